"""Event streams over bare sockets, servers with production parameters, and sessions by SQL.

Between these streams and the wire stands no client library: a test sees every chunk, can stop
reading, and can cut the line.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.api import operations
from sse_server.api.notifications import STORE
from sse_server.app import create_app
from sse_server.config import Settings
from sse_server.connections import Limits, Site
from sse_server.feed import Feed
from sse_server.hub import Hub
from sse_server.metrics import Metrics
from sse_server.sessions import COOKIE
from sse_server.store import Store
from sse_server.stream import STREAMS
from tests.conftest import eventually
from tests.sse import Event, EventParser

YEAR_MS = 365 * 86_400_000


# SQL


def query(db: Connection, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    with db.cursor() as cursor:
        cursor.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description is not None else []


def insert(db: Connection, user_id: str, *messages: str) -> list[int]:
    """One statement and so, with autocommit, one transaction; returns the ids."""
    rows = query(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT %s, 'new_message', m FROM unnest(%s) AS m RETURNING id",
        user_id,
        list(messages or ("hello",)),
    )
    return [row[0] for row in rows]


def without_rate_limit(db: Connection) -> None:
    query(db, "UPDATE settings SET user_rate_per_minute = 0")


def sign_in(db: Connection, *user_ids: str, seconds: float = 3600) -> list[str]:
    """A session for each; returns the values of their cookies."""
    keys = [secrets.token_urlsafe(32) for _ in user_ids]
    query(
        db,
        "INSERT INTO sessions (key_hash, user_id, expires_at) "
        "SELECT h, u, clock_timestamp() + make_interval(secs => %s) "
        "FROM unnest(%s::bytea[], %s) AS s (h, u)",
        seconds,
        [hashlib.sha256(key.encode()).digest() for key in keys],
        list(user_ids),
    )
    return keys


def end_session(db: Connection, key: str) -> None:
    query(db, "DELETE FROM sessions WHERE key_hash = %s", hashlib.sha256(key.encode()).digest())


# Streams


class RawStream(asyncio.Protocol):
    """What came over one connection, as it came.

    Attributes:
        status: Of the response; 0 before there is one.
        headers: Names in lower case.
        body: Of a response that is no event stream.
        events: All so far.
        complete: Whether the body has ended as it should: with the last chunk, or, in HTTP/1.0,
            with the connection.
        closed: Whether the connection has ended, in whatever way.
    """

    transport: asyncio.Transport

    def __init__(self, request: bytes) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.events: list[Event] = []
        self.parser = EventParser()
        self.complete = False
        self.closed = False
        self._request = request
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self.status:
            head, separator, rest = bytes(self._data).partition(b"\r\n\r\n")
            if not separator:
                return
            status_line, *lines = head.decode("latin-1").split("\r\n")
            self.status = int(status_line.split()[1])
            for line in lines:
                name, _, value = line.partition(": ")
                self.headers[name.lower()] = value
            self._data = bytearray(rest)
        if self.headers.get("transfer-encoding") == "chunked":
            self._chunks()
        else:
            self._content(bytes(self._data))
            self._data.clear()

    def _chunks(self) -> None:
        at = 0
        while (end := self._data.find(b"\r\n", at)) != -1:
            size = int(self._data[at:end], 16)
            after = end + 2 + size + 2
            if len(self._data) < after:
                break
            assert self._data[after - 2 : after] == b"\r\n"
            assert not self.complete, "something follows the last chunk"
            if size:
                self._content(bytes(self._data[end + 2 : after - 2]))
            else:
                self.complete = True
            at = after
        del self._data[:at]

    def _content(self, data: bytes) -> None:
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            self.events += self.parser.feed(data)
        else:
            self.body += data

    def eof_received(self) -> None:
        if "transfer-encoding" not in self.headers:
            self.complete = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True

    # What the tests ask

    @property
    def ids(self) -> list[int]:
        """Of the notifications, in the order in which they came."""
        return [int(event.id) for event in self.of("notification") if event.id]

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.event == name]

    @property
    def ready(self) -> int:
        """How often it has gone live, or was told the count anew."""
        return len(self.of("ready"))

    @property
    def reason(self) -> str | None:
        """Why the server ended it, if it did; that must have been the last event, and complete."""
        if not self.complete or not self.events:
            return None
        *before, last = self.events
        assert last.event == "closing"
        assert not [event for event in before if event.event == "closing"]
        assert last.retry == last.json["retry_ms"]
        return str(last.json["reason"])

    def pause(self) -> None:
        """Stop reading: the buffers between here and the server fill up."""
        self.transport.pause_reading()

    def resume(self) -> None:
        self.transport.resume_reading()

    def cut(self) -> None:
        """Break the connection as a lost line does: without a word."""
        self.transport.abort()


class Clients:
    """Opens streams, and cuts those that are left at the end."""

    def __init__(self) -> None:
        self.streams: list[RawStream] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self.streams:
            stream.cut()
        await eventually(lambda: all(stream.closed for stream in self.streams))

    async def open(
        self,
        port: int,
        key: str | None,
        *,
        last_event_id: str | int | None = None,
        path: str = "/api/stream",
        method: str = "GET",
        accept: str = "text/event-stream",
        version: str = "1.1",
        receive_buffer: int | None = None,
    ) -> RawStream:
        """Ask for something, by default a stream; returns when the head of the answer is here.

        Args:
            port: On the loopback interface.
            key: The session cookie.
            receive_buffer: Bytes that the kernel may hold for a client that does not read.
        """
        lines = [f"{method} {path} HTTP/{version}", f"Host: 127.0.0.1:{port}", f"Accept: {accept}"]
        if key is not None:
            lines.append(f"Cookie: {COOKIE}={key}")
        if last_event_id is not None:
            lines.append(f"Last-Event-ID: {last_event_id}")
        request = "".join(f"{line}\r\n" for line in [*lines, ""]).encode()
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
            _, stream = await loop.create_connection(lambda: RawStream(request), sock=sock)
        except BaseException:
            sock.close()
            raise
        self.streams.append(stream)
        await eventually(lambda: stream.status or stream.closed, 30)
        return stream

    async def open_many(self, port: int, keys: Sequence[str]) -> list[RawStream]:
        """Streams of many sessions, all of them live."""
        streams: list[RawStream] = []
        for start in range(0, len(keys), 200):  # no more at once than any backlog takes
            streams += await asyncio.gather(
                *(self.open(port, key) for key in keys[start : start + 200])
            )
        await eventually(lambda: all(stream.ready for stream in streams), 30)
        return streams


# Servers


@dataclass
class Node:
    """A server in this process, run as the command runs it."""

    app: web.Application
    runner: web.AppRunner
    port: int
    clients: Clients = field(default_factory=Clients)

    @property
    def hub(self) -> Hub:
        return self.app[operations.HUB]

    @property
    def feed(self) -> Feed:
        return self.app[operations.FEED]

    @property
    def metrics(self) -> Metrics:
        return self.app[operations.METRICS]

    @property
    def store(self) -> Store:
        return self.app[STORE]

    def count(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def open(self, key: str | None, **arguments: Any) -> RawStream:
        return await self.clients.open(self.port, key, **arguments)

    async def open_live(self, key: str, **arguments: Any) -> RawStream:
        """A stream whose replay is done."""
        stream = await self.open(key, **arguments)
        assert stream.status == 200
        await eventually(lambda: stream.ready)
        return stream


@contextlib.asynccontextmanager
async def running(settings: Settings, *, hand_over: bool = True) -> AsyncIterator[Node]:
    """Run a server as ``cli`` does, above all without the test client's handler_cancellation.

    Its feed has got over the first moments, in which it sweeps often because it does not know yet
    whether everybody notifies.

    Args:
        settings: Of the server.
        hand_over: False has aiohttp go on to serve each stream, as it does with TLS.
    """
    app = create_app(settings)
    runner = web.AppRunner(app, shutdown_timeout=settings.drain_seconds)
    try:
        await runner.setup()
        if hand_over:
            site: web.BaseSite = Site(
                runner,
                "127.0.0.1",
                0,
                limits=Limits.of(settings),
                busy=lambda: app[STREAMS].busy,
            )
        else:
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        node = Node(app, runner, runner.addresses[0][1])
        async with node.clients:
            await eventually(lambda: not node.feed._polling)
            yield node
    finally:
        await runner.cleanup()


def allow_descriptors(count: int) -> None:
    """Raise the limit of open files of this process and of those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


