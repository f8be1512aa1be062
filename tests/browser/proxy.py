"""Proxies that treat the line to the server as real ones do, on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

ERROR_PAGE = "<html><h1>The site is down for maintenance</h1></html>"
HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Date", "Server")


class HttpProxy:
    """A reverse proxy.

    Attributes:
        target: Where the server is; may change, as behind a load balancer.
        status: Answer everything below ``/api`` with this and an HTML page; 0 forwards.
        buffers: Keep what a stream sends to itself until the stream has ended.
        open: Those requests.
        requests: Paths of all requests so far.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.status = 0
        self.buffers = False
        self.open: list[web.Request] = []
        self.requests: list[str] = []
        self.url = ""
        self._session: aiohttp.ClientSession

    @property
    def streams(self) -> int:
        return len(self.open)

    def cut(self) -> None:
        """Break all streams off, without a proper end."""
        for request in list(self.open):
            if request.transport is not None:
                request.transport.abort()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(),
            connector=aiohttp.TCPConnector(limit=0),
        )
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        # The client's leaving must end the request to the server, or its stream would stay.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        if self.status and request.path.startswith("/api"):
            return web.Response(status=self.status, text=ERROR_PAGE, content_type="text/html")
        is_stream = request.path == "/api/stream"
        if is_stream:
            self.open.append(request)
        try:
            async with self._session.request(
                request.method,
                self.target + request.raw_path,
                headers=request.headers,
                data=await request.read(),
                allow_redirects=False,
            ) as answer:
                return await self._forward(request, answer, hold=self.buffers and is_stream)
        except aiohttp.ClientError:
            return web.Response(status=502, text=ERROR_PAGE, content_type="text/html")
        finally:
            if is_stream:
                self.open.remove(request)

    async def _forward(
        self, request: web.Request, answer: aiohttp.ClientResponse, *, hold: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.title() not in HOP_BY_HOP:
                response.headers.add(name, value)
        if hold:
            held = await answer.read()
            await response.prepare(request)
            await response.write(held)
            return response
        await response.prepare(request)
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        except aiohttp.ClientError:
            # Cut off by the server: cut off the client as well, without a proper end.
            if request.transport is not None:
                request.transport.abort()
        return response


class TcpProxy:
    """A line that can go dead.

    Attributes:
        dead: Nothing passes, in either direction, and nothing says so.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 0)
        self._alive = asyncio.Event()
        self._alive.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    @property
    def dead(self) -> bool:
        return not self._alive.is_set()

    @dead.setter
    def dead(self, dead: bool) -> None:
        if dead:
            self._alive.clear()
            return
        # What was under way while the line was dead stays lost, as after a change of address.
        for task in self._tasks:
            task.cancel()
        self._alive.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            async with _connection(self._target) as (far_reader, far_writer):
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            await self._alive.wait()
            writer.write(chunk)
            await writer.drain()
        await self._alive.wait()
        writer.close()


@contextlib.asynccontextmanager
async def _connection(
    target: tuple[str, int],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*target)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
