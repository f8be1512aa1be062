"""``GET /api/stream``: the life of one event stream.

A stream registers in the hub first and replays second, so that nothing can slip in between; it goes
live when a whole pass over the table has found what there is and nothing was announced meanwhile.
If its client is slow it falls back to replaying. It holds no database connection while it is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

from sse_server import events
from sse_server.errors import (
    DatabaseError,
    DatabaseUnavailable,
    NotSignedIn,
    ServiceError,
    TooManyRequests,
    Unavailable,
)
from sse_server.events import Closing, Cursor
from sse_server.hub import Hub, Stream
from sse_server.limits import LIMITS, network
from sse_server.metrics import Metrics
from sse_server.sessions import STORAGE
from sse_server.spans import traced
from sse_server.store import Page, Position, Store
from sse_server.tasks import Batcher, cancel_and_wait
from sse_server.wire import FINISH_SECONDS, ResponseWire, SocketWire, Wire, socket_transport

logger = logging.getLogger(__name__)

# First pages of this many streams are one query.
REPLAY_BATCH = 50

# As are the sessions of this many.
CHECK_BATCH = 200

# Streams that have ended: so many are released by one query.
RELEASE_BATCH = 500

# From so many on, new connections are taken more slowly: as many as a batch of each kind, and some.
OPENING = 200

# Pages are shorter when many streams share the memory; about what a notification takes.
ROW_BYTES = 512
LEAST_PAGE_ROWS = 20

# Pause between tries of a stream that replays while the database is away.
RETRY_SECONDS = (0.5, 2.0)

# At the end of the process, for the releases of its last streams.
RELEASE_SECONDS = 2.0

T = TypeVar("T")


class EventStream(EventSourceResponse):
    """aiohttp-sse's response without its ping task: one timer serves all streams here.

    Its ``send_timeout`` stays (``TCP_USER_TIMEOUT``): it finds dead peers.

    Attributes:
        handed_over: The connection is no more aiohttp's; nothing is written by it, not even the
            end.
    """

    handed_over = False

    async def write_eof(self, data: bytes = b"") -> None:
        if not self.handed_over:
            await super().write_eof(data)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        if not self.prepared:
            if request.transport is None:
                raise ConnectionResetError("the client left before its stream was opened")
            self._set_tcp_user_timeout(request)
        # Not super(): that is where the task is started.
        return await web.StreamResponse.prepare(self, request)


class Streams:
    """Opens streams and keeps them going. One per process."""

    def __init__(
        self,
        hub: Hub,
        store: Store,
        metrics: Metrics,
        *,
        # Limits
        page_rows: int = 500,
        # Timeouts
        slow_seconds: float = 60.0,
        send_timeout: float = 120.0,
    ) -> None:
        self._hub = hub
        self._store = store
        self._metrics = metrics
        self._page_rows = page_rows
        self._slow_seconds = slow_seconds
        self._send_timeout = send_timeout
        # Of streams that were handed over and replay.
        self._tasks: set[asyncio.Task[None]] = set()
        # Set when the last stream has gone; only looked for when draining.
        self._empty: asyncio.Event | None = None
        # Streams between their request and their head.
        self._opening = 0
        self._pages: Batcher[Position, Page] = Batcher(
            "replay", self._replay_batch, size=REPLAY_BATCH, concurrency=3
        )
        # (session, number) of those that have ended.
        self._releases: Batcher[tuple[int, int], None] = Batcher(
            "release streams", self._release_batch, size=RELEASE_BATCH, concurrency=1
        )
        # Seconds left and newest stream of a session; `None` if it has ended.
        self._sessions: Batcher[int, tuple[float, int] | None] = Batcher(
            "check sessions", self._check_batch, size=CHECK_BATCH, concurrency=2
        )

    async def _replay_batch(self, positions: list[Position]) -> list[Page]:
        # A page is in memory twice until its client has taken it.
        rows = max(LEAST_PAGE_ROWS, self._hub.share // ROW_BYTES)
        return await self._store.replay(positions, min(self._page_rows, rows))

    async def _check_batch(self, ids: list[int]) -> list[tuple[float, int] | None]:
        valid = await self._store.check_sessions(ids)
        return [valid.get(id) for id in ids]

    async def _release_batch(self, ended: list[tuple[int, int]]) -> list[None]:
        try:
            await self._store.release_streams(ended)
        except DatabaseError as exc:
            # They will count for as long as they might have lasted.
            logger.info("%d ended streams could not be released: %s", len(ended), exc)
        return [None] * len(ended)

    def _release(self, session_id: int, number: int) -> None:
        _ = self._releases.ask((session_id, number))  # nobody waits for it

    @property
    def busy(self) -> bool:
        """Whether so many streams are being opened that further ones had better wait."""
        return self._opening >= OPENING

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve one stream: until it ends, or until its socket is handed over.

        Raises:
            NotSignedIn: For everybody without a session.
            ServiceError: 429 or 503 for clients that are no EventSource, if it cannot be served
                now; an EventSource would give up for good on them.
        """
        self._opening += 1
        try:
            opened = await self._open(request)
        finally:
            self._opening -= 1
        if isinstance(opened, web.StreamResponse):
            return opened
        return await opened

    async def _open(
        self, request: web.Request
    ) -> web.StreamResponse | Coroutine[Any, Any, web.StreamResponse]:
        """Returns: The answer, if the handler has no more to do; else what it has to do."""
        asked = asks_for(request)
        address = network(request.remote)
        if (refused := self._hub.refuses(address)) is not None:
            return await self._turn_away(request, refused)
        storage = request.app[STORAGE]
        limits = request.app[LIMITS]
        key = storage.key(request)
        # Before the claim, which ends the session's older stream.
        if key is not None and not await limits.may_open_stream(key):
            return await self._turn_away(request, Closing.LIMIT)
        claimed = storage.claim_stream(request)
        try:
            claim = None if claimed is None else await claimed
        except DatabaseUnavailable:
            return await self._turn_away(request, Closing.UNAVAILABLE)
        if key is None or claim is None:
            # An EventSource gives up on 401 and on 429 alike; only the first says why.
            if not await limits.anonymous.take(f"address:{address}") and not is_event_source(
                request
            ):
                raise limits.anonymous.refusal()
            raise NotSignedIn("Sign in first.")
        counted = await limits.claimed_stream(key, claim.user_id)
        if claim.number is None or claim.seconds_left is None:
            return await self._turn_away(request, Closing.LIMIT)
        stream = Stream(claim.user_id, claim.session_id, claim.number, address=address)
        refused = self._hub.register(stream, claim.seconds_left) if counted else Closing.LIMIT
        if refused is not None:
            self._release(claim.session_id, claim.number)
            return await self._turn_away(request, refused)
        try:
            opened = await self._head(request, stream, asked)
        except DatabaseError:
            self._hub.close(stream, Closing.UNAVAILABLE)
            self._ended(stream)
            return await self._turn_away(request, Closing.UNAVAILABLE)
        except BaseException:
            self._ended(stream)
            raise
        return opened

    def _ended(self, stream: Stream) -> None:
        self._hub.unregister(stream)
        # Of the others the session has gone, or has another stream that counts.
        if stream.closing not in (Closing.SESSION_ENDED, Closing.SUPERSEDED):
            self._release(stream.session_id, stream.number)
        seconds = time.monotonic() - stream.opened_at
        logger.info(
            "stream %d/%d closed: %s, %d sent in %.1f s",
            stream.session_id,
            stream.number,
            stream.closing,
            stream.sent,
            seconds,
            extra={
                "stream": f"{stream.session_id}/{stream.number}",
                "reason": stream.closing,
                "sent": stream.sent,
                "seconds": round(seconds, 3),
            },
        )
        if self._empty is not None and not len(self._hub):
            self._empty.set()

    async def _turn_away(self, request: web.Request, reason: Closing) -> web.StreamResponse:
        self._metrics.turned_away.labels(reason.value).inc()
        retry_ms = random.randint(*events.RETRY_MS[reason])
        if not is_event_source(request):
            error: type[ServiceError] = TooManyRequests if reason is Closing.LIMIT else Unavailable
            raise error(
                f"No stream can be opened now: {reason.value}.",
                retry_after=None if retry_ms == events.NEVER_MS else retry_ms / 1000,
                reason=reason.value,
            )
        response = EventStream(send_timeout=self._send_timeout)
        response.force_close()
        # aiohttp-sse has put "keep-alive" there: the client would send its next request to nobody.
        response.headers[hdrs.CONNECTION] = "close"
        await response.prepare(request)
        await response.write(events.unchunk(events.closing(reason, retry_ms)))
        await response.write_eof()
        return response

    async def _head(
        self, request: web.Request, stream: Stream, asked: Cursor
    ) -> web.StreamResponse | Coroutine[Any, Any, web.StreamResponse]:
        """Returns: As `_open()`.

        Raises:
            DatabaseError: The head has not been sent.
        """
        # Asked for before the head is sent: without a database there is nothing to stream.
        first = Position(stream.user_id, cursor=asked.id)
        page, session = await asyncio.gather(
            self._pages.ask(first), self._sessions.ask(stream.session_id)
        )
        # The session may have ended, or opened another stream elsewhere, between the claim and
        # register(): announced while the hub did not know this stream, and never again.
        if session is None:
            self._hub.close(stream, Closing.SESSION_ENDED)
        else:
            seconds_left, newest = session
            self._hub.supersede(stream.session_id, newest)
            self._hub.expire(stream.session_id, seconds_left)
        response = EventStream(send_timeout=self._send_timeout)
        stream.plain = request.version < (1, 1)
        writer = await response.prepare(request)
        assert writer is not None
        stream.transport = socket_transport(request)
        if stream.closing is not None:
            # While there was no transport yet; its last event could not be written.
            reason, stream.closing = stream.closing, None
            self._hub.close(stream, reason)
        logger.info(
            "stream %d/%d opened by %s",
            stream.session_id,
            stream.number,
            request.remote,
            extra={
                "stream": f"{stream.session_id}/{stream.number}",
                "address": request.remote,
                "cursor": asked.id,
            },
        )
        stream.write(events.retry(random.randint(*events.DEFAULT_RETRY_MS)))
        if asked.malformed or not page.known:
            stream.write(events.reset("unknown_cursor"))
        elif asked.id is not None and stream.seen is not None:
            # The client has it, so the replay leaves it out; it may yet be announced.
            stream.seen[asked.id] = page.snapshot.xmax - 1
        socket = SocketWire.take_over(request, stream, self)
        if socket is not None:
            response.handed_over = True
            self._start(self._keep(socket, first, page))
            return response
        return self._serve(response, ResponseWire(response, writer), stream, first, page)

    # A stream that was handed over

    def _start(self, keeping: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(keeping, name="stream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def resume(self, wire: SocketWire) -> None:
        self._start(self._keep(wire, None, None))

    async def _keep(self, wire: SocketWire, position: Position | None, page: Page | None) -> None:
        """See to a stream until it is live or has ended."""
        stream = wire.stream
        try:
            if page is not None or await self._drained(stream, wire):
                await self._replay(stream, wire, position, page)
        except ConnectionError:
            self._hub.close(stream, Closing.GONE)
        except Exception:
            logger.exception("stream %d/%d failed", stream.session_id, stream.number)
            wire.abort()
        # From go_live() to here there is no await: nothing could wake it in between.
        wire.busy = False
        stream.waker = None
        if stream.ended:
            wire.finish()

    def lost(self, wire: SocketWire) -> None:
        self._hub.close(wire.stream, Closing.GONE)
        self._ended(wire.stream)

    # A stream whose handler waits

    async def _serve(
        self,
        response: web.StreamResponse,
        wire: ResponseWire,
        stream: Stream,
        first: Position,
        page: Page,
    ) -> web.StreamResponse:
        try:
            try:
                await self._run(stream, wire, first, page)
            except ConnectionError:
                self._hub.close(stream, Closing.GONE)
            await wire.finish(stream)
        finally:
            self._ended(stream)
        return response

    async def _run(self, stream: Stream, wire: Wire, first: Position, page: Page) -> None:
        """Replay, be live, replay again when lagging, until the stream is closing."""
        await self._replay(stream, wire, first, page)
        while not stream.ended:
            if stream.live:
                await stream.waiter()
            elif await self._drained(stream, wire):
                await self._replay(stream, wire, None, None)

    # Both

    @traced("replay")
    async def _replay(
        self,
        stream: Stream,
        wire: Wire,
        position: Position | None,
        page: Page | None,
    ) -> None:
        """Pass over the table until nothing new has come meanwhile, then go live."""
        while not stream.ended:
            if position is None:
                # What is announced from here on may be too late for this pass's snapshot.
                stream.dirty = False
                position = Position(stream.user_id, base=stream.base)
            base = stream.base
            unread_count = await self._pass(stream, wire, position, page)
            # From here to go_live() there is no await: what is announced before makes it dirty,
            # what is announced after is written.
            if stream.base is base:
                stream.base = position.snapshot
            # else it has been told to start over: the database is another cluster
            position = page = None
            if unread_count is not None and self._hub.go_live(stream):
                self._metrics.replays.inc()
                stream.write(events.ready(unread_count, self._hub.heartbeat_seconds))
                return

    async def _pass(
        self, stream: Stream, wire: Wire, position: Position, page: Page | None
    ) -> int | None:
        """Write all that one snapshot shows, page by page.

        Returns: The number of unread rows, if a single page was enough.
        """
        while not stream.ended:
            if page is None:
                page = await self._page(stream, position)
                if page is None:
                    break
            position.snapshot = page.snapshot
            position.counted = False
            for notification in page.notifications:
                self._hub.replayed(stream, notification)
                position.after_id = notification.id
            self._metrics.replayed.inc(len(page.notifications))
            # Nobody's replay may fill the memory.
            if page.full or stream.buffered > self._hub.room:
                await self._drained(stream, wire)
            if not page.full:
                return page.unread_count
            page = None
        return None

    async def _page(self, stream: Stream, position: Position) -> Page | None:
        """The next page, whenever the database can give it; `None` once the stream is closing."""
        while True:
            answer = self._pages.ask(position)
            try:
                return await self._unless_closing(stream, answer)
            except DatabaseError as exc:
                logger.info("stream %d/%d: replay waits: %s", stream.session_id, stream.number, exc)
            await self._unless_closing(stream, asyncio.sleep(random.uniform(*RETRY_SECONDS)))
            if stream.ended:
                return None

    async def _unless_closing(self, stream: Stream, awaitable: Awaitable[T]) -> T | None:
        """Wait for something, but no longer than for the stream's end; `None` then."""
        future = asyncio.ensure_future(awaitable)
        try:
            while not future.done() and not stream.ended:
                waiting: set[asyncio.Future[Any]] = {future, stream.waiter()}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return future.result() if future.done() else None
        finally:
            future.cancel()

    async def _drained(self, stream: Stream, wire: Wire) -> bool:
        """Wait until the client has taken most of what is buffered; False if it never does."""
        try:
            async with asyncio.timeout(self._slow_seconds):
                await self._unless_closing(stream, wire.drain())
        except TimeoutError:
            self._hub.close(stream, Closing.SLOW)
        # drain() returns at once when the connection is lost: nobody is left to replay for.
        if stream.transport is None or stream.transport.is_closing():
            self._hub.close(stream, Closing.GONE)
        return not stream.ended

    async def drain(self, seconds: float) -> None:
        """End all streams within `seconds`, spread out so that they do not come back all at once.

        New ones are turned away from now on.
        """
        self._hub.draining = True
        streams = list(self._hub)
        random.shuffle(streams)
        # A few streams end at once; many take up to half of the time there is.
        spread = min(seconds / 2, len(streams) / 1000)
        started = time.monotonic()
        for position, stream in enumerate(streams):
            due = started + spread * position / len(streams)
            if (wait := due - time.monotonic()) > 0.01:
                await asyncio.sleep(wait)
            self._hub.close(stream, Closing.SHUTDOWN)
        # aiohttp waits for its handlers, and knows nothing of those that were handed over.
        if len(self._hub):
            self._empty = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), FINISH_SECONDS + 1)

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks)
        await self._releases.finish(RELEASE_SECONDS)
        await self._pages.close()
        await self._sessions.close()


def is_event_source(request: web.Request) -> bool:
    """Whether the client gives up for good on any status but 200."""
    return "text/event-stream" in request.headers.get(hdrs.ACCEPT, "")


def asks_for(request: web.Request) -> Cursor:
    """The request's cursor: the ``Last-Event-ID`` header, else ``?last_event_id=``."""
    text = request.headers.get("Last-Event-ID")
    if text is None:
        text = request.query.get("last_event_id")
    return Cursor(text)


STREAMS = web.AppKey("streams", Streams)


async def stream(request: web.Request) -> web.StreamResponse:
    """GET /api/stream"""
    return await request.app[STREAMS].handle(request)
