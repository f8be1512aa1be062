"""All clients come back at once after a restart: how long until all are live, and at what price.

Starts an embedded PostgreSQL with fsync on, one node, and ``--streams`` clients with a session each
and a cursor. Then the node is killed and started again, and all clients connect as fast as they
can, while some users go on using the API. Once with batching as it is, once with each question to
the database asked alone.

    python bench/storm.py --streams 10000
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import resource
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
import psutil
import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server.embedded import EmbeddedPostgres  # noqa: E402

API_USERS = 10
API_SECONDS = 0.1  # between two calls of one of them
SAMPLE_SECONDS = 0.1
ADDRESS_STREAMS = 20_000  # of one loopback address: its ports
UNREAD = 3
MOST_SECONDS = 180
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h

# The service as it is, but for the sizes of its batches.
ALONE = """
import sse_server.sessions, sse_server.stream
sse_server.sessions.CLAIM_BATCH = 1
sse_server.stream.REPLAY_BATCH = sse_server.stream.CHECK_BATCH = 1
from sse_server.cli import main
main()
"""


class Client(asyncio.Protocol):
    """One stream; only its `ready` is looked for."""

    ready = 0
    turned_away = 0

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._seen = b""
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return
        self._seen += data
        if b"event: ready" in self._seen:
            Client.ready += 1
        elif b"event: closing" in self._seen:
            Client.turned_away += 1
        else:
            return
        self._answered = True
        self._seen = b""


class Database(threading.Thread):
    """Samples what the node does to PostgreSQL."""

    def __init__(self, dsn: str) -> None:
        super().__init__(daemon=True)
        self.connections = 0
        self.peak = 0.0
        self.total = 0
        self._stop_it = threading.Event()
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True

    def _count(self) -> tuple[int, int]:
        with self._connection.cursor() as cursor:
            # Counters of other sessions arrive here with a delay of up to a second.
            cursor.execute(
                "SELECT (SELECT xact_commit + xact_rollback FROM pg_stat_database "
                "         WHERE datname = current_database()), "
                "       (SELECT count(*) FROM pg_stat_activity "
                "         WHERE application_name LIKE 'sse-server%')"
            )
            row = cursor.fetchone()
        assert row is not None
        return row[0], row[1]

    def run(self) -> None:
        samples = [(time.monotonic(), self._count()[0])]
        first = samples[0][1]
        while not self._stop_it.wait(SAMPLE_SECONDS):
            done, connections = self._count()
            samples.append((time.monotonic(), done))
            self.connections = max(self.connections, connections)
            while samples[-1][0] - samples[0][0] > 2:
                samples.pop(0)
            if samples[-1][0] - samples[0][0] > 1:
                rate = (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
                self.peak = max(self.peak, rate)
            self.total = done - first

    def stop(self) -> None:
        time.sleep(1.5)  # until the last counters are in
        self._stop_it.set()
        self.join()
        self._connection.close()


def start(dsn: str, *, batched: bool) -> tuple[subprocess.Popen[str], int]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SSE_", "PG"))
    } | {
        "DATABASE_URL": dsn,
        "SSE_PORT": "0",
        "SSE_DEMO": "1",
        "SSE_API_CALLS_PER_MINUTE": "0",
        "SSE_LOG_LEVEL": "WARNING",
        "PYTHONPATH": str(ROOT),
    }
    command = ["-m", "sse_server"] if batched else ["-c", ALONE]
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"listening on http://\S+:(\d+)", process.stdout.readline())
    if found is None:
        raise click.ClickException("the service did not start")
    return process, int(found[1])


async def api(url: str, key: str, latencies: list[float]) -> None:
    async with aiohttp.ClientSession(cookies={"sse_session": key}) as session:
        while True:
            began = time.monotonic()
            async with session.get(f"{url}/api/preferences") as answer:
                answer.raise_for_status()
                await answer.read()
            latencies.append(time.monotonic() - began)
            await asyncio.sleep(API_SECONDS)


async def connect(
    address: str, port: int, request: bytes
) -> tuple[asyncio.Transport, asyncio.Protocol]:
    """Open one stream from this address of our own."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    # The port is chosen when the peer is known: with thousands of others, bind() searches for long.
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0))
    await loop.sock_connect(sock, ("127.0.0.1", port))
    return await loop.create_connection(lambda: Client(request), sock=sock)


