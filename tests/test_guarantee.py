"""Every notification that commits reaches its user, whatever the order of commits."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.embedded import EmbeddedPostgres
from sse_server.snapshot import Snapshot
from tests.conftest import ROOT, SettingsFactory, connect, eventually, execute
from tests.streaming import (
    Node,
    Proxy,
    RawStream,
    insert,
    query,
    running,
    sign_in,
    without_rate_limit,
)

WRITERS = 12
ROWS = 2400
USERS = [f"user-{number}" for number in range(8)]
END = "the end"

# The cursor that everybody writes first. What the client has acknowledged is the id, so that is
# where it goes on.
NAIVE_CURSOR = (
    "(a.horizon || ':' || a.horizon || ':')::pg_snapshot",
    "AND id > q.after_id AND",
    "AND id > greatest(q.after_id, q.cursor) AND",
)


class Writers:
    """Backends whose transactions commit late, in another order than that of their ids, or not."""

    def __init__(self, dsn: str, seed: int) -> None:
        self._dsn = dsn
        self._lock = threading.Lock()
        self._left = ROWS
        self._threads = [
            threading.Thread(target=self._write, args=(random.Random(seed + number),))
            for number in range(WRITERS)
        ]
        self.failures: list[Exception] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _take(self, count: int) -> bool:
        with self._lock:
            self._left -= count
            return self._left > -count

    def _write(self, rng: random.Random) -> None:
        try:
            connection = psycopg2.connect(self._dsn)
            try:
                while self._transaction(connection, rng):
                    pass
            finally:
                connection.close()
        except Exception as exc:  # noqa: BLE001
            self.failures.append(exc)

    def _transaction(self, connection: Connection, rng: random.Random) -> bool:
        rolled_back = rng.random() < 0.15
        recipients = rng.choices(USERS, k=rng.randint(1, 4))
        if not rolled_back and not self._take(len(recipients)):
            return False
        with connection.cursor() as cursor:
            for user_id in recipients:
                cursor.execute(
                    "INSERT INTO notifications (user_id, event_type, message) "
                    "VALUES (%s, 'new_message', %s)",
                    (user_id, f"for {user_id}"),
                )
                if rng.random() < 0.5:  # what a backend does between its statements
                    cursor.execute("SELECT pg_sleep(%s)", (rng.expovariate(1 / 0.008),))
        if rolled_back:
            connection.rollback()
        else:
            connection.commit()
        return True


class Restless:
    """A client that has hardly connected when its line breaks, and comes back with its cursor."""

    def __init__(self, node: Node, user_id: str, key: str, rng: random.Random) -> None:
        self._node = node
        self._user_id = user_id
        self._key = key
        self._rng = rng
        self.received: list[int] = []
        self.connections = 0

    async def run(self) -> None:
        ended = False
        while not ended:
            last_id = self.received[-1] if self.received else None
            stream = await self._node.open(self._key, last_event_id=last_id)
            self.connections += 1
            ended = await self._listen(stream, self._rng.randint(1, 16))
            assert not stream.of("reset")
            assert len(set(stream.ids)) == len(stream.ids), "a stream repeated a notification"
            for event in stream.of("notification"):
                assert event.json["message"] in (f"for {self._user_id}", END)
            self.received += stream.ids

    @staticmethod
    async def _listen(stream: RawStream, enough: int) -> bool:
        """Receive some rows, then break; returns whether it had the last row of all."""

        def had_the_end() -> bool:
            return any(event.json["message"] == END for event in stream.of("notification"))

        await eventually(lambda: len(stream.of("notification")) >= enough or had_the_end(), 120)
        stream.cut()
        await eventually(lambda: stream.closed)
        return had_the_end()


async def commit_and_reconnect(node: Node, db: Connection, dsn: str) -> dict[str, Restless]:
    """Let the writers write and the clients break, to the end of both."""
    without_rate_limit(db)
    writers = Writers(dsn, seed=1)
    clients = {
        user_id: Restless(node, user_id, key, random.Random(number))
        for number, (user_id, key) in enumerate(zip(USERS, sign_in(db, *USERS), strict=True))
    }
    tasks = [asyncio.create_task(client.run()) for client in clients.values()]
    writers.start()
    try:
        await eventually(lambda: not writers.running, 120)
        for user_id in USERS:
            insert(db, user_id, END)
        await asyncio.gather(*tasks)
    finally:
        writers.join()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert writers.failures == []
    return clients


def committed(db: Connection) -> dict[str, dict[int, tuple[int, int]]]:
    """For each user: id → (xact, horizon)."""
    rows = query(
        db, "SELECT user_id, id, xact::text::bigint, horizon::text::bigint FROM notifications"
    )
    assert len(rows) >= 2000 + len(USERS)
    users: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for user_id, id, xact, horizon in rows:
        users[user_id][id] = (xact, horizon)
    return users


def uncovered(received: list[int], rows: dict[int, tuple[int, int]]) -> list[int]:
    """The rows that came although one that they cover had not come yet.

    A cursor at such a row would lose the other one, whether or not the line breaks just then.
    """
    missing: Iterator[tuple[int, int]] = iter(sorted((rows[id][0], id) for id in rows))
    oldest = next(missing, None)
    had: set[int] = set()
    found = []
    for id in received:
        had.add(id)
        while oldest is not None and oldest[1] in had:
            oldest = next(missing, None)
        if oldest is not None and oldest[0] < rows[id][1]:
            found.append(id)
    return found


@pytest.mark.timeout(300)
async def test_nothing_is_lost_under_commit_reordering(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """Clients that reconnect all the time receive exactly what was committed for them."""
    async with running(settings(api_calls_per_minute=0, replay_page_rows=5)) as node:
        clients = await commit_and_reconnect(node, db, dsn)
    rows = committed(db)
    for user_id, client in clients.items():
        assert set(client.received) == set(rows[user_id])
        assert uncovered(client.received, rows[user_id]) == []
        assert client.connections > 20


@pytest.mark.timeout(300)
async def test_an_id_as_the_cursor_loses_notifications(
    settings: SettingsFactory,
    db: Connection,
    dsn: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The harness above would see a loss: with ``id > last_id`` for the cursor there is one."""
    async with running(settings(api_calls_per_minute=0, replay_page_rows=5)) as node:
        statement = node.store._q["replay"]
        horizon, after, naive = NAIVE_CURSOR
        assert horizon in statement
        assert after in statement
        node.store._q["replay"] = statement.replace(horizon, "NULL").replace(after, naive)
        clients = await commit_and_reconnect(node, db, dsn)
    rows = committed(db)
    lost = sum(len(set(rows[user]) - set(client.received)) for user, client in clients.items())
    record_property("lost", lost)
    print(f"id > last_id lost {lost} of {sum(map(len, rows.values()))} rows")
    assert lost > 0


