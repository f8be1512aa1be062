"""Several processes on one port, several hosts on one database: one service to its clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.embedded import EmbeddedPostgres
from sse_server.sessions import COOKIE
from sse_server.workers import DELAY_MOST, Plan, _Application
from tests.browser.test_nginx import Nginx, hang_up, serve
from tests.conftest import ROOT, ServerProcess, ServerProcessFactory, eventually, execute
from tests.sse import Event, EventReader
from tests.streaming import Clients, Proxy, insert, query, sign_in, without_rate_limit
from tests.test_process import open_live, port
from tests.test_tls import make_certificate, presented

pytestmark = pytest.mark.timeout(120)

USERS = [f"user-{number}" for number in range(12)]


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    async with Clients() as clients:
        yield clients


def workers(server: ServerProcess) -> list[psutil.Process]:
    """Those that live; the master may have PostgreSQL for a child as well."""
    return [
        child
        for child in psutil.Process(server.pid).children()
        if child.name() != "postgres" and child.status() != psutil.STATUS_ZOMBIE
    ]


def owners(server: ServerProcess) -> dict[int, int]:
    """Which worker has the connection that comes from this port."""
    found = {}
    for worker in workers(server):
        for connection in worker.net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED:
                found[connection.raddr.port] = worker.pid
    return found


def own_port(transport: asyncio.BaseTransport) -> int:
    number: int = transport.get_extra_info("sockname")[1]
    return number


async def two_serve(server: ServerProcess, *, without: int = 0) -> list[psutil.Process]:
    """Wait until two workers listen; `without` is the one that was there before."""

    def listening() -> list[psutil.Process]:
        found = []
        for worker in workers(server):
            try:
                connections = worker.net_connections("tcp")
            except psutil.Error:
                continue
            if worker.pid != without and psutil.CONN_LISTEN in {c.status for c in connections}:
                found.append(worker)
        return found if len(found) == 2 else []

    return await eventually(listening, 30)


async def call(
    server: ServerProcess, key: str, method: str, path: str, body: object = None
) -> tuple[int, int]:
    """Ask over a connection of its own. Returns: the status, and which worker has answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port(server))
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port(server)}\r\nCookie: {COOKIE}={key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(head.encode() + data)
    answer = await reader.readuntil(b"\r\n\r\n")
    worker = owners(server)[own_port(writer.transport)]
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), worker


# Where streams are


