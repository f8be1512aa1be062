"""Takes new connections, no faster than they are served.

asyncio takes all that wait, up to the backlog, at once. After a restart these are thousands, and
each of them then holds a request, two tasks and a parser until the database has answered. That is
four times the memory of the streams that they become, which the process keeps for good; and
everybody else's requests stand in line behind them. So connections wait in the kernel, in the order
in which they came, while many streams are being opened.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# Limits
BACKLOG = 4096
BATCH = 32  # connections taken before others get their turn

# Timeouts
BUSY_SECONDS = 0.005  # until it is asked again whether there is less to do
# A pace and no gate: should the database hang, health checks must still get through.
MOST_BUSY_SECONDS = 0.02
FULL_SECONDS = 1.0  # no descriptors left

_FULL = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """Stands in for `asyncio.Server`, as far as aiohttp's sites need one."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        protocol: Callable[[], asyncio.Protocol],
        busy: Callable[[], bool],
        *,
        ssl_context: ssl.SSLContext | None,
        # Timeouts
        handshake_seconds: float,
        shutdown_seconds: float,
    ) -> None:
        """
        Args:
            sockets: Bound; `start()` makes them listen.
            protocol: Makes one for each connection.
            busy: Whether more is under way than should be.
            ssl_context: For TLS.
            handshake_seconds: Longest that TLS may take to begin.
            shutdown_seconds: Longest that TLS may take to end.
        """
        self.sockets = tuple(sockets)
        self._protocol = protocol
        self._busy = busy
        self._ssl: dict[str, Any] = {}
        if ssl_context is not None:
            self._ssl = {
                "ssl": ssl_context,
                "ssl_handshake_timeout": handshake_seconds,
                "ssl_shutdown_timeout": shutdown_seconds,
            }
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[Any]] = set()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: The address cannot be used.
        """
        for sock in self.sockets:
            sock.setblocking(False)
            sock.listen(BACKLOG)
            self._loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Take no more connections. Those that there are go on."""
        for sock in self.sockets:
            self._loop.remove_reader(sock)
            sock.close()
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()

    async def wait_closed(self) -> None:
        """Nothing to wait for: connections are aiohttp's."""

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in _FULL:
                    raise
                logger.error("no connection can be taken: %s", exc.strerror)
                self._pause(sock, FULL_SECONDS, FULL_SECONDS)
                return
            connection.setblocking(False)
            task = self._loop.create_task(
                self._loop.connect_accepted_socket(self._protocol, connection, **self._ssl),
                name="connection",
            )
            self._connecting.add(task)
            task.add_done_callback(self._connected)
        if self._busy():
            self._pause(sock, BUSY_SECONDS, MOST_BUSY_SECONDS)

    def _connected(self, task: asyncio.Task[Any]) -> None:
        self._connecting.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A handshake that failed, or a client that has left already.
            logger.debug("a connection could not be made: %s", task.exception())

    def _pause(self, sock: socket.socket, seconds: float, most: float) -> None:
        self._loop.remove_reader(sock)
        self._pauses[sock] = self._loop.call_later(seconds, self._again, sock, most - seconds)

    def _again(self, sock: socket.socket, most: float) -> None:
        del self._pauses[sock]
        if most > 0 and self._busy():
            self._pause(sock, BUSY_SECONDS, most)
        else:
            self._loop.add_reader(sock, self._accept, sock)
