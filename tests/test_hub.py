"""The hub: the fan-out and its rules, and the law that all of them together keep."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from aiohttp.abc import AbstractStreamWriter
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sse_server import events
from sse_server.events import Closing, Content, Notification
from sse_server.hub import TICKS_PER_SECOND, Hub, Stream
from sse_server.metrics import Metrics
from sse_server.snapshot import NOTHING, Snapshot
from sse_server.store import Page, Position, Store
from sse_server.stream import Streams
from tests.sse import Event, EventParser

CONTENT = Content.of("new_message", "hello", None)


def row(id: int, user_id: str = "alice", xact: int | None = None) -> Notification:
    return Notification(id, user_id, CONTENT, 0, 100 + id if xact is None else xact)


class Transport(asyncio.WriteTransport):
    """Collects what is written; `taken` says how much of it the client has read."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self.stalled = False
        self.closed = False
        self._buffered = 0

    def write(self, data: Any) -> None:
        assert not self.closed, "asyncio would complain"
        self.frames.append(bytes(data))
        if self.stalled:
            self._buffered += len(data)

    def get_write_buffer_size(self) -> int:
        return self._buffered

    def is_closing(self) -> bool:
        return self.closed

    def take(self) -> None:
        """The client reads all there is, and goes on reading."""
        self.stalled = False
        self._buffered = 0

    @property
    def events(self) -> list[Event]:
        parser = EventParser()
        return [event for frame in self.frames for event in parser.feed(events.unchunk(frame))]

    @property
    def ids(self) -> list[int]:
        return [int(event.id) for event in self.events if event.id is not None]

    @property
    def names(self) -> list[str]:
        return [event.event for event in self.events]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> Hub:
    return Hub(
        Metrics(),
        streams_per_user=3,
        buffer_bytes=1000,
        heartbeat_seconds=2,
        max_seconds=100,
        clock=clock,
    )


def connected(
    hub: Hub, user_id: str = "alice", session_id: int = 1, number: int = 1, *, live: bool = True
) -> tuple[Stream, Transport]:
    """A stream that has been registered, and whose replay found nothing."""
    stream, transport = Stream(user_id, session_id, number), Transport()
    assert hub.register(stream, 3600) is None
    stream.transport = transport
    if live:
        assert hub.go_live(stream)
    return stream, transport


class Socket:
    """Keeps a stream's socket, as a wire does; `received` is what was written to it directly."""

    def __init__(self, stream: Stream) -> None:
        self.here, self.there = socket.socketpair()
        self.here.setblocking(False)
        self.there.setblocking(False)
        stream.keeper = self

    def wake(self) -> None:
        """Nothing waits."""

    def fileno(self) -> int:
        return self.here.fileno()

    @property
    def received(self) -> bytes:
        try:
            return self.there.recv(100_000)
        except BlockingIOError:
            return b""

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.here.close()
        self.there.close()


def reason(transport: Transport) -> str:
    assert transport.names.count("closing") == 1
    return str(transport.events[-1].json["reason"])


# Fan-out


def test_a_frame_goes_to_all_live_streams_of_its_user(hub: Hub) -> None:
    """One notification is written to each stream of its user, and to nobody else."""
    hers = [connected(hub, "alice", n) for n in (1, 2, 3)]
    _, his = connected(hub, "bob", 4)
    assert hub.publish(row(1)) == 3
    assert [transport.ids for _, transport in hers] == [[1]] * 3
    assert len({transport.frames[-1] for _, transport in hers}) == 1
    assert his.frames == []


def test_nobody_there_costs_nothing(hub: Hub) -> None:
    """What is for users without a stream leaves no trace."""
    connected(hub, "bob")
    assert hub.publish(row(1)) == 0
    assert not hub.wants("alice")
    assert not hub.missed("alice", 1)
    assert hub.users() == ["bob"]


def test_the_same_notification_is_written_once(hub: Hub) -> None:
    """Brought by an announcement and by a sweep, it is written once."""
    _, transport = connected(hub)
    assert hub.missed("alice", 1)
    assert hub.publish(row(1)) == 1
    assert not hub.missed("alice", 1)
    assert hub.publish(row(1)) == 0
    assert transport.ids == [1]


def test_a_replaying_stream_is_made_dirty(hub: Hub) -> None:
    """What is announced during a replay is not written, and keeps the stream from going live."""
    stream, transport = connected(hub, live=False)
    assert hub.publish(row(1)) == 0
    assert stream.dirty
    assert not hub.go_live(stream)
    assert not stream.live
    assert hub.go_live(stream)  # after another pass
    assert transport.ids == []


