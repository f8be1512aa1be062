"""Through the real PgBouncer: LISTEN that would be in vain is refused, all else works."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.app import create_app
from sse_server.database import Database
from sse_server.embedded import EmbeddedPostgres
from sse_server.errors import DatabaseUnavailable
from sse_server.retention import Retention
from sse_server.services import hash_key, new_key
from sse_server.store import Store
from tests.browser.test_nginx import free_ports
from tests.conftest import (
    Client,
    ServerProcessFactory,
    SettingsFactory,
    connect,
    eventually,
    execute,
    require_program,
)
from tests.streaming import Clients, insert, query, sign_in
from tests.test_process import open_live, port
from tests.test_workers import call

pytestmark = pytest.mark.timeout(120)

INI = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = trust
auth_file = {directory}/users.txt
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
logfile = {directory}/pgbouncer.log
pidfile = {directory}/pgbouncer.pid
"""


class PgBouncer:
    """PgBouncer in front of the cluster, with its own defaults where nothing is said here."""

    def __init__(self, directory: Path, cluster: EmbeddedPostgres) -> None:
        self._program = require_program("pgbouncer", "apt-get install pgbouncer")
        self._directory = directory
        parameters = parse_dsn(cluster.dsn("postgres"))
        self._socket_dir, self._port = parameters["host"], parameters["port"]
        self._popen: subprocess.Popen[bytes] | None = None
        self.port = free_ports()[0]

    def dsn(self, direct: str) -> str:
        """The way to this database through the pooler."""
        return f"postgresql://postgres@127.0.0.1:{self.port}{urlsplit(direct).path}"

    def _spawn(self, mode: str, size: int) -> None:
        (self._directory / "users.txt").write_text('"postgres" ""\n')
        ini = self._directory / "pgbouncer.ini"
        ini.write_text(
            INI.format(
                host=self._socket_dir,
                port=self._port,
                listen_port=self.port,
                directory=self._directory,
                mode=mode,
                size=size,
            )
        )
        arguments: dict[str, Any] = {}
        if os.geteuid() == 0:
            # It does not run as root; and the socket is for its owner alone.
            owner = Path(self._socket_dir).stat()
            os.chown(self._directory, owner.st_uid, owner.st_gid)
            arguments = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        self._popen = subprocess.Popen(
            [str(self._program), str(ini)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **arguments,
        )

    async def start(self, *, mode: str = "transaction", size: int = 2) -> None:
        self._spawn(mode, size)
        await eventually(self._answers, 20, "PgBouncer does not start")

    def _answers(self) -> bool:
        try:
            psycopg2.connect(self.dsn("postgresql:///postgres")).close()
        except psycopg2.OperationalError:
            return False
        return True

    def stop(self) -> None:
        popen, self._popen = self._popen, None
        if popen is not None:
            popen.send_signal(signal.SIGTERM)  # at once, whoever is connected
            popen.wait(15)


@pytest.fixture
def pgbouncer(public_dir: Path, cluster: EmbeddedPostgres) -> Iterator[PgBouncer]:
    """Not yet started: ``await pgbouncer.start(mode="session")``."""
    pooler = PgBouncer(public_dir, cluster)
    yield pooler
    pooler.stop()


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    async with Clients() as clients:
        yield clients


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., Store]]:
    """A store over a pool: ``make(dsn, listen_dsn=…)``."""
    made: list[Store] = []

    def build(dsn: str, **arguments: Any) -> Store:
        values = {"size": 3, "connect_timeout": 5.0, "query_timeout": 10.0} | arguments
        made.append(Store(Database(dsn, **values)))
        return made[-1]

    yield build
    for store in made:
        await store.database.close()


# What is refused


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("workers", ["1", "2"])
async def test_transaction_pooling_is_refused(
    pgbouncer: PgBouncer, server_process: ServerProcessFactory, dsn: str, size: int, workers: str
) -> None:
    """With LISTEN through a transaction pooler, of one server connection or of several, the service
    does not start, and says in one sentence what to set."""
    await pgbouncer.start(size=size)
    for changes in (
        {"DATABASE_URL": pgbouncer.dsn(dsn)},
        {"SSE_LISTEN_DATABASE_URL": pgbouncer.dsn(dsn)},
    ):
        values: dict[str, str | None] = {"SSE_WORKERS": workers, **changes}
        server = await server_process(wait=False, **values)
        assert await server.wait(40) == 2
        assert "listening" not in server.stdout
        [sentence] = server.stderr.splitlines()
        assert "PgBouncer in transaction mode" in sentence
        assert "SSE_LISTEN_DATABASE_URL" in sentence


