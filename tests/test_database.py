"""Connections: whatever the network or the server does, the answer is an error of ours, soon."""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil
import psycopg2
import pytest
from psycopg2.extensions import connection as RawConnection  # noqa: N812

from sse_server.database import Database, connect, load_queries
from sse_server.embedded import EmbeddedPostgres
from sse_server.errors import ConfigurationError, DatabaseError, DatabaseUnavailable
from sse_server.tasks import cancel_and_wait
from tests.conftest import connect as connect_directly
from tests.conftest import eventually
from tests.listener import fetch

PID = "SELECT pg_backend_pid()"

MakeDatabase = Callable[..., Database]


@pytest.fixture
async def make(dsn: str) -> AsyncIterator[MakeDatabase]:
    """Build one on the test's database, closed at the end; its name there is unique."""
    made = []

    def build(dsn: str = dsn, size: int = 3, **timeouts: Any) -> Database:
        database = Database(
            dsn,
            size=size,
            application_name=f"test {secrets.token_hex(4)}",
            **{"connect_timeout": 5.0, "query_timeout": 10.0} | timeouts,
        )
        made.append(database)
        return database

    yield build
    for database in made:
        await database.close()


@pytest.fixture
async def loop_errors() -> list[dict[str, Any]]:
    """What the event loop's exception handler is called with."""
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    return errors


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """All numbers below 1,024 are taken: select() cannot be asked about what is opened now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if wanted < 2048:
        pytest.skip("fewer than 2,048 descriptors are allowed: raise the hard limit (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < 1024:
        taken.append(os.dup(taken[0]))
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said, like a host that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def backends(db: RawConnection, database: Database) -> list[int]:
    rows = fetch(
        db,
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s",
        database._application_name,
    )
    return [row[0] for row in rows]


async def running(db: RawConnection, database: Database, count: int = 1) -> list[int]:
    """Wait until so many of its connections are in pg_sleep(); return their processes."""
    statement = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND wait_event = 'PgSleep'"
    )

    def look() -> list[int]:
        rows = fetch(db, statement, database._application_name)
        return [row[0] for row in rows] if len(rows) >= count else []

    return await eventually(look)


# Queries


def test_load_queries(tmp_path: Path) -> None:
    """A file of queries is taken apart by their names; what stands before the first is none."""
    path = tmp_path / "queries.sql"
    path.write_text("-- Heading\n\n-- name: one\nSELECT 1;\n\n-- name: two\nSELECT\n  2\n")
    assert load_queries(path) == {"one": "SELECT 1", "two": "SELECT\n  2"}


async def test_fetch(make: MakeDatabase) -> None:
    """A statement answers with its rows, or with none if it has none."""
    database = make()
    assert await database.fetch("SELECT %s + 1, %s", (41, "ü")) == [(42, "ü")]
    assert await database.fetch("SELECT %(a)s", {"a": None}) == [(None,)]
    assert await database.fetch("SET TIME ZONE 'UTC'") == []
    assert await database.fetch_one("SELECT 1") == (1,)
    assert database.in_use == 0


async def test_refusal(make: MakeDatabase, dsn: str) -> None:
    """A refusal tells the SQLSTATE, the reason and the hint, and the connection is kept."""
    database = make(size=1)
    before = await database.fetch(PID)
    with pytest.raises(DatabaseError, match="division by zero") as refused:
        await database.fetch("SELECT 1 / 0")
    assert not isinstance(refused.value, DatabaseUnavailable)
    assert refused.value.sqlstate == "22012"
    with pytest.raises(DatabaseError, match=r"unknown event type 'x' \(Known event types: new_m"):
        await database.fetch("SELECT notify_user('ada', 'x', 'hello')")
    with pytest.raises(DatabaseError) as refused:
        await database.fetch("INSERT INTO settings VALUES (true, 4242)")
    assert "4242" not in str(refused.value)
    assert await database.fetch(PID) == before


NOT_NOW = ("53300", "57P03", "40P01", "25006")  # connections, starting up, deadlock, a standby
NOT_LIKE_THIS = ("23505", "42P01", "SR429")


async def test_not_now_or_not_like_this(make: MakeDatabase) -> None:
    """What may go better later is told apart from what never will."""
    database = make()
    for sqlstate in (*NOT_NOW, *NOT_LIKE_THIS):
        with pytest.raises(DatabaseError) as refused:
            await database.fetch(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$")
        assert refused.value.sqlstate == sqlstate
        assert isinstance(refused.value, DatabaseUnavailable) is (sqlstate in NOT_NOW)


async def test_statement_timeout(
    make: MakeDatabase, dsn: str, loop_errors: list[dict[str, Any]]
) -> None:
    """A query that the server cancels is an error; the caller's task is not cancelled by it."""
    database = make(f"{dsn}&options=-cstatement_timeout%3D100", size=1)
    before = await database.fetch(PID)
    with pytest.raises(DatabaseUnavailable) as failed:
        await database.fetch("SELECT pg_sleep(10)")
    assert failed.value.sqlstate == "57014"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await database.fetch(PID) == before
    assert len(loop_errors) <= 1


