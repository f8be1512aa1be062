"""queries.sql: no query reads a whole table, or a whole index, however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.database import load_queries
from sse_server.embedded import EmbeddedPostgres
from tests.conftest import ROOT, connect, execute
from tests.listener import fetch
from tests.plans import Case, Size, cases, load

# So many that reading all of any large table is dearer than using its index.
SIZE = Size(rows=60_000, users=20_000)
QUERIES = load_queries(ROOT / "sse_server" / "queries.sql")

# Of the number of users or their rows. The others have a few rows for ever.
LARGE = {
    "notifications",
    "user_preferences",
    "sessions",
    "used_tokens",
    "publications",
    "audit_log",
}


@pytest.fixture(scope="module")
def full(cluster: EmbeddedPostgres) -> Iterator[Connection]:
    """A database with rows in all tables, which nobody changes."""
    execute(cluster.dsn("postgres"), "CREATE DATABASE plans")
    db = connect(cluster.dsn("plans"))
    load(db, SIZE)
    yield db
    db.close()
    execute(cluster.dsn("postgres"), "DROP DATABASE plans WITH (FORCE)")


def explain(db: Connection, query: str, params: Any) -> dict[str, Any]:
    """The plan of a query that is really run, and then undone."""
    row: tuple[Any, ...] | None = None
    fetch(db, "BEGIN")
    try:
        with db.cursor() as cursor:
            # Twice: the first reads the catalogue, and sets hint bits.
            for _ in range(2):
                cursor.execute("SAVEPOINT s")
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", params)
                row = cursor.fetchone()
                cursor.execute("ROLLBACK TO s")
    finally:
        fetch(db, "ROLLBACK")
    assert row is not None
    plan: dict[str, Any] = row[0][0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", []):
        yield from nodes(below)


def judge(case: Case, plan: dict[str, Any]) -> list[str]:
    """What is wrong with a plan, if anything."""
    used = {node["Index Name"] for node in nodes(plan) if "Index Name" in node}
    used = {name for name in used if name.startswith(tuple(f"{table}_" for table in LARGE))}
    blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    faults = [
        f"{case.id} reads all of {node['Relation Name']}"
        for node in nodes(plan)
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE
    ]
    if used != case.indexes:
        faults.append(f"{case.id} uses {sorted(used)}, not {sorted(case.indexes)}")
    if blocks > case.blocks:
        faults.append(f"{case.id} touches {blocks} blocks, more than {case.blocks}")
    return faults


def test_every_query_is_looked_at(full: Connection) -> None:
    """A query without an expectation of its plan fails here: add it to tests/plans.py."""
    assert {case.name for case in cases(full, SIZE)} == set(QUERIES)


def test_every_query_uses_its_index(full: Connection) -> None:
    """No plan has a sequential scan of a large table, and each touches few blocks."""
    faults = []
    for case in cases(full, SIZE):
        faults += judge(case, explain(full, QUERIES[case.name], case.params))
    assert not faults, "\n".join(faults)


def test_an_index_that_is_walked_is_noticed(full: Connection) -> None:
    """A plan that uses the right index and reads all of it does not pass."""
    walking = "SELECT count(*) FROM (SELECT xact, id FROM notifications ORDER BY xact, id) AS n"
    case = Case("walking", params={}, indexes=frozenset({"notifications_xact_idx"}), blocks=20)
    assert any("blocks" in fault for fault in judge(case, explain(full, walking, {})))


@pytest.mark.parametrize("table", ["notifications", "user_preferences", "sessions"])
def test_nothing_known_about_the_tables(full: Connection, table: str) -> None:
    """Without statistics, as after a restore, no query reads a whole table either."""
    fetch(full, "BEGIN")
    try:
        fetch(full, "DELETE FROM pg_statistic WHERE starelid = %s::regclass", table)
        with full.cursor() as cursor:
            for case in cases(full, SIZE):
                cursor.execute(f"EXPLAIN (FORMAT JSON) {QUERIES[case.name]}", case.params)
                row = cursor.fetchone()
                assert row is not None
                scanned = {
                    node["Relation Name"]
                    for node in nodes(row[0][0]["Plan"])
                    if node["Node Type"] == "Seq Scan"
                }
                assert not scanned & LARGE, case.id
    finally:
        fetch(full, "ROLLBACK")
