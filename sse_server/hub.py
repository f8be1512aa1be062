"""Who is connected, and the fan-out to them: pure memory, plain functions.

A stream is *live* or *replaying*. A live one is written to directly, in a loop over the user's
streams, with a frame that was encoded once. For a replaying one a frame only sets its *dirty* mark:
the row is in the table, and the stream will look again before it goes live. So nothing is ever
queued for a stream here, and a slow one costs no more than the buffer of its socket.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Protocol, cast

from sse_server import events
from sse_server.events import Closing, Notification
from sse_server.metrics import Metrics
from sse_server.snapshot import NOTHING, Snapshot
from sse_server.trace import Trace

# Short enough that a stream ends well within a second of its session.
TICKS_PER_SECOND = 4

# Bytes that a stream may always have unsent: some notifications.
LEAST_ROOM = 4096


class Keeper(Protocol):
    """Sees to a stream for which no handler waits."""

    def wake(self) -> None:
        """The stream is closing, or has to replay."""

    def fileno(self) -> int:
        """The descriptor of the socket, open until the stream's transport is taken away."""


class Stream:
    """One open event stream. Written by the hub when live, by its handler while it replays."""

    __slots__ = (
        "address",
        "base",
        "closing",
        "deadline",
        "deadline_reason",
        "dirty",
        "fd",
        "keeper",
        "lagging",
        "live",
        "number",
        "opened_at",
        "plain",
        "seen",
        "sent",
        "session_id",
        "slot",
        "transport",
        "user_id",
        "waker",
    )

    def __init__(self, user_id: str, session_id: int, number: int, *, address: str = "") -> None:
        self.user_id = user_id
        # Under which it is counted; see limits.network().
        self.address = address
        self.session_id = session_id
        # Of all streams that the session ever opened, the one with the highest number counts.
        self.number = number
        # None until the head of the response is out.
        self.transport: asyncio.WriteTransport | None = None
        # The descriptor to write to directly: while the stream is live, and nothing is unsent.
        self.fd = -1
        # HTTP/1.0: without the framing of chunks.
        self.plain = False
        self.live = False
        # Something has been announced that the running replay may not have seen.
        self.dirty = False
        # It was live, and replays because its client was slow.
        self.lagging = False
        # Why it is to end; from then on nothing more is written.
        self.closing: Closing | None = None
        # While replaying: what this snapshot shows of the user's rows has been sent, and `seen`.
        # None at first: that depends on the client's cursor, which is looked up with the rows.
        self.base: Snapshot | None = None
        # Ids (with xact) that were sent and may yet be announced, or found by this replay.
        self.seen: dict[int, int] | None = None
        self.waker: asyncio.Future[None] | None = None
        # Who sees to it when no handler waits; see wire.py.
        self.keeper: Keeper | None = None
        # Tick of the hub's clock at which it has to end, and why.
        self.deadline = 0
        self.deadline_reason = Closing.MAX_AGE
        self.slot = 0
        self.opened_at = time.monotonic()
        self.sent = 0

    def write(self, frame: bytes) -> None:
        """Hand a frame to the kernel, or the transport. Without effect on one that is closing."""
        if self.fd >= 0:
            # Only the stream and the kernel's socket are touched. With thousands of streams the
            # transport's many objects would have to come from memory, for each frame.
            try:
                taken = os.write(self.fd, frame)
            except OSError:  # not now, or never again: the transport finds out
                taken = 0
            if taken == len(frame):
                return
            frame = frame[taken:]
        transport = self.transport
        # asyncio would log a warning for each frame that goes to a lost connection.
        if transport is not None and self.closing is None and not transport.is_closing():
            transport.write(events.unchunk(frame) if self.plain else frame)
            if self.fd >= 0 and transport.get_write_buffer_size():
                self.fd = -1  # what comes next has to wait behind it

    @property
    def buffered(self) -> int:
        """Bytes that the transport could not yet give to the kernel."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    @property
    def ended(self) -> bool:
        """Whether its last event has been written."""
        return self.closing is not None

    def wake(self) -> None:
        """Wake whoever waits for the stream, or is to see to it."""
        if self.waker is not None and not self.waker.done():
            self.waker.set_result(None)
        if self.keeper is not None:
            self.keeper.wake()

    def waiter(self) -> asyncio.Future[None]:
        """What the handler waits for: done when the stream is closing or has to replay."""
        self.waker = asyncio.get_running_loop().create_future()
        if self.closing is not None:
            self.waker.set_result(None)
        return self.waker


# Most users have none at most times, and an empty dict is not free.
_NO_IDS = cast(dict[int, int], MappingProxyType({}))


class _User:
    """The streams of one user on this node."""

    __slots__ = ("recent", "streams")

    def __init__(self) -> None:
        self.streams: tuple[Stream, ...] = ()
        # Ids (with xact) that have been dispatched since the feed's last sweep; the next one will
        # find them again.
        self.recent = _NO_IDS


class Hub:
    """All streams of this process."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        # Limits
        max_streams: int = 50_000,
        streams_per_user: int = 20,
        streams_per_address: int = 0,
        buffer_bytes: int = 256 * 1024,
        buffer_memory: int = 256 * 1024 * 1024,
        # Timeouts
        heartbeat_seconds: float = 15.0,
        max_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.trace = Trace()
        self.draining = False
        # That of the feed's last sweep: every row that it shows has been dispatched.
        self.snapshot = NOTHING
        self.heartbeat_seconds = heartbeat_seconds
        self._max_streams = max_streams
        self._streams_per_user = streams_per_user
        self._streams_per_address = streams_per_address
        self._most_room = buffer_bytes
        self._buffer_memory = buffer_memory
        # Bytes that each stream may have unsent, and its share of the memory that there is for all:
        # clients that do not read cannot fill it, however many they are.
        self.room = buffer_bytes
        self.share = buffer_memory
        self._max_seconds = max_seconds
        self._clock = clock
        self._users: dict[str, _User] = {}
        self._sessions: dict[int, Stream] = {}
        self._addresses: dict[str, int] = {}
        # All heartbeats and all ends by time hang on one timer: each stream sits in one of as many
        # slots as a heartbeat has ticks.
        self._tick = int(clock() * TICKS_PER_SECOND)
        slots = max(1, round(heartbeat_seconds * TICKS_PER_SECOND))
        self._slots: list[set[Stream]] = [set() for _ in range(slots)]
        self._next_slot = 0
        self._deadlines: dict[int, set[Stream]] = {}
        # Those whose `recent` or `seen` is not empty, to be pruned by the next sweep.
        self._recent: set[str] = set()
        self._seen: set[Stream] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._sessions.values()))

    def users(self) -> list[str]:
        """The users who have a stream here."""
        return list(self._users)

    def streams_of(self, user_id: str) -> int:
        """How many streams this user has here."""
        user = self._users.get(user_id)
        return 0 if user is None else len(user.streams)

    def wants(self, user_id: str) -> bool:
        """Whether anything for this user is of interest here."""
        return user_id in self._users

    def missed(self, user_id: str, id: int) -> bool:
        """Whether this notification is of interest here and has not been dispatched."""
        user = self._users.get(user_id)
        return user is not None and id not in user.recent

    # Coming and going

    def refuses(self, address: str) -> Closing | None:
        """Why no stream from this address can be opened now, whosever it is; `None` if one can.

        To be asked before the stream is claimed: a claim ends the session's older stream.
        """
        if self.draining:
            return Closing.SHUTDOWN
        if len(self._sessions) >= self._max_streams:
            return Closing.OVERLOAD
        if 0 < self._streams_per_address <= self._addresses.get(address, 0):
            return Closing.LIMIT
        return None

    def _share_memory(self) -> None:
        self.share = self._buffer_memory // max(1, len(self._sessions))
        self.room = min(self._most_room, max(LEAST_ROOM, self.share))

    def register(self, stream: Stream, seconds_left: float) -> Closing | None:
        """Add a stream; from now on it misses nothing: what comes makes it dirty.

        Supersedes the session's older stream, if that is here.

        Args:
            stream: Replaying.
            seconds_left: Until its session expires.

        Returns: Why it was not added, or `None` if it was.
        """
        if self.draining:
            return Closing.SHUTDOWN
        older = self._sessions.get(stream.session_id)
        if older is not None:
            if older.number > stream.number:
                return Closing.SUPERSEDED
            self.close(older, Closing.SUPERSEDED)
            self.unregister(older)
        # Again: others may have come since it was asked.
        refused = self.refuses(stream.address)
        if refused is not None:
            return refused
        user = self._users.get(stream.user_id)
        if user is None:
            user = self._users[stream.user_id] = _User()
        elif len(user.streams) >= self._streams_per_user:
            return Closing.LIMIT
        stream.seen = {}
        self._seen.add(stream)
        user.streams += (stream,)
        self._sessions[stream.session_id] = stream
        if self._streams_per_address:
            self._addresses[stream.address] = self._addresses.get(stream.address, 0) + 1
        else:
            stream.address = ""  # of no use then
        self._share_memory()
        stream.slot = self._next_slot
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        self._slots[stream.slot].add(stream)
        self._schedule(stream, self._max_seconds * random.uniform(0.8, 1.0), Closing.MAX_AGE)
        self.expire(stream.session_id, seconds_left)
        self.metrics.opened.inc()
        return None

    def unregister(self, stream: Stream) -> None:
        """Forget a stream. Calling it again does nothing."""
        if self._sessions.get(stream.session_id) is not stream:
            return
        del self._sessions[stream.session_id]
        self._share_memory()
        if self._streams_per_address:
            self._addresses[stream.address] -= 1
            if not self._addresses[stream.address]:
                del self._addresses[stream.address]
        user = self._users[stream.user_id]
        user.streams = tuple(other for other in user.streams if other is not stream)
        if not user.streams:
            del self._users[stream.user_id]
            self._recent.discard(stream.user_id)
        self._seen.discard(stream)
        self._slots[stream.slot].discard(stream)
        self._unschedule(stream)
        if stream.closing is None:
            stream.closing = Closing.GONE
        self.metrics.closed.labels(stream.closing.value).inc()

    def close(self, stream: Stream, reason: Closing, retry_ms: int | None = None) -> None:
        """End a stream: write its last event and wake its handler. Only the first call counts."""
        if stream.closing is not None:
            return
        if retry_ms is None:
            retry_ms = random.randint(*events.RETRY_MS[reason])
        if reason is not Closing.GONE:
            stream.write(events.closing(reason, retry_ms))
        stream.closing = reason
        stream.live = False
        stream.fd = -1
        stream.wake()

    # Fan-out

    def publish(self, notification: Notification) -> int:
        """Write a notification to its user's live streams. Bringing it again does nothing.

        Returns: To how many it was written.
        """
        user = self._users.get(notification.user_id)
        if user is None or notification.id in user.recent:
            return 0
        if user.recent is _NO_IDS:
            user.recent = {}
            self._recent.add(notification.user_id)
        user.recent[notification.id] = notification.xact
        frame = events.notification(notification)
        written = waiting = 0
        for stream in user.streams:
            if stream.seen and notification.id in stream.seen:
                continue  # by its replay, before the announcement came
            if stream.fd < 0:  # not live, or something is unsent
                if not stream.live:
                    stream.dirty = True
                    waiting += 1
                    continue
                transport = stream.transport
                assert transport is not None
                if transport.is_closing():
                    self.close(stream, Closing.GONE)
                    continue
                if transport.get_write_buffer_size() > self.room:
                    self._lag(stream, user, notification.id)
                    waiting += 1
                    continue
                self._direct(stream)
            stream.write(frame)
            stream.sent += 1
            written += 1
        self.trace.published(notification.id, written, waiting)
        return written

    @staticmethod
    def _direct(stream: Stream) -> None:
        """Write directly to a live stream from now on, if nothing is unsent."""
        if stream.keeper is not None and not stream.buffered:
            stream.fd = stream.keeper.fileno()

    def control(self, user_id: str, frame: bytes) -> None:
        """Write a control event to all streams of a user.

        Those that lag do not get it: what they say comes from the table, with `ready` behind it.
        """
        user = self._users.get(user_id)
        if user is not None:
            for stream in user.streams:
                if stream.buffered <= self.room:
                    stream.write(frame)

    def ready(self, user_id: str, unread_count: int) -> None:
        """Tell a user's live streams the count anew; the others will be told by their replay."""
        frame = events.ready(unread_count, self.heartbeat_seconds)
        for stream in self._users[user_id].streams if user_id in self._users else ():
            if stream.live and stream.buffered <= self.room:
                stream.write(frame)

    def _lag(self, stream: Stream, user: _User, announced: int) -> None:
        stream.live = False
        stream.lagging = True
        stream.dirty = True
        # Until now it was written all that has been dispatched: by the last sweep and before, and
        # since then, but for this one.
        stream.base = self.snapshot
        seen = stream.seen if stream.seen is not None else {}
        seen.update(user.recent)
        seen.pop(announced, None)
        stream.seen = seen
        self._seen.add(stream)
        self.metrics.lagged.inc()
        stream.wake()

    def lag_all(self) -> None:
        """Let every stream replay all its unread rows: nothing that was known holds any more."""
        for stream in self:
            stream.live = False
            stream.fd = -1
            stream.dirty = True
            stream.base = Snapshot(NOTHING.text)  # another object: a pass under way is void
            stream.seen = {}
            self._seen.add(stream)
            stream.wake()
        for user in self._users.values():
            user.recent = _NO_IDS
        self._recent.clear()

    # Replaying (called by the stream's handler)

    def replayed(self, stream: Stream, notification: Notification) -> None:
        """Write a notification found by a replay, unless this stream has had it."""
        seen = stream.seen
        assert seen is not None
        if notification.id in seen:
            return
        if not self.snapshot.covers(notification.xact):  # it may yet be announced
            seen[notification.id] = notification.xact
        stream.write(events.notification(notification))
        stream.sent += 1
        self.trace.replayed(notification.id)

    def go_live(self, stream: Stream) -> bool:
        """Switch a stream that has written everything its pass saw to live, if that is all.

        Returns: False if something was announced meanwhile: it has to look again, unless it has
            ended.
        """
        if stream.closing is not None:
            return False
        if stream.dirty:
            stream.dirty = False
            return False
        stream.live = True
        stream.lagging = False
        stream.base = None
        self._direct(stream)
        self._prune(stream)
        return True

    # What the feed brings

    def advance(self, snapshot: Snapshot) -> None:
        """Every row that `snapshot` shows has been dispatched, and will not be again."""
        self.snapshot = snapshot
        for user_id in list(self._recent):
            user = self._users[user_id]
            user.recent = {
                id: xact for id, xact in user.recent.items() if not snapshot.covers(xact)
            }
            if not user.recent:
                user.recent = _NO_IDS
                self._recent.discard(user_id)
        for stream in list(self._seen):
            # A replaying stream's base may be older: it could find again what is pruned.
            if stream.live:
                self._prune(stream)

    def _prune(self, stream: Stream) -> None:
        covers = self.snapshot.covers
        seen = {id: xact for id, xact in (stream.seen or {}).items() if not covers(xact)}
        stream.seen = seen or None
        if not seen:
            self._seen.discard(stream)

    def supersede(self, session_id: int, number: int) -> None:
        """Another stream of this session has been opened, here or on another node."""
        stream = self._sessions.get(session_id)
        if stream is not None and stream.number < number:
            self.close(stream, Closing.SUPERSEDED)

    def expire(self, session_id: int, seconds_left: float) -> None:
        """The session ends then (or has ended, if that is not above 0)."""
        stream = self._sessions.get(session_id)
        if stream is None:
            return
        if seconds_left <= 0:
            self.close(stream, Closing.SESSION_ENDED)
        elif self._at(seconds_left) < stream.deadline:
            self._schedule(stream, seconds_left, Closing.SESSION_ENDED)
        elif stream.deadline_reason is Closing.SESSION_ENDED:  # and now ends later than was said
            longest = self._max_seconds * random.uniform(0.8, 1.0)
            if seconds_left < longest:
                self._schedule(stream, seconds_left, Closing.SESSION_ENDED)
            else:
                self._schedule(stream, longest, Closing.MAX_AGE)

    # Time

    def _at(self, seconds: float) -> int:
        return max(self._tick + 1, math.ceil((self._clock() + seconds) * TICKS_PER_SECOND))

    def _schedule(self, stream: Stream, seconds: float, reason: Closing) -> None:
        self._unschedule(stream)
        stream.deadline = self._at(seconds)
        stream.deadline_reason = reason
        self._deadlines.setdefault(stream.deadline, set()).add(stream)

    def _unschedule(self, stream: Stream) -> None:
        due = self._deadlines.get(stream.deadline)
        if due is not None:
            due.discard(stream)
            if not due:
                del self._deadlines[stream.deadline]

    def tick(self) -> None:
        """Send the heartbeats and end what is due; to be called `TICKS_PER_SECOND` times a second.

        A late call makes up for those that were missed.
        """
        now = int(self._clock() * TICKS_PER_SECOND)
        frame = events.ping(int(time.time() * 1000))
        # After a pause of the process each slot is served once, not once per missed tick.
        first = max(self._tick + 1, now - len(self._slots) + 1)
        for tick in range(self._tick + 1, now + 1):
            for stream in self._deadlines.pop(tick, ()):
                self.close(stream, stream.deadline_reason)
            if tick >= first:
                self._heartbeat(self._slots[tick % len(self._slots)], frame)
        self._tick = max(self._tick, now)

    def _heartbeat(self, streams: Iterable[Stream], frame: bytes) -> None:
        for stream in list(streams):
            transport = stream.transport
            if transport is None:
                continue
            if transport.is_closing():
                self.close(stream, Closing.GONE)
            elif stream.fd >= 0 or transport.get_write_buffer_size() <= self.room:
                stream.write(frame)