async def test_query_cancelled_by_an_operator(
    make: MakeDatabase, db: RawConnection, loop_errors: list[dict[str, Any]]
) -> None:
    """pg_cancel_backend() is an error for the caller, whose task goes on."""
    database = make(size=1)
    query = asyncio.create_task(database.fetch("SELECT pg_sleep(10)"))
    (pid,) = await running(db, database)
    fetch(db, "SELECT pg_cancel_backend(%s)", pid)
    with pytest.raises(DatabaseUnavailable):
        await query
    assert query.cancelling() == 0
    assert await database.fetch(PID) == [(pid,)]


async def test_query_timeout(make: MakeDatabase) -> None:
    """A query that outlives its time fails, and its connection is not used again."""
    database = make(size=1, query_timeout=0.5)
    before = await database.fetch(PID)
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match=r"did not answer within 0\.5 s"):
        await database.fetch("SELECT pg_sleep(10)")
    assert time.monotonic() - started < 5
    assert await database.fetch(PID) != before
    assert database.in_use == 0


async def test_pool_is_busy(make: MakeDatabase) -> None:
    """Who gets no connection in time is told so, and the next one may have more luck."""
    database = make(size=1, query_timeout=0.3)
    async with database._acquire():
        with pytest.raises(DatabaseUnavailable, match="all database connections are busy"):
            await database.fetch("SELECT 1")
    assert await database.fetch("SELECT 1") == [(1,)]


async def test_cancelled_task(make: MakeDatabase, db: RawConnection) -> None:
    """A cancelled task ends as cancelled, its connection is closed and the pool goes on."""
    database = make(size=1)
    query = asyncio.create_task(database.fetch("SELECT pg_sleep(1)"))
    (pid,) = await running(db, database)
    await cancel_and_wait(query)
    assert query.cancelled()
    assert database.in_use == 0
    assert await database.fetch(PID) != [(pid,)]


async def test_cancelled_at_any_moment(make: MakeDatabase, db: RawConnection) -> None:
    """Whenever tasks are cancelled, no place in the pool is lost and none is given twice."""
    database = make(size=2)
    for turns in range(40):
        tasks = [asyncio.create_task(database.fetch("SELECT 1")) for _ in range(4)]
        for _ in range(turns):
            await asyncio.sleep(0)
        await cancel_and_wait(*tasks)
        assert all(task.cancelled() or task.result() == [(1,)] for task in tasks)
    assert database.in_use == 0
    assert len(await asyncio.gather(*(database.fetch(PID) for _ in range(8)))) == 8
    await eventually(lambda: len(backends(db, database)) <= 2)


# Lost connections


async def test_terminated(
    make: MakeDatabase, db: RawConnection, loop_errors: list[dict[str, Any]]
) -> None:
    """After a restart of the database, which ends every pooled connection, the next query works."""
    database = make()
    await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(3)))
    pids = backends(db, database)
    assert len(pids) == 3
    # No turn of the loop between the loss and the query: nothing has been noticed yet.
    fetch(db, "SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", pids)
    assert await database.fetch("SELECT 1") == [(1,)]
    assert len(await asyncio.gather(*(database.fetch("SELECT 1") for _ in range(9)))) == 9
    assert not set(backends(db, database)) & set(pids)
    assert loop_errors == []


