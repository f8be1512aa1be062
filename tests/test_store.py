"""The queries: what a replay and a sweep show of transactions that commit in any order."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.database import Connection as DatabaseConnection
from sse_server.database import Database
from sse_server.errors import DatabaseError
from sse_server.events import MAX_ID, Notification
from sse_server.snapshot import NOTHING, Snapshot
from sse_server.store import Claim, Position, Store
from tests.conftest import connect
from tests.listener import Listener, fetch


@pytest.fixture
async def store(dsn: str, db: Connection) -> AsyncIterator[Store]:
    """A store on the test's database, without a limit of the users' rate."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 0")
    database = Database(dsn, size=4, connect_timeout=5, query_timeout=10)
    yield Store(database, link_hosts=frozenset({"example.org"}))
    await database.close()


@pytest.fixture
async def feed(store: Store) -> AsyncIterator[DatabaseConnection]:
    """A connection such as the feed has."""
    connection = await store.database.connect()
    yield connection
    connection.close()


class Writer:
    """A connection with a transaction that ends when the test says so."""

    def __init__(self, dsn: str) -> None:
        self.connection = connect(dsn)
        self.connection.autocommit = False

    def insert(self, user_id: str = "ada", count: int = 1) -> list[int]:
        return insert(self.connection, user_id, count)

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()


def insert(connection: Connection, user_id: str = "ada", count: int = 1) -> list[int]:
    rows = fetch(
        connection,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT %s, 'new_message', 'x' FROM generate_series(1, %s) RETURNING id",
        user_id,
        count,
    )
    return [row[0] for row in rows]


@pytest.fixture
def writers(dsn: str) -> Any:
    """Three of them."""
    made = [Writer(dsn) for _ in range(3)]
    yield made
    for writer in made:
        writer.connection.close()


def ids(notifications: list[Notification]) -> list[int]:
    return [notification.id for notification in notifications]


async def replay_pass(
    store: Store, position: Position, limit: int = 500
) -> tuple[list[int], Snapshot]:
    """One pass, page by page; the snapshot is the base of the next."""
    found: list[int] = []
    while True:
        (page,) = await store.replay([position], limit)
        found += ids(page.notifications)
        if not page.full:
            return found, page.snapshot
        position = replace(
            position, base=position.base, snapshot=page.snapshot, after_id=found[-1], counted=False
        )


# Replay


async def test_pages(store: Store, db: Connection) -> None:
    """Pages follow each other without gap or repeat, and the last one is known for it."""
    expected = insert(db, count=1050)
    insert(db, "bob", 3)
    (first,) = await store.replay([Position("ada")], 500)
    assert (first.known, first.unread_count, first.full) == (True, 1050, True)
    (second,) = await store.replay(
        [Position("ada", snapshot=first.snapshot, after_id=expected[499], counted=False)], 500
    )
    assert (second.unread_count, second.full, second.snapshot) == (None, True, first.snapshot)
    (third,) = await store.replay(
        [Position("ada", snapshot=first.snapshot, after_id=expected[999])], 500
    )
    assert (third.unread_count, third.full) == (1050, False)
    assert ids(first.notifications + second.notifications + third.notifications) == expected


async def test_notifications_of_a_page(store: Store, db: Connection) -> None:
    """A row arrives sanitised, with its time, its transaction and only the links that may be."""
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, link, created_at) VALUES "
        "('ada', 'new_message', 'Tom & <b>Jerry</b>', '/inbox', '2024-02-03 04:05:06.789+00'), "
        "('ada', 'new_message', 'x', 'https://example.org/', now()), "
        "('ada', 'new_message', 'x', 'https://example.com/', now())",
    )
    (page,) = await store.replay([Position("ada")], 10)
    item = page.notifications[0]
    assert (item.user_id, item.content.event_type) == ("ada", "new_message")
    assert item.content.message == "Tom & Jerry"
    assert item.as_json()["created_at"] == "2024-02-03T04:05:06.789Z"
    assert [(i.xact,) for i in page.notifications] == fetch(
        db, "SELECT xact::text::bigint FROM notifications ORDER BY id"
    )
    links = [i.content.link for i in page.notifications]
    assert links == ["/inbox", "https://example.org/", None]


