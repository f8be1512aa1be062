"""Many notifications through several nodes, one of which is killed every few seconds.

``python -m tests.faults.million --rows 1000000 --nodes 3 --kill-seconds 10`` ends with one line of
figures, and with status 1 unless every client has received what was committed for it, and nothing
else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions

from sse_server.embedded import EmbeddedPostgres
from tests.conftest import ROOT, eventually, execute
from tests.faults.clients import Client, living
from tests.faults.links import Direct
from tests.faults.nodes import Node

# The run has failed when nothing at all has come for so long.
STANDSTILL_SECONDS = 120.0
START_SECONDS = 120.0
MOST_SECONDS = 7200.0

INSERT = """
    INSERT INTO notifications (user_id, event_type, message)
    SELECT 'user-' || u, 'new_message', 'for user-' || u
      FROM unnest(%s) AS u, generate_series(1, %s)
"""


class Counted(Client):
    """A client that looks at each message when it comes, and keeps none."""

    def remember(self, id: int, message: str) -> None:
        if message != f"for {self.user_id}":
            self.foreign.append(f"{id} says {message!r}")


class Writers:
    """Threads that insert until there are enough rows: some commit late, some roll back."""

    def __init__(self, dsn: str, rows: int, users: int, count: int, per_second: int) -> None:
        self.committed = 0
        self._dsn = dsn
        self._rows = rows
        self._users = users
        self._per_second = per_second
        self._taken = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._running = [self._pool.submit(self._write, number) for number in range(count)]

    @property
    def done(self) -> bool:
        return all(thread.done() for thread in self._running)

    def _take(self, count: int) -> int:
        with self._lock:
            count = min(count, self._rows - self._taken)
            self._taken += count
            ahead = self._taken / self._per_second - (time.monotonic() - self._began)
        if ahead > 0:
            self._stop.wait(ahead)
        return count

    def _write(self, number: int) -> None:
        rng = random.Random(number)
        connection = psycopg2.connect(self._dsn)
        try:
            while not self._stop.is_set():
                wanted = rng.choice((1, 1, 1, 2, 10, 50, 200))
                if not (count := self._take(wanted)):
                    return
                self._commit(connection, rng, count)
        finally:
            connection.close()

    def _commit(
        self, connection: psycopg2.extensions.connection, rng: random.Random, count: int
    ) -> None:
        """Exactly `count` rows; before that, perhaps some that come to nothing."""
        with connection.cursor() as cursor:
            if rng.random() < 0.1:
                cursor.execute(INSERT, ([rng.randrange(self._users)], count))
                connection.rollback()
            several = min(count, self._users, rng.choice((1, 5, 20)))
            users = rng.sample(range(self._users), several)
            cursor.execute(INSERT, (users, count // several))
            if rest := count % several:
                cursor.execute(INSERT, (users[:1], rest))
            if rng.random() < 0.05:
                time.sleep(rng.uniform(0.0, 0.5))  # others overtake it
        connection.commit()
        with self._lock:
            self.committed += count

    def end(self) -> None:
        self._stop.set()
        self._pool.shutdown()
        for thread in self._running:
            thread.result()


async def kill_now_and_then(nodes: list[Node], seconds: float) -> None:
    number = 0
    while True:
        await asyncio.sleep(seconds)
        await nodes[number % len(nodes)].kill(0.0)
        number += 1


def expected(dsn: str) -> dict[str, int]:
    return dict(query(dsn, "SELECT user_id, count(*) FROM notifications GROUP BY user_id"))


def query(dsn: str, statement: str, *parameters: object) -> list[Any]:
    connection = psycopg2.connect(dsn)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            return cursor.fetchall()
    finally:
        connection.close()


async def everything(clients: list[Counted], dsn: str) -> None:
    """Wait until each client has as many as were committed for it, as long as something comes."""
    due = await asyncio.to_thread(expected, dsn)
    had, changed = -1, time.monotonic()
    while any(len(client.had) < due.get(client.user_id, 0) for client in clients):
        now = sum(len(client.had) for client in clients)
        if now != had:
            had, changed = now, time.monotonic()
        if time.monotonic() - changed > STANDSTILL_SECONDS:
            return
        await asyncio.sleep(0.1)


async def main(arguments: argparse.Namespace) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="sse-million-", ignore_cleanup_errors=True) as data,
        tempfile.TemporaryDirectory(prefix="sse-million-") as logs,
    ):
        options = {"fsync": "off", "max_connections": "300", "max_wal_size": "4GB"}
        postgres = EmbeddedPostgres(Path(data), options=options)
        await asyncio.to_thread(postgres.start)
        try:
            return await measure(arguments, postgres, Path(logs))
        finally:
            await asyncio.to_thread(postgres.stop)


async def measure(
    arguments: argparse.Namespace, postgres: EmbeddedPostgres, directory: Path
) -> int:
    execute(postgres.dsn("postgres"), "CREATE DATABASE million")
    dsn = postgres.dsn("million")
    execute(dsn, (ROOT / "schema.sql").read_text(encoding="utf-8"))
    execute(dsn, "UPDATE settings SET user_rate_per_minute = 0")
    if arguments.feed_mode:
        execute(dsn, f"UPDATE settings SET feed_mode = '{arguments.feed_mode}'")
    nodes = [
        Node(number, directory, {"DATABASE_URL": dsn}, link=Direct())
        for number in range(arguments.nodes)
    ]
    keepers = [asyncio.create_task(node.run()) for node in nodes]
    clients = [
        Counted(number, f"user-{number}", 0, nodes, random.Random(number))
        for number in range(arguments.users)
    ]
    try:
        await asyncio.gather(*(node.serving() for node in nodes))
        async with living(clients):
            await eventually(lambda: all(client.live for client in clients), START_SECONDS)
            began = time.monotonic()
            writers = Writers(
                dsn, arguments.rows, arguments.users, arguments.writers, arguments.per_second
            )
            killer = asyncio.create_task(kill_now_and_then(nodes, arguments.kill_seconds))
            try:
                await eventually(lambda: writers.done, MOST_SECONDS)
                wrote = time.monotonic() - began
                killer.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await killer
                await everything(clients, dsn)
            finally:
                killer.cancel()
                await asyncio.to_thread(writers.end)
            took = time.monotonic() - began
            kills = sum(node.starts for node in nodes) - len(nodes)
        await asyncio.gather(*(node.stop() for node in nodes))
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
    return judge(clients, nodes, dsn, writers.committed, kills, wrote, took)


def judge(
    clients: list[Counted],
    nodes: list[Node],
    dsn: str,
    committed: int,
    kills: int,
    wrote: float,
    took: float,
) -> int:
    missing = foreign = in_table = 0
    for client in clients:
        ids = {
            row[0]
            for row in query(dsn, "SELECT id FROM notifications WHERE user_id = %s", client.user_id)
        }
        in_table += len(ids)
        missing += len(ids - client.had)
        foreign += len(client.had - ids) + len(client.foreign)
    received = sum(len(client.received) for client in clients)
    distinct = sum(len(client.had) for client in clients)
    connections = sum(len(client.records) for client in clients)
    alarms = [alarm for node in nodes for alarm in (*node.alarms(), *node.died)]
    speed = f"{committed / wrote:.0f} rows/s"
    print(
        f"committed {committed} (in the table {in_table}), received {distinct}, "
        f"missing {missing}, foreign {foreign}, repeats {received - distinct}, "
        f"{len(nodes)} nodes, {kills} kills, {len(clients)} clients, {connections} connections; "
        f"written in {wrote:.0f} s ({speed}), all received after {took:.0f} s"
    )
    for alarm in alarms[:10]:
        print(alarm)
    return int(bool(missing or foreign or alarms or committed != in_table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--users", type=int, default=60, help="each has one client")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--per-second", type=int, default=100_000, help="at most so many rows")
    parser.add_argument("--kill-seconds", type=float, default=10.0)
    parser.add_argument("--feed-mode", choices=("notify", "poll", "auto"))
    sys.exit(asyncio.run(main(parser.parse_args())))
