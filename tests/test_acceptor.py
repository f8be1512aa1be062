"""New connections are taken in their order, at a pace, and none is forgotten."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator, Sequence

import pytest
from aiohttp import ClientSession
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.acceptor import BATCH, Acceptor
from sse_server.connections import HEADS, Site
from sse_server.sessions import STORAGE
from sse_server.store import Claim
from sse_server.stream import OPENING, STREAMS
from tests.conftest import SettingsFactory, eventually
from tests.streaming import running, sign_in


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    sock = socket.create_server(("127.0.0.1", 0))
    yield sock
    sock.close()


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"hello")
        transport.close()


def acceptor(sock: socket.socket, *, busy: bool) -> Acceptor:
    return Acceptor(
        [sock],
        Greeter,
        lambda: busy,
        ssl_context=None,
        handshake_seconds=1,
        shutdown_seconds=1,
    )


async def greeted(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("busy", [False, True])
async def test_every_connection_is_taken(listening: socket.socket, busy: bool) -> None:
    """However busy the process is: a pace is no gate."""
    taker = acceptor(listening, busy=busy)
    port = listening.getsockname()[1]
    taker.start()
    try:
        answers = await asyncio.gather(*(greeted(port) for _ in range(4 * BATCH)))
        assert answers == [b"hello"] * 4 * BATCH
    finally:
        taker.close()
    with pytest.raises(ConnectionError):
        await greeted(port)


async def test_no_descriptors_left(
    listening: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection for which there was no descriptor is taken when there is one again."""
    taker = acceptor(listening, busy=False)
    port = listening.getsockname()[1]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.create_connection(("127.0.0.1", port))
    try:
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
        used = []
        try:
            while True:  # gaps below the limit
                used.append(os.dup(0))
        except OSError:
            pass
        taker.start()
        await eventually(lambda: "no connection can be taken" in caplog.text)
        for descriptor in used:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.setblocking(False)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 9), 10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.close()
        taker.close()


async def test_streams_that_open_are_a_reason_to_wait(
    settings: SettingsFactory, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the database does not answer, more connections are taken more slowly, health checks
    among them; then all streams open."""
    keys = sign_in(db, *(f"user-{number}" for number in range(OPENING + 2 * BATCH)))
    async with running(settings()) as node:
        streams = node.app[STREAMS]
        answering = asyncio.Event()
        claims = node.app[STORAGE]._claims
        claim = claims._answer

        async def held(keys: list[bytes]) -> Sequence[Claim | None]:
            await answering.wait()
            return await claim(keys)

        monkeypatch.setattr(claims, "_answer", held)
        opening = asyncio.gather(*(node.open(key) for key in keys))
        await eventually(lambda: streams.busy)
        url = f"http://127.0.0.1:{node.port}/livez"
        async with ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200
        assert streams.busy
        answering.set()
        await eventually(lambda: len(node.hub) == len(keys), 30)
        await opening
        assert not streams.busy


async def test_silent_connections_are_a_reason_to_wait(
    settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that have not said anything yet are counted, until they do, end, or are cut."""
    pauses = 0
    pause = Acceptor._pause

    def counted(self: Acceptor, sock: socket.socket, seconds: float, most: float) -> None:
        nonlocal pauses
        pauses += 1
        pause(self, sock, seconds, most)

    monkeypatch.setattr(Acceptor, "_pause", counted)
    async with running(settings(header_timeout=2)) as node:
        [site] = node.runner.sites
        assert isinstance(site, Site)
        address = ("127.0.0.1", node.port)
        # All of them wait before the first is taken.
        silent = [socket.create_connection(address) for _ in range(3 * HEADS)]
        await eventually(lambda: site.heads == len(silent))
        assert pauses
        url = f"http://127.0.0.1:{node.port}/livez"
        async with ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200
        assert site.heads == len(silent)  # that one has spoken
        for sock in silent[:20]:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
        for sock in silent[20:30]:
            sock.close()
        await eventually(lambda: site.heads == len(silent) - 30)
        await eventually(lambda: site.heads == 0)  # cut
        silent[-1].setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(silent[-1], 1) == b""
        for sock in silent:
            sock.close()
