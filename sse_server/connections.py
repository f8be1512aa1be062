"""The connections of the HTTP server: how many there may be, and how long each may take.

aiohttp bounds the size of a request, and the pause between two. It does not bound how long a
request's head may take to arrive once its first byte is here, and answers what it cannot parse by
itself, quoting it in the log; a cookie may stand in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from aiohttp import http_exceptions, web

from sse_server.acceptor import Acceptor
from sse_server.config import Settings
from sse_server.errors import BadRequest, HeadTooLarge, ServiceError
from sse_server.middleware import problem, security_headers

logger = logging.getLogger(__name__)

# Limits
LINE_BYTES = 8190
FIELD_BYTES = 8190
FIELDS = 64
LINGER_SECONDS = 5.0  # for the rest of a body that nobody wants any more
SPARE_FILES = 128  # descriptors for the database, logs, static files
# Connections whose head is awaited, from which on new ones are taken more slowly: each has a task
# and a parser, and after a restart all clients connect before the first of them says anything.
HEADS = 200


def reserve(host: str, port: int) -> list[socket.socket]:
    """Take an address for processes that will share it, each with a `Site` of its own.

    The sockets are bound and do not listen: they hold the port, and get no connections.

    Args:
        host: A name may stand for several addresses.
        port: 0 takes a free one, the same for all addresses.

    Returns: What is to be closed when the address is no longer needed.

    Raises:
        OSError: The address cannot be used, or somebody else does.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise OSError("several processes cannot share a port on this system")
    reserved: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            where = (address[0], port, *address[2:])
            # First without sharing: another service on this port would share it as well, and take
            # half of the connections.
            for share in (False, True):
                sock = socket.socket(family, kind, protocol)
                reserved.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if share:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                sock.bind(where)
                if share:
                    port = sock.getsockname()[1]
                else:
                    reserved.pop().close()
    except BaseException:
        for sock in reserved:
            sock.close()
        raise
    return reserved


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every connection; seconds."""

    head_seconds: float
    keepalive_seconds: float
    # A peer that takes nothing, or has gone without a word.
    send_seconds: float
    connections: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those of the settings."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files == resource.RLIM_INFINITY:
            files = 1 << 30
        return cls(
            head_seconds=settings.header_timeout,
            keepalive_seconds=settings.keepalive_timeout,
            send_seconds=settings.send_timeout,
            connections=settings.max_connections or max(files // 2, files - SPARE_FILES),
        )


class Connection(web.RequestHandler):
    """One connection. The time for a head runs from its first byte, or from the connection's."""

    __slots__ = ("_head_timer", "_limits", "_site")

    def __init__(
        self, site: Site, server: web.Server, limits: Limits, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=cast(logging.Logger, None),  # no line per request
            keepalive_timeout=limits.keepalive_seconds,
            max_line_size=LINE_BYTES,
            max_field_size=FIELD_BYTES,
            max_headers=FIELDS,
            lingering_time=LINGER_SECONDS,
        )
        self._site = site
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._site.has_room():
            # No answer: that would take a task and a parser, of which there are too many already.
            # An EventSource that loses its line tries again.
            cast(asyncio.WriteTransport, transport).abort()
            return
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self._limits.send_seconds * 1000)
            with contextlib.suppress(OSError):  # it has gone already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._start_head_timer()

    def hand_over(self, protocol: asyncio.Protocol) -> Callable[[], None]:
        """Give the socket to another protocol, once the head of a response has been written.

        aiohttp is told that the connection is lost, and drops all that it keeps for it. The handler
        that is running goes on to its end; what it returns goes nowhere.

        Returns: What is to be called when the connection has really ended.
        """
        transport = self.transport
        assert transport is not None
        transport.set_protocol(protocol)
        # Or aiohttp would close it. tests/test_wire.py fails if it does something else with it.
        self.transport = None
        self._stop_head_timer()
        super().connection_lost(None)
        return self._site.when_closed

    def connection_lost(self, exc: BaseException | None) -> None:
        self._site.closed()
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # _request_count and _waiter are aiohttp's own, which pyproject.toml holds to one minor
        # version; tests/test_connections.py fails when they mean something else.
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._stop_head_timer()
        elif (
            data
            and self._head_timer is None
            and self._waiter is not None
            and not self._waiter.done()
        ):
            # It waits for a request, and this is not yet all of its head.
            self._start_head_timer()

    def _start_head_timer(self) -> None:
        self._site.heads += 1
        self._head_timer = self._loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._site.heads -= 1
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._site.heads -= 1
        self._head_timer = None
        if self.transport is not None:
            logger.debug("a request took too long: cut")
            # Not close(): that would wait for a client which may not read either.
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, or what no handler has answered, as a problem document.

        Raises:
            ConnectionError: Part of an answer has been sent already.
        """
        error: ServiceError
        if isinstance(exc, http_exceptions.HttpProcessingError):
            logger.debug("%s: not HTTP: %s", request.remote, type(exc).__name__)
            if isinstance(exc, http_exceptions.LineTooLong) or "Too many" in exc.message:
                error = HeadTooLarge()
            else:
                error = BadRequest("This is not HTTP/1.1.")
        else:
            logger.error("%s: failed outside of its handler", request.remote, exc_info=exc)
            error = ServiceError()
        if request.writer.output_size > 0:
            raise ConnectionError("part of the answer has been sent")
        response = problem(error)
        security_headers(request, response)
        response.force_close()
        return response


class Site(web.BaseSite):
    """A TCP site whose connections are `Connection`s."""

    __slots__ = (
        "_busy",
        "_full",
        "_host",
        "_limits",
        "_open",
        "_port",
        "_reuse_port",
        "heads",
        "when_closed",
    )

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        *,
        limits: Limits,
        ssl_context: ssl.SSLContext | None = None,
        reuse_port: bool = False,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            runner: Set up.
            host: A name may stand for several addresses.
            port: 0 takes a free one.
            limits: Of every connection.
            ssl_context: For TLS.
            reuse_port: Whether other processes listen there too.
            busy: Asked when connections have been taken: whether the next ones should wait a bit.
        """
        super().__init__(runner, ssl_context=ssl_context)
        self._host = host
        self._port = port
        self._limits = limits
        self._reuse_port = reuse_port
        self._busy = busy
        self._full = False
        self._open = 0
        # Connections of which the head of a request is awaited.
        self.heads = 0
        # One object for all connections that are handed over.
        self.when_closed = self.closed

    @property
    def name(self) -> str:
        scheme = "http" if self._ssl_context is None else "https"
        return f"{scheme}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The address cannot be used.
        """
        await super().start()
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        # Resolves and binds; who listens is the acceptor.
        bound = await loop.create_server(
            asyncio.Protocol,
            self._host,
            self._port,
            reuse_port=self._reuse_port,
            start_serving=False,
        )
        sockets = [sock.dup() for sock in bound.sockets]
        bound.close()
        acceptor = Acceptor(
            sockets,
            lambda: Connection(self, server, self._limits, loop),
            lambda: self.heads >= HEADS or self._busy(),
            ssl_context=self._ssl_context,
            handshake_seconds=self._limits.head_seconds,
            shutdown_seconds=LINGER_SECONDS,
        )
        # What sites ask of it is there.
        self._server = cast(asyncio.Server, acceptor)
        acceptor.start()

    def has_room(self) -> bool:
        """Count a new connection. Returns: False if it is one too many."""
        self._open += 1
        if self._open <= self._limits.connections:
            return True
        if not self._full:  # said once, there may be thousands
            self._full = True
            logger.warning("%d connections are open, no more are taken", self._limits.connections)
        return False

    def closed(self) -> None:
        """One connection less, whether there was room for it or not."""
        self._open -= 1
        if self._open < self._limits.connections * 0.9:
            self._full = False
