"""The life of a stream: replay, live, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from aiohttp import web
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server import feed as feed_module
from sse_server.errors import DatabaseUnavailable
from sse_server.events import MAX_ID, Notification
from sse_server.hub import Stream
from sse_server.sanitize import plain_text
from sse_server.sessions import STORAGE
from sse_server.store import Claim, Page, Position
from sse_server.stream import STREAMS, EventStream
from tests.conftest import SettingsFactory, connect, eventually
from tests.streaming import (
    YEAR_MS,
    Node,
    Proxy,
    RawStream,
    end_session,
    insert,
    query,
    running,
    sign_in,
    without_rate_limit,
)

# Sweeps would in the end make good for much; these tests are about what happens before.
NO_SWEEP = {"probe_seconds": 30.0}


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed sweeps often at first, until it knows that everybody notifies; let it be quick."""
    monkeypatch.setattr(feed_module, "LEAVING_SECONDS", 0.005)


@pytest.fixture
async def node(settings: SettingsFactory) -> AsyncIterator[Node]:
    """A server with the default settings, but for a heartbeat that a test can wait for."""
    async with running(settings(heartbeat_seconds=1, **NO_SWEEP)) as node:
        yield node


def all_ids(db: Connection, user_id: str) -> list[int]:
    rows = query(db, "SELECT id FROM notifications WHERE user_id = %s ORDER BY id", user_id)
    return [row[0] for row in rows]


@contextlib.contextmanager
def transaction(dsn: str) -> Iterator[Connection]:
    """A connection whose transaction stays open until it is told to commit."""
    connection = connect(dsn)
    connection.autocommit = False
    try:
        yield connection
    finally:
        connection.close()


def dispatch(node: Node, db: Connection, id: int) -> None:
    """Do what the feed does with a row's announcement, at this very moment."""
    [(user_id, event_type, message, xact)] = query(
        db,
        "SELECT user_id, event_type, message, xact::text::bigint FROM notifications WHERE id = %s",
        id,
    )
    content = node.store.content(event_type, message, None)
    node.hub.publish(Notification(id, user_id, content, 0, xact))


async def dispatched(node: Node, db: Connection, id: int) -> None:
    """Wait until the feed has done so, even if nobody was there to get it."""
    [(xact,)] = query(db, "SELECT xact::text::bigint FROM notifications WHERE id = %s", id)
    await eventually(lambda: node.feed._last_xact == xact or node.hub.snapshot.covers(xact))


# Replay, then live, without a seam


async def test_unread_rows_come_first_then_ready_then_live_ones(node: Node, db: Connection) -> None:
    """A stream starts with retry and the unread rows in order, says ready, and goes on live."""
    [key] = sign_in(db, "alice")
    old = insert(db, "alice", "one", "two", "three")
    query(db, "UPDATE notifications SET read_at = now() WHERE id = %s", old[1])
    insert(db, "bob", "not hers")
    stream = await node.open_live(key)
    new = insert(db, "alice", "four")
    await eventually(lambda: len(stream.ids) == 3)
    assert stream.ids == [old[0], old[2], *new]
    assert [event.event for event in stream.events] == [
        "notification",
        "notification",
        "ready",
        "notification",
    ]
    assert stream.of("ready")[0].json == {"unread_count": 2, "heartbeat_seconds": 1}
    assert stream.parser.retry is not None
    assert 1000 <= stream.parser.retry <= 5000
    data = stream.events[-1].json
    assert list(data) == ["id", "created_at", "event_type", "message", "link"]
    assert (data["id"], data["event_type"], data["message"]) == (new[0], "new_message", "four")
    assert [event for event in stream.events if event.id and event.event != "notification"] == []