async def test_known_cursor(store: Store, db: Connection) -> None:
    """After a row come the later ones that are unread, and not that row again."""
    expected = insert(db), insert(db), insert(db), insert(db)
    a, b, c, d = (id for (id,) in expected)
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id = %s", c)
    (page,) = await store.replay([Position("ada", cursor=b)], 10)
    assert (page.known, page.unread_count, ids(page.notifications)) == (True, 3, [d])
    (page,) = await store.replay([Position("ada", cursor=c)], 10)
    assert (page.known, ids(page.notifications)) == (True, [d])  # a row that was read is a cursor
    (page,) = await store.replay([Position("ada", cursor=d)], 10)
    assert (page.known, ids(page.notifications)) == (True, [])
    assert a < b


async def test_unknown_cursor(store: Store, db: Connection) -> None:
    """A cursor of nobody's, somebody else's or a deleted row is unknown: all unread rows come."""
    expected = insert(db, count=3)
    (foreign,) = insert(db, "bob")
    (deleted,) = insert(db)
    fetch(db, "DELETE FROM notifications WHERE id = %s", deleted)
    cursors = [0, -1, -MAX_ID, MAX_ID, foreign, deleted]
    pages = await store.replay([Position("ada", cursor=cursor) for cursor in cursors], 10)
    for page in pages:
        assert (page.known, ids(page.notifications)) == (False, expected)


async def test_late_commit_behind_the_cursor(
    store: Store, db: Connection, writers: list[Writer]
) -> None:
    """A row with a smaller id that commits after the client's last one is not lost."""
    (late,) = writers[0].insert()
    (received,) = insert(db)
    assert late < received
    (page,) = await store.replay([Position("ada")], 10)
    assert ids(page.notifications) == [received]
    writers[0].commit()
    (page,) = await store.replay([Position("ada", cursor=received)], 10)
    assert (page.known, ids(page.notifications)) == (True, [late])


async def test_commits_between_pages(store: Store, db: Connection, writers: list[Writer]) -> None:
    """A row that commits between two pages is in the next pass, wherever its id belongs."""
    first = insert(db)
    early = writers[0].insert()
    second = insert(db, count=2)
    writers[1].insert()
    (page,) = await store.replay([Position("ada")], 2)
    assert ids(page.notifications) == [*first, second[0]]
    writers[0].commit()
    writers[1].rollback()
    later = insert(db)
    (rest,) = await store.replay([Position("ada", snapshot=page.snapshot, after_id=second[0])], 2)
    assert ids(rest.notifications) == [second[1]]
    assert rest.snapshot == page.snapshot
    found, snapshot = await replay_pass(store, Position("ada", base=rest.snapshot))
    assert found == early + later
    assert await replay_pass(store, Position("ada", base=snapshot)) == ([], snapshot)


async def test_cursor_of_a_page(store: Store, db: Connection, writers: list[Writer]) -> None:
    """A client that is cut off after a page and comes back with its last id misses nothing."""
    insert(db)
    late = writers[0].insert()
    insert(db, count=2)
    (page,) = await store.replay([Position("ada")], 2)
    writers[0].commit()
    everything = {row[0] for row in fetch(db, "SELECT id FROM notifications")}
    for cut in (1, 2):
        received = ids(page.notifications)[:cut]
        found, _ = await replay_pass(store, Position("ada", cursor=received[-1]), limit=1)
        assert set(received) | set(found) == everything
        assert set(late) <= set(found)


