"""The database goes away, and comes back here or elsewhere: what clients and operators see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.embedded import EmbeddedPostgres
from sse_server.services import hash_key, new_key
from sse_server.sessions import COOKIE
from tests.browser.conftest import until
from tests.conftest import (
    ROOT,
    ServerProcess,
    ServerProcessFactory,
    connect,
    eventually,
    execute,
)
from tests.streaming import Clients, insert, query, sign_in
from tests.test_process import open_live, port

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    async with Clients() as clients:
        yield clients


async def ask(
    server: ServerProcess, method: str, path: str, *, body: object = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Returns: status, headers with their names in lower case, body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    data = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port(server)}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + data)
    async with asyncio.timeout(30):
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    status, *fields = head.decode().split("\r\n")
    pairs = (field.split(": ", 1) for field in fields)
    return int(status.split()[1]), {name.lower(): value for name, value in pairs}, rest


async def ready(server: ServerProcess) -> tuple[int, list[str]]:
    """What /readyz says: its status, and what fails."""
    status, _, body = await ask(server, "GET", "/readyz")
    return status, json.loads(body)["failed"]


async def is_ready(server: ServerProcess) -> bool:
    return await ready(server) == (200, [])


def processes(cluster: EmbeddedPostgres) -> list[psutil.Process]:
    """PostgreSQL's own, the postmaster first: it must not see a backend stop."""
    assert cluster._process is not None
    postmaster = psutil.Process(cluster._process.pid)
    return [postmaster, *postmaster.children()]


@contextlib.contextmanager
def away(cluster: EmbeddedPostgres, how: str) -> Iterator[None]:
    """Take the database away: gone without a trace, or there and silent, as a host that hangs."""
    if how == "gone":
        cluster.crash()
        try:
            yield
        finally:
            cluster.restart()
        return
    frozen = processes(cluster)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("how", ["gone", "frozen"])
async def test_the_database_is_away(
    server_process: ServerProcessFactory,
    cluster: EmbeddedPostgres,
    dsn: str,
    db: Connection,
    clients: Clients,
    how: str,
) -> None:
    """Streams stay, /readyz is red and /livez green, an EventSource is told to come back, every
    other call is a 503 with Retry-After; then all recovers, in the same process."""
    key, other_key = sign_in(db, "alice", "bob")
    service_key = new_key()
    query(db, "INSERT INTO services (name, key_hash) VALUES ('shop', %s)", hash_key(service_key))
    server = await server_process(
        SSE_QUERY_TIMEOUT="1",
        SSE_CONNECT_TIMEOUT="1",
        SSE_PROBE_SECONDS="0.3",
        SSE_HEARTBEAT_SECONDS="1",
    )
    stream = await open_live(clients, server, key)
    assert await is_ready(server)
    cookie = {"Cookie": f"{COOKIE}={key}"}
    bearer = {"Authorization": f"Bearer {service_key}"}
    publication = {"recipients": ["alice"], "event_type": "new_message", "message": "hello"}
    calls: list[tuple[str, str, Any, dict[str, str]]] = [
        ("GET", "/api/notifications", None, cookie),
        ("GET", "/api/notifications/unread", None, cookie),
        ("POST", "/api/notifications/read", {"ids": [1]}, cookie),
        ("GET", "/api/preferences", None, cookie),
        ("PUT", "/api/preferences/new_message", {"enabled": True}, cookie),
        ("GET", "/api/session", None, cookie),
        ("DELETE", "/api/session", None, cookie),
        ("POST", "/api/publish", publication, bearer),
    ]
    with away(cluster, how):
        await until(lambda: ready_is(server, 503, {"database", "feed"}), 20)
        status, _, _ = await ask(server, "GET", "/livez")
        assert status == 200
        for method, path, body, headers in calls:
            status, fields, answer = await ask(server, method, path, body=body, **headers)
            assert status == 503, (method, path, answer)
            assert 1 <= int(fields["retry-after"]) <= 10
            assert fields["content-type"].startswith("application/problem+json")
            assert json.loads(answer)["type"] == "urn:sse-server:problem:unavailable"
        turned_away = await clients.open(port(server), other_key)
        await eventually(lambda: turned_away.reason)
        assert (turned_away.status, turned_away.reason) == (200, "unavailable")
        assert turned_away.parser.retry is not None
        pings = len(stream.of("ping"))
        await eventually(lambda: len(stream.of("ping")) > pings)
        assert not stream.closed
    db = connect(dsn)
    ids = insert(db, "alice")
    db.close()
    await eventually(lambda: stream.ids == ids, 40)
    await until(lambda: is_ready(server), 40)
    for method, path, body, headers in calls:
        status, _, answer = await ask(server, method, path, body=body, **headers)
        assert status in (200, 204), (method, path, answer)
    await open_live(clients, server, other_key)
    assert server.popen.poll() is None
    assert "Traceback" not in server.stderr


async def ready_is(server: ServerProcess, status: int, failed: set[str]) -> bool:
    found = await ready(server)
    return found[0] == status and set(found[1]) == failed


