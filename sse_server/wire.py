"""How a stream's bytes get out.

The handler of an open stream has nothing to do until something happens, and yet nearly all memory
of an idle stream would be what aiohttp keeps for it: the request, two tasks, a parser (11 of 13
KB). So once the head of the response is out, the socket is *handed over* to a protocol of our own,
the handler returns, and what is left is a transport and a few slots (`SocketWire`). A task exists
only while the stream replays.

Where that does not fit (TLS in this process, HTTP/1.0, a request with a body, another server than
ours) the response stays aiohttp's and its handler waits (`ResponseWire`). Both end in the same way,
and everything above them is the same for both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from sse_server.connections import Connection
from sse_server.hub import Stream

# Longest that the end of a stream may wait for a client that does not read.
FINISH_SECONDS = 3.0

# What a client may send behind its request; nobody will answer it.
EXCESS_BYTES = 64 * 1024

LAST_CHUNK = b"0\r\n\r\n"


class Wire(Protocol):
    """What a replay needs of a stream's connection."""

    async def drain(self) -> None:
        """Wait until the client has taken most of what is buffered, or has gone.

        Raises:
            ConnectionError: It has gone.
        """


class ResponseWire:
    """A response that aiohttp goes on to serve."""

    def __init__(self, response: web.StreamResponse, writer: AbstractStreamWriter) -> None:
        self._response = response
        self._writer = writer

    async def drain(self) -> None:
        await self._writer.drain()

    async def finish(self, stream: Stream) -> None:
        """End the body properly, unless the client does not even take that."""
        self._response.force_close()
        transport = stream.transport
        try:
            async with asyncio.timeout(FINISH_SECONDS):
                await self._response.write_eof()
        except TimeoutError:
            if transport is not None:
                transport.abort()
        except ConnectionError:
            pass  # gone, and nobody is left to be told


class Owner(Protocol):
    """Who looks after the streams that were handed over."""

    def resume(self, wire: SocketWire) -> None:
        """A live stream lags: start a task that replays."""

    def lost(self, wire: SocketWire) -> None:
        """The connection has ended, whoever ended it."""


class SocketWire(asyncio.Protocol):
    """A socket that was handed over.

    Attributes:
        stream: Whose it is.
        busy: Whether a task looks after the stream. While it is live nobody does, and the hub's
            call of `wake()` is what makes it end, or replay.
    """

    # What an idle stream keeps in memory, in bytes (sys.getsizeof, CPython 3.11; bench/storm.py
    # measures the sum):
    #   88  this
    #  184  hub.Stream, and about 180 for its user_id, float and numbers
    #  510  asyncio's transport, its __dict__, socket, empty buffer and bound method
    #  480  the transport's _extra: socket object and both addresses
    #  370  the selector's key, the loop's handle, its context and arguments
    #  100  the hub's entry of the user
    #  600  the hub's indexes: user, session, heartbeat slot, deadline
    __slots__ = ("_drained", "_excess", "_owner", "_paused", "_site_closed", "busy", "stream")

    def __init__(self, stream: Stream, owner: Owner) -> None:
        self.stream = stream
        self.busy = True
        self._owner = owner
        self._drained: asyncio.Future[None] | None = None
        self._paused = False
        self._excess = 0
        self._site_closed: Callable[[], None] | None = None

    @classmethod
    def take_over(cls, request: web.Request, stream: Stream, owner: Owner) -> SocketWire | None:
        """Take the socket of a request whose response has just been prepared.

        Returns: `None` if that does not fit. Else aiohttp knows of the connection no more.
        """
        connection = request.protocol
        transport = connection.transport
        if (
            not isinstance(connection, Connection)
            or transport is None
            or stream.plain
            or request.can_read_body
            or transport.get_extra_info("sslcontext") is not None
        ):
            return None
        wire = cls(stream, owner)
        wire._site_closed = connection.hand_over(wire)
        if not transport.is_reading():
            # Held by aiohttp, for requests that came behind this one. Unread, the end of the
            # connection would not be seen.
            with contextlib.suppress(RuntimeError):  # it is closing
                transport.resume_reading()
        stream.keeper = wire
        return wire

    # What the hub and the tasks call

    def wake(self) -> None:
        """See to a stream that is closing, or that lags, unless a task does already."""
        if self.busy:
            return
        if self.stream.ended:
            self.finish()
        else:
            self.busy = True
            self._owner.resume(self)

    def fileno(self) -> int:
        transport = self.stream.transport
        return -1 if transport is None else transport.get_extra_info("socket").fileno()

    async def drain(self) -> None:
        if self.stream.transport is None:
            raise ConnectionResetError("the client has gone")
        if self._paused:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def finish(self) -> None:
        """End the body and the connection; a client that does not take it is cut."""
        transport = self.stream.transport
        if transport is None or transport.is_closing():
            return
        transport.write(LAST_CHUNK)
        transport.close()
        if transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(FINISH_SECONDS, transport.abort)

    def abort(self) -> None:
        """Cut the connection."""
        if self.stream.transport is not None:
            self.stream.transport.abort()

    # What the transport calls

    def data_received(self, data: bytes) -> None:
        # A stream ends with its connection: what was sent behind the request is answered by nobody.
        self._excess += len(data)
        if self._excess > EXCESS_BYTES:
            self.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake_drained()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.stream.fd = -1  # the number may soon be another connection's
        if self._site_closed is None:
            return
        self._site_closed()
        self._site_closed = None
        self._owner.lost(self)
        self.stream.transport = None
        self._paused = False
        self._wake_drained()

    def _wake_drained(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None


def socket_transport(request: web.Request) -> asyncio.WriteTransport:
    """The transport of a request.

    Raises:
        ConnectionResetError: The client has gone.
    """
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client left while its stream was opened")
    return cast(asyncio.WriteTransport, transport)