async def test_repeatable_read_writer(store: Store, db: Connection, writers: list[Writer]) -> None:
    """A writer whose snapshot is older than its row covers no more than it saw."""
    fetch(writers[0].connection, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    fetch(writers[0].connection, "SELECT 1")
    late = writers[1].insert()
    (received,) = writers[0].insert()
    writers[0].commit()
    writers[1].commit()
    (page,) = await store.replay([Position("ada", cursor=received)], 10)
    assert ids(page.notifications) == late


async def test_savepoints(store: Store, db: Connection, writers: list[Writer]) -> None:
    """Rows of a subtransaction belong to their transaction: none is covered before it commits."""
    fetch(writers[0].connection, "SAVEPOINT a")
    one = writers[0].insert()
    fetch(writers[0].connection, "SAVEPOINT b")
    writers[0].insert()
    fetch(writers[0].connection, "ROLLBACK TO b")
    two = writers[0].insert()
    (received,) = insert(db)
    (page,) = await store.replay([Position("ada")], 10)
    assert ids(page.notifications) == [received]
    writers[0].commit()
    assert (await replay_pass(store, Position("ada", base=page.snapshot)))[0] == one + two
    assert (await replay_pass(store, Position("ada", cursor=received)))[0] == one + two


async def test_many_positions(store: Store, db: Connection, writers: list[Writer]) -> None:
    """Each position of a batch gets what it would get alone, in the order of the batch."""
    for n in range(20):
        insert(db, f"user-{n % 5}", n % 4)
    writers[0].insert("user-1")
    everyone = fetch(db, "SELECT id, user_id FROM notifications ORDER BY id")
    positions = [Position(f"user-{n}") for n in (4, 2, 0, 2, 99)]
    positions += [Position(user_id, cursor=id, counted=id % 2 == 0) for id, user_id in everyone]
    positions += [Position("user-0", cursor=id) for id, user_id in everyone if user_id != "user-0"]
    positions += [Position("user-2", base=NOTHING, after_id=everyone[7][0])]
    together = await store.replay(positions, 3)
    for position, page in zip(positions, together, strict=True):
        (alone,) = await store.replay([position], 3)
        assert (page.known, page.unread_count, page.full, ids(page.notifications)) == (
            (alone.known, alone.unread_count, alone.full, ids(alone.notifications))
        )
        assert (page.unread_count is None) is (not position.counted)
    assert len(together) == len(positions)


async def test_restored_rows(store: Store, feed: DatabaseConnection, db: Connection) -> None:
    """After a restore into a younger cluster, a client with its old cursor gets what is new."""
    horizon = fetch(db, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000000")
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, xact, horizon) "
        "SELECT 'ada', 'new_message', 'restored', %s::text::xid8, %s::text::xid8 "
        "FROM generate_series(1, 2)",
        *horizon[0] * 2,
    )
    ((first,), (second,)) = fetch(db, "SELECT id FROM notifications ORDER BY id")
    snapshot = (await store.feed_start(feed)).snapshot
    assert fetch(db, "SELECT DISTINCT xact::text, horizon::text FROM notifications") == [("3", "3")]
    assert snapshot.covers(3)
    (new,) = insert(db)
    (page,) = await store.replay([Position("ada", cursor=second)], 10)
    assert (page.known, ids(page.notifications)) == (True, [first, new])
    (page,) = await store.replay([Position("ada", base=snapshot)], 10)
    assert ids(page.notifications) == [new]


async def test_reset_leaves_our_own_rows(
    store: Store, feed: DatabaseConnection, db: Connection, writers: list[Writer]
) -> None:
    """Rows of this cluster keep their transactions, and nobody waits for those that are open."""
    insert(db, count=3)
    writers[0].insert()
    before = fetch(db, "SELECT id, xact::text, horizon::text FROM notifications")
    async with asyncio.timeout(5):
        await store.feed_start(feed)
    assert fetch(db, "SELECT id, xact::text, horizon::text FROM notifications") == before


# Any order of commits. Steps: which of three writers, and what it does; between them, passes.
steps = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 2), st.sampled_from(["insert", "insert", "commit", "rollback"])),
        st.just((0, "look")),
    ),
    max_size=25,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps, st.integers(1, 4))