class Hooks:
    """Calls a function at one point of the way from the claim to going live."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached: dict[str, int] = {}
        self._actions: dict[tuple[str, int], Callable[[], Any]] = {}
        hub, store = node.hub, node.store
        register, go_live, replay = hub.register, hub.go_live, store.replay

        def hooked_register(stream: Stream, seconds_left: float) -> Any:
            self._call("before register")
            result = register(stream, seconds_left)
            self._call("after register")
            return result

        def hooked_go_live(stream: Stream) -> bool:
            self._call("before go_live")
            result = go_live(stream)
            self._call("after go_live")
            return result

        async def hooked_replay(positions: Sequence[Position], limit: int) -> list[Page]:
            if awaitable := self._call("before page"):
                await awaitable
            pages = await replay(positions, limit)
            if awaitable := self._call("after page"):
                await awaitable
            return pages

        monkeypatch.setattr(hub, "register", hooked_register)
        monkeypatch.setattr(hub, "go_live", hooked_go_live)
        monkeypatch.setattr(store, "replay", hooked_replay)

    def at(self, point: str, time: int, action: Callable[[], Any]) -> None:
        self._actions[point, time] = action

    def _call(self, point: str) -> Any:
        self.reached[point] = time = self.reached.get(point, 0) + 1
        action = self._actions.pop((point, time), None)
        return action() if action is not None else None


SYNCHRONOUS = ["before register", "after register", "before go_live", "after go_live"]
# Five rows in pages of two are three pages; the pass after them, which has the count, is a fourth.
# A single page is the one after which there is no second look, unless the stream is dirty.
POINTS = [
    *((rows, point, 1) for rows in (2, 500) for point in SYNCHRONOUS),
    *((2, point, time) for time in (1, 2, 3, 4) for point in ("before page", "after page")),
    *((500, point, 1) for point in ("before page", "after page")),
]


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced yet"])
@pytest.mark.parametrize("page_rows, point, time", POINTS)
async def test_an_insert_during_replay_arrives_exactly_once(
    settings: SettingsFactory,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
    page_rows: int,
    point: str,
    time: int,
    announced: bool,
) -> None:
    """A row that commits at any point between registering and going live comes once."""
    [key] = sign_in(db, "alice")
    insert(db, "alice", *"abcde")
    async with running(settings(replay_page_rows=page_rows, **NO_SWEEP)) as node:
        hooks = Hooks(node, monkeypatch)

        def commit_now() -> None:
            [id] = insert(db, "alice", "meanwhile")
            if announced:
                dispatch(node, db, id)

        async def commit() -> None:
            [id] = insert(db, "alice", "meanwhile")
            if announced:
                await dispatched(node, db, id)

        hooks.at(point, time, commit_now if point in SYNCHRONOUS else commit)
        stream = await node.open_live(key)
        assert hooks.reached[point] >= time
        insert(db, "alice", "the last")
        expected = all_ids(db, "alice")
        await eventually(lambda: expected[-1] in stream.ids)
        assert sorted(stream.ids) == expected
        assert node.count("sse_feed_swept_notifications_total") == 0


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "not announced yet"])
async def test_a_smaller_id_that_commits_between_two_pages_arrives_first(
    settings: SettingsFactory,
    db: Connection,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    announced: bool,
) -> None:
    """A row that commits after its page is neither lost nor overtaken by one that covers it."""
    [key] = sign_in(db, "alice")
    covering: list[int] = []
    async with running(settings(replay_page_rows=2, **NO_SWEEP)) as node:
        with transaction(dsn) as late:
            [late_id] = insert(late, "alice", "late")
            ids = insert(db, "alice", *"abcde")
            hooks = Hooks(node, monkeypatch)

            async def commit() -> None:
                late.commit()
                covering.extend(insert(db, "alice", "covers it"))
                if announced:
                    await dispatched(node, db, covering[0])

            hooks.at("after page", 1, commit)
            stream = await node.open_live(key)
        await eventually(lambda: len(stream.ids) == 7)
        assert sorted(stream.ids) == sorted([late_id, *ids, *covering])
        # A client whose line breaks after `covering` comes back with it as its cursor.
        assert stream.ids.index(late_id) < stream.ids.index(covering[0])


async def test_transactions_open_across_the_replay_arrive_live(
    node: Node, db: Connection, dsn: str
) -> None:
    """A row whose transaction was open during the whole replay comes when that commits."""
    [key] = sign_in(db, "alice")
    with transaction(dsn) as late:
        [late_id] = insert(late, "alice", "late")
        ids = insert(db, "alice", "early")
        stream = await node.open_live(key)
        late.commit()
    await eventually(lambda: stream.ids == [*ids, late_id])
    # The cursor is now the larger of the two ids, or the smaller one: no matter.
    for last in (late_id, ids[0]):
        again = await node.open_live(key, last_event_id=last)
        assert set(again.ids) >= {late_id, *ids} - {last, ids[0]}
        assert last not in again.ids


async def test_two_passes_repeat_nothing(
    settings: SettingsFactory, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many passes a replay needs, and however late announcements are, a row comes once."""
    [key] = sign_in(db, "alice")
    insert(db, "alice", *"abcde")
    async with running(settings(replay_page_rows=2, **NO_SWEEP)) as node:
        hooks = Hooks(node, monkeypatch)
        for time in range(1, 8):

            async def commit() -> None:
                _, second = insert(db, "alice", "x", "y")
                await dispatched(node, db, second)

            hooks.at("after page", time, commit)
        stream = await node.open_live(key)
        expected = all_ids(db, "alice")
        await eventually(lambda: len(stream.ids) >= len(expected))
        assert stream.ids == expected