def test_what_the_replay_has_written_makes_nobody_dirty(hub: Hub) -> None:
    """An announcement of a row that the replay has found means nothing new."""
    stream, transport = connected(hub, live=False)
    hub.replayed(stream, row(1))
    assert hub.publish(row(1)) == 0
    assert hub.go_live(stream)
    assert hub.publish(row(2)) == 1
    assert transport.ids == [1, 2]


def test_a_row_replayed_before_its_announcement_is_remembered_when_live(hub: Hub) -> None:
    """An announcement that comes only after going live is still recognised."""
    stream, transport = connected(hub, live=False)
    hub.replayed(stream, row(1))
    hub.replayed(stream, row(1))
    assert hub.go_live(stream)
    assert hub.publish(row(1)) == 0
    assert transport.ids == [1]


def test_a_sweep_prunes_what_will_not_come_again(hub: Hub) -> None:
    """After a sweep the hub remembers only rows of transactions that it did not show."""
    stream, _ = connected(hub)
    hub.publish(row(1, xact=10))
    hub.publish(row(2, xact=12))
    other, _ = connected(hub, session_id=2, live=False)
    hub.replayed(other, row(3, xact=14))
    assert hub.go_live(other)
    hub.advance(Snapshot("12:14:12"))
    assert hub.missed("alice", 1)
    assert not hub.missed("alice", 2)
    assert other.seen == {3: 14}
    hub.advance(Snapshot("20:20:"))
    assert hub.missed("alice", 2)
    assert not other.seen
    assert not stream.seen
    assert not hub._recent
    assert not hub._seen


def test_a_sweep_leaves_a_replay_its_memory(hub: Hub) -> None:
    """A pass that began before a sweep may find again what it has written: it is not repeated."""
    stream, transport = connected(hub, live=False)
    hub.replayed(stream, row(1, xact=10))
    hub.advance(Snapshot("20:20:"))
    hub.replayed(stream, row(1, xact=10))
    assert transport.ids == [1]
    assert hub.go_live(stream)
    assert not stream.seen


def test_a_stream_over_its_buffer_lags(hub: Hub) -> None:
    """A slow client is written nothing more, costs no memory, and replays from where it was."""
    stream, transport = connected(hub)
    _, quick = connected(hub, session_id=2)
    hub.advance(Snapshot("50:50:"))
    transport.stalled = True
    written = 0
    while stream.live:
        written += 1
        hub.publish(row(written))
    assert transport.ids == list(range(1, written))
    assert quick.ids == list(range(1, written + 1))
    assert stream.dirty
    assert stream.base is hub.snapshot
    assert sorted(stream.seen or ()) == list(range(1, written))
    frames = len(transport.frames)
    hub.publish(row(999))
    hub.control("alice", events.read([1], None))
    hub.ready("alice", 5)
    assert len(transport.frames) == frames


def test_a_slow_client_gets_no_heartbeat(hub: Hub, clock: Clock) -> None:
    """Nor do heartbeats fill the buffer of a client that does not read."""
    _, transport = connected(hub)
    transport.stalled = True
    for _ in range(1000):
        clock.now += 1 / TICKS_PER_SECOND
        hub.tick()
    assert transport.get_write_buffer_size() < 1200


def test_lag_all_replays_everything(hub: Hub) -> None:
    """When the database is another cluster, nothing that was known of transactions counts."""
    stream, transport = connected(hub)
    hub.publish(row(1))
    before = stream.base
    hub.lag_all()
    assert not stream.live
    assert stream.base is not before
    assert stream.base is not None
    assert not stream.base.covers(3)
    hub.replayed(stream, row(1))
    assert transport.ids == [1, 1]


# Straight to the socket


def test_frames_go_straight_to_the_socket_while_nothing_waits(hub: Hub) -> None:
    """And through the transport behind what waits there, until that is gone."""
    stream, transport = connected(hub, live=False)
    with Socket(stream) as kernel:
        hub.publish(row(1))
        stream.dirty = False
        assert hub.go_live(stream)
        hub.publish(row(2))
        assert kernel.received == events.notification(row(2))
        assert not transport.frames
        transport.stalled = True
        while True:  # fill the kernel's buffer
            try:
                kernel.here.send(b"x" * 1000)
            except BlockingIOError:
                break
        hub.publish(row(3))
        assert stream.fd == -1
        while kernel.received:  # now there is room, but not before what waits
            pass
        hub.publish(row(4))
        hub.control("alice", events.read([1], None))
        assert not kernel.received
        assert transport.names == ["notification", "notification", "read"]
        transport.take()
        hub.publish(row(5))
        hub.publish(row(6))
        assert kernel.received == events.notification(row(5)) + events.notification(row(6))
        assert transport.ids == [3, 4]
        assert stream.sent == 5


