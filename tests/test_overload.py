"""Overload: who is turned away, in what order the others are served, and what it costs."""

from __future__ import annotations

import asyncio

import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import SUPERVISOR
from tests.conftest import SettingsFactory, connect, eventually
from tests.streaming import (
    Node,
    RawStream,
    end_session,
    insert,
    query,
    running,
    sign_in,
    without_rate_limit,
)


def open_streams(db: Connection) -> int:
    """How many the database knows to be open."""
    [[count]] = query(db, "SELECT count(*) FROM sessions WHERE stream_at IS NOT NULL")
    return int(count)


async def turned_away(node: Node, key: str) -> RawStream:
    stream = await node.open(key)
    await eventually(lambda: stream.closed)
    return stream


@pytest.mark.parametrize(
    "limit, reason, least_ms",
    [
        ({"max_streams": 3}, "overload", 10_000),
        ({"streams_per_address": 3}, "limit", 60_000),
        ({"streams_per_user": 3}, "limit", 60_000),
    ],
    ids=["process", "address", "user"],
)
async def test_one_stream_too_many(
    settings: SettingsFactory, db: Connection, limit: dict[str, int], reason: str, least_ms: int
) -> None:
    """It is told to come back later, with jitter; those that are open are untouched, and there is
    room again when one of them ends."""
    keys = sign_in(db, *["alice"] * 8)
    async with running(settings(**limit)) as node:
        streams = [await node.open_live(key) for key in keys[:3]]
        refused = [await turned_away(node, key) for key in keys[3:]]
        assert [stream.reason for stream in refused] == [reason] * 5
        retries = {stream.parser.retry for stream in refused}
        assert len(retries) > 1
        assert min(retry or 0 for retry in retries) >= least_ms
        plain = await node.open(keys[3], accept="*/*")
        assert plain.status == (503 if reason == "overload" else 429)
        assert int(plain.headers["retry-after"]) >= least_ms // 1000
        ids = insert(db, "alice", "for those that are open")
        await eventually(lambda: all(stream.ids == ids for stream in streams))
        assert node.count("sse_streams_turned_away_total", reason=reason) == 6
        streams[0].cut()
        await eventually(lambda: len(node.hub) == 2)
        await eventually(lambda: open_streams(db) == 2)
        assert (await node.open_live(keys[7])).ids == ids


async def test_the_limit_of_a_user_holds_for_all_nodes(
    settings: SettingsFactory, db: Connection
) -> None:
    """However the streams are spread; a session that has one may take it to another node, and
    whatever way a stream ends, there is room for another one."""
    keys = sign_in(db, *["alice"] * 7)
    configured = settings(streams_per_user=3)
    async with running(configured) as there:
        async with running(configured) as here:
            away = await there.open_live(keys[0])
            streams = [await here.open_live(key) for key in keys[1:3]]
            for node in (here, there):
                assert (await turned_away(node, keys[3])).reason == "limit"
            moved = await here.open_live(keys[0])
            await eventually(lambda: away.reason == "superseded")
            assert (await turned_away(there, keys[3])).reason == "limit"

            streams[0].cut()
            await eventually(lambda: open_streams(db) == 2)
            await there.open_live(keys[3])
            assert (await turned_away(here, keys[4])).reason == "limit"
            end_session(db, keys[0])
            await eventually(lambda: moved.reason == "session_ended")
            await there.open_live(keys[4])
            assert (await turned_away(there, keys[5])).reason == "limit"
        # `here` has ended its stream, and said so.
        assert open_streams(db) == 2
        await there.open_live(keys[5])
        assert (await turned_away(there, keys[6])).reason == "limit"


async def test_the_last_streams_of_a_process_are_released(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """It does not go before it has said that they have ended."""
    [key] = sign_in(db, "alice")
    holder = connect(dsn)
    holder.autocommit = False
    async with running(settings()) as node:
        stream = await node.open_live(key)
        query(holder, "SELECT FROM sessions FOR UPDATE")

        async def let_go() -> None:
            await eventually(lambda: stream.closed and not node.app[SUPERVISOR]._tasks)
            await asyncio.sleep(0.2)  # time to go, if it did
            holder.commit()

        letting_go = asyncio.create_task(let_go())
    await letting_go
    holder.close()
    assert open_streams(db) == 0


async def test_what_finds_no_room_is_released(settings: SettingsFactory, db: Connection) -> None:
    """A stream that this process or a limit turns away after its claim counts no more."""
    keys = sign_in(db, "alice", "alice")
    async with running(settings(api_calls_per_minute=1)) as node:
        await node.open_live(keys[0])
        assert (await turned_away(node, keys[1])).reason == "limit"
        await eventually(lambda: open_streams(db) == 1)


async def test_a_stream_that_is_refused_does_not_end_an_older_one(
    settings: SettingsFactory, db: Connection
) -> None:
    """A session whose new stream finds no room keeps the one it has, wherever that is."""
    [key] = sign_in(db, "alice")
    async with running(settings()) as there, running(settings(max_streams=1)) as here:
        older = await there.open_live(key)
        [other] = sign_in(db, "bob")
        await here.open_live(other)
        assert (await turned_away(here, key)).reason == "overload"
        ids = insert(db, "alice", "still here")
        await eventually(lambda: older.ids == ids)


async def test_slow_clients_share_what_memory_there_is(
    settings: SettingsFactory, db: Connection
) -> None:
    """Clients that do not read take no more than the process has for them all."""
    without_rate_limit(db)
    memory = 1024 * 1024
    keys = sign_in(db, *["alice"] * 40)
    options = settings(
        buffer_memory_bytes=memory, stream_buffer_bytes=256 * 1024, streams_per_user=40
    )
    async with running(options) as node:
        streams = [await node.open_live(key, receive_buffer=4096) for key in keys]
        for stream in streams:
            stream.pause()
        while node.count("sse_streams_lagged_total") < 40:
            insert(db, "alice", *["x" * 1900] * 20)
            await asyncio.sleep(0)
        most = max(sum(stream.buffered for stream in node.hub) for _ in range(20))
        frame = 2100
        assert most <= memory + 40 * frame
        for stream in streams:
            stream.resume()
        expected = len(query(db, "SELECT FROM notifications"))
        await eventually(lambda: all(len(stream.ids) == expected for stream in streams), 30)