# Another cluster


def dump(postgres: EmbeddedPostgres, database: str) -> bytes:
    command = [str(postgres.psql.with_name("pg_dump")), "--dbname", postgres.dsn(database)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def restore(postgres: EmbeddedPostgres, database: str, script: bytes) -> None:
    subprocess.run(
        [postgres.psql, "-Xq", "-v", "ON_ERROR_STOP=1", "-d", postgres.dsn(database)],
        check=True,
        capture_output=True,
        input=script,
    )


def counter(db: Connection) -> int:
    [(xmax,)] = query(db, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    return int(xmax)


def burn(db: Connection, count: int) -> None:
    """Use up transaction ids; each block with a handler that fails is one."""
    query(
        db,
        f"DO $$ BEGIN FOR i IN 1..{count} LOOP BEGIN "
        "INSERT INTO settings VALUES (true); EXCEPTION WHEN unique_violation THEN END; "
        "END LOOP; END $$",
    )


async def test_a_cursor_survives_a_restore_into_another_cluster(
    settings: SettingsFactory, db: Connection, cluster: EmbeddedPostgres, public_dir: Path
) -> None:
    """After pg_dump and a restore where the transaction counter is lower, a client that comes back
    with its old cursor gets every row inserted since."""
    [key] = sign_in(db, "alice")
    burn(db, 8_000)
    async with running(settings(api_calls_per_minute=0)) as node:
        stream = await node.open_live(key)
        late = connect(db.dsn)
        late.autocommit = False
        ids = [insert(db, "alice", "old")[0] for _ in range(3)]
        insert(late, "alice", "rolled back")
        ids += insert(db, "alice", "newer than an open transaction")
        late.close()
        await eventually(lambda: stream.ids == ids)
    old_counter = counter(db)
    [(database,)] = query(db, "SELECT current_database()")

    fresh = EmbeddedPostgres(public_dir / "fresh", options={"fsync": "off"})
    try:
        dsn = await asyncio.to_thread(fresh.start)
        restore(fresh, "sse", dump(cluster, database))
        restored = connect(dsn)
        try:
            assert counter(restored) < old_counter - 4_000
            async with running(settings(api_calls_per_minute=0, database_url=dsn)) as node:
                new = insert(restored, "alice", "new", "new")
                for cursor in ids:
                    stream = await node.open_live(key, last_event_id=cursor)
                    assert not stream.of("reset")
                    assert set(new) <= set(stream.ids)
                    assert len(set(stream.ids)) == len(stream.ids)
                # Live again, and after that with a cursor of the new cluster's.
                new += insert(restored, "alice", "live")
                await eventually(lambda: stream.ids[-1] == new[-1])
                again = await node.open_live(key, last_event_id=new[-1])
                assert not set(again.ids) & set(ids)
        finally:
            restored.close()
    finally:
        await asyncio.to_thread(fresh.stop)


async def test_streams_survive_a_restore_into_another_cluster(
    settings: SettingsFactory, db: Connection, cluster: EmbeddedPostgres, public_dir: Path
) -> None:
    """Streams that stay open while the database is replaced by a restored one get what is new."""
    keys = sign_in(db, "alice", "bob")
    burn(db, 8_000)
    insert(db, "alice", "old")
    [(database,)] = query(db, "SELECT current_database()")
    fresh = EmbeddedPostgres(public_dir / "fresh", options={"fsync": "off"})
    try:
        new_dsn = await asyncio.to_thread(fresh.start)
        paths = [
            "{host}/.s.PGSQL.{port}".format(**parse_dsn(dsn))
            for dsn in (cluster.dsn(database), new_dsn)
        ]
        restore(fresh, "sse", dump(cluster, database))
        restored = connect(new_dsn)
        async with Proxy(paths[0]) as proxy:
            # One name for both, as after a failover.
            url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{database}"
            async with running(settings(api_calls_per_minute=0, database_url=url)) as node:
                alice, bob = [await node.open_live(key) for key in keys]
                await proxy.refuse()
                restored.close()
                execute(fresh.dsn("postgres"), f"ALTER DATABASE sse RENAME TO {database}")
                restored = connect(fresh.dsn(database))
                new = insert(restored, "alice", "new")
                proxy.lead_to(paths[1])
                await proxy.accept()
                await eventually(lambda: new[0] in alice.ids)
                new += insert(restored, "bob", "live")
                await eventually(lambda: bob.ids == new[1:])
                assert not alice.closed
        restored.close()
    finally:
        await asyncio.to_thread(fresh.stop)


def transaction_id(db: Connection) -> int:
    [(xact,)] = query(db, "SELECT pg_current_xact_id()::text::bigint")
    return int(xact)


@pytest.mark.timeout(180)
async def test_ids_that_a_crash_forgets_may_be_used_again(
    settings: SettingsFactory, public_dir: Path
) -> None:
    """Transactions that left nothing on the disk give their ids to others after a crash; a feed
    and streams that have seen them used still get the rows of those others."""
    options = {"fsync": "off", "wal_writer_delay": "10s"}
    postgres = EmbeddedPostgres(public_dir / "forgetful", options=options)
    try:
        dsn = await asyncio.to_thread(postgres.start)
        execute(dsn, (ROOT / "schema.sql").read_text(encoding="utf-8"))
        async with Proxy("{host}/.s.PGSQL.{port}".format(**parse_dsn(dsn))) as proxy:
            url = f"postgresql://postgres@127.0.0.1:{proxy.port}/sse"
            async with running(settings(database_url=url, probe_seconds=0.05)) as node:
                db = connect(dsn)
                without_rate_limit(db)
                [key] = sign_in(db, "alice")
                stream = await node.open_live(key)
                insert(db, "alice", "before")
                db.autocommit = False
                forgotten = 0
                for _ in range(6):
                    insert(db, "alice", "never")
                    forgotten = transaction_id(db)
                    db.rollback()
                db.autocommit = True
                sweeps = 0
                advance = node.hub.advance

                def counted(snapshot: Snapshot) -> None:
                    nonlocal sweeps
                    sweeps += 1
                    advance(snapshot)

                node.hub.advance = counted  # type: ignore[method-assign]
                await eventually(lambda: sweeps >= 2)  # the second began after the last rollback
                await proxy.refuse()
                await asyncio.to_thread(postgres.crash)
                await asyncio.to_thread(postgres.restart)
                db.close()
                db = connect(dsn)
                ids = [insert(db, "alice", f"after {n}")[0] for n in range(10)]
                [(first,)] = query(
                    db, "SELECT xact::text::bigint FROM notifications WHERE id = %s", ids[0]
                )
                assert first <= forgotten, "no id has been used again: this tests nothing"
                await proxy.accept()
                await eventually(lambda: set(ids) <= set(stream.ids), 60)
                db.close()
    finally:
        await asyncio.to_thread(postgres.stop)


@pytest.mark.timeout(180)
async def test_streams_survive_a_failover_that_lost_rows(
    settings: SettingsFactory, public_dir: Path
) -> None:
    """A standby that had not got everything gives the ids of lost transactions to others. What it
    has lost is lost; streams that stay open get everything that it commits."""
    primary = EmbeddedPostgres(public_dir / "primary", options={"fsync": "off"})
    standby = EmbeddedPostgres(public_dir / "standby", options={"fsync": "off"})
    try:
        dsn = await asyncio.to_thread(primary.start)
        execute(dsn, (ROOT / "schema.sql").read_text(encoding="utf-8"))
        db = connect(dsn)
        without_rate_limit(db)
        [key] = sign_in(db, "alice")
        insert(db, "alice", "on both")
        db.close()
        await asyncio.to_thread(primary.stop)
        # What a standby is that was cut off here; cp keeps the owners, whoever runs this.
        copy = ["cp", "-a", str(public_dir / "primary"), str(public_dir / "standby")]
        await asyncio.to_thread(subprocess.run, copy, check=True)
        dsn = await asyncio.to_thread(primary.start)
        standby_dsn = await asyncio.to_thread(standby.start)
        paths = ["{host}/.s.PGSQL.{port}".format(**parse_dsn(each)) for each in (dsn, standby_dsn)]
        async with Proxy(paths[0]) as proxy:
            url = f"postgresql://postgres@127.0.0.1:{proxy.port}/sse"
            async with running(settings(database_url=url, probe_seconds=0.05)) as node:
                stream = await node.open_live(key)
                db = connect(dsn)
                lost = [insert(db, "alice", f"lost {n}")[0] for n in range(5)]
                await eventually(lambda: set(lost) <= set(stream.ids))
                await eventually(lambda: node.hub.snapshot.covers(counter(db) - 1))
                await proxy.refuse()
                db.close()
                db = connect(standby_dsn)
                query(db, "SELECT setval('notifications_id_seq', 1000)")  # else ids are used again
                new = [insert(db, "alice", f"new {n}")[0] for n in range(10)]
                db.close()
                proxy.lead_to(paths[1])
                await proxy.accept()
                await eventually(lambda: set(new) <= set(stream.ids), 60)
                assert not stream.closed
    finally:
        await asyncio.to_thread(primary.stop)
        await asyncio.to_thread(standby.stop)