@pytest.mark.parametrize("how", ["close", "lag_all"])
def test_nothing_goes_straight_to_a_stream_that_is_not_live(hub: Hub, how: str) -> None:
    """What is written after the last event, or into a replay, would be a lie."""
    stream, _ = connected(hub, live=False)
    with Socket(stream) as kernel:
        assert hub.go_live(stream)
        if how == "close":
            hub.close(stream, Closing.SESSION_ENDED)
        else:
            hub.lag_all()
        assert (b"closing" in kernel.received) is (how == "close")
        hub.publish(row(1))
        assert not kernel.received


# Coming and going


def test_a_newer_stream_of_a_session_supersedes_the_older(hub: Hub) -> None:
    """The older one is told, and what is published goes to the newer one alone."""
    older, old_transport = connected(hub, number=1)
    newer, new_transport = connected(hub, number=2)
    assert reason(old_transport) == "superseded"
    assert old_transport.events[-1].retry == events.NEVER_MS
    hub.publish(row(1))
    assert (old_transport.ids, new_transport.ids) == ([], [1])
    hub.unregister(older)
    hub.unregister(older)
    assert list(hub) == [newer]
    hub.unregister(newer)
    assert hub.users() == []


def test_an_older_stream_that_comes_late_is_refused(hub: Hub) -> None:
    """Whoever registers last is not the newest: the number says who is."""
    _, transport = connected(hub, number=2)
    assert hub.register(Stream("alice", 1, 1), 60) is Closing.SUPERSEDED
    assert transport.names == []


def test_another_node_may_supersede(hub: Hub) -> None:
    """A higher number announced by another node ends the stream, the same or a lower does not."""
    _, transport = connected(hub, number=5)
    hub.supersede(1, 5)
    hub.supersede(1, 4)
    hub.supersede(99, 7)
    assert transport.names == []
    hub.supersede(1, 6)
    assert reason(transport) == "superseded"


def test_the_newest_over_the_limit_is_refused(hub: Hub) -> None:
    """A user's fourth session is turned away, but a reload of the third is not."""
    for session_id in (1, 2, 3):
        connected(hub, session_id=session_id)
    assert hub.register(Stream("alice", 4, 1), 60) is Closing.LIMIT
    connected(hub, session_id=3, number=2)
    connected(hub, "bob", 5)
    assert len(hub) == 4


def test_a_draining_hub_refuses(hub: Hub) -> None:
    """During a shutdown nobody is let in."""
    hub.draining = True
    assert hub.register(Stream("alice", 1, 1), 60) is Closing.SHUTDOWN


def test_only_the_first_reason_counts(hub: Hub) -> None:
    """A stream says once why it ends, and then nothing more."""
    stream, transport = connected(hub)
    hub.close(stream, Closing.MAX_AGE)
    hub.close(stream, Closing.SHUTDOWN)
    stream.write(events.ping(0))
    assert hub.publish(row(1)) == 0
    hub.unregister(stream)
    assert transport.names == ["closing"]
    assert reason(transport) == "max_age"
    count = hub.metrics.registry.get_sample_value
    assert count("sse_streams_closed_total", {"reason": "max_age"}) == 1


def test_a_lost_connection_is_noticed(hub: Hub, clock: Clock) -> None:
    """By the next frame or the next heartbeat, and nothing is written to it."""
    by_frame, first = connected(hub)
    by_heartbeat, second = connected(hub, "bob", 2)
    first.closed = second.closed = True
    hub.publish(row(1))
    assert by_frame.closing is Closing.GONE
    hub.control("bob", events.read([1], None))
    clock.now += 2
    hub.tick()
    assert by_heartbeat.closing is Closing.GONE
    assert first.frames == second.frames == []


# Time


def test_every_stream_has_one_ping_per_heartbeat(hub: Hub, clock: Clock) -> None:
    """Spread over the ticks, and not in a burst after the process was paused."""
    transports = [connected(hub, f"user-{n}", n)[1] for n in range(16)]
    most = 0
    for _ in range(3 * 2 * TICKS_PER_SECOND):
        before = sum(len(transport.frames) for transport in transports)
        clock.now += 1 / TICKS_PER_SECOND
        hub.tick()
        most = max(most, sum(len(transport.frames) for transport in transports) - before)
    assert [transport.names for transport in transports] == [["ping"] * 3] * 16
    assert most == 2
    clock.now += 60
    hub.tick()
    assert [len(transport.frames) for transport in transports] == [4] * 16


