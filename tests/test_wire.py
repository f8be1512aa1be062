"""Streams whose socket was taken over from aiohttp keep every promise of those that it serves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server import events
from sse_server.hub import Stream
from sse_server.wire import EXCESS_BYTES, SocketWire
from tests.conftest import SettingsFactory, eventually
from tests.streaming import (
    Node,
    end_session,
    insert,
    query,
    running,
    sign_in,
    without_rate_limit,
)

SLOW = {"receive_buffer": 4096}


@pytest.fixture(params=[True, False], ids=["handed over", "served by aiohttp"])
def hand_over(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def node(settings: SettingsFactory, hand_over: bool) -> AsyncIterator[Node]:
    options = settings(
        heartbeat_seconds=1, stream_buffer_bytes=16384, replay_page_rows=50, slow_seconds=2
    )
    async with running(options, hand_over=hand_over) as node:
        yield node


async def test_who_serves_the_stream(node: Node, db: Connection, hand_over: bool) -> None:
    """Behind our own site a stream costs neither a task nor anything of aiohttp's; behind another
    one it is served all the same."""
    [key] = sign_in(db, "alice")
    before = len(asyncio.all_tasks())
    await node.open_live(key)
    [stream] = node.hub
    server = node.runner.server
    assert server is not None
    if hand_over:
        assert isinstance(stream.keeper, SocketWire)
        await eventually(lambda: len(asyncio.all_tasks()) == before and not server.connections)
        assert not stream.keeper.busy
    else:
        assert stream.keeper is None
        assert len(server.connections) == 1


async def test_the_whole_life(node: Node, db: Connection) -> None:
    """Replay, live, heartbeat, read, and a proper end when the session ends."""
    [key] = sign_in(db, "alice")
    ids = insert(db, "alice", "one", "two")
    stream = await node.open_live(key)
    ids += insert(db, "alice", "three")
    await eventually(lambda: stream.ids == ids)
    await eventually(lambda: stream.of("ping"))
    query(db, "UPDATE notifications SET read_at = now() WHERE id = %s", ids[0])
    await eventually(lambda: stream.of("read"))
    end_session(db, key)
    await eventually(lambda: stream.reason == "session_ended" and stream.closed)
    await eventually(lambda: len(node.hub) == 0)
    assert node.count("sse_streams_closed_total", reason="session_ended") == 1


async def test_a_newer_stream_ends_the_older(node: Node, db: Connection) -> None:
    """The older one gets its last event and its last chunk; the newer one goes on."""
    [key] = sign_in(db, "alice")
    older = await node.open_live(key)
    newer = await node.open_live(key)
    await eventually(lambda: older.reason == "superseded" and older.closed)
    ids = insert(db, "alice", "one")
    await eventually(lambda: newer.ids == ids)


async def test_a_slow_client_lags_and_catches_up(node: Node, db: Connection) -> None:
    """Back pressure reaches the replay: nothing is lost, nothing comes twice."""
    without_rate_limit(db)
    slow_key, quick_key = sign_in(db, "alice", "alice")
    slow = await node.open_live(slow_key, **SLOW)
    quick = await node.open_live(quick_key)
    slow.pause()
    ids: list[int] = []
    while not node.count("sse_streams_lagged_total"):
        ids += insert(db, "alice", *["x" * 1900] * 20)
        await eventually(lambda: quick.ids == ids)  # noqa: B023
    slow.resume()
    await eventually(lambda: sorted(slow.ids) == ids)
    ids += insert(db, "alice", "live again")
    await eventually(lambda: slow.ids[-1] == ids[-1])
    assert len(set(slow.ids)) == len(slow.ids)


async def test_a_client_that_never_reads_is_cut(node: Node, db: Connection) -> None:
    """What it does not take within the time allowed ends its stream, and its connection."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key, **SLOW)
    stream.pause()
    while not node.count("sse_streams_lagged_total"):
        insert(db, "alice", *["x" * 1900] * 20)
        await asyncio.sleep(0)
    await eventually(lambda: len(node.hub) == 0, 15)
    assert node.count("sse_streams_closed_total", reason="slow") == 1


async def test_the_end_of_the_process_waits_for_streams(
    settings: SettingsFactory, db: Connection, hand_over: bool
) -> None:
    """Every stream is told that the process goes away, and gets its last chunk before it does."""
    keys = sign_in(db, *["alice", "bob"] * 5)
    async with running(settings(drain_seconds=2), hand_over=hand_over) as node:
        streams = await node.clients.open_many(node.port, keys)
        await node.runner.cleanup()
        assert [stream.reason for stream in streams] == ["shutdown"] * len(streams)
        await eventually(lambda: all(stream.closed for stream in streams))


