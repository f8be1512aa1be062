"""The real process: how it starts, stops, is killed, and what it holds."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import psutil
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from tests.conftest import ServerProcess, ServerProcessFactory, eventually
from tests.streaming import (
    YEAR_MS,
    Clients,
    Proxy,
    RawStream,
    allow_descriptors,
    end_session,
    insert,
    query,
    sign_in,
    without_rate_limit,
)


@pytest.fixture
async def clients() -> AsyncIterator[Clients]:
    async with Clients() as clients:
        yield clients


def port(process: ServerProcess) -> int:
    number = urlsplit(process.url).port
    assert number is not None
    return number


async def open_live(
    clients: Clients, process: ServerProcess, key: str, *, receive_buffer: int | None = None
) -> RawStream:
    stream = await clients.open(port(process), key, receive_buffer=receive_buffer)
    assert stream.status == 200
    await eventually(lambda: stream.ready)
    return stream


# How it ends


async def test_sigterm_ends_a_thousand_streams_properly(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """On SIGTERM every stream is told, with a last chunk; the process is gone in time, status 0."""
    allow_descriptors(8192)
    keys = sign_in(db, *(f"user-{number}" for number in range(1000)))
    process = await server_process(SSE_LOG_LEVEL="WARNING")
    streams = await clients.open_many(port(process), keys)
    started = time.monotonic()
    process.terminate()
    status = await process.wait(30)
    elapsed = time.monotonic() - started
    assert status == 0, process.stderr
    assert elapsed < 10  # drain_seconds
    await eventually(lambda: all(stream.closed for stream in streams))
    assert {stream.reason for stream in streams} == {"shutdown"}
    retries = [stream.parser.retry or 0 for stream in streams]
    assert all(500 <= retry <= 5_000 for retry in retries)
    assert len(set(retries)) > 500  # they do not all come back at once
    assert process.stderr == ""


async def test_sigterm_does_not_wait_for_a_client_that_does_not_read(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """A client that takes nothing delays the end neither of the others nor of the process."""
    without_rate_limit(db)
    keys = sign_in(db, "alice", "bob")
    process = await server_process(SSE_DRAIN_SECONDS="8")
    stuck = await open_live(clients, process, keys[0], receive_buffer=4096)
    stuck.pause()
    insert(db, "alice", *["x" * 1900] * 4000)
    stream = await open_live(clients, process, keys[1])
    process.terminate()
    await eventually(lambda: stream.reason == "shutdown")
    assert await process.wait(20) == 0


async def test_nothing_is_lost_over_sigkill_and_restart(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """Killed and started again, it serves every client from where that one was."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    received: list[int] = []
    written: list[int] = []
    for _ in range(3):
        process = await server_process()
        cursor = received[-1] if received else None
        stream = await clients.open(port(process), key, last_event_id=cursor)
        await eventually(lambda stream=stream: stream.ready)  # type: ignore[misc]
        for _ in range(10):
            written += insert(db, "alice", "x")
        process.kill()
        written += insert(db, "alice", "nobody is there")
        assert await process.wait() == -9
        await eventually(lambda stream=stream: stream.closed)  # type: ignore[misc]
        assert not stream.complete  # that was not a proper end
        assert not stream.of("reset")
        received += stream.ids
    process = await server_process()
    stream = await clients.open(port(process), key, last_event_id=received[-1])
    await eventually(lambda: stream.ready)
    received += stream.ids
    assert sorted(set(received)) == written


# Two processes


