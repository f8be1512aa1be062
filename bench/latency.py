"""From COMMIT to the client: how long a notification is on its way.

    python bench/latency.py [--inserts 1000] [--streams 1] [--pause 0.002] [--dsn URL]
                            [--feed-modes auto,notify,bare --rounds 3]

Starts the server as an operator would (on a PostgreSQL of its own, with its real fsync, unless
--dsn names a database), opens streams over bare sockets, and inserts one row after the other, each
in a transaction. The clock of a row starts when COMMIT is sent, so that the commit itself, which
nobody can be faster than, is in the figure; it is shown on its own, too.

With several modes of the feed (settings.feed_mode) they take turns for as many rounds. `bare` is
no mode but the yardstick: without the service, a process that LISTENs with psycopg2 and writes each
payload to one socket.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server.embedded import EmbeddedPostgres  # noqa: E402
from sse_server.sessions import COOKIE  # noqa: E402
from sse_server.store import schema_sql  # noqa: E402

MARK = re.compile(rb'"m(?:essage)?": ?"latency (\d+)"')

# What nobody who is told by NOTIFY can be faster than.
BARE = """
import select, socket, sys
import psycopg2
dsn, = sys.argv[1:]
connection = psycopg2.connect(dsn)
connection.autocommit = True
cursor = connection.cursor()
cursor.execute("SELECT channel FROM settings")
cursor.execute(f'LISTEN "{cursor.fetchone()[0]}"')
server = socket.create_server(("127.0.0.1", 0))
print(f"listening on http://127.0.0.1:{server.getsockname()[1]}", flush=True)
client, _ = server.accept()
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
client.sendall(b"event: ready\\n\\n")
while True:
    select.select([connection], [], [])
    connection.poll()
    while connection.notifies:
        client.sendall(connection.notifies.pop(0).payload.encode() + b"\\n\\n")
"""


class Reader(threading.Thread):
    """One stream; notes when each frame arrived."""

    def __init__(self, port: int, key: str) -> None:
        super().__init__(daemon=True)
        self.arrived: dict[int, float] = {}
        self.ready = threading.Event()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(
            f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n"
            f"Cookie: {COOKIE}={key}\r\n\r\n".encode()
        )

    def run(self) -> None:
        rest = b""
        while data := self._receive():
            now = time.perf_counter()
            *whole, rest = (rest + data).split(b"\n\n")
            for frame in whole:
                if found := MARK.search(frame):
                    self.arrived[int(found[1])] = now
                elif b"event: ready" in frame:
                    self.ready.set()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except ConnectionResetError:  # the server was ended
            return b""


def percentiles(name: str, seconds: Sequence[float]) -> None:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    print(
        f"{name:28}  p50 {cuts[49] * 1000:6.2f} ms   p99 {cuts[98] * 1000:6.2f} ms"
        f"   max {max(seconds) * 1000:6.2f} ms   n={len(seconds)}"
    )


def measure(dsn: str, port: int, arguments: argparse.Namespace) -> None:
    inserts, streams = arguments.inserts, arguments.streams
    connection = psycopg2.connect(dsn)
    user_id = f"latency-{secrets.token_hex(4)}"
    keys = [secrets.token_urlsafe(32) for _ in range(streams)]
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE settings SET user_rate_per_minute = 0")
        for key in keys:
            cursor.execute(
                "INSERT INTO sessions (key_hash, user_id, expires_at) "
                "VALUES (%s, %s, now() + interval '1 hour')",
                (hashlib.sha256(key.encode()).digest(), user_id),
            )
    readers = [Reader(port, key) for key in keys]
    for reader in readers:
        reader.start()
    for reader in readers:
        if not reader.ready.wait(10):
            sys.exit("a stream did not open")

    begun: list[float] = []
    commits: list[float] = []
    with connection.cursor() as cursor:
        for number in range(inserts):
            cursor.execute(
                "INSERT INTO notifications (user_id, event_type, message) "
                "VALUES (%s, 'new_message', %s)",
                (user_id, f"latency {number}"),
            )
            start = time.perf_counter()
            connection.commit()
            commits.append(time.perf_counter() - start)
            begun.append(start)
            time.sleep(arguments.pause)  # single notifications, not a burst
    deadline = time.monotonic() + 10
    while any(len(reader.arrived) < inserts for reader in readers):
        if time.monotonic() > deadline:
            sys.exit("not every notification arrived")
        time.sleep(0.01)
    connection.close()
    percentiles("COMMIT alone", commits)
    percentiles(
        "COMMIT sent -> client",
        [
            reader.arrived[number] - start
            for reader in readers
            for number, start in enumerate(begun)
        ],
    )


def set_mode(dsn: str, mode: str) -> None:
    mode = "notify" if mode == "bare" else mode
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        cursor.execute("UPDATE settings SET feed_mode = %s, polling_until = '-infinity'", (mode,))
    connection.close()


def take_turns(dsn: str, arguments: argparse.Namespace) -> None:
    for number in range(arguments.rounds):
        for mode in arguments.feed_modes.split(","):
            set_mode(dsn, mode)
            print(f"feed_mode {mode}, round {number + 1}")
            serve(dsn, arguments, bare=mode == "bare")


def serve(dsn: str, arguments: argparse.Namespace, *, bare: bool) -> None:
    if bare and arguments.streams != 1:
        sys.exit("bare has one stream")
    command = ["-c", BARE, dsn] if bare else ["-m", "sse_server", "--port", "0"]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("SSE_")}
    environment |= {"DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment | {"SSE_LOG_LEVEL": "WARNING"},
            cwd=directory,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"listening on http://\S+:(\d+)", line):
                    measure(dsn, int(found[1]), arguments)
                    break
            else:
                sys.exit("the server does not start")
        finally:
            process.terminate()
            process.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inserts", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1, help="of one user, at most 20")
    parser.add_argument("--pause", type=float, default=0.002, help="seconds between inserts")
    parser.add_argument("--feed-modes", default="auto", help="of auto, notify, poll, bare")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dsn", help="a database whose rate limit may be switched off")
    arguments = parser.parse_args()
    if arguments.dsn:
        take_turns(arguments.dsn, arguments)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)  # root runs PostgreSQL as another account
        postgres = EmbeddedPostgres(Path(directory) / "data")
        try:
            dsn = postgres.start()
            connection = psycopg2.connect(dsn)
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(schema_sql())
            connection.close()
            take_turns(dsn, arguments)
        finally:
            postgres.stop()


if __name__ == "__main__":
    main()