async def test_terminated_in_a_query(make: MakeDatabase, db: RawConnection) -> None:
    """A statement whose connection is lost is run again, but not one that must not run twice."""
    database = make()
    for retry in (True, False):
        query = asyncio.create_task(
            database.fetch("SELECT pg_backend_pid() FROM pg_sleep(0.5)", retry=retry)
        )
        (pid,) = await running(db, database)
        fetch(db, "SELECT pg_terminate_backend(%s, 5000)", pid)
        if retry:
            assert await query != [(pid,)]
        else:
            with pytest.raises(DatabaseUnavailable, match="connection to the database was lost"):
                await query


async def test_terminated_with_many_descriptors(
    make: MakeDatabase,
    db: RawConnection,
    many_descriptors: None,
    loop_errors: list[dict[str, Any]],
) -> None:
    """A loss is noticed, once, when the descriptors are beyond what select() takes."""
    database = make()
    listening = await database.connect()
    assert listening.fileno() >= 1024
    notified = asyncio.create_task(listening.notified())
    await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(3)))
    idle = list(database._idle)
    assert len(idle) == 3
    assert all(connection.fileno() >= 1024 for connection in idle)
    pids = backends(db, database)
    assert len(pids) == 4
    fetch(db, "SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", pids)
    with pytest.raises(DatabaseUnavailable, match="LISTEN connection was lost"):
        await asyncio.wait_for(notified, 5)
    await eventually(lambda: all(connection.closed for connection in idle))
    assert await database.fetch("SELECT 1") == [(1,)]
    for _ in range(100):  # turns in which the loop would spin
        await asyncio.sleep(0)
    assert loop_errors == []
    # And when the next query is the first to notice.
    fetch(
        db,
        "SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid",
        backends(db, database),
    )
    assert await database.fetch("SELECT 1") == [(1,)]
    assert loop_errors == []


async def test_closing_twice(make: MakeDatabase) -> None:
    """Closing again does nothing to the socket that has the descriptor's number by then."""
    connection = await make().connect()
    number = connection.fileno()
    connection.close()
    # Others take the number.
    pairs = [socket.socketpair()]
    while all(end.fileno() != number for end in pairs[-1]):
        pairs.append(socket.socketpair())
    ours, theirs = sorted(pairs[-1], key=lambda end: end.fileno() != number)
    reader, writer = await asyncio.open_connection(sock=ours)
    connection.close()
    theirs.sendall(b"still heard\n")
    assert await asyncio.wait_for(reader.readline(), 5) == b"still heard\n"
    writer.close()
    await writer.wait_closed()
    for pair in pairs:
        for end in pair:
            end.close()


# The pool


async def test_pool_keeps_its_size(make: MakeDatabase, db: RawConnection) -> None:
    """However many ask, connections are reused, and never more than the pool's size."""
    database = make(size=3)

    async def ask() -> int:
        (pid,) = await database.fetch_one("SELECT pg_backend_pid() FROM pg_sleep(0.01)")
        assert 0 <= database.in_use < 3
        return int(pid)

    pids = await asyncio.gather(*(ask() for _ in range(30)))
    assert len(set(pids)) == 3
    assert len(backends(db, database)) == 3
    assert {await ask() for _ in range(5)} <= set(pids)
    assert database.in_use == 0


async def test_pool_keeps_its_size_after_a_loss(make: MakeDatabase, db: RawConnection) -> None:
    """A query that is run again on a fresh connection does not let the pool grow."""
    database = make(size=2)
    lost = asyncio.create_task(database.fetch("SELECT pg_sleep(1)"))
    (pid,) = await running(db, database)
    other = asyncio.create_task(database.fetch("SELECT pg_sleep(1)"))
    await running(db, database, 2)
    waiting = [asyncio.create_task(database.fetch("SELECT pg_sleep(0.1)")) for _ in range(6)]
    await asyncio.sleep(0)
    fetch(db, "SELECT pg_terminate_backend(%s, 5000)", pid)
    await asyncio.gather(lost, other, *waiting)
    assert len(database._idle) <= 2
    await eventually(lambda: len(backends(db, database)) <= 2)


async def test_close(make: MakeDatabase, db: RawConnection) -> None:
    """Closing the pool closes what is idle at once, and the rest when it comes back."""
    database = make()
    await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(2)))
    last = asyncio.create_task(database.fetch("SELECT pg_sleep(0.3)"))
    await running(db, database)
    await database.close()
    await eventually(lambda: len(backends(db, database)) == 1)
    await last
    await eventually(lambda: not backends(db, database))


# Connecting