def test_streams_end_with_their_session(hub: Hub, clock: Clock) -> None:
    """Within a tick of the expiry, which may be moved in both directions."""
    stream, transport = Stream("alice", 1, 1), Transport()
    assert hub.register(stream, 10) is None
    stream.transport = transport
    hub.expire(1, 40)
    clock.now += 30
    hub.tick()
    assert transport.names[-1] == "ping"
    hub.expire(1, 1)
    clock.now += 1.5
    hub.tick()
    assert reason(transport) == "session_ended"
    assert (stream.live, stream.closing) == (False, Closing.SESSION_ENDED)


def test_a_session_that_has_ended_ends_at_once(hub: Hub) -> None:
    """Nothing left is no time to wait for a tick."""
    _, transport = connected(hub)
    hub.expire(1, 0)
    assert reason(transport) == "session_ended"


def test_every_stream_ends_at_its_longest_life(hub: Hub, clock: Clock) -> None:
    """At 80 to 100 % of it, not all at once."""
    transports = [connected(hub, f"user-{n}", n)[1] for n in range(40)]
    clock.now += 79
    hub.tick()
    assert not any("closing" in transport.names for transport in transports)
    clock.now += 10
    hub.tick()
    ended = sum("closing" in transport.names for transport in transports)
    assert 0 < ended < 40
    clock.now += 12
    hub.tick()
    assert {reason(transport) for transport in transports} == {"max_age"}


def test_it_forgets_what_is_gone(hub: Hub, clock: Clock) -> None:
    """When the last stream has ended there is nothing left of any."""
    for n in range(30):
        stream, _ = connected(hub, f"user-{n % 7}", n % 5, n)
        hub.publish(row(n, f"user-{n % 7}"))
        clock.now += 0.3
        hub.tick()
        if n % 2:
            hub.unregister(stream)
    for stream in hub:
        hub.unregister(stream)
    assert hub.users() == []
    assert (len(hub), hub._recent, hub._seen, hub._deadlines) == (0, set(), set(), {})
    assert not any(hub._slots)


# The law

USERS = ("alice", "bob")
PAGE_ROWS = 2
BUFFER_BYTES = 200  # the second frame is above it


class Model:
    """PostgreSQL: transactions that write, commit in any order, and are announced after that."""

    def __init__(self) -> None:
        self.next_id = 1
        self.next_xact = 10
        self.open: dict[int, list[Notification]] = {}
        self.committed: list[Notification] = []
        self.horizons: dict[int, int] = {}
        self.announcements: list[list[Notification]] = []
        # Of rows that no NOTIFY told of. Where triggers are off, a row that came after them may be
        # sent first, so a cursor need not cover them; a stream that stays open gets them.
        self.silent: set[int] = set()

    @property
    def snapshot(self) -> Snapshot:
        running = ",".join(map(str, sorted(self.open)))
        return Snapshot(f"{min(self.open, default=self.next_xact)}:{self.next_xact}:{running}")

    def begin(self) -> int:
        xact, self.next_xact = self.next_xact, self.next_xact + 1
        self.open[xact] = []
        return xact

    def insert(self, xact: int, user_id: str) -> None:
        self.horizons[self.next_id] = self.snapshot.xmin
        self.open[xact].append(row(self.next_id, user_id, xact))
        self.next_id += 1

    def commit(self, xact: int, *, announced: bool) -> None:
        rows = self.open.pop(xact)
        self.committed += rows
        if not announced:
            self.silent.update(row.id for row in rows)
        elif rows:
            self.announcements.append(rows)

    def page(self, position: Position, limit: int) -> Page:
        """What the query ``replay`` says."""
        known = True
        base = position.base
        if base is None:
            base = NOTHING
            if position.cursor is not None:
                [cursor] = [row for row in self.committed if row.id == position.cursor]
                assert cursor.user_id == position.user_id
                horizon = self.horizons[position.cursor]
                base = Snapshot(f"{horizon}:{horizon}:")
        snapshot = position.snapshot or self.snapshot
        found = sorted(
            (
                row
                for row in self.committed
                if row.user_id == position.user_id
                and row.id > position.after_id
                and row.id != position.cursor
                and not base.covers(row.xact)
                and snapshot.covers(row.xact)
            ),
            key=lambda row: row.id,
        )[:limit]
        unread = sum(row.user_id == position.user_id for row in self.committed)
        return Page(
            known, snapshot, unread if position.counted else None, found, len(found) == limit
        )