async def test_any_order_of_commits(
    store: Store,
    feed: DatabaseConnection,
    db: Connection,
    writers: list[Writer],
    steps: list[tuple[int, str]],
    limit: int,
) -> None:
    """In whatever order transactions end, passes and sweeps find each row exactly once, and a
    client that comes back with any id it has received finds all that it has not."""
    user_id = secrets.token_hex(8)
    base = swept = (await store.feed_start(feed)).snapshot
    passes: list[int] = []
    sweeps: list[int] = []

    async def look() -> None:
        nonlocal base, swept
        seen_before = list(passes)
        found, base = await replay_pass(store, Position(user_id, base=base), limit)
        passes.extend(found)
        swept_ids, swept = await sweep_pass(store, feed, swept, limit)
        sweeps.extend(id for id, owner in swept_ids if owner == user_id)
        for n, cursor in enumerate(seen_before):
            # Whatever had been sent up to this row, and in this order.
            missing = set(passes) - set(seen_before[: n + 1])
            again, _ = await replay_pass(store, Position(user_id, cursor=cursor), limit)
            assert missing <= set(again), f"lost after {cursor}"

    try:
        for number, step in steps:
            if step == "look":
                await look()
            elif step == "insert":
                writers[number].insert(user_id)
            else:
                getattr(writers[number], step)()
        for writer in writers:
            writer.commit()
        await look()
    finally:
        for writer in writers:
            writer.rollback()
    rows = fetch(db, "SELECT id FROM notifications WHERE user_id = %s", user_id)
    assert sorted(passes) == sorted(sweeps) == sorted(row[0] for row in rows)


# Sweep


async def sweep_pass(
    store: Store, feed: DatabaseConnection, base: Snapshot, limit: int
) -> tuple[list[tuple[int, str]], Snapshot]:
    """One sweep, page by page; the snapshot is the base of the next."""
    found: list[tuple[int, str]] = []
    snapshot: Snapshot | None = None
    after = (0, 0)
    while True:
        page = await store.feed_sweep(feed, base=base, snapshot=snapshot, after=after, limit=limit)
        found += [(id, user_id) for id, user_id, _ in page.rows]
        snapshot = page.snapshot
        if len(page.rows) < limit:
            return found, snapshot
        after = (page.rows[-1][2], page.rows[-1][0])


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_sweep(
    store: Store, feed: DatabaseConnection, db: Connection, writers: list[Writer], limit: int
) -> None:
    """A sweep finds what was open at its base and has committed since, page by page, once."""
    insert(db)
    open_then = writers[0].insert("ada", 2)
    never = writers[1].insert("bob")
    insert(db)
    base = (await store.feed_start(feed)).snapshot
    assert len(base.xip) == 2
    new = insert(db, "eve", 3)
    still_open = writers[2].insert("zoe")
    writers[0].commit()
    writers[1].rollback()
    found, snapshot = await sweep_pass(store, feed, base, limit)
    assert [id for id, _ in found] == open_then + new
    assert {user_id for _, user_id in found} == {"ada", "eve"}
    writers[2].commit()
    found, last = await sweep_pass(store, feed, snapshot, limit)
    assert found == [(still_open[0], "zoe")]
    assert await sweep_pass(store, feed, last, limit) == ([], last)
    assert never


async def test_sweep_in_the_order_of_transactions(
    store: Store, feed: DatabaseConnection, db: Connection, writers: list[Writer]
) -> None:
    """No row is found before one that it covers."""
    writers[0].insert()
    writers[1].insert()
    base = (await store.feed_start(feed)).snapshot
    second = writers[1].insert()
    first = writers[0].insert()
    writers[1].commit()
    writers[0].commit()
    page = await store.feed_sweep(feed, base=base, snapshot=None, after=(0, 0), limit=100)
    assert [row[2] for row in page.rows] == sorted(row[2] for row in page.rows)
    assert first[0] > second[0]
    assert [row[0] for row in page.rows].index(first[0]) < [row[0] for row in page.rows].index(
        second[0]
    )


# Sessions


async def make_session(store: Store, user_id: str = "ada", seconds: float = 3600) -> bytes:
    key_hash = secrets.token_bytes(32)
    await store.insert_session(key_hash, user_id, {}, seconds)
    return key_hash


async def test_session(store: Store) -> None:
    """A session is found by its key while it lasts, and by no other."""
    key = secrets.token_bytes(32)
    session = await store.insert_session(key, "ada", {"a": ["\u2028", 1]}, 60)
    assert session is not None
    assert session.expires_ms - session.created_ms == pytest.approx(60_000, abs=1000)
    assert await store.session_by_key(key) == session
    assert await store.session_by_key(secrets.token_bytes(32)) is None
    await store.update_session(key, "bob", {"b": 2})
    assert await store.session_by_key(key) == replace(session, user_id="bob", data={"b": 2})
    await store.delete_session(key)
    assert await store.session_by_key(key) is None
    expired = await make_session(store, seconds=-1)
    assert await store.session_by_key(expired) is None