async def test_two_processes_share_a_session(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """Plain streams of one session on two processes: the older ends for good, no chase begins."""
    key, other = sign_in(db, "alice", "alice")
    one, two = await server_process(), await server_process()
    older = await open_live(clients, one, key)
    newer = await open_live(clients, two, key)
    beside = await open_live(clients, one, other)
    await eventually(lambda: older.reason)
    # What an EventSource does now: nothing, for a year.
    assert (older.reason, older.parser.retry) == ("superseded", YEAR_MS)
    ids = insert(db, "alice", "hello")
    await eventually(lambda: newer.ids == beside.ids == ids)
    assert older.ids == []


@pytest.mark.parametrize("how", ["api", "sql", "expiry"])
async def test_a_session_ends_on_another_process(
    server_process: ServerProcessFactory, db: Connection, clients: Clients, how: str
) -> None:
    """Signing out on one process ends the stream on another, as does the end of the row."""
    [key] = sign_in(db, "alice")
    one = await server_process(SSE_PROBE_SECONDS="30")
    stream = await open_live(clients, one, key)
    if how == "api":
        two = await server_process()
        answer = await clients.open(port(two), key, method="DELETE", path="/api/session")
        assert answer.status == 204
    elif how == "sql":
        end_session(db, key)
    else:
        query(db, "UPDATE sessions SET expires_at = clock_timestamp() + interval '0.3 s'")
    await eventually(lambda: stream.reason, 3)
    assert stream.reason == "session_ended"


# What it holds


async def test_closing_a_client_frees_its_descriptor(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """Within a heartbeat of the end of a hundred clients the process holds nothing of them."""
    keys = sign_in(db, *["alice", "bob", "carol", "dave", "eve"] * 20)
    process = await server_process(SSE_HEARTBEAT_SECONDS="1")
    statistics = psutil.Process(process.pid)
    # Once, so that the pool and whatever else stays is there.
    first = await open_live(clients, process, keys[0])
    first.cut()
    before = statistics.num_fds()
    streams = await clients.open_many(port(process), keys)
    assert statistics.num_fds() >= before + 90
    for stream in streams:
        stream.cut()
    await eventually(lambda: process.stderr.count(" closed: ") == 101)
    await eventually(lambda: statistics.num_fds() <= before + 12)  # a fuller pool
    answer = await clients.open(port(process), None, path="/metrics")
    await eventually(lambda: b"sse_streams_lagged_total" in answer.body)
    assert {'sse_streams{state="live"} 0.0', 'sse_streams{state="replaying"} 0.0'} <= set(
        answer.body.decode().splitlines()
    )


async def test_a_client_that_does_not_read_costs_no_memory(
    server_process: ServerProcessFactory, db: Connection, clients: Clients
) -> None:
    """While a client sleeps through 50,000 notifications the process does not grow, others are
    served as before, and when the client reads on it gets every row once."""
    total, batch = 50_000, 100
    without_rate_limit(db)
    slow_key, quick_key, other_key = sign_in(db, "alice", "alice", "bob")
    process = await server_process(SSE_LOG_LEVEL="WARNING", SSE_SLOW_SECONDS="120")
    slow = await open_live(clients, process, slow_key, receive_buffer=4096)
    quick = await open_live(clients, process, quick_key)
    other = await open_live(clients, process, other_key)
    statistics = psutil.Process(process.pid)

    # Warm up: what any load makes the process allocate once.
    warm = insert(db, "alice", *["w" * 200] * 3000)
    await eventually(lambda: slow.ids == quick.ids == warm, 30)
    before = statistics.memory_info().rss
    slow.pause()

    ids: list[int] = []
    his: list[int] = []
    most = 0

    def undisturbed() -> bool:
        return other.ids == his

    for number in range(total // batch):
        # 40 MB in all: much more than the process may grow by.
        ids += await asyncio.to_thread(insert, db, "alice", *["x" * 800] * batch)
        if number % 10 == 0:
            his += insert(db, "bob", "beside")
            await eventually(undisturbed)
            most = max(most, statistics.memory_info().rss)
    await eventually(lambda: len(quick.ids) == len(warm) + total, 30)
    most = max(most, statistics.memory_info().rss)
    assert quick.ids == warm + ids
    assert len(slow.ids) < len(warm) + total // 2
    assert most - before < 30 * 2**20

    slow.resume()
    await eventually(lambda: len(slow.ids) == len(warm) + total, 60)
    assert slow.ids == warm + ids
    await eventually(lambda: slow.ready == 2)
    assert process.stderr == ""


# How it does not start

PASSWORD = "hunter2-f549a4dc"


async def refused(server_process: ServerProcessFactory, database_url: str) -> str:
    """Start it with this DATABASE_URL; returns the one sentence that it says."""
    process = await server_process(wait=False, DATABASE_URL=database_url, SSE_DEMO=None)
    assert await process.wait(30) == 2
    assert "listening" not in process.stdout
    assert PASSWORD not in process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    [sentence] = [line for line in process.stderr.splitlines() if line.startswith("sse-server:")]
    assert process.stderr.splitlines() == [sentence]
    return sentence


@pytest.mark.parametrize(
    "database_url",
    [
        f"postgresql://alice:{PASSWORD}@[::1/x",
        f"postgresql://alice:{PASSWORD}@127.0.0.1:port/x",
        f"password={PASSWORD} nonsense",
        f"host=127.0.0.1 passwort={PASSWORD}",
    ],
)
async def test_a_database_url_that_is_none(
    server_process: ServerProcessFactory, database_url: str
) -> None:
    """A DATABASE_URL that cannot be read is one sentence that names it, and exit status 2."""
    assert "DATABASE_URL" in await refused(server_process, database_url)


async def test_a_database_that_refuses(server_process: ServerProcessFactory) -> None:
    """A database that nobody serves is one sentence and exit status 2."""
    sentence = await refused(server_process, f"postgresql://alice:{PASSWORD}@127.0.0.1:1/x")
    assert "refused" in sentence


@pytest.fixture
def guarded(dsn: str, db: Connection) -> Iterator[str]:
    """A role that needs a password, in spite of the cluster's trust."""
    role = f"guarded_{secrets.token_hex(4)}"
    [(hba_file,)] = query(db, "SHOW hba_file")
    query(db, f"CREATE ROLE {role} LOGIN PASSWORD 'another'")
    with open(hba_file, encoding="utf-8") as file:  # noqa: PTH123
        before = file.read()

    def write(text: str) -> None:
        with open(hba_file, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        query(db, "SELECT pg_reload_conf()")

    write(f"local all {role} scram-sha-256\n{before}")
    yield role
    write(before)
    query(db, f"DROP ROLE {role}")


async def test_a_password_that_is_wrong(
    server_process: ServerProcessFactory, dsn: str, guarded: str
) -> None:
    """A wrong password is one sentence without the password, and exit status 2."""
    parameters = parse_dsn(dsn)
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        sentence = await refused(
            server_process,
            f"postgresql://{guarded}:{PASSWORD}@127.0.0.1:{proxy.port}/{parameters['dbname']}",
        )
    assert "password" in sentence


async def test_a_database_that_does_not_exist(
    server_process: ServerProcessFactory, dsn: str
) -> None:
    """A database that is not there is one sentence and exit status 2."""
    parameters = parse_dsn(dsn)
    sentence = await refused(
        server_process,
        f"postgresql://postgres@/nowhere?host={parameters['host']}&port={parameters['port']}",
    )
    assert "nowhere" in sentence