async def test_a_replay_found_row_does_not_come_again_when_it_is_announced(
    node: Node, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An announcement that comes after its row was replayed writes nothing."""
    [key] = sign_in(db, "alice")
    announced, released = asyncio.Event(), asyncio.Event()
    on_payload = node.feed._on_payload

    async def held(connection: Any, payload: str) -> None:
        if '"notification"' in payload:
            announced.set()
            await released.wait()
        await on_payload(connection, payload)

    monkeypatch.setattr(node.feed, "_on_payload", held)
    hooks = Hooks(node, monkeypatch)

    async def commit() -> None:
        insert(db, "alice", "hello")
        await announced.wait()

    hooks.at("before page", 1, commit)
    stream = await node.open_live(key)
    assert len(stream.ids) == 1
    released.set()
    insert(db, "alice", "next")
    await eventually(lambda: len(stream.ids) >= 2)
    assert stream.ids == all_ids(db, "alice")


async def test_every_session_of_a_user_is_served(node: Node, db: Connection) -> None:
    """Each device of a user gets each notification, and no other user does."""
    keys = sign_in(db, "alice", "alice", "alice", "bob")
    streams = [await node.open_live(key) for key in keys]
    ids = insert(db, "alice", "a", "b")
    hers = insert(db, "bob", "c")
    await eventually(lambda: all(stream.ids for stream in streams))
    await eventually(lambda: all(stream.ids == ids for stream in streams[:3]))
    assert streams[3].ids == hers


async def test_extreme_messages_arrive(node: Node, db: Connection) -> None:
    """2,000 characters of 4 bytes, and control characters, arrive live and replayed alike."""
    # Neither "<" nor "&": what the sanitiser makes of those is its own tests' matter.
    messages = ["\U0001f600" * 2000, "".join(map(chr, [*range(1, 32), 127])), "a\u2028b\r\nc"]
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    ids = insert(db, "alice", *messages)
    await eventually(lambda: len(stream.ids) == 3)
    again = await node.open_live(key)
    assert sorted(stream.ids) == again.ids == ids
    live = {event.json["id"]: event.json["message"] for event in stream.of("notification")}
    replayed = {event.json["id"]: event.json["message"] for event in again.of("notification")}
    assert live == replayed
    assert live[ids[0]] == messages[0]
    assert live == {id: plain_text(message) for id, message in zip(ids, messages, strict=True)}


async def test_no_database_connection_is_held_by_an_open_stream(node: Node, db: Connection) -> None:
    """Fifty open streams need no more connections than the pool has, and use none."""
    streams = await node.clients.open_many(node.port, sign_in(db, *["alice", "bob", "carol"] * 6))
    await eventually(lambda: node.store.database.in_use == 0)
    assert all(not stream.closed for stream in streams)
    [(count,)] = query(
        db,
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'sse-server%%'",
    )
    assert count <= 8 + 1


# The cursor


async def test_a_known_cursor_continues_after_it(node: Node, db: Connection) -> None:
    """Only what came after the cursor's row is replayed, read or not as that row may be."""
    [key] = sign_in(db, "alice")
    ids = [insert(db, "alice", message)[0] for message in "abcd"]
    query(db, "UPDATE notifications SET read_at = now() WHERE id = %s", ids[1])
    stream = await node.open_live(key, last_event_id=ids[1])
    assert stream.ids == ids[2:]
    assert not stream.of("reset")
    # A first connect cannot set a header; a reconnect can, and knows better.
    stream = await node.open_live(key, path=f"/api/stream?last_event_id={ids[2]}")
    assert stream.ids == ids[3:]
    stream = await node.open_live(
        key, path=f"/api/stream?last_event_id={ids[0]}", last_event_id=ids[2]
    )
    assert stream.ids == ids[3:]
    assert not stream.of("reset")


@pytest.mark.parametrize(
    "cursor",
    [
        "abc",
        "-1",
        "1e3",
        str(10**30),
        str(MAX_ID),
        str(MAX_ID + 1),
        "1;--",
        "\x01",
        "'",
        "\xb2",
        " ",
    ],
)
async def test_an_unknown_cursor_is_a_reset(node: Node, db: Connection, cursor: str) -> None:
    """A cursor that is nobody's is answered with reset and all unread rows, never with silence."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", "a", "b")
    header = await node.open(key, last_event_id=cursor)
    if cursor == "\x01":
        assert header.status == 400  # no header field may hold one
    elif cursor != " ":  # what is around a field is not part of it
        await eventually(lambda: header.ready)
        assert [event.event for event in header.events][:3] == ["reset", *["notification"] * 2]
        assert header.ids == ids
    encoded = "".join(f"%{byte:02x}" for byte in cursor.encode())
    parameter = await node.open_live(key, path=f"/api/stream?last_event_id={encoded}")
    assert [event.event for event in parameter.events][:3] == ["reset", *["notification"] * 2]
    assert parameter.of("reset")[0].json == {"reason": "unknown_cursor"}
    assert parameter.ids == ids


@pytest.mark.parametrize("cursor", ["%00", "1%00", "%001", "%ff%fe", "%ed%a0%80"])
async def test_bytes_that_are_no_text_are_an_unknown_cursor(
    node: Node, db: Connection, cursor: str
) -> None:
    """NUL and bytes that are not UTF-8 are a reset as well, and no error."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", "a")
    stream = await node.open_live(key, path=f"/api/stream?last_event_id={cursor}")
    assert stream.of("reset")
    assert stream.ids == ids