async def test_expired_sessions(store: Store, db: Connection) -> None:
    """Expired sessions are deleted, 1,000 at a time, and no others."""
    fetch(
        db,
        "INSERT INTO sessions (key_hash, user_id, expires_at) "
        "SELECT sha256(n::text::bytea), 'ada', now() - n * interval '1 s' "
        "FROM generate_series(1, 1001) AS n",
    )
    kept = await make_session(store)
    assert [await store.delete_expired_sessions() for _ in range(3)] == [1000, 1, 0]
    assert await store.session_by_key(kept) is not None


async def claim(store: Store, keys: Sequence[bytes], most: int = 10_000) -> list[Claim | None]:
    return await store.claim_streams(keys, most=most, seconds=3600)


def claimed(claims: list[Claim | None]) -> list[tuple[str, int | None] | None]:
    return [None if claim is None else (claim.user_id, claim.number) for claim in claims]


async def test_claim_streams(store: Store, dsn: str) -> None:
    """Each claim of a session has a higher number than all before, and is announced."""
    ada, bob = await make_session(store), await make_session(store, "bob", 60)
    listener = Listener(dsn)
    claims = await claim(store, [ada, bob])
    assert claimed(claims) == [("ada", 1), ("bob", 1)]
    assert claims[1] is not None
    assert claims[1].seconds_left is not None
    assert 55 < claims[1].seconds_left <= 60
    # Several streams of a session in one batch, in the order in which they came.
    assert claimed(await claim(store, [ada, bob, ada, ada])) == [
        ("ada", 2),
        ("bob", 2),
        ("ada", 3),
        ("ada", 4),
    ]
    announced = [sorted(payload["s"]) for payload in listener.of("stream")]
    assert [[number for _, number in each] for each in announced] == [[1, 1], [4, 2]]
    assert claims[0] is not None
    valid = await store.check_sessions([claims[0].session_id, claims[1].session_id, 10**12])
    assert {id: number for id, (_, number) in valid.items()} == {
        claims[0].session_id: 4,
        claims[1].session_id: 2,
    }
    listener.close()


async def test_claim_streams_of_no_session(store: Store, dsn: str) -> None:
    """Expired and unknown sessions get no stream, and disturb nobody else's."""
    expired, unknown = await make_session(store, seconds=-1), secrets.token_bytes(32)
    listener = Listener(dsn)
    assert await claim(store, [expired, unknown, expired]) == [None, None, None]
    assert listener.payloads() == []
    valid = await make_session(store)
    assert claimed(await claim(store, [expired, valid, unknown])) == [
        None,
        ("ada", 1),
        None,
    ]
    assert await claim(store, []) == []
    listener.close()


async def test_claims_at_once(store: Store, db: Connection) -> None:
    """Nodes that claim the same sessions at the same time neither deadlock nor share a number."""
    rows = fetch(
        db,
        "INSERT INTO sessions (key_hash, user_id, expires_at) "
        "SELECT sha256(n::text::bytea), 'ada', now() + interval '1 hour' "
        "FROM generate_series(1, 5000) AS n RETURNING key_hash",
    )
    # With so many sessions the plan visits them in the order of the batch, unless told otherwise.
    fetch(db, "ANALYZE sessions")
    keys = [bytes(row[0]) for row in rows[:200]]
    batches = await asyncio.gather(
        *(claim(store, keys if n % 2 else keys[::-1]) for n in range(40))
    )
    numbers: dict[int, list[int]] = {}
    for each in (each for batch in batches for each in batch):
        assert each is not None
        assert each.number is not None
        numbers.setdefault(each.session_id, []).append(each.number)
    assert [sorted(each) for each in numbers.values()] == [list(range(1, 41))] * 200