async def test_another_database_is_refused(
    server_process: ServerProcessFactory, dsn: str, cluster: EmbeddedPostgres, template: str
) -> None:
    """A listening URL that leads to another database is refused: nothing would ever be heard."""
    name = f"other_{os.getpid()}"
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        # A template's channel is everybody's.
        execute(cluster.dsn(name), "UPDATE settings SET channel = channel || 'x'")
        server = await server_process(wait=False, SSE_LISTEN_DATABASE_URL=cluster.dsn(name))
        assert await server.wait(30) == 2
        assert "leads to another database" in server.stderr
        server = await server_process(
            wait=False, DATABASE_URL=None, SSE_LISTEN_DATABASE_URL=cluster.dsn(name)
        )
        assert await server.wait(30) == 2
        assert "set both" in server.stderr
    finally:
        execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


async def test_session_pooling_is_taken(
    pgbouncer: PgBouncer,
    server_process: ServerProcessFactory,
    dsn: str,
    db: Connection,
    clients: Clients,
) -> None:
    """A pooler in session mode passes NOTIFY on, and needs no second URL."""
    await pgbouncer.start(mode="session", size=20)
    server = await server_process(DATABASE_URL=pgbouncer.dsn(dsn), SSE_PROBE_SECONDS="30")
    stream = await open_live(clients, server, sign_in(db, "alice")[0])
    ids = insert(db, "alice")
    await eventually(lambda: stream.ids == ids)


async def test_the_trial_costs_nothing(
    make: Callable[..., Store], dsn: str, db: Connection
) -> None:
    """Without a pooler the trial takes a moment, and leaves neither a channel nor a connection."""
    store = make(dsn)
    connection = await store.database.connect_to_listen("trial")
    started = time.monotonic()
    await store.check_listen(connection)
    assert time.monotonic() - started < 2  # of the five that it would wait
    assert await connection.fetch("SELECT pg_listening_channels()") == []
    connection.close()


# What works through it