async def test_another_users_cursor_is_a_reset(node: Node, db: Connection) -> None:
    """Another user's id, or one that retention has deleted, gives all of one's own unread rows."""
    [key] = sign_in(db, "alice")
    [foreign] = insert(db, "bob", "his")
    ids = insert(db, "alice", "a", "b", "c")
    query(db, "DELETE FROM notifications WHERE id = %s", ids[2])
    for cursor in (foreign, ids[2]):
        stream = await node.open_live(key, last_event_id=cursor)
        assert stream.of("reset")
        assert stream.ids == ids[:2]


@pytest.mark.parametrize("cursor", ["0", ""])
async def test_no_cursor_is_not_a_reset(node: Node, db: Connection, cursor: str) -> None:
    """Who has nothing yet gets all unread rows, without reset."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", "a")
    stream = await node.open_live(key, last_event_id=cursor)
    assert not stream.of("reset")
    assert stream.ids == ids


# One stream per session


async def test_the_older_stream_of_a_session_is_superseded(node: Node, db: Connection) -> None:
    """Of two plain streams of a session the older ends, and is told not to come back for a year."""
    [key, other_key] = sign_in(db, "alice", "alice")
    older, other = await node.open_live(key), await node.open_live(other_key)
    newer = await node.open_live(key)
    await eventually(lambda: older.reason)
    assert older.reason == "superseded"
    assert older.parser.retry == YEAR_MS
    ids = insert(db, "alice", "hello")
    await eventually(lambda: newer.ids == ids and other.ids == ids)
    assert older.ids == []
    assert len(node.hub) == 2


async def test_a_stream_is_superseded_on_another_node(
    settings: SettingsFactory, db: Connection
) -> None:
    """The newest stream of a session counts, on whatever node it is."""
    [key] = sign_in(db, "alice")
    async with running(settings(**NO_SWEEP)) as one, running(settings(**NO_SWEEP)) as two:
        streams = [await node.open_live(key) for node in (one, two, one, two)]
        await eventually(lambda: all(stream.reason == "superseded" for stream in streams[:3]))
        assert not streams[3].closed
        assert (len(one.hub), len(two.hub)) == (0, 1)


async def test_streams_of_a_session_that_open_at_once_leave_one(
    settings: SettingsFactory, db: Connection
) -> None:
    """Out of a storm of streams of one session, over two nodes, exactly one stays."""
    [key] = sign_in(db, "alice")
    async with running(settings(**NO_SWEEP)) as one, running(settings(**NO_SWEEP)) as two:
        streams = await asyncio.gather(*(node.open(key) for node in [one, two] * 15))
        await eventually(lambda: len(one.hub) + len(two.hub) == 1)
        await eventually(lambda: sum(stream.complete for stream in streams) == 29)
        assert {stream.reason for stream in streams} == {"superseded", None}


# Why streams end


async def delete_by_api(node: Node, db: Connection, key: str) -> None:
    answer = await node.open(key, method="DELETE", path="/api/session")
    assert answer.status == 204


async def delete_by_sql(node: Node, db: Connection, key: str) -> None:
    end_session(db, key)


async def expire_at_once(node: Node, db: Connection, key: str) -> None:
    query(db, "UPDATE sessions SET expires_at = clock_timestamp()")


async def expire_soon(node: Node, db: Connection, key: str) -> None:
    query(db, "UPDATE sessions SET expires_at = clock_timestamp() + interval '0.4 s'")


async def delete_user(node: Node, db: Connection, key: str) -> None:
    query(db, "UPDATE sessions SET user_id = 'somebody else'")


async def truncate(node: Node, db: Connection, key: str) -> None:
    query(db, "TRUNCATE sessions")


@pytest.mark.parametrize(
    "end",
    [delete_by_api, delete_by_sql, expire_at_once, expire_soon, delete_user, truncate],
    ids=lambda end: end.__name__,
)
async def test_the_end_of_a_session_ends_its_stream(
    settings: SettingsFactory,
    db: Connection,
    end: Callable[[Node, Connection, str], Awaitable[None]],
) -> None:
    """However a session ends, its stream ends on every node within a second."""
    [key] = sign_in(db, "alice")
    async with running(settings(**NO_SWEEP)) as one, running(settings(**NO_SWEEP)) as two:
        stream = await one.open_live(key)
        await end(two, db, key)
        await eventually(lambda: stream.reason, 3)
        assert stream.reason == "session_ended"
        assert stream.parser.retry == YEAR_MS
        assert (await one.open(key)).status == (200 if end is delete_user else 401)


async def test_a_session_that_expires_by_itself_ends_its_stream(node: Node, db: Connection) -> None:
    """A session's own expiry ends the stream, with nobody saying anything; no later, no sooner."""
    short, long = sign_in(db, "alice", seconds=1) + sign_in(db, "alice")
    streams = [await node.open_live(key) for key in (short, long)]
    await eventually(lambda: streams[0].reason == "session_ended")
    assert not streams[1].closed