class Proxy:
    """TCP on the loopback interface, in front of the cluster's Unix socket.

    Every connection through it can be stalled (nothing gets through, and no error either: a peer
    that has vanished), and new ones refused.
    """

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.port = 0

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()

    async def accept(self) -> None:
        """Take connections, on the same port as before."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def lead_to(self, socket_path: str) -> None:
        """Take new connections to another cluster."""
        self._socket_path = socket_path

    async def refuse(self) -> None:
        """Cut all connections and take no more."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for pipe in self._pipes:
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    def stall(self) -> None:
        """From now on nothing passes through the connections that there are; new ones work."""
        self._passing.clear()
        self._passing = asyncio.Event()
        self._passing.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pipes.add(task)
        passing = self._passing
        upstream: asyncio.StreamWriter | None = None
        try:
            up_reader, upstream = await asyncio.open_unix_connection(self._socket_path)
            halves = [
                asyncio.create_task(self._pipe(reader, upstream, passing)),
                asyncio.create_task(self._pipe(up_reader, writer, passing)),
            ]
            try:
                await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for half in halves:
                    half.cancel()
                await asyncio.gather(*halves, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the end of this task is nobody's but ours
        finally:
            self._pipes.discard(task)
            for end in (writer, upstream):
                if end is not None:
                    end.transport.abort()

    @staticmethod
    async def _pipe(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            await passing.wait()
            writer.write(data)
            await writer.drain()