async def told(connecting: Awaitable[Any]) -> str:
    """How connecting fails: its sentence, and all that a log would show of it."""
    with pytest.raises((DatabaseUnavailable, ConfigurationError)) as failed:
        await connecting
    trace = traceback.format_exception(failed.value)
    assert not any("hunter2" in line or "passw0rd" in line for line in trace), trace
    sentence = str(failed.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    "dsn, sentence",
    [
        ("postgresql://ada:hunter2passw0rd@127.0.0.1:1/db", "Connection refused"),
        ("host=127.0.0.1 port=1 user=ada password='hunter2 passw0rd'", "Connection refused"),
        # As people write them who do not percent-encode.
        ("postgresql://ada:hunter2@passw0rd@127.0.0.1/db", "percent-encoded"),
        ("postgresql://ada:hunter2/passw0rd@127.0.0.1/db", "percent-encoded"),
        ("postgresql://ada:hunter2%zzpassw0rd@127.0.0.1/db", "not a valid"),
        ("postgresql://ada:hunter2 passw0rd@127.0.0.1:x/db", "percent-encoded"),
        ("host=127.0.0.1 password=hunter2 passw0rd", "not a valid"),
        ("hunter2passw0rd", "not a valid"),
        ("postgresql://ada:hunter2passw0rd@127.0.0.1:1/db?sslmode=x", 'sslmode value: "x"'),
        ("postgresql://ada:hunter2passw0rd@127.0.0.1:1/db?nonsense=1", "not a valid"),
        ("postgresql://ada:hunter2passw0rd@127.0.0.1:99999/db", "port number"),
        ("postgresql://ada:hunter2passw0rd@/db?host=/nonexistent", "No such file or directory"),
    ],
)
async def test_wrong_dsn(dsn: str, sentence: str) -> None:
    """A DSN that is wrong or leads nowhere is said to be in one sentence without the password."""
    connecting = connect(dsn, connect_timeout=5, query_timeout=5, application_name="test")
    assert sentence in await told(connecting)


async def test_no_such_database(make: MakeDatabase, dsn: str) -> None:
    """A database or a role that does not exist is named."""
    missing = dsn.replace("/test_", "/missing_")
    assert 'database "missing_' in await told(make(missing).fetch("SELECT 1"))
    assert 'role "nobody' in await told(
        make(dsn.replace("//postgres@", "//nobody_here:hunter2@")).fetch("SELECT 1")
    )


@pytest.fixture
def locked_role(cluster: EmbeddedPostgres, db: RawConnection) -> Iterator[str]:
    """A role that has to give its password, which is "right"."""
    role = f"locked_{secrets.token_hex(4)}"
    fetch(db, f"CREATE ROLE {role} LOGIN PASSWORD 'right'")
    path = Path(fetch(db, "SHOW hba_file")[0][0])
    before = path.read_text()
    path.write_text(f"local all {role} scram-sha-256\n{before}")
    fetch(db, "SELECT pg_reload_conf()")
    yield role
    path.write_text(before)
    fetch(db, "SELECT pg_reload_conf()")
    fetch(db, f"DROP ROLE {role}")


async def test_wrong_password(make: MakeDatabase, dsn: str, locked_role: str) -> None:
    """A wrong password is said to be wrong, and not what it was."""
    none = dsn.replace("//postgres@", f"//{locked_role}@")

    def asks() -> bool:  # once the server has read its file again
        try:
            connect_directly(none).close()
        except psycopg2.OperationalError:
            return True
        return False

    await eventually(asks)
    assert "no password supplied" in await told(make(none).fetch("SELECT 1"))
    wrong = dsn.replace("//postgres@", f"//{locked_role}:hunter2@")
    assert "password authentication failed" in await told(make(wrong).fetch("SELECT 1"))
    right = dsn.replace("//postgres@", f"//{locked_role}:right@")
    assert await make(right).fetch("SELECT 1") == [(1,)]


def hosts(dsn: str, *before: tuple[str, str]) -> str:
    """A DSN with other hosts and ports in front of its own."""
    parts = urlsplit(dsn)
    own = parse_qs(parts.query)
    pairs = [*before, (own["host"][0], own["port"][0])]
    return (
        f"host={','.join(host for host, _ in pairs)} port={','.join(port for _, port in pairs)} "
        f"user=postgres dbname={parts.path[1:]}"
    )


