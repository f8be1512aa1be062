"""What a payload costs between LISTEN and the streams: payloads per second of one core.

    python bench/payloads.py [--payloads 20000] [--streams 1000] [--rounds 5]

One transaction inserts so many rows, one statement each, so that as many payloads arrive at once,
each for one user with one stream. Contenders take turns:

    feed        the service's feed and hub: to when the last frame has been handed to its stream.
                The streams' transports only count: the kernel's write is the same for everybody
    aiopg       aiopg's `connection.notifies.get()` for each, and nothing done with it
    psycopg2    `select`, `poll()`, take them off the list, and nothing done with them

The figure is CPU time (user and system) of this process, which does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import select
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import aiopg
import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server.database import Database  # noqa: E402
from sse_server.embedded import EmbeddedPostgres  # noqa: E402
from sse_server.feed import Feed  # noqa: E402
from sse_server.hub import Hub, Stream  # noqa: E402
from sse_server.metrics import Metrics  # noqa: E402
from sse_server.store import Store, schema_sql  # noqa: E402


class Counter:
    """A transport that takes everything and counts it."""

    def __init__(self) -> None:
        self.frames = 0

    def write(self, data: bytes) -> None:
        self.frames += 1

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


def insert(dsn: str, arguments: argparse.Namespace) -> None:
    """From a thread of its own, whose waiting for PostgreSQL costs next to nothing."""
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "DO $$ BEGIN FOR n IN 1 .. %s LOOP "
            "INSERT INTO notifications (user_id, event_type, message) "
            "VALUES ('user-' || n %% %s, 'new_message', 'A message of some length, no. ' || n); "
            "END LOOP; END $$",
            (arguments.payloads, arguments.streams),
        )
    connection.close()


class Measured:
    """CPU time from the start of the INSERTs, whose thread only waits, to the last payload."""

    def __init__(self, dsn: str, arguments: argparse.Namespace) -> None:
        self._writer = threading.Thread(target=insert, args=(dsn, arguments))
        self._before = 0.0

    def __enter__(self) -> Measured:
        self._before = time.process_time()
        self._writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._before
        self._writer.join()


async def feed(dsn: str, arguments: argparse.Namespace) -> float:
    metrics = Metrics()
    hub = Hub(metrics)
    counter = Counter()
    for number in range(arguments.streams):
        stream = Stream(f"user-{number}", number, 1)
        stream.transport = cast(Any, counter)
        assert hub.register(stream, 3600.0) is None
        assert hub.go_live(stream)
    database = Database(dsn, size=1, connect_timeout=10.0, query_timeout=60.0)
    service = Feed(Store(database), hub, metrics)
    await service.open()
    running = asyncio.create_task(service.run())
    while metrics.registry.get_sample_value("sse_feed_polling"):  # noqa: ASYNC110 - it begins so
        await asyncio.sleep(0.1)
    with Measured(dsn, arguments) as measured:
        while counter.frames < arguments.payloads:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await database.close()
    heard = metrics.registry.get_sample_value("sse_feed_payloads_total")
    if heard != arguments.payloads:
        sys.exit(f"the feed was notified of {heard:.0f} only, and found the others by itself")
    return measured.seconds


async def through_aiopg(dsn: str, arguments: argparse.Namespace) -> float:
    async with aiopg.connect(dsn) as connection, connection.cursor() as cursor:
        await cursor.execute("SELECT channel FROM settings")
        [channel] = await cursor.fetchone()
        await cursor.execute(f'LISTEN "{channel}"')
        with Measured(dsn, arguments) as measured:
            for _ in range(arguments.payloads):
                await connection.notifies.get()
    return measured.seconds


async def through_psycopg2(dsn: str, arguments: argparse.Namespace) -> float:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT channel FROM settings")
        [channel] = cursor.fetchone()
        cursor.execute(f'LISTEN "{channel}"')
    taken = 0
    with Measured(dsn, arguments) as measured:
        while taken < arguments.payloads:
            select.select([connection], [], [])
            connection.poll()
            taken += len(connection.notifies)
            connection.notifies.clear()
    connection.close()
    return measured.seconds


CONTENDERS: dict[str, Callable[[str, argparse.Namespace], Awaitable[float]]] = {
    "feed": feed,
    "aiopg": through_aiopg,
    "psycopg2": through_psycopg2,
}


def measure(dsn: str, arguments: argparse.Namespace) -> None:
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute(schema_sql())
        cursor.execute("UPDATE settings SET user_rate_per_minute = 0, feed_mode = 'notify'")
    connection.close()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(arguments.rounds):
        for name, contender in CONTENDERS.items():
            seconds[name].append(asyncio.run(contender(dsn, arguments)))
            each = seconds[name][-1] / arguments.payloads
            print(f"round {number + 1}  {name:9} {each * 1e6:6.1f} µs", flush=True)
    for name, took in seconds.items():
        median = statistics.median(took) / arguments.payloads
        print(f"{name:9} {median * 1e6:6.1f} µs a payload, {1 / median:9,.0f} a second of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--payloads", type=int, default=20_000)
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)  # root runs PostgreSQL as another account
        postgres = EmbeddedPostgres(Path(directory) / "data", options={"fsync": "off"})
        try:
            measure(postgres.start(), arguments)
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