async def test_claims_over_the_limit(store: Store, dsn: str) -> None:
    """A user's streams are limited over all sessions, the first of a batch first; a session that
    has one may open it anew, and one that is refused keeps what it has."""
    ada = [await make_session(store) for _ in range(5)]
    bob = await make_session(store, "bob")
    assert claimed(await claim(store, [ada[3], bob, ada[1], ada[2]], most=2)) == [
        ("ada", 1),
        ("bob", 1),
        ("ada", 1),
        ("ada", None),
    ]
    listener = Listener(dsn)
    assert claimed(await claim(store, [ada[0], ada[1], ada[1], ada[4]], most=2)) == [
        ("ada", None),
        ("ada", 2),
        ("ada", 3),
        ("ada", None),
    ]
    [[[_, number]]] = [payload["s"] for payload in listener.of("stream")]
    assert number == 3
    assert claimed(await claim(store, [ada[0]], most=2)) == [("ada", None)]
    assert listener.payloads() == []
    listener.close()


async def test_released_streams_count_no_more(store: Store, db: Connection) -> None:
    """Nor do those that cannot be open any longer, nor those of expired sessions; a release that
    comes after a newer claim changes nothing."""
    first, second, third = [await make_session(store) for _ in range(3)]
    [claimed_first] = await claim(store, [first], most=1)
    assert claimed_first is not None
    assert claimed_first.number == 1
    assert claimed(await claim(store, [second], most=1)) == [("ada", None)]
    await store.release_streams([(claimed_first.session_id, 1), (10**12, 1)])
    assert claimed(await claim(store, [second], most=1)) == [("ada", 1)]
    assert claimed(await claim(store, [second], most=1)) == [("ada", 2)]
    [again] = await claim(store, [second], most=1)
    assert again is not None
    await store.release_streams([(again.session_id, 1), (again.session_id, 2)])
    assert claimed(await claim(store, [third], most=1)) == [("ada", None)]
    fetch(db, "UPDATE sessions SET stream_at = stream_at - interval '59 minutes'")
    assert claimed(await claim(store, [third], most=1)) == [("ada", None)]
    fetch(db, "UPDATE sessions SET stream_at = stream_at - interval '2 minutes'")
    assert claimed(await claim(store, [third], most=1)) == [("ada", 1)]
    fetch(db, "UPDATE sessions SET expires_at = clock_timestamp() WHERE key_hash = %s", third)
    assert claimed(await claim(store, [first], most=1)) == [("ada", 2)]


async def test_claims_and_releases_at_once(store: Store, db: Connection) -> None:
    """They do not deadlock, and in the end nobody's stream counts that has ended."""
    keys = [await make_session(store) for _ in range(100)]

    async def open_and_end(keys: list[bytes]) -> None:
        for _ in range(5):
            claims = await claim(store, keys)
            ended = [(each.session_id, each.number or 0) for each in claims if each is not None]
            assert len(ended) == len(keys)
            await store.release_streams(ended[::-1])

    await asyncio.gather(*(open_and_end(keys if n % 2 else keys[::-1]) for n in range(4)))
    assert fetch(db, "SELECT count(*) FROM sessions WHERE stream_at IS NOT NULL") == [(0,)]


# Reading


async def test_mark_read(store: Store, db: Connection) -> None:
    """A user marks own rows only, some or all up to an id, and again without effect."""
    mine = insert(db, count=5)
    (foreign,) = insert(db, "bob")
    assert await store.mark_read("ada", ids=[mine[1], foreign, MAX_ID, -1]) == (1, 4)
    assert await store.mark_read("ada", ids=[mine[1]]) == (0, 4)
    assert await store.mark_read("ada", ids=[]) == (0, 4)
    assert await store.mark_read("ada", up_to=mine[2]) == (2, 2)
    assert await store.mark_read("ada", up_to=mine[2]) == (0, 2)
    assert await store.mark_read("ada") == (2, 0)
    assert await store.unread_counts(["ada", "bob", "eve"]) == {"ada": 0, "bob": 1, "eve": 0}
    read = fetch(db, "SELECT count(DISTINCT read_at) FROM notifications WHERE user_id = 'ada'")
    assert read[0][0] > 1


