"""Retention: what is old goes, what is not stays, and nobody waits or stops for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server import retention
from sse_server.app import SUPERVISOR, create_app
from sse_server.config import Settings
from sse_server.database import Database
from sse_server.embedded import EmbeddedPostgres
from sse_server.retention import Retention
from sse_server.store import Store
from tests.conftest import Client, SettingsFactory, connect, eventually
from tests.sse import EventReader
from tests.streaming import insert, query, sign_in, without_rate_limit


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    database = Database(dsn, size=4, connect_timeout=5, query_timeout=10)
    yield Store(database)
    await database.close()


def age(db: Connection, interval: str, condition: str = "true") -> None:
    query(
        db,
        f"UPDATE notifications SET created_at = created_at - interval '{interval}' "
        f"WHERE {condition}",
    )


def ids(db: Connection) -> list[int]:
    return [row[0] for row in query(db, "SELECT id FROM notifications ORDER BY id")]


async def test_old_notifications_go_and_the_others_stay(store: Store, db: Connection) -> None:
    """Older than 30 days, read or not, in many batches; the setting may be changed."""
    without_rate_limit(db)
    old = insert(db, "ada", *map(str, range(250)))
    age(db, "30 days 1 minute")
    kept = insert(db, "ada", *map(str, range(50)))
    age(db, "29 days 23 hours", f"id >= {kept[0]}")
    query(db, "UPDATE notifications SET read_at = clock_timestamp() WHERE id % 2 = 0")
    await Retention(store, batch_rows=40, pause_seconds=0).delete_old()
    assert ids(db) == kept
    assert old[-1] < kept[0]
    query(db, "UPDATE settings SET retention_days = 29")
    await Retention(store, batch_rows=40, pause_seconds=0).delete_old()
    assert ids(db) == []


async def test_dates_out_of_order_do_not_stop_it(store: Store, db: Connection) -> None:
    """Rows that a wrong clock dated into the future, in front or between, are stepped over."""
    without_rate_limit(db)
    future = insert(db, "ada", *map(str, range(25)))
    age(db, "-300 days")
    insert(db, "ada", *map(str, range(25)))
    age(db, "31 days", f"id > {future[-1]}")
    await Retention(store, batch_rows=10, pause_seconds=0).delete_old()
    assert ids(db) == future


async def test_old_audit_records_go(store: Store, db: Connection) -> None:
    """After as many days as notifications."""
    query(
        db,
        "INSERT INTO audit_log (at, actor, action, outcome) "
        "SELECT clock_timestamp() - make_interval(days => d), 'user:' || d, 'test', 'ok' "
        "FROM generate_series(40, 20, -1) AS d",
    )
    await Retention(store, batch_rows=4, pause_seconds=0).delete_old()
    left = [row[0] for row in query(db, "SELECT actor FROM audit_log ORDER BY id")]
    assert left == [f"user:{day}" for day in range(29, 19, -1)]


async def test_what_has_expired_goes(store: Store, db: Connection) -> None:
    """Sessions and used tokens at their end, answers to idempotency keys after 24 hours."""
    sign_in(db, *(f"user-{number}" for number in range(30)), seconds=-1)
    sign_in(db, "ada")
    query(
        db,
        "INSERT INTO used_tokens SELECT sha256(n::text::bytea), "
        "clock_timestamp() + make_interval(hours => n) FROM generate_series(-3, 1) AS n",
    )
    query(
        db,
        "INSERT INTO publications (service, idempotency_key, body_hash, created_at) "
        "SELECT 'shop', n, sha256(''), clock_timestamp() - make_interval(hours => n) "
        "FROM generate_series(20, 60) AS n",
    )
    await Retention(store, batch_rows=10, pause_seconds=0).delete_expired()
    assert query(db, "SELECT user_id FROM sessions") == [("ada",)]
    assert query(db, "SELECT count(*) FROM used_tokens WHERE expires_at < now()") == [(0,)]
    left = query(db, "SELECT idempotency_key FROM publications ORDER BY 1")
    assert left == [("20",), ("21",), ("22",), ("23",)]


async def test_one_process_at_a_time(dsn: str, store: Store, db: Connection) -> None:
    """While another process holds the turn nothing is deleted, and nobody waits for it."""
    insert(db, "ada", "old")
    age(db, "31 days")
    other = connect(dsn)
    other.autocommit = False
    query(other, "SELECT pg_advisory_xact_lock(7095164721844)")
    async with asyncio.timeout(2):
        await Retention(store).delete_old()
    assert len(ids(db)) == 1
    other.rollback()
    await asyncio.gather(*(Retention(store).delete_old() for _ in range(5)))
    assert ids(db) == []
    other.close()


async def test_it_waits_for_no_row_and_no_insert_waits_for_it(
    dsn: str, store: Store, db: Connection
) -> None:
    """A row that a transaction has locked is left; inserts go on while a batch is open."""
    locked, free = insert(db, "ada", "1", "2")
    age(db, "31 days")
    other = connect(dsn)
    other.autocommit = False
    query(other, "UPDATE notifications SET read_at = now() WHERE id = %s", locked)
    async with asyncio.timeout(2):
        await Retention(store, pause_seconds=0).delete_old()
    assert ids(db) == [locked]
    other.rollback()

    # The statement as it is, in a transaction that stays open.
    with other.cursor() as cursor:
        cursor.execute(store._q["delete_old_notifications"], {"after": 0, "limit": 1000})
        assert cursor.fetchone() == (True, 1, locked, 1, 1)
    query(db, "SET lock_timeout = '500ms'")
    [new] = insert(db, "ada", "3")
    other.commit()
    other.close()
    assert ids(db) == [new]
    assert free not in ids(db)


@pytest.mark.parametrize("what", ["notifications", "audit"])
async def test_it_does_not_wait_for_the_disk(store: Store, dsn: str, what: str) -> None:
    """A batch's commit leaves the disk to the writers; the next on its connection does not."""
    db = connect(dsn)
    db.autocommit = False
    with db.cursor() as cursor:
        cursor.execute(store._q[f"delete_old_{what}"], {"after": 0, "limit": 10})
    assert query(db, "SHOW synchronous_commit") == [("off",)]
    db.commit()
    assert query(db, "SHOW synchronous_commit") == [("on",)]
    db.close()


