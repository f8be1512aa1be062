"""The cluster of the runs, and the sum of them all at the end."""

from __future__ import annotations

import collections
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sse_server.embedded import EmbeddedPostgres
from tests.conftest import ROOT, connect, execute
from tests.faults.drill import Outcome

# When each transaction committed is asked at the end; a crash is to lose what it can lose.
OPTIONS = {
    "fsync": "off",
    "max_connections": "300",
    "track_commit_timestamp": "on",
    "wal_writer_delay": "2s",
}

_outcomes = pytest.StashKey[list[Outcome]]()


@pytest.fixture(scope="session")
def fault_cluster() -> Iterator[EmbeddedPostgres]:
    """A cluster that is restarted and crashed all the time."""
    with tempfile.TemporaryDirectory(prefix="sse-faults-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(Path(name), options=OPTIONS)
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()


class Databases:
    """Makes databases with the schema, one for each run."""

    def __init__(self, cluster: EmbeddedPostgres) -> None:
        self.cluster = cluster
        self._count = 0

    def create(self) -> str:
        self._count += 1
        name = f"run_{self._count}"
        execute(self.cluster.dsn("postgres"), f"CREATE DATABASE {name}")
        execute(self.cluster.dsn(name), (ROOT / "schema.sql").read_text(encoding="utf-8"))
        return self.cluster.dsn(name)

    def drop(self, dsn: str) -> None:
        connection = connect(dsn)
        name = connection.info.dbname
        connection.close()
        execute(self.cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def databases(fault_cluster: EmbeddedPostgres) -> Databases:
    return Databases(fault_cluster)


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """Where each run leaves what became of it."""
    return request.config.stash.setdefault(_outcomes, [])


def summary(outcomes: list[Outcome]) -> dict[str, object]:
    """The sum of all runs."""
    faults: collections.Counter[str] = collections.Counter()
    problems: collections.Counter[str] = collections.Counter({"missing": 0, "foreign": 0})
    for outcome in outcomes:
        faults += outcome.faults
        for kind, sentences in outcome.problems.found.items():
            problems[kind] += len(sentences)
    return {
        "seeds": len(outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "operations": sum(sum(outcome.done.values()) for outcome in outcomes),
        "faults": dict(faults.most_common()),
        "clients": sum(outcome.clients for outcome in outcomes),
        "connections": sum(outcome.connections for outcome in outcomes),
        "rows": sum(outcome.rows for outcome in outcomes),
        "deliveries": sum(outcome.deliveries for outcome in outcomes),
        "repeats": sum(outcome.repeats for outcome in outcomes),
        "superseded by nobody": sum(outcome.superseded for outcome in outcomes),
        "problems": dict(problems),
        "failed": [outcome.plan.seed for outcome in outcomes if outcome.problems],
    }


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    outcomes = config.stash.get(_outcomes, [])
    if not outcomes:
        return
    found = summary(outcomes)
    terminalreporter.section("faults")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind} {count}" for kind, count in value.items())
        terminalreporter.write_line(f"{name}: {value}")
    if path := os.environ.get("FAULTS_REPORT"):
        Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