async def test_a_prolonged_session_keeps_its_stream(
    settings: SettingsFactory, db: Connection
) -> None:
    """A stream whose session was prolonged outlives the first expiry, once the feed looks again."""
    [key] = sign_in(db, "alice", seconds=2)
    async with running(settings(**NO_SWEEP)) as node:
        stream = await node.open_live(key)
        query(db, "UPDATE sessions SET expires_at = clock_timestamp() + interval '1 hour'")
        [opened] = node.hub
        deadline = opened.deadline
        assert node.feed.connection is not None
        query(
            db,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'sse-server feed'",
        )
        await eventually(lambda: opened.deadline > deadline)
        assert not stream.closed


class Gate:
    """Holds the claims of a node between the database's answer and the handler."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        storage = node.app[STORAGE]
        claim_stream = storage.claim_stream

        def held(request: web.Request) -> asyncio.Future[Claim | None] | None:
            claimed = claim_stream(request)
            assert claimed is not None

            async def answer() -> Claim | None:
                claim = await claimed
                gate = asyncio.get_running_loop().create_future()
                self.waiting.append(gate)
                await gate
                return claim

            return asyncio.ensure_future(answer())

        monkeypatch.setattr(storage, "claim_stream", held)

    def open(self) -> None:
        for gate in self.waiting:
            gate.set_result(None)


@pytest.mark.parametrize("reason", ["session_ended", "superseded"])
async def test_what_happens_between_claim_and_register_counts(
    settings: SettingsFactory, db: Connection, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """A session that ends, or opens another stream elsewhere, while its stream is being opened
    ends that stream too."""
    [key, witness_key] = sign_in(db, "alice", "bob")
    async with running(settings(**NO_SWEEP)) as one, running(settings(**NO_SWEEP)) as two:
        witness = await one.open_live(witness_key)
        gate = Gate(one, monkeypatch)
        opening = asyncio.create_task(one.open(key))
        await eventually(lambda: gate.waiting)
        if reason == "session_ended":
            end_session(db, key)
        else:
            await two.open_live(key)
        insert(db, "bob", "a sign that the feed has heard of it")
        await eventually(lambda: witness.ids)
        gate.open()
        stream = await opening
        await eventually(lambda: stream.reason, 3)
        assert stream.reason == reason


async def test_the_newest_stream_over_the_limit_is_turned_away(
    settings: SettingsFactory, db: Connection
) -> None:
    """Over a user's limit the newest stream is told so, politely, and the others stay."""
    keys = sign_in(db, "alice", "alice", "alice", "bob")
    async with running(settings(streams_per_user=2)) as node:
        streams = [await node.open_live(key) for key in keys[:2]]
        refused = await node.open(keys[2])
        await eventually(lambda: refused.reason)
        assert (refused.status, refused.reason) == (200, "limit")
        assert refused.headers["content-type"].startswith("text/event-stream")
        assert refused.parser.retry is not None
        assert 60_000 <= refused.parser.retry <= 120_000
        other = await node.open(keys[2], accept="application/json")
        await eventually(lambda: other.body)
        assert other.status == 429
        assert other.headers["content-type"].startswith("application/problem+json")
        assert 60 <= int(other.headers["retry-after"]) <= 120
        assert json.loads(other.body)["reason"] == "limit"
        await node.open_live(keys[3])
        # Reloading a page within the limit is none too many.
        await node.open_live(keys[1])
        await eventually(lambda: streams[1].reason == "superseded")
        assert not streams[0].closed