async def test_mark_read_at_once(store: Store, db: Connection) -> None:
    """Devices that mark the same rows at the same time do not deadlock; each row counts once."""
    mine = insert(db, count=300)
    results = await asyncio.gather(
        *(store.mark_read("ada", ids=mine if n % 2 else mine[::-1]) for n in range(4)),
        *(store.mark_read("ada") for _ in range(4)),
    )
    assert sum(marked for marked, _ in results) == 300
    assert {unread for _, unread in results} == {0}


async def test_notifications_by_id(store: Store, db: Connection) -> None:
    """Those that exist come in the order asked for, whosever they are."""
    one, two = insert(db), insert(db, "bob")
    found = await store.notifications_by_id([*two, MAX_ID, *one])
    assert [(n.id, n.user_id) for n in found] == [(two[0], "bob"), (one[0], "ada")]
    assert await store.notifications_by_id([]) == []


# Preferences


async def test_preferences(store: Store, db: Connection) -> None:
    """Every event type is listed with what counts for the user; only the user's own changes."""
    fetch(db, "INSERT INTO event_types VALUES ('newsletter', 'News', false, false)")
    fetch(db, "UPDATE event_types SET required = true WHERE name = 'system_alert'")

    async def enabled(user_id: str) -> dict[str, bool]:
        return {p.event_type: p.enabled for p in await store.preferences(user_id)}

    default = {
        "new_message": True,
        "newsletter": False,
        "status_change": True,
        "system_alert": True,
    }
    assert await enabled("ada") == default
    (news,) = (p for p in await store.preferences("ada") if p.event_type == "newsletter")
    assert (news.description, news.required) == ("News", False)
    await store.set_preferences("ada", {"new_message": False, "newsletter": True})
    await store.set_preferences("ada", {"status_change": False})
    assert await enabled("ada") == default | {
        "new_message": False,
        "newsletter": True,
        "status_change": False,
    }
    assert await enabled("bob") == default
    assert await store.explicit_preferences(["ada", "bob"]) == {
        "ada": {"new_message": False, "newsletter": True, "status_change": False}
    }
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'system_alert', false)")
    assert (await enabled("ada"))["system_alert"] is True


async def test_preferences_that_cannot_be(store: Store, db: Connection) -> None:
    """Of a change with an unknown or a required event type in it, nothing is done."""
    fetch(db, "UPDATE event_types SET required = true WHERE name = 'system_alert'")
    for wrong in ({"nonsense": True}, {"system_alert": False}):
        _, done = await store.set_preferences("ada", {"new_message": False} | wrong)
        assert not done
        assert await store.explicit_preferences(["ada"]) == {}
    would_be, done = await store.set_preferences(
        "ada", {"system_alert": True, "new_message": False}
    )
    assert done
    assert would_be == await store.preferences("ada")


# Publishing


async def test_publish(store: Store, db: Connection) -> None:
    """Each recipient is reported, and the rows tell who sent them."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 1")
    await store.set_preferences("off", {"new_message": False})
    insert(db, "full")
    sent = await store.publish(
        source="billing",
        user_ids=["ada", "off", "full", "ada"],
        event_type="new_message",
        message="hello",
        link=None,
    )
    ((id, source),) = fetch(db, "SELECT id, source FROM notifications WHERE user_id = 'ada'")
    assert source == "billing"
    assert sent == [
        ("ada", "created", id),
        ("off", "suppressed", None),
        ("full", "rate_limited", None),
    ]


async def test_refusals(store: Store) -> None:
    """A refusal by the database names its SQLSTATE and quotes no message."""
    with pytest.raises(DatabaseError, match="Known event types: new_message") as refused:
        await store.publish(
            source="billing", user_ids=["ada"], event_type="x", message="secret", link=None
        )
    assert refused.value.sqlstate == "23503"
    with pytest.raises(DatabaseError, match="notifications_message_length") as refused:
        await store.publish(
            source="billing",
            user_ids=["ada"],
            event_type="new_message",
            message="secret" * 1000,
            link=None,
        )
    assert refused.value.sqlstate == "23514"
    assert "secret" not in str(refused.value)
    assert isinstance(refused.value.__cause__, psycopg2.Error)
