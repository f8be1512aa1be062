"""A TCP proxy on the loopback interface that behaves like a bad network.

One stands between the clients and each node, another between each node and PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import Self

# What a link may hold back by itself, in each direction: little, so that a client that does not
# read is soon felt by the server.
BUFFER_BYTES = 16 * 1024


class Link:
    """A proxy in front of one address, which may change.

    Attributes:
        port: Where it listens, for as long as it is open.
        target: A TCP port of this machine, the path of a Unix socket, or `None`: nobody is there.
        delay: Seconds by which each read is late at most; how much is up to chance.
        refusing: New connections are reset at once.
    """

    def __init__(self, target: int | str | None = None, *, small_buffers: bool = False) -> None:
        self.port = 0
        self.target = target
        self.delay = 0.0
        self.refusing = False
        self._small_buffers = small_buffers
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._passing = asyncio.Event()
        self._passing.set()

    async def __aenter__(self) -> Self:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if self._small_buffers:  # inherited by what is accepted
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        listener.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, limit=BUFFER_BYTES, backlog=1024
        )
        self.port = listener.getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refusing = True
        if self._server is not None:
            self._server.close()
        self.reset()
        # start_server() hands each connection to a task of its own, which ends now.
        while self._connections:
            await asyncio.wait({connection.task for connection in self._connections})

    def stall(self) -> None:
        """Nothing gets through, and no error either, until `resume()`."""
        self._passing.clear()

    def resume(self) -> None:
        self._passing.set()

    def lose(self) -> None:
        """Nothing ever gets through the present connections again; new ones work.

        As when a firewall has forgotten them: no reset, no end, in neither direction.
        """
        for connection in self._connections:
            connection.lost = True

    def reset(self) -> None:
        """Break the present connections with a reset."""
        for connection in list(self._connections):
            connection.abort()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(task, writer)
        self._connections.add(connection)
        # The end of this task is nobody's but ours, whatever it is.
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if not self.refusing and self.target is not None:
                await self._serve(connection, reader, writer)
        self._connections.discard(connection)
        connection.abort_transports()

    async def _serve(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        target = self.target
        if isinstance(target, str):
            up_reader, up = await asyncio.open_unix_connection(target, limit=BUFFER_BYTES)
        else:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            if self._small_buffers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            try:
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", target or 0))
            except BaseException:
                sock.close()
                raise
            up_reader, up = await asyncio.open_connection(sock=sock, limit=BUFFER_BYTES)
        connection.writers.append(up)
        for end in (up, writer):
            end.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        halves = [
            asyncio.create_task(self._pipe(connection, reader, up)),
            asyncio.create_task(self._pipe(connection, up_reader, writer)),
        ]
        try:
            # An end that was said passes on; an end that was not (a reset) is one for both.
            done, _ = await asyncio.wait(halves, return_when=asyncio.FIRST_EXCEPTION)
            for half in done:
                half.result()
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)

    async def _pipe(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            data = await reader.read(BUFFER_BYTES)
            if self.delay:
                await asyncio.sleep(random.uniform(0.0, self.delay))
            await self._passing.wait()
            if connection.lost:
                await asyncio.Event().wait()
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


class Direct:
    """No proxy: the way straight to the target, for runs that are about something else."""

    def __init__(self) -> None:
        self.target: int | str | None = None

    @property
    def port(self) -> int:
        """0, which nobody can connect to, while there is no target."""
        return self.target if isinstance(self.target, int) else 0


class _Connection:
    """Both halves of one connection through a link."""

    def __init__(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self.task = task
        self.writers = [writer]
        self.lost = False

    def abort(self) -> None:
        self.abort_transports()
        self.task.cancel()

    def abort_transports(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