async def test_without_a_session_there_is_no_stream(node: Node, db: Connection) -> None:
    """No session is 401 for everybody: coming back would not help."""
    for key in (None, "x" * 43, "malformed"):
        answer = await node.open(key)
        await eventually(lambda answer=answer: answer.body)  # type: ignore[misc]
        assert answer.status == 401
        assert json.loads(answer.body)["type"] == "urn:sse-server:problem:not-signed-in"


async def test_without_a_database_open_streams_stay_and_new_ones_are_told(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """While the database is away new streams are turned away as unavailable, open ones go on."""
    parameters = parse_dsn(dsn)
    keys = sign_in(db, "alice", "bob")
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}"
        async with running(
            settings(database_url=url, heartbeat_seconds=1, query_timeout=2.0)
        ) as node:
            stream = await node.open_live(keys[0])
            await proxy.refuse()
            refused = await node.open(keys[1])
            await eventually(lambda: refused.reason)
            assert (refused.status, refused.reason) == (200, "unavailable")
            assert refused.parser.retry is not None
            assert 2_000 <= refused.parser.retry <= 10_000
            other = await node.open(keys[1], accept="*/*")
            assert other.status == 503
            assert 2 <= int(other.headers["retry-after"]) <= 10
            pings = len(stream.of("ping"))
            await eventually(lambda: len(stream.of("ping")) > pings)
            ids = insert(db, "alice", "meanwhile")
            await proxy.accept()
            await eventually(lambda: stream.ids == ids)
            await node.open_live(keys[1])
            assert not stream.closed