class Query:
    """Pages that are asked for, seen by the database at one moment and here at a later one."""

    def __init__(
        self,
        database: Model,
        positions: Sequence[Position],
        limit: int,
        answer: asyncio.Future[list[Page]],
    ) -> None:
        self.answer = answer
        self._database = database
        self._positions = positions
        self._limit = limit
        self._pages: list[Page] | None = None

    def look(self) -> None:
        if self._pages is None:
            self._pages = [self._database.page(p, self._limit) for p in self._positions]

    def deliver(self) -> None:
        self.look()
        if not self.answer.done():
            self.answer.set_result(self._pages or [])


class Client:
    """One session with its stream; comes back with the cursor of the last one."""

    def __init__(self, session_id: int, user_id: str) -> None:
        self.session_id = session_id
        self.user_id = user_id
        self.number = 0
        self.received: list[int] = []
        self.stream: Stream | None = None
        self.transport = Transport()
        self.drained = asyncio.Event()

    async def drain(self) -> None:
        """Of the response's writer."""
        while self.transport.stalled and self.transport.get_write_buffer_size():
            self.drained.clear()
            await self.drained.wait()


class Delivery(RuleBasedStateMachine):
    """The real hub and the real replay, over a model of the database, in any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.database = Model()
        self.hub = Hub(Metrics(), buffer_bytes=BUFFER_BYTES, streams_per_user=100)
        self.feed_snapshot = self.database.snapshot
        self.hub.advance(self.feed_snapshot)
        self.asked: list[Query] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.clients = [Client(number, USERS[number % 2]) for number in range(3)]
        self.streams = Streams(
            self.hub,
            cast(Store, self),
            self.hub.metrics,
            page_rows=PAGE_ROWS,
        )

    async def replay(self, positions: Sequence[Position], limit: int) -> list[Page]:
        """The store's: answered when the test says so."""
        query = Query(self.database, positions, limit, self.loop.create_future())
        self.asked.append(query)
        return await query.answer

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    # The backends

    @rule()
    @precondition(lambda self: len(self.database.open) < 4)
    def begin(self) -> None:
        self.database.begin()

    @rule(data=st.data(), users=st.lists(st.sampled_from(USERS), min_size=1, max_size=3))
    @precondition(lambda self: self.database.open)
    def insert(self, data: st.DataObject, users: list[str]) -> None:
        xact = data.draw(st.sampled_from(sorted(self.database.open)))
        for user_id in users:
            self.database.insert(xact, user_id)

    @rule(users=st.lists(st.sampled_from(USERS), min_size=1, max_size=3))
    def write(self, users: list[str]) -> None:
        """A statement of its own, which the feed hears of at once."""
        xact = self.database.begin()
        for user_id in users:
            self.database.insert(xact, user_id)
        self.database.commit(xact, announced=True)
        while self.database.announcements:
            self.announce()

    @rule(data=st.data(), announced=st.booleans())
    @precondition(lambda self: self.database.open)
    def commit(self, data: st.DataObject, announced: bool) -> None:
        """Without an announcement: a NOTIFY that was lost, or a trigger that was switched off."""
        xact = data.draw(st.sampled_from(sorted(self.database.open)))
        self.database.commit(xact, announced=announced)

    @rule(data=st.data())
    @precondition(lambda self: self.database.open)
    def roll_back(self, data: st.DataObject) -> None:
        del self.database.open[data.draw(st.sampled_from(sorted(self.database.open)))]

    # The feed

    @rule()
    @precondition(lambda self: self.database.announcements)
    def announce(self) -> None:
        for notification in self.database.announcements.pop(0):
            if not self.feed_snapshot.covers(notification.xact):
                self.hub.publish(notification)
        self.settle()

    @rule()
    def sweep(self) -> None:
        snapshot = self.database.snapshot
        found = [
            row
            for row in self.database.committed
            if snapshot.covers(row.xact) and not self.feed_snapshot.covers(row.xact)
        ]
        for notification in sorted(found, key=lambda row: (row.xact, row.id)):
            if self.hub.missed(notification.user_id, notification.id):
                self.hub.publish(notification)
        self.feed_snapshot = snapshot
        self.hub.advance(snapshot)
        self.settle()

    # The clients

    async def _serve(self, client: Client, stream: Stream, cursor: int | None) -> None:
        transport = client.transport
        first = Position(client.user_id, cursor=cursor)
        page = await self.streams._pages.ask(first)
        if stream.ended:
            return
        stream.transport = transport
        await self.streams._run(stream, cast(AbstractStreamWriter, client), first, page)

    @rule(number=st.integers(0, 2))
    def connect(self, number: int) -> None:
        client = self.clients[number]
        if client.stream is not None:
            self.disconnect(number)
        client.number += 1
        client.transport = Transport()
        client.stream = Stream(client.user_id, client.session_id, client.number)
        cursor = client.received[-1] if client.received else None
        serve = self._serve(client, client.stream, cursor)
        assert self.hub.register(client.stream, 3600) is None
        self.tasks.append(self.loop.create_task(serve))
        self.settle()

    @rule(number=st.integers(0, 2))
    @precondition(lambda self: any(client.stream for client in self.clients))
    def disconnect(self, number: int) -> None:
        """What the client has not taken yet is lost with its line."""
        client = self.clients[number]
        if client.stream is None:
            return
        kept = client.transport.ids
        assert len(set(kept)) == len(kept)
        client.received += kept
        client.transport.closed = True
        self.hub.close(client.stream, Closing.GONE)
        self.hub.unregister(client.stream)
        client.stream = None
        client.drained.set()
        self.settle()

    @rule(number=st.integers(0, 2))
    def stall(self, number: int) -> None:
        self.clients[number].transport.stalled = True

    @rule(number=st.integers(0, 2))
    def overwhelm(self, number: int) -> None:
        """More than a client that does not read has buffer for."""
        self.clients[number].transport.stalled = True
        for _ in range(4):
            self.write([self.clients[number].user_id])

    @rule(number=st.integers(0, 2))
    def read_on(self, number: int) -> None:
        self.clients[number].transport.take()
        self.clients[number].drained.set()
        self.settle()

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def look(self, data: st.DataObject) -> None:
        """The database takes its snapshot; the answer is still on its way."""
        data.draw(st.sampled_from(self.asked)).look()

    @rule(data=st.data())
    @precondition(lambda self: self.asked)
    def answer(self, data: st.DataObject) -> None:
        self.asked.pop(data.draw(st.integers(0, len(self.asked) - 1))).deliver()
        self.settle()

    # The law

    @invariant()
    def nobody_gets_a_foreign_row_or_one_twice(self) -> None:
        owners = {row.id: row.user_id for row in self.database.committed}
        for client in self.clients:
            ids = client.transport.ids
            assert len(set(ids)) == len(ids)
            assert all(owners[id] == client.user_id for id in ids)

    @invariant()
    def every_cursor_is_safe(self) -> None:
        """Whoever has received a row has been sent everything that it covers."""
        for client in self.clients:
            sent = client.received + client.transport.ids
            had: set[int] = set()
            for id in sent:
                had.add(id)
                horizon = self.database.horizons[id]
                missing = [
                    row.id
                    for row in self.database.committed
                    if row.user_id == client.user_id
                    and row.xact < horizon
                    and row.id not in had
                    and row.id not in self.database.silent
                ]
                assert missing == []

    @invariant()
    def buffers_are_bounded(self) -> None:
        for client in self.clients:
            assert client.transport.get_write_buffer_size() < BUFFER_BYTES + (PAGE_ROWS + 1) * 200

    def teardown(self) -> None:
        """In the end, with everything committed, swept and read, everybody has everything."""
        try:
            for xact in list(self.database.open):
                self.database.commit(xact, announced=False)
            self.sweep()
            for number, client in enumerate(self.clients):
                self.read_on(number)
                if client.stream is None:
                    self.connect(number)
            for _ in range(1000):
                if not self.asked:
                    break
                self.asked.pop(0).deliver()
                self.settle()
            for number, client in enumerate(self.clients):
                assert client.stream is not None
                assert client.stream.live
                self.disconnect(number)
                expected = {
                    row.id for row in self.database.committed if row.user_id == client.user_id
                }
                received = set(client.received)
                assert received <= expected
                assert expected - received <= (self.database.silent if client.number > 1 else set())
            for task in self.tasks:
                task.result()
        finally:
            for task in self.tasks:
                task.cancel()
            self.loop.run_until_complete(self.streams.close())
            self.settle()
            self.loop.close()


TestDelivery = Delivery.TestCase
TestDelivery.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