async def test_streams_spread_evenly(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """Of 200 streams neither of two workers has less than 30 %, and each gets what is its own."""
    server = await server_process("--workers", "2", SSE_LOG_LEVEL="WARNING")
    users = [f"user-{number}" for number in range(200)]
    streams = await clients.open_many(port(server), sign_in(db, *users))
    found = owners(server)
    count = Counter(found[own_port(stream.transport)] for stream in streams)
    assert set(count) == {worker.pid for worker in workers(server)}
    assert all(60 <= streams_of_one <= 140 for streams_of_one in count.values()), count
    rows = query(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT u, 'new_message', 'hello' FROM unnest(%s) AS u RETURNING user_id, id",
        users,
    )
    expected = dict(rows)
    await eventually(lambda: all(stream.ids for stream in streams))
    assert [stream.ids for stream in streams] == [[expected[user]] for user in users]
    assert server.stderr == ""


@pytest.mark.parametrize("what", ["supersede", "session end", "read", "preferences"])
async def test_what_happens_on_one_worker_shows_on_the_others(
    server_process: ServerProcessFactory, db: Connection, clients: Clients, what: str
) -> None:
    """A newer stream, the end of a session, reading and preferences reach the stream at once,
    whichever worker was asked."""
    server = await server_process("--workers", "2", SSE_PROBE_SECONDS="30")
    keys = sign_in(db, *USERS)
    streams = await clients.open_many(port(server), keys)
    found = owners(server)
    streaming = [found[own_port(stream.transport)] for stream in streams]
    asked = []
    for user, key in zip(USERS, keys, strict=True):
        if what == "supersede":
            newer = await open_live(clients, server, key)
            asked.append(owners(server)[own_port(newer.transport)])
            continue
        method, path, body = {
            "session end": ("DELETE", "/api/session", None),
            "read": ("POST", "/api/notifications/read", {"ids": insert(db, user)}),
            "preferences": ("PATCH", "/api/preferences", {"new_message": False}),
        }[what]
        status, worker = await call(server, key, method, path, body)
        assert status in (200, 204)
        asked.append(worker)
    # Of twelve, not all can have met the same worker by chance: once in 4,096 runs.
    assert any(one != other for one, other in zip(streaming, asked, strict=True))
    if what in ("read", "preferences"):
        await eventually(lambda: all(len(stream.of(what)) == 1 for stream in streams))
    else:
        await eventually(lambda: all(stream.reason for stream in streams))
        reason = {"supersede": "superseded", "session end": "session_ended"}[what]
        assert {stream.reason for stream in streams} == {reason}


async def test_limits_of_a_user_hold_for_all_workers(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """Whichever workers a user's calls and streams meet, the limits are those of one process."""
    server = await server_process(
        "--workers", "2", SSE_API_CALLS_PER_MINUTE="40", SSE_STREAMS_PER_USER="3"
    )
    [caller] = sign_in(db, "ada")
    answers = [await call(server, caller, "GET", "/api/session") for _ in range(120)]
    assert len({worker for _, worker in answers}) == 2
    passed = [status for status, _ in answers].count(200)
    # One more each second and a half, and what one worker has not yet told the other.
    assert 40 <= passed <= 60
    streams = [await open_live(clients, server, key) for key in sign_in(db, *3 * ["bob"])]
    for key in sign_in(db, *8 * ["bob"]):
        refused = await clients.open(port(server), key)
        await eventually(lambda refused=refused: refused.reason)  # type: ignore[misc]
        assert refused.reason == "limit"
    assert not any(stream.closed for stream in streams)


# What becomes of workers


async def test_a_killed_worker_comes_back_and_nothing_is_lost(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """After SIGKILL of a worker its clients go on where they were, on others or on the next one;
    streams of other workers notice nothing."""
    without_rate_limit(db)
    server = await server_process("--workers", "2", SSE_LOG_LEVEL="WARNING")
    keys = sign_in(db, *USERS)
    streams = dict(zip(USERS, await clients.open_many(port(server), keys), strict=True))
    received: dict[str, list[int]] = {user: [] for user in USERS}
    written: dict[str, list[int]] = {user: [] for user in USERS}

    def write() -> None:
        for user in USERS:
            written[user] += insert(db, user)

    def all_live() -> bool:
        return all(received[user] + streams[user].ids == written[user] for user in USERS)

    write()
    await eventually(all_live)
    found = owners(server)
    victim = found[own_port(streams[USERS[0]].transport)]
    killed = [user for user in USERS if found[own_port(streams[user].transport)] == victim]
    os.kill(victim, signal.SIGKILL)
    write()
    await eventually(lambda: all(streams[user].closed for user in killed))
    for user in killed:
        assert not streams[user].complete
        received[user] += streams[user].ids
    now = await two_serve(server, without=victim)
    for user in killed:
        key = keys[USERS.index(user)]
        streams[user] = await clients.open(port(server), key, last_event_id=received[user][-1])
    write()
    await eventually(all_live)
    assert not any(stream.of("reset") for stream in streams.values())
    assert not any(streams[user].closed for user in USERS)
    assert victim not in {worker.pid for worker in now}
    assert server.stderr.count("starting another one") == 1


async def test_a_single_worker_is_ended(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """SIGTERM to one worker ends its streams properly and nothing else; another takes its place."""
    server = await server_process("--workers", "2", SSE_LOG_LEVEL="WARNING")
    streams = await clients.open_many(port(server), sign_in(db, *USERS))
    found = owners(server)
    [metrics] = directories(server)
    victim = found[own_port(streams[0].transport)]
    his = [stream for stream in streams if found[own_port(stream.transport)] == victim]
    os.kill(victim, signal.SIGTERM)
    await eventually(lambda: {stream.reason for stream in his} == {"shutdown"})
    await two_serve(server, without=victim)
    assert not any(stream.closed for stream in streams if stream not in his)
    assert directories(server) == {metrics}
    assert server.stderr.count("starting another one") == 1


async def test_sigterm_drains_all_workers(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """On SIGTERM every stream of every worker is told, with a last chunk, and all is gone."""
    server = await server_process("--workers", "3", SSE_LOG_LEVEL="WARNING")
    pids = [worker.pid for worker in workers(server)]
    assert len(pids) == 3
    metrics = [Path(name) for name in directories(server)]
    assert metrics
    streams = await clients.open_many(port(server), sign_in(db, *USERS * 5))
    server.terminate()
    assert await server.wait(30) == 0, server.stderr
    await eventually(lambda: all(stream.closed for stream in streams))
    assert {stream.reason for stream in streams} == {"shutdown"}
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not any(path.exists() for path in metrics)
    assert server.stderr == ""


def directories(server: ServerProcess) -> set[str]:
    """Where the workers have their metrics."""
    return {
        str(Path(mapped.path).parent)
        for worker in workers(server)
        for mapped in worker.memory_maps()
        if "sse-server-metrics-" in mapped.path and Path(mapped.path).exists()
    }


async def test_a_client_that_does_not_read_does_not_hold_the_end_up(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """SIGINT drains as SIGTERM does, and a client that takes nothing delays it by seconds."""
    without_rate_limit(db)
    server = await server_process("--workers", "2", SSE_DRAIN_SECONDS="5")
    stuck_key, key = sign_in(db, "alice", "bob")
    stuck = await open_live(clients, server, stuck_key, receive_buffer=4096)
    stuck.pause()
    insert(db, "alice", *["x" * 1900] * 4000)
    stream = await open_live(clients, server, key)
    server.popen.send_signal(signal.SIGINT)
    await eventually(lambda: stream.reason == "shutdown")
    assert await server.wait(25) == 0


async def test_workers_do_not_outlive_the_master(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """When the master is killed, the workers end their streams and go by themselves."""
    server = await server_process("--workers", "2")
    pids = [worker.pid for worker in workers(server)]
    stream = await open_live(clients, server, sign_in(db, "alice")[0])
    server.kill()
    await eventually(lambda: stream.reason == "shutdown")
    await eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


async def test_certificate_is_renewed_in_all_workers(
    server_process: ServerProcessFactory, tmp_path: Path
) -> None:
    """SIGHUP to the master takes the new certificate in every worker, and ends nothing."""
    values: dict[str, str | None] = {"SSE_DEMO": "0", **make_certificate(tmp_path)}
    server = await server_process("--workers", "2", wait=True, **values)
    pids = {worker.pid for worker in workers(server)}
    first = await presented(server)
    make_certificate(tmp_path)
    os.kill(server.pid, signal.SIGHUP)
    await eventually(lambda: server.stderr.count("was read again") == 2)
    shown = {await presented(server) for _ in range(16)}
    assert len(shown) == 1
    assert shown != {first}
    assert {worker.pid for worker in workers(server)} == pids


async def test_a_worker_that_cannot_start_waits_for_the_database(
    server_process: ServerProcessFactory, db: Connection, dsn: str, clients: Clients
) -> None:
    """While the database is away a new worker tries again by itself, the master does not start
    one after the other, and when the database is back there are two again."""
    parameters = parse_dsn(dsn)
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        server = await server_process(
            "--workers",
            "2",
            DATABASE_URL=f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}",
        )
        before = {worker.pid for worker in workers(server)}
        key, other_key = sign_in(db, "alice", "bob")
        stream = await open_live(clients, server, key)
        owner = owners(server)[own_port(stream.transport)]
        await proxy.refuse()
        [victim] = before - {owner}
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: server.stderr.count("a worker cannot start: ") >= 3, 30)
        assert server.stderr.count("starting another one") == 1
        assert len(workers(server)) == 2
        assert not stream.closed
        # Who comes now comes to the worker that is left.
        turned_away = await clients.open(port(server), other_key)
        await eventually(lambda: turned_away.reason)
        assert (turned_away.status, turned_away.reason) == (200, "unavailable")
        await proxy.accept()
        await two_serve(server, without=victim)
        ids = insert(db, "alice")
        await eventually(lambda: stream.ids == ids, 40)


async def test_it_stops_while_a_worker_waits(
    server_process: ServerProcessFactory, dsn: str
) -> None:
    """SIGTERM ends a worker that waits for the database as soon as any other."""
    parameters = parse_dsn(dsn)
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        server = await server_process(
            "--workers",
            "2",
            DATABASE_URL=f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}",
        )
        await proxy.refuse()
        os.kill(workers(server)[0].pid, signal.SIGKILL)
        await eventually(lambda: "a worker cannot start: " in server.stderr)
        server.terminate()
        assert await server.wait(20) == 0


def test_workers_that_die_again_and_again_are_held_back() -> None:
    """Each may die once and is replaced at once; from then on it takes longer and longer."""
    plan = Plan(count=2, work=lambda _: 0, ready=lambda: None, stop_seconds=1, reloads=False)
    application = _Application(plan)
    delays = []
    for _ in range(12):
        delays.append(application.delay())
        application.deaths.append(time.monotonic())
    assert delays[:3] == [0, 0, 0]
    assert delays[3:] == sorted(delays[3:])
    assert delays[3] > 0
    assert delays[-1] == DELAY_MOST
    application.deaths.clear()
    application.deaths.extend([time.monotonic() - 3600] * 12)
    assert application.delay() == 0
    for end in (application.master_end, application.word_end):
        os.close(end)


# The PostgreSQL of its own


async def test_postgresql_is_stopped_last(
    server_process: ServerProcessFactory, public_dir: Path, clients: Clients
) -> None:
    """The embedded PostgreSQL is the master's: it outlives every worker, and no process is left."""
    server = await server_process(
        "--workers", "2", DATABASE_URL=None, SSE_DEMO=None, SSE_DATA_DIR=str(public_dir / "data")
    )
    master = psutil.Process(server.pid)
    everything = master.children(recursive=True)
    [postgres] = [child for child in master.children() if child.name() == "postgres"]
    os.kill(workers(server)[0].pid, signal.SIGKILL)
    everything += await two_serve(server, without=0)
    assert postgres.is_running()
    found = re.search(r"psql '(\S+)'", server.stdout)
    assert found is not None
    server.terminate()
    assert await server.wait(30) == 0
    lines = server.stderr.splitlines()
    [stopped] = [number for number, line in enumerate(lines) if "PostgreSQL stopped" in line]
    stopping = [number for number, line in enumerate(lines) if '"message": "stopping"' in line]
    assert len(stopping) == 2
    assert stopping[-1] < stopped == len(lines) - 1
    assert not [process for process in everything if process.is_running()]

    again = await server_process(
        "--workers", "2", DATABASE_URL=None, SSE_DEMO=None, SSE_DATA_DIR=str(public_dir / "data")
    )
    assert "left running" not in again.stderr


async def test_a_killed_master_leaves_a_directory_that_can_be_used(
    server_process: ServerProcessFactory, public_dir: Path
) -> None:
    """After SIGKILL of the master the next start takes the data directory over."""
    values: dict[str, str | None] = {
        "DATABASE_URL": None,
        "SSE_DEMO": None,
        "SSE_DATA_DIR": str(public_dir / "data"),
    }
    server = await server_process("--workers", "2", wait=True, **values)
    # At once: the workers may still be there, and must not hold what was the master's.
    frozen = workers(server)
    for worker in frozen:
        worker.suspend()
    server.kill()
    try:
        again = await server_process("--workers", "2", wait=True, **values)
        assert "that was left running" in again.stderr
    finally:
        for worker in frozen:
            worker.resume()
    await eventually(lambda: not any(worker.is_running() for worker in frozen))


# How it does not start


async def refused(server: ServerProcess) -> str:
    """The one sentence that it ends with."""
    assert await server.wait(30) == 2
    assert "listening" not in server.stdout
    [sentence] = server.stderr.splitlines()
    assert sentence.startswith("sse-server: ")
    return sentence


async def test_a_port_that_is_taken(server_process: ServerProcessFactory) -> None:
    """A port that somebody else listens on is refused, though it could be shared."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        number = str(sock.getsockname()[1])
        server = await server_process("--workers", "2", "--port", number, wait=False)
        assert "Cannot listen" in await refused(server)
    # Nor one of our own.
    one = await server_process("--workers", "2")
    for count in ("1", "2"):
        server = await server_process("--workers", count, "--port", str(port(one)), wait=False)
        assert "Cannot listen" in await refused(server)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"SSE_WORKERS": "0"}, "SSE_WORKERS"),
        ({"DATABASE_URL": "postgresql://ada@127.0.0.1:1/x"}, "refused"),
        ({"SSE_TLS_CERT": "/nonexistent", "SSE_TLS_KEY": "/nonexistent"}, "SSE_TLS_CERT"),
        ({"SSE_JWT_PUBLIC_KEY_FILE": "/nonexistent", "SSE_JWT_AUDIENCE": "x"}, "SSE_JWT_PUBLIC"),
        ({"SSE_LISTEN_DATABASE_URL": "nonsense"}, "SSE_LISTEN_DATABASE_URL"),
    ],
)
async def test_what_is_misconfigured(
    server_process: ServerProcessFactory, changes: dict[str, str | None], words: str
) -> None:
    """Misconfigured is one sentence and exit status 2, said once and not by each worker."""
    server = await server_process(wait=False, **{"SSE_WORKERS": "2", **changes})
    assert words in await refused(server)


async def test_workers_that_cannot_start(
    server_process: ServerProcessFactory, cluster: EmbeddedPostgres
) -> None:
    """What only the workers meet, such as too few connections for all, ends the start as well."""
    name = f"narrow_{os.getpid()}"
    execute(cluster.dsn("postgres"), f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 3")
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {name} OWNER {name}")
    url = cluster.dsn(name).replace("//postgres@", f"//{name}@")
    try:
        server = await server_process("--workers", "4", wait=False, DATABASE_URL=url)
        assert await server.wait(40) == 2
        assert "listening" not in server.stdout
        assert "Traceback" not in server.stderr
        assert "sse-server: The database cannot be used: " in server.stderr
        assert "too many connections" in server.stderr
        alone = await server_process(DATABASE_URL=url)
        alone.terminate()
        assert await alone.wait() == 0
    finally:
        execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")
        execute(cluster.dsn("postgres"), f"DROP OWNED BY {name}")
        execute(cluster.dsn("postgres"), f"DROP ROLE {name}")


async def test_one_process_does_without(server_process: ServerProcessFactory) -> None:
    """Without workers there is no master, and the process manager is not even imported."""
    server = await server_process()
    assert workers(server) == []
    maps = "".join(mapped.path for mapped in psutil.Process(server.pid).memory_maps())
    assert "sse-server-metrics-" not in maps
    code = (
        "import sys, sse_server.cli; "
        "sys.exit(bool({'gunicorn', 'prometheus_client'} & set(sys.modules)))"
    )
    # prometheus_client looks once, when it is imported, whether it has a directory to share.
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT)
    assert await process.wait() == 0


# Several hosts behind a proxy


@pytest.fixture
def nginx(public_dir: Path) -> Iterator[Nginx]:
    proxy = Nginx(public_dir)
    yield proxy
    proxy.stop()


class Browser:
    """An EventSource and its cookie, behind the proxy: comes back whenever its line is lost."""

    def __init__(self, nginx: Nginx, user: str) -> None:
        self.user = user
        self.events: list[Event] = []
        self.session = aiohttp.ClientSession(
            nginx.url,
            connector=aiohttp.TCPConnector(ssl=nginx.tls, limit=0),
            cookie_jar=aiohttp.CookieJar(unsafe=True),
        )
        self.answers: list[aiohttp.ClientResponse] = []
        self.tasks: list[asyncio.Task[str]] = []

    async def sign_in(self) -> None:
        async with self.session.post("/demo/session", json={"user_id": self.user}) as answer:
            assert answer.status == 200

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.event == name]

    @property
    def ids(self) -> set[int]:
        return {int(event.id) for event in self.of("notification") if event.id}

    def open(self) -> asyncio.Task[str]:
        """A tab. Its task ends with the reason for which the stream is not to be opened again."""
        task = asyncio.create_task(self._stream())
        self.tasks.append(task)
        return task

    async def _stream(self) -> str:
        last = ""
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
            try:
                async with self.session.get("/api/stream", headers=headers) as answer:
                    self.answers.append(answer)
                    if answer.status != 200:
                        continue  # nobody is there; a browser's EventSource would be made anew
                    reader = EventReader(answer)
                    async for chunk in answer.content.iter_any():
                        for event in reader.parser.feed(chunk):
                            self.events.append(event)
                            last = reader.parser.last_event_id
                            if event.event == "closing" and event.json["reason"] == "superseded":
                                return "superseded"
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        for answer in self.answers:
            if answer.connection is not None:
                hang_up(answer)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.session.close()


async def test_two_hosts_behind_nginx(
    nginx: Nginx, server_process: ServerProcessFactory, db: Connection
) -> None:
    """Two services on one database, one of them with workers: streams are on both, supersede each
    other across them, and when one is killed its clients go on at the other without a gap."""
    without_rate_limit(db)
    one = await serve(server_process, "--workers", "2")
    other = await serve(server_process)
    await nginx.start(one.url, other.url)
    browsers = [Browser(nginx, user) for user in USERS]
    try:
        for browser in browsers:
            await browser.sign_in()
        tabs = [browser.open() for browser in browsers]
        await eventually(lambda: all(browser.of("ready") for browser in browsers))
        opened = re.compile(r"stream \d+/\d+ opened")
        assert opened.search(one.stderr)
        assert opened.search(other.stderr)
        written = {user: set(insert(db, user)) for user in USERS}

        def complete() -> bool:
            return all(browser.ids == written[browser.user] for browser in browsers)

        await eventually(complete)
        newer = [browser.open() for browser in browsers]
        assert set(await asyncio.wait_for(asyncio.gather(*tabs), 10)) == {"superseded"}
        one.kill()
        for user in USERS:
            written[user] |= set(insert(db, user))
        await eventually(complete, 30)
        assert not any(browser.of("reset") for browser in browsers)
        assert not any(tab.done() for tab in newer)
    finally:
        for browser in browsers:
            await browser.close()