async def storm(port: int, requests: list[bytes], api_keys: list[str]) -> dict[str, Any]:
    Client.ready = Client.turned_away = 0
    latencies: list[float] = []
    callers = [
        asyncio.create_task(api(f"http://127.0.0.1:{port}", key, latencies)) for key in api_keys
    ]
    began = time.monotonic()
    connections = await asyncio.gather(
        *(
            connect(f"127.0.0.{2 + number // ADDRESS_STREAMS}", port, request)
            for number, request in enumerate(requests)
        )
    )
    while Client.ready + Client.turned_away < len(requests):
        await asyncio.sleep(0.01)
        if time.monotonic() - began > MOST_SECONDS:
            break
    seconds = time.monotonic() - began
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    for transport, _ in connections:
        transport.abort()
    return {
        "seconds": seconds,
        "ready": Client.ready,
        "turned_away": Client.turned_away,
        "latencies": latencies,
    }


@click.command()
@click.option("--streams", default=10_000, show_default=True)
@click.option("--repeats", default=2, show_default=True)
def main(streams: int, repeats: int) -> None:
    """Measure a reconnect storm with and without batching."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="storm-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(Path(name))
        dsn = postgres.start()
        try:
            node, _ = start(dsn, batched=True)  # for the schema
            node.kill()
            node.wait()
            keys, cursors = prepare(dsn, streams)
            for _ in range(repeats):
                for batched in (True, False):
                    print(json.dumps(measure(dsn, keys, cursors, batched=batched)))
        finally:
            postgres.stop()


def prepare(dsn: str, streams: int) -> tuple[list[str], list[int]]:
    """Sessions, and for each user a row that has been received and some that have not."""
    keys = [secrets.token_urlsafe(32) for _ in range(streams + API_USERS)]
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO sessions (key_hash, user_id, expires_at) "
            "SELECT h, 'user-' || n, clock_timestamp() + interval '1 day' "
            "FROM unnest(%s::bytea[]) WITH ORDINALITY AS s (h, n)",
            ([hashlib.sha256(key.encode()).digest() for key in keys],),
        )
        cursor.execute(
            "INSERT INTO notifications (user_id, event_type, message) "
            "SELECT 'user-' || n, 'new_message', 'received' FROM generate_series(1, %s) AS n "
            "RETURNING id",
            (streams,),
        )
        cursors = [row[0] for row in cursor.fetchall()]
        connection.commit()
        cursor.execute(
            "INSERT INTO notifications (user_id, event_type, message) "
            "SELECT 'user-' || n, 'new_message', repeat('missed ', 15) "
            "FROM generate_series(1, %s) AS n, generate_series(1, %s)",
            (streams, UNREAD),
        )
    connection.close()
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    connection.cursor().execute("VACUUM ANALYZE")
    connection.close()
    return keys, cursors


def measure(dsn: str, keys: list[str], cursors: list[int], *, batched: bool) -> dict[str, Any]:
    node, port = start(dsn, batched=batched)
    try:
        process = psutil.Process(node.pid)
        requests = [
            (
                f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                f"Accept: text/event-stream\r\nLast-Event-ID: {cursor}\r\n"
                f"Cookie: sse_session={key}\r\n\r\n"
            ).encode()
            for key, cursor in zip(keys, cursors, strict=False)
        ]
        empty = process.memory_info().rss
        database = Database(dsn)
        database.start()
        before = process.cpu_times()
        found = asyncio.run(storm(port, requests, keys[len(cursors) :]))
        after = process.cpu_times()
        memory = process.memory_info().rss
        database.stop()
        calls = sorted(found["latencies"])
        return {
            "batched": batched,
            "streams": len(requests),
            "ready": found["ready"],
            "turned_away": found["turned_away"],
            "seconds": round(found["seconds"], 2),
            "server_cpu_seconds": round(after.user + after.system - before.user - before.system, 2),
            "database_connections": database.connections,
            "queries": database.total,
            "peak_queries_per_second": round(database.peak),
            "api_calls": len(calls),
            "api_p50_ms": round(1000 * statistics.median(calls), 1),
            "api_p99_ms": round(1000 * calls[int(0.99 * (len(calls) - 1))], 1),
            "kb_per_stream_after": round((memory - empty) / 1000 / len(requests), 2),
        }
    finally:
        node.kill()
        node.wait()


if __name__ == "__main__":
    main()
