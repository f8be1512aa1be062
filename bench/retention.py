"""What deleting a million old rows does to the INSERTs beside it.

    python bench/retention.py [--rows 1000000] [--rate 200] [--writers 4] [--window 10]
                              [--batch-rows N] [--pause SECONDS] [--most-windows N]

A cluster with its real fsync and autovacuum, as many old rows as asked for and as many young ones.
pgbench inserts single rows at a steady rate, each in a transaction, in windows: one in which
sse_server.retention deletes, one in which it is held, and so on until everything old is gone. So
whatever else the machine does meets both kinds. Shown is how long an INSERT took in each window,
and the median over the windows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psycopg2
from typing_extensions import override

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server import retention  # noqa: E402
from sse_server.database import Database  # noqa: E402
from sse_server.embedded import EmbeddedPostgres  # noqa: E402
from sse_server.store import Store, Walked, schema_sql  # noqa: E402

USERS = 100_000


class GatedStore(Store):
    """One whose deleting can be held."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.gate = asyncio.Event()
        self.deleted = 0
        self.seconds: list[float] = []

    @override
    async def delete_old(self, what: str, *, after: int, limit: int) -> Walked:
        await self.gate.wait()
        started = time.perf_counter()
        page = await super().delete_old(what, after=after, limit=limit)
        if page.deleted:
            self.deleted += page.deleted
            self.seconds.append(time.perf_counter() - started)
        return page


def fill(dsn: str, rows: int) -> None:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(schema_sql())
        cursor.execute("UPDATE settings SET user_rate_per_minute = 100, feed_mode = 'notify'")
        cursor.execute("SET session_replication_role = replica")
        for age in ("31 days", "1 day"):
            cursor.execute(
                "INSERT INTO notifications (user_id, event_type, message, created_at, read_at) "
                f"SELECT 'user-' || 1 + floor(random() * {USERS})::int, 'new_message', "
                f"repeat('x', 100), now() - interval '{age}', "
                f"CASE WHEN random() < 0.9 THEN now() - interval '{age}' END "
                f"FROM generate_series(1, {rows})"
            )
        cursor.execute("VACUUM (ANALYZE)")
        cursor.execute("CHECKPOINT")
    connection.close()


def read_logs(directory: Path) -> list[float]:
    # client, number, microseconds since it was due, script, time, us, microseconds too late
    return [
        (int(fields[2]) - int(fields[6])) / 1000
        for log in directory.glob("log*")
        for fields in map(str.split, log.read_text().splitlines())
    ]


async def window(
    postgres: EmbeddedPostgres, dsn: str, arguments: argparse.Namespace
) -> list[float]:
    """Insert for a while. Returns: the milliseconds that each INSERT took."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "insert.sql"
        script.write_text(
            f"\\set user random(1, {USERS})\n"
            "INSERT INTO notifications (user_id, event_type, message) "
            f"VALUES ('user-' || :user, 'new_message', '{'x' * 100}');\n"
        )
        process = await asyncio.create_subprocess_exec(
            postgres.psql.with_name("pgbench"),
            "--no-vacuum",
            f"--client={arguments.writers}",
            f"--time={arguments.window}",
            f"--rate={arguments.rate}",
            "--log",
            f"--log-prefix={directory}/log",
            f"--file={script}",
            dsn,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode:
            sys.exit(f"pgbench: {output.decode()}")
        return await asyncio.to_thread(read_logs, Path(directory))


async def measure(postgres: EmbeddedPostgres, dsn: str, arguments: argparse.Namespace) -> None:
    database = Database(dsn, size=2, connect_timeout=10, query_timeout=60)
    store = GatedStore(database)
    walk = asyncio.create_task(
        retention.Retention(
            store, batch_rows=arguments.batch_rows, pause_seconds=arguments.pause
        ).delete_old()
    )
    cuts: dict[bool, list[list[float]]] = {False: [], True: []}
    await window(postgres, dsn, arguments)  # warm-up
    deleting_seconds = 0.0
    number = 0
    while not walk.done() and number < arguments.most_windows:
        deleting = number % 2 == 1
        if deleting:
            store.gate.set()
        started = time.perf_counter()
        latencies = await window(postgres, dsn, arguments)
        if deleting:
            store.gate.clear()
            deleting_seconds += time.perf_counter() - started
            if walk.done():
                break  # a window of both kinds
        quantiles = statistics.quantiles(latencies, n=1000, method="inclusive")
        p50, p99, p999 = (quantiles[n] for n in (499, 989, 998))
        cuts[deleting].append([p50, p99, p999])
        print(
            f"{'deleting' if deleting else 'held':8}  p50 {p50:6.2f}  p99 {p99:6.2f}"
            f"  p99.9 {p999:6.2f} ms  {len(latencies)} inserts, {store.deleted:,} rows deleted"
            f"  (load {os.getloadavg()[0]:.1f})",
            file=sys.stderr,
        )
        number += 1
    walk.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await walk
    await database.close()

    print(
        f"\n{arguments.writers} writers, {arguments.rate} inserts/s, batches of "
        f"{arguments.batch_rows} rows, {arguments.pause} s between them"
    )
    medians = {}
    for deleting, name in ((False, "held"), (True, "deleting")):
        medians[deleting] = [
            statistics.median(column) for column in zip(*cuts[deleting], strict=True)
        ]
        p50, p99, p999 = medians[deleting]
        print(
            f"{name:8}  p50 {p50:6.2f}  p99 {p99:6.2f}  p99.9 {p999:6.2f} ms"
            f"  (median of {len(cuts[deleting])} windows)"
        )
    ratios = [with_ / without for with_, without in zip(medians[True], medians[False], strict=True)]
    print(f"{'ratio':8}  p50 {ratios[0]:6.2f}  p99 {ratios[1]:6.2f}  p99.9 {ratios[2]:6.2f}")
    print(
        f"{store.deleted:,} rows in {deleting_seconds:.0f} s of deleting; a batch takes"
        f" {statistics.median(store.seconds) * 1000:.1f} ms,"
        f" at most {max(store.seconds) * 1000:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="old ones")
    parser.add_argument("--rate", type=int, default=200, help="inserts per second")
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--window", type=int, default=10, help="seconds")
    parser.add_argument("--most-windows", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=retention.BATCH_ROWS)
    parser.add_argument("--pause", type=float, default=retention.PAUSE_SECONDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)  # root runs PostgreSQL as another account
        postgres = EmbeddedPostgres(
            Path(directory) / "data", options={"shared_buffers": "512MB", "max_wal_size": "4GB"}
        )
        try:
            dsn = postgres.start()
            fill(dsn, arguments.rows)
            asyncio.run(measure(postgres, dsn, arguments))
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