async def test_a_replay_survives_the_loss_of_the_database(
    settings: SettingsFactory, db: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is replaying when the database goes away goes on where it was."""
    monkeypatch.setattr("sse_server.stream.RETRY_SECONDS", (0.05, 0.1))
    parameters = parse_dsn(dsn)
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", *"abcde")
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}"
        async with running(settings(database_url=url, replay_page_rows=2)) as node:
            hooks = Hooks(node, monkeypatch)
            hooks.at("before page", 2, proxy.refuse)
            stream = await node.open(key)
            await eventually(lambda: hooks.reached["before page"] >= 4)
            assert stream.ids == ids[:2]
            await proxy.accept()
            await eventually(lambda: stream.ready)
            assert stream.ids == ids


async def test_streams_do_not_live_for_ever(settings: SettingsFactory, db: Connection) -> None:
    """Every stream ends at its longest life, with a retry that brings the client back soon."""
    keys = sign_in(db, *["alice"] * 5)
    async with running(settings(stream_max_seconds=1)) as node:
        streams = [await node.open(key) for key in keys]
        await eventually(lambda: all(stream.reason for stream in streams))
        assert {stream.reason for stream in streams} == {"max_age"}
        retries = {stream.parser.retry for stream in streams}
        assert all(100 <= (retry or 0) <= 2_000 for retry in retries)
        assert len(retries) > 1


async def test_a_draining_server_turns_streams_away(node: Node, db: Connection) -> None:
    """From the first moment of a shutdown new streams are told so, and old ones end."""
    keys = sign_in(db, "alice", "bob")
    stream = await node.open_live(keys[0])
    await node.app[STREAMS].drain(1.0)
    await eventually(lambda: stream.reason)
    assert stream.reason == "shutdown"
    refused = await node.open(keys[1])
    await eventually(lambda: refused.reason)
    assert (refused.status, refused.reason) == (200, "shutdown")
    other = await node.open(keys[1], accept="application/json")
    assert other.status == 503
    assert int(other.headers["retry-after"]) >= 1


# Heartbeats


async def test_pings_come_with_every_heartbeat(node: Node, db: Connection) -> None:
    """A live stream gets a named ping with the time, and no id that would move its cursor."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    await eventually(lambda: len(stream.of("ping")) >= 2)
    assert [event.id for event in stream.of("ping")] == [None] * len(stream.of("ping"))
    assert stream.of("ping")[0].json["time"].endswith("Z")


async def test_pings_come_while_a_replay_takes_long(
    settings: SettingsFactory, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that the database is slow to give does not keep the heartbeat back."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", *"abcde")
    async with running(settings(heartbeat_seconds=1, replay_page_rows=2)) as node:
        hooks = Hooks(node, monkeypatch)
        released = asyncio.Event()
        hooks.at("before page", 2, released.wait)
        stream = await node.open(key)
        await eventually(lambda: stream.of("ping"))
        assert not stream.ready
        released.set()
        await eventually(lambda: stream.ready)
        assert stream.ids == ids


# Clients of every kind


async def test_http_1_0_gets_a_plain_body(node: Node, db: Connection) -> None:
    """For HTTP/1.0 nothing is chunked, in replay, live and at the end."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", "a")
    stream = await node.open_live(key, version="1.0")
    assert "transfer-encoding" not in stream.headers
    ids += insert(db, "alice", "b")
    await eventually(lambda: stream.ids == ids)
    await eventually(lambda: stream.of("ping"))
    end_session(db, key)
    await eventually(lambda: stream.reason == "session_ended")
    assert (await node.open(key, version="1.0")).status == 401


async def test_no_cache_and_no_buffering_proxy_keeps_a_stream(node: Node, db: Connection) -> None:
    """The head of a stream forbids caches to keep it and proxies to change it."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in stream.headers["cache-control"]
    assert stream.headers["x-accel-buffering"] == "no"


def living(*classes: type) -> int:
    gc.collect()
    return sum(isinstance(item, classes) for item in gc.get_objects())


async def test_a_client_that_leaves_frees_everything(node: Node, db: Connection) -> None:
    """Within a heartbeat of a tab's end nothing of its stream is left, without any traffic."""
    keys = sign_in(db, *["alice", "bob"] * 5)
    before = len(asyncio.all_tasks())
    streams = await node.clients.open_many(node.port, keys)
    assert len(node.hub) == 10
    await eventually(lambda: len(asyncio.all_tasks()) <= before)  # an idle stream has no task
    for number, stream in enumerate(streams):
        if number % 2:
            stream.cut()  # reset
        else:
            stream.transport.close()  # a proper end
    await eventually(lambda: len(node.hub) == 0, 5)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)
    assert node.runner.server is not None
    assert len(node.runner.server.connections) == 0
    assert node.hub.users() == []
    assert node.count("sse_streams_closed_total", reason="gone") == 10
    await eventually(lambda: living(Stream, EventStream) == 0)