async def test_everything_else_goes_through_it(
    pgbouncer: PgBouncer,
    server_process: ServerProcessFactory,
    dsn: str,
    db: Connection,
    clients: Clients,
) -> None:
    """With a URL of its own to LISTEN, all of the API works over two pooled connections that
    everybody shares, and nothing of it stays on them."""
    await pgbouncer.start(size=2)
    server = await server_process(
        "--workers",
        "2",
        DATABASE_URL=pgbouncer.dsn(dsn),
        SSE_LISTEN_DATABASE_URL=dsn,
        SSE_PROBE_SECONDS="30",
    )
    users = [f"user-{number}" for number in range(40)]
    keys = sign_in(db, *users)
    streams = await clients.open_many(port(server), keys)
    ids = [insert(db, user)[0] for user in users]
    await eventually(lambda: [stream.ids for stream in streams] == [[id] for id in ids])

    async def ask(key: str, method: str, path: str, body: object = None) -> int:
        return (await call(server, key, method, path, body))[0]

    calls = []
    for key, id in zip(keys, ids, strict=True):
        calls += [
            ask(key, "GET", "/api/notifications"),
            ask(key, "GET", "/api/notifications/unread"),
            ask(key, "POST", "/api/notifications/read", {"ids": [id]}),
            ask(key, "GET", "/api/preferences"),
            ask(key, "GET", "/api/session"),
        ]
    assert set(await asyncio.gather(*calls)) == {200}
    await eventually(lambda: all(len(stream.of("read")) == 1 for stream in streams))
    assert set(await asyncio.gather(*(ask(key, "DELETE", "/api/session") for key in keys))) == {204}
    await eventually(lambda: {stream.reason for stream in streams} == {"session_ended"})
    assert server.stderr.count("ERROR") == 0
    # What the service might have left for the next one who is given the connection.
    pooled = connect(pgbouncer.dsn(dsn))
    for _ in range(5):
        assert query(pooled, "SHOW statement_timeout") == [("0",)]
        assert query(pooled, "SELECT count(*) FROM pg_listening_channels()") == [(0,)]
        assert query(pooled, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    pooled.close()


async def test_publishing_goes_through_it(
    pgbouncer: PgBouncer,
    aiohttp_client: Callable[..., Any],
    settings: SettingsFactory,
    dsn: str,
    db: Connection,
) -> None:
    """A service publishes, repeats itself with its idempotency key, and users set preferences."""
    await pgbouncer.start(size=1)
    client: Client = await aiohttp_client(
        create_app(settings(database_url=pgbouncer.dsn(dsn), listen_database_url=dsn))
    )
    key = new_key()
    query(db, "INSERT INTO services (name, key_hash) VALUES ('shop', %s)", hash_key(key))
    body: dict[str, object] = {
        "recipients": ["alice", "bob"],
        "event_type": "new_message",
        "message": "hello",
    }
    body |= {"idempotency_key": "one"}
    headers = {"Authorization": f"Bearer {key}"}
    answers = []
    for _ in range(2):
        async with client.post("/api/publish", json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            answers.append(await answer.json())
    assert answers[0]["results"] == answers[1]["results"]
    assert query(db, "SELECT count(*) FROM notifications") == [(2,)]
    async with client.post("/demo/session", json={"user_id": "alice"}) as answer:
        assert answer.status == 200
    async with client.patch("/api/preferences", json={"new_message": False}) as answer:
        assert answer.status == 200
    async with client.get("/readyz") as answer:
        assert answer.status == 200


async def test_housekeeping_goes_through_it(
    pgbouncer: PgBouncer, make: Callable[..., Store], dsn: str, db: Connection
) -> None:
    """The schema is applied and old rows are deleted, by one process at a time, through it."""
    await pgbouncer.start(size=2)
    stores = [make(pgbouncer.dsn(dsn)) for _ in range(3)]
    query(db, "COMMENT ON TABLE settings IS 'an older version'")
    await asyncio.gather(*(store.apply_schema() for store in stores))
    insert(db, "alice", *["old"] * 30)
    query(db, "UPDATE notifications SET created_at = clock_timestamp() - interval '60 days'")
    kept = insert(db, "alice", *["new"] * 5)
    retentions = [Retention(store, batch_rows=7, pause_seconds=0) for store in stores]
    await asyncio.gather(*(retention.delete_old() for retention in retentions))
    # Whoever finds another one at work leaves it to that one.
    await retentions[0].delete_old()
    assert query(db, "SELECT id FROM notifications ORDER BY id") == [(id,) for id in kept]
    assert query(db, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


@pytest.mark.parametrize("way", ["straight", "pooler"])
async def test_a_query_that_was_given_up_does_not_run_on(
    pgbouncer: PgBouncer, make: Callable[..., Store], dsn: str, db: Connection, way: str
) -> None:
    """What nobody waits for any more ends in the server as well, also behind a pooler."""
    await pgbouncer.start(size=2)
    store = make(dsn if way == "straight" else pgbouncer.dsn(dsn), query_timeout=0.5)
    running = (
        "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(5_)%' "
        "AND pid <> pg_backend_pid()"
    )
    # pg_sleep() would notice that its client has gone only when it wakes up.
    with pytest.raises(DatabaseUnavailable, match="did not answer"):
        await store.database.fetch("SELECT pg_sleep(59)")
    await eventually(lambda: not query(db, running), 10)
    assert await store.database.fetch("SELECT 1") == [(1,)]


async def test_a_restart_of_the_pooler(
    pgbouncer: PgBouncer,
    server_process: ServerProcessFactory,
    dsn: str,
    db: Connection,
    clients: Clients,
) -> None:
    """While the pooler is away open streams get what comes; when it is back, all is as before."""
    await pgbouncer.start()
    server = await server_process(DATABASE_URL=pgbouncer.dsn(dsn), SSE_LISTEN_DATABASE_URL=dsn)
    key, other = sign_in(db, "alice", "bob")
    stream = await open_live(clients, server, key)
    pgbouncer.stop()
    ids = insert(db, "alice")
    await eventually(lambda: stream.ids == ids)
    turned_away = await clients.open(port(server), other)
    await eventually(lambda: turned_away.reason == "unavailable")
    await pgbouncer.start()
    await open_live(clients, server, other)
    assert not stream.closed


async def test_a_pooler_says_what_it_does_not_take(
    pgbouncer: PgBouncer, make: Callable[..., Store], dsn: str
) -> None:
    """A search path in the DSN, which PgBouncer refuses, is said in its own words."""
    await pgbouncer.start()
    store = make(f"{pgbouncer.dsn(dsn)}?options=-csearch_path%3Dx")
    with pytest.raises(DatabaseUnavailable, match="unsupported startup parameter"):
        await store.ping()
