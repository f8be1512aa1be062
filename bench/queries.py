"""Every query of the service on 10 million rows: how long, how many pages, by which index.

    python bench/queries.py [--rows 10000000] [--users 1000000] [--repeats 5] [--plans FILE]
                            [--dsn URL]

Fills a database (about 3 GB and three minutes for 10 million rows, in a directory below TMPDIR that
is removed afterwards, with fsync off: only reading is measured) and runs each query with
EXPLAIN (ANALYZE, BUFFERS) in a transaction that is rolled back. The fastest repeat counts: the
pages are in memory then. --dsn names an empty database instead, or one that an earlier run with
--dsn and the same figures has filled. The queries and their parameters are those of
tests/plans.py, and one user of extremes beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server.database import load_queries  # noqa: E402
from sse_server.embedded import EmbeddedPostgres  # noqa: E402
from tests.plans import Case, Size, cases, load  # noqa: E402

QUERIES = load_queries(ROOT / "sse_server" / "queries.sql")


def extremes(case: Case) -> Iterator[Case]:
    """The same for the user with the most rows, one in a hundred of all."""
    if case.id in ("history-heavy", "unread_counts-heavy", "replay-heavy"):
        params = dict(case.params)
        for name, value in params.items():
            if name == "user_id":
                params[name] = "user-0"
            elif name == "user_ids":
                params[name] = ["user-0"] * len(value)
        yield replace(case, variant="heaviest", params=params)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)  # root runs PostgreSQL as another account
        postgres = EmbeddedPostgres(
            Path(directory) / "data",
            options={
                "fsync": "off",
                "full_page_writes": "off",
                "shared_buffers": "4GB",
                "maintenance_work_mem": "1GB",
                "max_wal_size": "8GB",
                "autovacuum": "off",
            },
        )
        try:
            yield postgres.start()
        finally:
            postgres.stop()


def measure(dsn: str, size: Size, repeats: int, plans: Path | None) -> None:
    db = psycopg2.connect(dsn)
    db.autocommit = True
    with db.cursor() as cursor:
        cursor.execute("SELECT to_regclass('notifications') IS NOT NULL")
        filled = cursor.fetchone() == (True,)
    if not filled:
        started = time.monotonic()
        load(db, size)
        print(f"loaded in {time.monotonic() - started:.0f} s", file=sys.stderr)
    texts = []
    print(f"{size.rows:,} rows of {size.users:,} users, warm\n")
    print(f"{'query':38} {'run ms':>8} {'plan ms':>8} {'pages':>6} {'rows':>6}")
    for case in cases(db, size):
        for each in (case, *extremes(case)):
            best: Any = None
            with db.cursor() as cursor:
                for _ in range(repeats):
                    cursor.execute("BEGIN")
                    cursor.execute(
                        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {QUERIES[each.name]}", each.params
                    )
                    row = cursor.fetchone()
                    cursor.execute("ROLLBACK")
                    assert row is not None
                    if best is None or row[0][0]["Execution Time"] < best["Execution Time"]:
                        best = row[0][0]
                cursor.execute("BEGIN")
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS) {QUERIES[each.name]}", each.params)
                text = "\n".join(line for (line,) in cursor.fetchall())
                cursor.execute("ROLLBACK")
            texts.append(f"-- {each.id}\n{text}\n")
            plan = best["Plan"]
            pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            print(
                f"{each.id:38} {best['Execution Time']:8.3f} {best['Planning Time']:8.3f}"
                f" {pages:6,} {plan['Actual Rows']:6.0f}"
            )
    if plans is not None:
        plans.write_text("\n".join(texts))
    db.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plans", type=Path, help="where to write the plans as text")
    parser.add_argument("--dsn", help="an empty database, or one filled by an earlier run")
    arguments = parser.parse_args()
    size = Size(arguments.rows, arguments.users)
    with contextlib.ExitStack() as stack:
        dsn = arguments.dsn or stack.enter_context(cluster())
        measure(dsn, size, arguments.repeats, arguments.plans)


if __name__ == "__main__":
    main()