async def test_a_client_that_leaves_during_its_replay_frees_everything(
    settings: SettingsFactory,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A replay ends with its client: no further pages, and not one warning."""
    [key] = sign_in(db, "alice")
    insert(db, "alice", *("x" * 100))
    async with running(settings(heartbeat_seconds=300, replay_page_rows=10)) as node:
        hooks = Hooks(node, monkeypatch)
        stream: RawStream | None = None

        async def leave() -> None:
            await eventually(lambda: stream is not None)
            assert stream is not None
            stream.cut()
            [served] = node.hub
            await eventually(lambda: served.transport and served.transport.is_closing())

        hooks.at("before page", 2, leave)
        stream = await node.open(key)
        await eventually(lambda: len(node.hub) == 0)
        assert hooks.reached["before page"] <= 3
        assert node.count("sse_streams_closed_total", reason="gone") == 1
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("ended", [False, True], ids=["served", "turned away"])
async def test_a_client_that_leaves_before_the_head_is_no_failure(
    settings: SettingsFactory,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ended: bool,
) -> None:
    """Who leaves while the first page is read leaves nothing behind, no error in the log either."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as node:
        hooks = Hooks(node, monkeypatch)

        async def leave() -> None:
            node.clients.streams[-1].cut()
            server = node.runner.server
            assert server is not None
            await eventually(lambda: [c.transport for c in server.connections] == [None])
            if ended:
                raise DatabaseUnavailable("away")

        hooks.at("before page", 1, leave)
        stream = await node.open(key)
        assert stream.closed
        assert not stream.status
        await eventually(lambda: hooks.reached.get("before page") == 1)
        await eventually(lambda: len(node.hub) == 0)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# Slow clients

SLOW = {"receive_buffer": 4096}


async def test_a_slow_client_lags_and_catches_up(settings: SettingsFactory, db: Connection) -> None:
    """Who stops reading goes back to replaying, disturbs nobody, and then gets every row once."""
    without_rate_limit(db)
    slow_key, quick_key = sign_in(db, "alice", "alice")
    async with running(settings(stream_buffer_bytes=16384, replay_page_rows=50)) as node:
        slow = await node.open_live(slow_key, **SLOW)
        quick = await node.open_live(quick_key)
        slow.pause()
        written: list[int] = []

        def caught_up() -> bool:
            return quick.ids == written

        while not node.count("sse_streams_lagged_total"):
            written += insert(db, "alice", *["x" * 1500] * 50)
            await eventually(caught_up)
        written += insert(db, "alice", *["y" * 1500] * 500)
        await eventually(caught_up)
        [buffered] = [stream.buffered for stream in node.hub if not stream.live]
        assert buffered < 16384 + 50 * 2000 + 8192
        assert len(slow.ids) < len(written)
        slow.resume()
        await eventually(lambda: slow.ready == 2)
        written += insert(db, "alice", "live again")
        await eventually(lambda: slow.ids[-1] == written[-1])
        assert slow.ids == written
        assert quick.ids == written


async def test_a_replay_waits_for_its_client(
    settings: SettingsFactory, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is asked for when the client has taken the one before, however much there is."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", *["x" * 1500] * 4000)
    buffered: list[int] = []
    async with running(settings(stream_buffer_bytes=16384, replay_page_rows=50)) as node:
        replay = node.store.replay

        async def watched(positions: Sequence[Position], limit: int) -> list[Page]:
            buffered.extend(stream.buffered for stream in node.hub)
            return await replay(positions, limit)

        monkeypatch.setattr(node.store, "replay", watched)
        stream = await node.open(key, **SLOW)
        stream.pause()
        await eventually(lambda: any(stream.buffered > 16384 for stream in node.hub))
        stream.resume()
        await eventually(lambda: stream.ready, 30)
        assert stream.ids == ids
        assert len(buffered) >= 80
        assert max(buffered) <= 64 * 1024  # where asyncio starts to hold a writer back


async def test_a_client_that_takes_nothing_is_closed(
    settings: SettingsFactory, db: Connection
) -> None:
    """A client that does not read for slow_seconds is closed as slow, and comes back unharmed."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    async with running(
        settings(stream_buffer_bytes=16384, slow_seconds=0.2, replay_page_rows=50)
    ) as node:
        stream = await node.open_live(key, **SLOW)
        stream.pause()
        written: list[int] = []

        def write_until_closed() -> bool:
            if len(node.hub) and len(written) < 20_000:
                written.extend(insert(db, "alice", *["x" * 1500] * 50))
            return len(node.hub) == 0

        await eventually(write_until_closed, 20)
        assert node.count("sse_streams_closed_total", reason="slow") == 1
        stream.resume()
        await eventually(lambda: stream.closed)
        had = stream.ids
        again = await node.open_live(key, last_event_id=stream.parser.last_event_id)
        # Rows of the cursor's own transaction may come again.
        assert sorted({*had, *again.ids}) == written
        assert len(set(again.ids)) == len(again.ids)