async def test_what_the_kernel_did_not_take_goes_first(
    node: Node, db: Connection, hand_over: bool
) -> None:
    """A frame is written directly only while nothing waits before it: no frame is torn, and all
    kinds of them, notifications, counts and heartbeats, come in the order of writing."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    client = await node.open_live(key, **SLOW)
    [stream] = node.hub
    assert stream.transport is not None
    kernel = stream.transport.get_extra_info("socket")
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # soon full
    assert (stream.fd >= 0) is hand_over
    ids: list[int] = []
    for _ in range(3):
        client.pause()
        while not stream.buffered:
            [id] = insert(db, "alice", "x" * 1900)
            ids.append(id)
            await eventually(lambda: stream.sent == len(ids))  # noqa: B023
        assert stream.live
        assert stream.fd == -1
        ids += insert(db, "alice", "behind what waits")
        node.hub.control("alice", events.read([1], None))
        await eventually(lambda: stream.sent == len(ids))  # noqa: B023
        client.resume()
        await eventually(lambda: client.ids == ids)  # noqa: B023
        await eventually(lambda: not stream.buffered)
        ids += insert(db, "alice", "and direct again")
        await eventually(lambda: client.ids == ids)  # noqa: B023
        assert (stream.fd >= 0) is hand_over
    assert len(client.of("read")) == 3
    assert not client.closed


async def test_the_descriptor_is_forgotten_with_the_connection() -> None:
    """The next connection gets the same number: nothing may go to it by way of the old stream."""

    class Owner:
        def resume(self, wire: SocketWire) -> None:
            """Of no interest."""

        def lost(self, wire: SocketWire) -> None:
            assert wire.stream.fd == -1

    stream = Stream("alice", 1, 1)
    stream.fd = 7
    SocketWire(stream, Owner()).connection_lost(None)
    assert stream.fd == -1


@pytest.mark.parametrize("abrupt", [True, False], ids=["reset", "closed"])
async def test_a_client_that_leaves(
    settings: SettingsFactory, db: Connection, hand_over: bool, abrupt: bool
) -> None:
    """Its stream is gone at once if the socket is ours, and by the next heartbeat if not."""
    [key] = sign_in(db, "alice")
    seconds = 300 if hand_over else 1
    async with running(settings(heartbeat_seconds=seconds), hand_over=hand_over) as node:
        stream = await node.open_live(key)
        if abrupt:
            stream.cut()
        else:
            stream.transport.close()
        await eventually(lambda: len(node.hub) == 0)
        assert node.count("sse_streams_closed_total", reason="gone") == 1


# Only those that were handed over


async def test_connections_are_counted_until_they_end(
    settings: SettingsFactory, db: Connection
) -> None:
    """A stream takes one of the places for connections, and gives it back when it ends."""
    keys = sign_in(db, "alice", "bob", "eve")
    async with running(settings(max_connections=2)) as node:
        first, _ = [await node.open_live(key) for key in keys[:2]]
        turned_away = await node.open(keys[2])
        assert turned_away.closed
        assert not turned_away.status
        first.cut()
        await eventually(lambda: len(node.hub) == 1)
        assert (await node.open_live(keys[2])).status == 200


def test_an_unused_name_of_aiohttp_is_noticed() -> None:
    """What the take-over relies on is there in the aiohttp that is installed."""
    slots = {name for cls in web.RequestHandler.__mro__ for name in getattr(cls, "__slots__", ())}
    assert {"transport", "_manager", "_force_close", "_current_request"} <= slots


@pytest.mark.parametrize("pieces", [1, 2], ids=["with the request", "later"])
async def test_requests_behind_a_stream_are_not_answered(
    settings: SettingsFactory, db: Connection, pieces: int
) -> None:
    """Bytes behind the request of a stream do not disturb it, whenever they come."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as node:
        request = (
            f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{node.port}\r\n"
            f"Accept: text/event-stream\r\nCookie: sse_session={key}\r\n\r\n"
        ).encode()
        excess = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 40
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        try:
            writer.write(request + excess if pieces == 1 else request)
            received = await asyncio.wait_for(reader.readuntil(b"event: ready"), 10)
            if pieces == 2:
                writer.write(excess)
            insert(db, "alice", "after it")
            received += await asyncio.wait_for(reader.readuntil(b"after it"), 10)
            assert received.count(b"HTTP/1.1 ") == 1
            assert len(node.hub) == 1
        finally:
            writer.close()
        # That the client has gone is seen although nobody wanted what it had sent.
        await eventually(lambda: len(node.hub) == 0)


async def test_a_client_that_talks_without_end_is_cut(
    settings: SettingsFactory, db: Connection
) -> None:
    """Nobody may keep the process busy with bytes that are thrown away."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as node:
        stream = await node.open_live(key)
        stream.transport.write(b"x" * (2 * EXCESS_BYTES))
        await eventually(lambda: stream.closed and len(node.hub) == 0)


async def test_a_request_with_a_body_is_left_to_aiohttp(
    settings: SettingsFactory, db: Connection
) -> None:
    """A GET with a body is a stream too; who reads the body is aiohttp."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as node:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        try:
            writer.write(
                (
                    f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{node.port}\r\n"
                    f"Content-Length: 5\r\nCookie: sse_session={key}\r\n\r\nhello"
                ).encode()
            )
            await asyncio.wait_for(reader.readuntil(b"event: ready"), 10)
            [stream] = node.hub
            assert stream.keeper is None
        finally:
            writer.close()


async def test_half_closed(settings: SettingsFactory, db: Connection) -> None:
    """A client that says it will send no more has left, as for aiohttp."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as node:
        stream = await node.open_live(key)
        sock = stream.transport.get_extra_info("socket")
        stream.transport.pause_reading()
        socket.socket.shutdown(sock._sock, socket.SHUT_WR)
        await eventually(lambda: len(node.hub) == 0)