async def test_several_hosts(make: MakeDatabase, dsn: str, silent_port: int) -> None:
    """Of several hosts the first that works is taken, whatever those before it do."""
    several = hosts(dsn, ("127.0.0.1", "1"), ("/nonexistent", ""), ("127.0.0.1", str(silent_port)))
    started = time.monotonic()
    assert await make(several, connect_timeout=0.3).fetch("SELECT 1") == [(1,)]
    assert time.monotonic() - started < 5


async def test_writable_host(make: MakeDatabase, dsn: str, db: RawConnection) -> None:
    """With target_session_attrs=read-write, a host that is read-only is passed over."""
    (name,) = fetch(db, "SELECT current_database()")[0]
    fetch(db, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert await make(dsn).fetch("SELECT 1") == [(1,)]
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        await make(f"{dsn}&target_session_attrs=read-write").fetch("SELECT 1")
    fetch(db, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert await make(f"{dsn}&target_session_attrs=read-write").fetch("SELECT 1") == [(1,)]


async def test_a_host_that_is_no_primary_any_more(make: MakeDatabase) -> None:
    """A connection that has become read-only is given up, and the statement run on another one."""
    database = make(size=1)
    await database.fetch("SET default_transaction_read_only = on")
    [(pid,)] = await database.fetch(PID)
    assert await database.fetch("CREATE TABLE t AS SELECT pg_backend_pid()") == []
    [(other,)] = await database.fetch("SELECT * FROM t")
    assert other != pid


async def test_silent_host(make: MakeDatabase, silent_port: int) -> None:
    """A host that never answers is given up in time, and holds up nobody else meanwhile."""
    database = make(f"postgresql://ada@127.0.0.1:{silent_port}/db", connect_timeout=0.3)
    started = time.monotonic()
    results = await asyncio.gather(
        *(database.fetch("SELECT 1") for _ in range(3)), return_exceptions=True
    )
    assert time.monotonic() - started < 3
    assert {str(result) for result in results} == {
        "the database did not accept a connection within 0.3 s"
    }
    assert database.in_use == 0


async def test_cancelled_while_connecting(silent_port: int) -> None:
    """Cancelling while a connection is made closes it."""
    before = psutil.Process().num_fds()
    connecting = asyncio.create_task(
        connect(
            f"postgresql://ada@127.0.0.1:{silent_port}/db",
            connect_timeout=60,
            query_timeout=60,
            application_name="test",
        )
    )
    for _ in range(10):
        await asyncio.sleep(0)
    await cancel_and_wait(connecting)
    assert connecting.cancelled()
    assert psutil.Process().num_fds() == before


async def test_names_itself(make: MakeDatabase, db: RawConnection) -> None:
    """An operator sees in pg_stat_activity whose connection it is."""
    database = make()
    assert await database.fetch("SHOW application_name") == [(database._application_name,)]
    feed = await database.connect("the feed")
    assert await feed.fetch("SHOW application_name") == [("the feed",)]
    feed.close()


# LISTEN


async def test_notifications_keep_their_order(make: MakeDatabase, db: RawConnection) -> None:
    """Payloads come in the order of their commits, awaited or not, and queries do not lose any."""
    connection = await make().connect()
    await connection.fetch("LISTEN c")
    assert connection.notified_nowait() is None
    for number in range(50):
        fetch(db, f"NOTIFY c, '{number}'")
    await connection.fetch("SELECT 1")
    received = [await asyncio.wait_for(connection.notified(), 5)]
    while (payload := connection.notified_nowait()) is not None:
        received.append(payload)
    while len(received) < 50:
        received.append(await asyncio.wait_for(connection.notified(), 5))
    assert received == [str(number) for number in range(50)]
    waiting = asyncio.create_task(connection.notified())
    await asyncio.sleep(0)
    connection.close()
    with pytest.raises(DatabaseUnavailable):
        await waiting


async def test_script(make: MakeDatabase, db: RawConnection) -> None:
    """A script is run as it is, percent signs included, and leaves no connection behind."""
    database = make()
    await database.execute_script(
        "CREATE TABLE t AS SELECT '100 %s' AS a; INSERT INTO t VALUES (1)"
    )
    assert fetch(db, "SELECT a FROM t") == [("100 %s",), ("1",)]
    await eventually(lambda: not backends(db, database))
    with pytest.raises(DatabaseError, match="division by zero"):
        await database.execute_script("SELECT 1; SELECT 1 / 0")