async def test_inserts_are_not_slowed_down(store: Store, db: Connection, dsn: str) -> None:
    """While 20,000 rows are deleted, no insert takes long."""
    without_rate_limit(db)
    query(
        db,
        "INSERT INTO notifications (user_id, event_type, message, created_at) "
        "SELECT 'user-' || n, 'new_message', 'x', now() - interval '31 days' "
        "FROM generate_series(1, 20000) AS n",
    )
    deleting = asyncio.create_task(Retention(store, pause_seconds=0.01).delete_old())
    longest = 0.0
    while not deleting.done():
        started = time.monotonic()
        await asyncio.to_thread(insert, db, "ada", "x")
        longest = max(longest, time.monotonic() - started)
    await deleting
    assert query(db, "SELECT count(*) FROM notifications WHERE user_id <> 'ada'") == [(0,)]
    assert longest < 1.0


async def test_a_cursor_whose_row_is_gone_gives_reset(
    client: Client, store: Store, db: Connection
) -> None:
    """On the stream and when polling: `reset`, and then all that is unread."""
    await client.post("/demo/session", json={"user_id": "ada"})
    [gone] = insert(db, "ada", "old")
    age(db, "31 days")
    [kept] = insert(db, "ada", "new")
    await Retention(store).delete_old()
    assert ids(db) == [kept]
    response = await client.get("/api/notifications/unread", params={"after": str(gone)})
    answer = await response.json()
    assert answer["reset"] is True
    assert [item["id"] for item in answer["notifications"]] == [kept]
    stream = await client.get(
        "/api/stream", headers={"Last-Event-ID": str(gone), "Accept": "text/event-stream"}
    )
    reader = EventReader(stream)
    events = [await reader.next_event() for _ in range(3)]
    assert [event.event for event in events] == ["reset", "notification", "ready"]
    assert events[1].id == str(kept)
    stream.close()


async def test_a_database_that_is_away_does_not_end_the_process(
    cluster: EmbeddedPostgres,
    settings: SettingsFactory,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The task logs, goes on, and cleans up when the database is back."""
    monkeypatch.setattr(retention, "EXPIRED_SECONDS", 0.05)
    monkeypatch.setattr(retention, "OLD_SECONDS", 0.0)
    configuration: Settings = settings(connect_timeout=1.0)
    app = create_app(configuration)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await asyncio.to_thread(cluster.stop)
        try:
            await eventually(lambda: "are left for later" in caplog.text)
        finally:
            await asyncio.to_thread(cluster.start)
        after = connect(dsn)
        insert(after, "ada", "old")
        age(after, "31 days")
        sign_in(after, "ada", seconds=-1)
        await eventually(lambda: ids(after) == [])
        await eventually(lambda: query(after, "SELECT count(*) FROM sessions") == [(0,)])
        after.close()
        assert not app[SUPERVISOR].failed.is_set()
    finally:
        await runner.cleanup()