async def test_a_call_does_not_wait_for_a_database_that_hangs(
    server_process: ServerProcessFactory, cluster: EmbeddedPostgres, dsn: str, db: Connection
) -> None:
    """With more callers than connections, each has its 503 in a few times the query timeout."""
    [key] = sign_in(db, "alice")
    server = await server_process(SSE_QUERY_TIMEOUT="1", SSE_CONNECT_TIMEOUT="1", SSE_POOL_SIZE="2")

    async def call() -> int:
        cookie = {"Cookie": f"{COOKIE}={key}"}
        return (await ask(server, "GET", "/api/preferences", **cookie))[0]

    async def answered() -> bool:
        return await call() == 200

    assert await answered()
    with away(cluster, "frozen"):
        started = time.monotonic()
        assert set(await asyncio.gather(*(call() for _ in range(30)))) == {503}
        assert time.monotonic() - started < 20
    await until(answered)


# Failover


class Standby:
    """A streaming replica of a cluster, which can be promoted."""

    def __init__(self, directory: Path, primary: EmbeddedPostgres) -> None:
        self._bin = primary._bin
        self._primary = parse_dsn(primary.dsn("postgres"))
        self._account = primary._as_account()
        self._directory = directory
        self._popen: subprocess.Popen[bytes] | None = None
        self._log = directory / "postgres.log"
        directory.mkdir(mode=0o700)
        if "user" in self._account:
            os.chown(directory, self._account["user"], self._account["group"])

    def start(self) -> None:
        backup = [
            *(str(self._bin / "pg_basebackup"), "-D", str(self._directory / "pgdata"), "-R"),
            *("-X", "stream", "-c", "fast", "--no-sync"),
            *("-h", self._primary["host"], "-p", self._primary["port"], "-U", "postgres"),
        ]
        subprocess.run(backup, check=True, timeout=120, **self._account)
        settings = {
            "port": "5432",
            "listen_addresses": "",
            "unix_socket_directories": str(self._directory),
            "fsync": "off",
        }
        command = [str(self._bin / "postgres"), "-D", str(self._directory / "pgdata")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(command, stdout=log, stderr=log, **self._account)

    def dsn(self, database: str) -> str:
        return f"host={self._directory} port=5432 user=postgres dbname={database}"

    def shows(self, statement: str) -> bool:
        """Whether it answers, with a true value."""
        try:
            connection = psycopg2.connect(self.dsn("sse"))
        except psycopg2.OperationalError:
            return False
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                row = cursor.fetchone()
                return bool(row and row[0])
        except psycopg2.Error:
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        if self._popen is not None:
            self._popen.send_signal(signal.SIGQUIT)
            self._popen.wait(30)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_failover_to_a_standby(
    server_process: ServerProcessFactory, public_dir: Path, clients: Clients, workers: str
) -> None:
    """The primary dies and its streaming standby is promoted: with both in the DSN, streams stay
    and get what is committed there, and everything else works again without a restart."""
    primary = EmbeddedPostgres(public_dir / "primary", options={"fsync": "off"})
    dsn = await asyncio.to_thread(primary.start)
    standby = Standby(public_dir / "standby", primary)
    try:
        execute(dsn, (ROOT / "schema.sql").read_text(encoding="utf-8"))
        await asyncio.to_thread(standby.start)
        await eventually(lambda: standby.shows("SELECT pg_is_in_recovery()"), 60)
        one, other = parse_dsn(dsn), parse_dsn(standby.dsn("sse"))
        server = await server_process(
            "--workers",
            workers,
            # The standby first: it must be passed over as long as it is one.
            DATABASE_URL=f"host={other['host']},{one['host']} port={other['port']},{one['port']} "
            "user=postgres dbname=sse target_session_attrs=read-write",
            SSE_PROBE_SECONDS="0.5",
        )
        pids = [child.pid for child in psutil.Process(server.pid).children()]
        db = connect(dsn)
        users = [f"user-{number}" for number in range(6)]
        keys = sign_in(db, *users, "late")
        streams = [await open_live(clients, server, key) for key in keys[:-1]]
        written = {user: insert(db, user, "before") for user in users}

        def complete() -> bool:
            return all(
                stream.ids == written[user] for stream, user in zip(streams, users, strict=True)
            )

        await eventually(complete)
        newest = max(written.values())[0]
        await eventually(
            lambda: standby.shows(f"SELECT EXISTS (SELECT FROM notifications WHERE id = {newest})")
        )
        db.close()
        await asyncio.to_thread(primary.crash)
        # A standby alone is no database to work with.
        await until(lambda: ready_is(server, 503, {"database", "feed"}), 30)
        assert standby.shows("SELECT pg_promote()")
        db = connect(standby.dsn("sse"))
        for user in users:
            written[user] += insert(db, user, "after")
        await eventually(complete, 60)
        assert not any(stream.closed for stream in streams)
        late = await open_live(clients, server, keys[-1])
        ids = insert(db, "late")
        await eventually(lambda: late.ids == ids)
        for _ in pids or [0]:
            await until(lambda: is_ready(server), 30)
        cookie = {"Cookie": f"{COOKIE}={keys[0]}"}
        status, _, _ = await ask(
            server, "POST", "/api/notifications/read", body={"ids": written["user-0"]}, **cookie
        )
        assert status == 200
        await eventually(lambda: len(streams[0].of("read")) == 1)
        db.close()
        assert [child.pid for child in psutil.Process(server.pid).children()] == pids
    finally:
        await asyncio.to_thread(standby.stop)
        await asyncio.to_thread(primary.stop)
