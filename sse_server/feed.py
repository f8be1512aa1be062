"""The one LISTEN connection of the process, and what it brings to the hub.

NOTIFY makes it fast, the table makes it correct. Payloads are dispatched in the order in which they
come, which is the order of commits. Every few seconds a *sweep* asks the table for every row that
the last one's snapshot did not show; that query is the probe of the connection too (a dead TCP peer
sends no error), and finds whatever no NOTIFY announced: after a reconnect, with a trigger switched
off, or for rows that replication wrote. So nothing depends on NOTIFY being complete.

Commits that notify wait for one another in the whole cluster. Under load the feeds therefore
*poll*: they sweep every few hundredths of a second, and while they do the triggers do not notify. A
lease in the table says so, which the feeds prolong: should they all die, the triggers speak again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from sse_server import events, spans
from sse_server.database import Connection
from sse_server.errors import DatabaseError
from sse_server.events import Closing, Notification
from sse_server.hub import Hub
from sse_server.metrics import Metrics
from sse_server.snapshot import NOTHING, Snapshot
from sse_server.store import Newest, Store

logger = logging.getLogger(__name__)

# Limits
SWEEP_ROWS = 5000  # ids in one page of a sweep: about 200 KB
FETCH_ROWS = 500  # contents fetched at once: up to 4 MB
RESYNC_STREAMS = 1000  # streams whose sessions and counts are looked up by one query

# Timeouts
BACKOFF_FIRST = 0.1
BACKOFF_MOST = 30.0
POLL_SECONDS = 0.03
# When transactions from the time of polling are still open, which will not notify.
LEAVING_SECONDS = 0.1
LEASE_SECONDS = 3.0
DECIDE_SECONDS = 1.0
# Longest that dispatching may hold the event loop before others get their turn.
TURN_SECONDS = 0.01

# Commits of notifications per second from which on feeds poll, and below which, if it lasts, they
# are notified again. Two thresholds and a delay, so that a load in between does not toggle.
POLL_ABOVE = 400.0
# Or so many writers that wait for one another at the moment of deciding: with a slow disk they
# never reach that rate, because each holds the lock until its commit is on it.
POLL_ABOVE_WAITING = 4
NOTIFY_BELOW = 150.0
NOTIFY_AFTER_SECONDS = 5.0

# All that reading a payload can fail with, if it is not one of ours: whatever it says, it must not
# end the feed. OSError is a time that is out of range; a lost connection is a DatabaseError.
_NOT_OURS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    OSError,
)

# Takes a payload; what it raises of `_NOT_OURS` means that it was none of ours.
Listener = Callable[[dict[str, Any]], Awaitable[None]]

T = TypeVar("T")


def _pages(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Feed:
    """LISTEN → hub. `open()` it once, then let `run()` go on for ever."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        metrics: Metrics,
        *,
        probe_seconds: float = 3.0,
        fetch_rows: int = FETCH_ROWS,
    ) -> None:
        self._store = store
        self._hub = hub
        self._metrics = metrics
        self._probe_seconds = probe_seconds
        self._fetch_rows = fetch_rows
        self._connection: Connection | None = None
        # When anything last came from the database, in seconds since 1970.
        self.heard_at = 0.0
        # That of the last sweep, and the newest row then.
        self._snapshot = NOTHING
        self._newest: Newest | None = None
        self._turn_started = 0.0
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "read": self._on_read,
            "preferences": self._on_preferences,
            "session": self._on_session,
            "stream": self._on_stream,
            "mode": self._on_mode,
        }
        self._listeners: dict[str, Listener] = {}
        self._recheck_sessions = False
        # Polling, and if so, since when the triggers notify again: the first snapshot from then.
        # Until all transactions that it shows running have ended, polling has to go on.
        self._polling = False
        self._leaving = False
        self._left: Snapshot | None = None
        self._sweep_now = False
        self._commits = 0
        self._last_xact = 0
        self._decided_at = 0.0
        self._quiet_since: float | None = None

    def listen(self, kind: str, listener: Listener) -> None:
        """Have payloads of a kind that is not the feed's own handed to somebody."""
        self._listeners[kind] = listener

    @property
    def connected(self) -> bool:
        """Whether what commits now will be dispatched now."""
        return self._connection is not None

    @property
    def connection(self) -> Connection | None:
        """The LISTEN connection, for tests that break it."""
        return self._connection

    async def open(self) -> None:
        """Connect for the first time, before there are any streams; fails fast.

        Raises:
            ConfigurationError: It would listen in vain.
            DatabaseError, DatabaseUnavailable: As connecting does.
        """
        connection = await self._store.database.connect_to_listen("sse-server feed")
        try:
            # First: LISTEN through a pooler would stay on a server connection that others use.
            await self._store.check_listen(connection)
            start = await self._store.feed_start(connection)
            self._snapshot, self._newest = start.snapshot, start.newest
            await self._resume_mode(connection)
        except BaseException:
            connection.close()
            raise
        self._hub.advance(self._snapshot)
        self._metrics.feed_swept_at.set_to_current_time()
        self.heard_at = time.time()
        self._set(connection)

    def _set(self, connection: Connection | None) -> None:
        self._connection = connection
        self._metrics.feed_connected.set(connection is not None)

    async def run(self) -> None:
        """Dispatch for ever, over as many connections as it takes."""
        backoff = BACKOFF_FIRST
        try:
            while True:
                try:
                    if self._connection is None:
                        await self._reconnect()
                        backoff = BACKOFF_FIRST
                        logger.info("feed: listening again")
                    assert self._connection is not None
                    await self._dispatch(self._connection)
                except (DatabaseError, OSError) as exc:
                    logger.warning(
                        "feed: %s; streams stay open, next try in at most %.1f s", exc, backoff
                    )
                finally:
                    if self._connection is not None:
                        self._connection.close()
                        self._set(None)
                        self._metrics.feed_reconnects.inc()
                # Full jitter: many nodes lose the same database at the same moment.
                await asyncio.sleep(random.uniform(0.5 * backoff, backoff))
                backoff = min(backoff * 2, BACKOFF_MOST)
        finally:
            if self._connection is not None:
                self._connection.close()
                self._set(None)

    async def _reconnect(self) -> None:
        connection = await self._store.database.connect_to_listen("sse-server feed")
        try:
            # LISTEN first, then look: what commits in between is announced and swept.
            start = await self._store.feed_start(connection, self._newest)
            if self._newest is not None and not start.same:
                # Restored from a dump, or a standby that had not got all: there the transactions
                # that the streams know of are others. (Or retention has deleted that row.)
                logger.warning("feed: the database is another one now, replaying all streams")
                self._snapshot, self._newest = start.snapshot, start.newest
                self._hub.advance(self._snapshot)
                self._hub.lag_all()
            await self._resume_mode(connection)
            await self._sweep(connection)
            await self._resync(connection)
        except BaseException:
            connection.close()
            raise
        self._set(connection)

    async def _dispatch(self, connection: Connection) -> None:
        """Dispatch payloads, and sweep now and then, until the connection is lost."""
        loop = asyncio.get_running_loop()
        next_sweep = loop.time() + self._sweep_seconds()
        # Kept over the sweeps: cancelling notified() at the wrong moment would lose a payload.
        notified: asyncio.Task[str] | None = None
        try:
            while True:
                if notified is None:
                    notified = asyncio.create_task(connection.notified(), name="feed payload")
                due = min(next_sweep, self._decided_at + DECIDE_SECONDS)
                await asyncio.wait({notified}, timeout=max(0.0, due - loop.time()))
                if notified.done():
                    payload: str | None = notified.result()
                    notified = None
                    self._turn_started = loop.time()
                    while payload is not None:
                        await self._on_payload(connection, payload)
                        await self._yield_turn()
                        next_sweep = min(next_sweep, loop.time() + self._sweep_seconds())
                        if loop.time() >= next_sweep:
                            break
                        payload = connection.notified_nowait()
                if self._sweep_now:
                    self._sweep_now = False
                    next_sweep = loop.time()
                if self._recheck_sessions:
                    self._recheck_sessions = False
                    await self._check_sessions(connection)
                if loop.time() >= self._decided_at + DECIDE_SECONDS:
                    await self._decide(connection)
                    next_sweep = min(next_sweep, loop.time() + self._sweep_seconds())
                if loop.time() >= next_sweep:
                    await self._sweep(connection)
                    next_sweep = loop.time() + self._sweep_seconds()
        finally:
            if notified is not None:
                # Ends by itself: closing the connection fails it.
                connection.close()
                notified.cancel()
                await asyncio.wait({notified})
                if not notified.cancelled():
                    notified.exception()

    async def _yield_turn(self) -> None:
        now = time.monotonic()
        if now - self._turn_started > TURN_SECONDS:
            await asyncio.sleep(0)
            self._turn_started = time.monotonic()

    # Payloads

    async def _on_payload(self, connection: Connection, payload: str) -> None:
        self._metrics.payloads.inc()
        self.heard_at = time.time()
        try:
            message = json.loads(payload)
            kind = message["t"]
            if kind == "notification":
                await self._on_notification(connection, message)
            elif (handler := self._handlers.get(kind)) is not None:
                handler(message)
            elif (listener := self._listeners.get(kind)) is not None:
                await listener(message)
            # Others come from a newer version during a rolling upgrade.
        except _NOT_OURS:
            # Anybody who may connect may NOTIFY on any channel. Not a word of what it said.
            logger.warning("feed: ignored a payload that is not ours (%d bytes)", len(payload))

    async def _on_notification(self, connection: Connection, message: dict[str, Any]) -> None:
        xact = message["x"]
        if xact != self._last_xact:
            self._last_xact = xact
            self._commits += 1
        if self._snapshot.covers(xact):
            return  # a sweep came first
        wants = self._hub.wants
        due = [recipient for recipient in message["r"] if wants(recipient[1])]
        if not due:
            return
        if self._polling:
            # Rows that nobody announces may have been committed before this one. A client that had
            # this one first, and then lost its line, would never ask for those.
            self._sweep_now = True
            return
        if "m" in message:
            content = self._store.content(message["e"], message["m"], message["l"])
            for id, user_id, created_ms in due:
                self._publish(Notification(id, user_id, content, created_ms, xact))
        else:
            # Too large for a payload. Fetched before the next payload is looked at: a client that
            # had the next one first, and then lost its line, would never ask for these.
            ids = [recipient[0] for recipient in due]
            # A statement that the database refuses would cost us this connection.
            if not all(type(id) is int and 0 < id <= events.MAX_ID for id in ids):
                raise ValueError("not an id")
            await self._fetch(connection, ids)

    def _publish(self, notification: Notification) -> int:
        if spans.tracer is None:
            written = self._hub.publish(notification)
        else:
            with spans.span("dispatch", notification_id=notification.id) as span:
                written = self._hub.publish(notification)
                if span is not None:
                    span.set_attribute("sse.streams_written", written)
        if written:
            self._metrics.deliveries.inc(written)
            self._metrics.latency.observe(max(0.0, time.time() - notification.created_ms / 1000))
        return written

    async def _fetch(self, connection: Connection, ids: Sequence[int]) -> None:
        for page in _pages(ids, self._fetch_rows):
            for notification in await self._store.notifications_by_id(page, connection=connection):
                self._publish(notification)
            await self._yield_turn()

    def _on_read(self, message: dict[str, Any]) -> None:
        for user_id, ids, *up_to in message["r"]:
            if self._hub.wants(user_id):
                self._hub.control(user_id, events.read(ids, up_to[0] if up_to else None))

    def _on_preferences(self, message: dict[str, Any]) -> None:
        if self._hub.wants(message["u"]):
            self._hub.control(message["u"], events.preferences(message["p"]))

    def _on_session(self, message: dict[str, Any]) -> None:
        if message["s"] is None:
            self._recheck_sessions = True
            return
        for session_id, ms_left in message["s"]:
            self._hub.expire(session_id, ms_left / 1000)

    def _on_stream(self, message: dict[str, Any]) -> None:
        for session_id, number in message["s"]:
            self._hub.supersede(session_id, number)

    # Sweeps

    async def _sweep(self, connection: Connection) -> None:
        """Dispatch every row that commits have added since the last sweep and that has not been."""
        snapshot: Snapshot | None = None
        after = (0, 0)
        while True:
            page = await self._store.feed_sweep(
                connection,
                base=self._snapshot,
                snapshot=snapshot,
                after=after,
                limit=SWEEP_ROWS,
            )
            missed = [id for id, user_id, _ in page.rows if self._hub.missed(user_id, id)]
            if self._polling and not self._leaving:
                self._commits += len({xact for _, _, xact in page.rows})
            elif not self._polling:
                self._metrics.feed_swept.inc(len(missed))
            if missed:
                await self._fetch(connection, missed)
            snapshot = page.snapshot
            if len(page.rows) < SWEEP_ROWS:
                break
            last_id, _, last_xact = page.rows[-1]
            after = (last_xact, last_id)
        self._newest = page.newest
        # Only as far as a crash of the database cannot make it untrue.
        self._snapshot = snapshot.lasting(0 if page.newest is None else page.newest.xact)
        self._hub.advance(self._snapshot)
        self._metrics.feed_swept_at.set_to_current_time()
        self.heard_at = time.time()
        if self._leaving:
            if self._left is None:
                self._left = snapshot
            elif snapshot.xmin >= self._left.xmax:
                self._set_polling(polling=False)

    # Poll or be notified

    def _sweep_seconds(self) -> float:
        if not self._polling:
            return self._probe_seconds
        return LEAVING_SECONDS if self._leaving else POLL_SECONDS

    def _set_polling(self, *, polling: bool) -> None:
        self._polling = polling
        self._leaving = False
        self._left = None
        self._quiet_since = None
        self._metrics.feed_polling.set(polling)

    def _leave(self) -> None:
        """The triggers notify again; what began before will end without a word."""
        if not self._leaving:
            self._set_polling(polling=True)
            self._leaving = True

    def _on_mode(self, message: dict[str, Any]) -> None:
        if message["polls"]:
            self._set_polling(polling=True)
        elif self._polling:
            self._leave()

    async def _resume_mode(self, connection: Connection) -> None:
        """After LISTEN: whatever the mode became while nobody here listened."""
        _, polls, _ = await self._store.feed_mode(connection)
        if polls:
            self._set_polling(polling=True)
        else:
            self._leave()

    async def _decide(self, connection: Connection) -> None:
        """Poll or be notified, as the setting says or the load asks for; prolong the lease."""
        now = asyncio.get_running_loop().time()
        rate = self._commits / max(now - self._decided_at, DECIDE_SECONDS)
        self._commits = 0
        self._decided_at = now
        mode, polls, waiting = await self._store.feed_mode(connection)
        active = self._polling and not self._leaving
        if mode == "auto" and active:
            if rate >= NOTIFY_BELOW:
                self._quiet_since = None
            elif self._quiet_since is None:
                self._quiet_since = now
            wanted = self._quiet_since is None or now - self._quiet_since < NOTIFY_AFTER_SECONDS
        else:
            crowded = rate >= POLL_ABOVE or waiting >= POLL_ABOVE_WAITING
            wanted = mode == "poll" or (mode == "auto" and crowded)
        if wanted:
            await self._store.feed_poll(connection, LEASE_SECONDS)
            if not active:
                logger.info("feed: polling (%.0f commits per second, mode %s)", rate, mode)
                self._set_polling(polling=True)
        elif active or (polls and mode == "notify"):
            logger.info("feed: notified (%.0f commits per second, mode %s)", rate, mode)
            await self._store.feed_notify(connection)
            self._leave()

    async def _resync(self, connection: Connection) -> None:
        """Tell the streams what else changed while nobody listened."""
        await self._check_sessions(connection)
        for user_ids in _pages(self._hub.users(), RESYNC_STREAMS):
            counts = await self._store.unread_counts(user_ids, connection=connection)
            preferences = await self._store.explicit_preferences(user_ids, connection=connection)
            for user_id in user_ids:
                if user_id in preferences:
                    self._hub.control(user_id, events.preferences(preferences[user_id]))
                if user_id in counts:
                    self._hub.ready(user_id, counts[user_id])

    async def _check_sessions(self, connection: Connection) -> None:
        for streams in _pages(list(self._hub), RESYNC_STREAMS):
            valid = await self._store.check_sessions(
                [stream.session_id for stream in streams], connection=connection
            )
            for stream in streams:
                if stream.session_id not in valid:
                    self._hub.close(stream, Closing.SESSION_ENDED)
                    continue
                seconds_left, number = valid[stream.session_id]
                self._hub.supersede(stream.session_id, number)
                self._hub.expire(stream.session_id, seconds_left)
