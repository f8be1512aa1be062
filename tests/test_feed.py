"""The feed: whatever happens to its connection, what commits arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server import feed as feed_module
from sse_server.app import SUPERVISOR
from sse_server.embedded import EmbeddedPostgres
from sse_server.errors import DatabaseUnavailable
from sse_server.feed import Feed
from sse_server.hub import Hub
from sse_server.metrics import Metrics
from tests.conftest import SettingsFactory, connect, eventually
from tests.streaming import (
    Node,
    Proxy,
    RawStream,
    allow_descriptors,
    end_session,
    insert,
    query,
    running,
    sign_in,
    without_rate_limit,
)

# No sweep comes to the rescue of what these tests are about.
NO_SWEEP = {"probe_seconds": 30.0}
BACKOFF = 0.01


@pytest.fixture
async def node(settings: SettingsFactory) -> AsyncIterator[Node]:
    async with running(settings(**NO_SWEEP)) as node:
        yield node


@contextlib.asynccontextmanager
async def proxied(
    settings: SettingsFactory, dsn: str, **changes: Any
) -> AsyncIterator[tuple[Proxy, Node]]:
    """A server whose connections to the database all go through a proxy."""
    parameters = parse_dsn(dsn)
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}"
        async with running(settings(database_url=url, **changes)) as node:
            yield proxy, node


def kill_feeds(db: Connection) -> None:
    rows = query(
        db,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'sse-server feed'",
    )
    assert rows


async def reconnected(node: Node, before: object) -> None:
    """Wait until the feed listens on another connection, having swept and told the streams."""
    await eventually(lambda: node.feed.connection not in (None, before), 20)


async def received(stream: RawStream, count: int) -> None:
    await eventually(lambda: len(stream.ids) >= count, 20)


async def swept(node: Node, before: object) -> None:
    await eventually(lambda: node.hub.snapshot is not before)


# Lost connections


async def test_a_killed_listen_connection_loses_nothing(node: Node, db: Connection) -> None:
    """After pg_terminate_backend the streams stay open and get what comes, once."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    ids: list[int] = []
    for round in range(1, 4):
        connection = node.feed.connection
        kill_feeds(db)
        ids += insert(db, "alice", "while it is away", "and this")
        await reconnected(node, connection)
        ids += insert(db, "alice", "when it is back")
        await received(stream, 3 * round)
    assert stream.ids == ids
    assert stream.ready == 4
    assert not stream.closed


async def test_everything_that_happens_while_the_feed_is_away_is_made_up_for(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """Rows, ended and superseded sessions, preferences and the unread count are all made up for."""
    keys = sign_in(db, "alice", "bob", "carol")
    read = insert(db, "alice", "old")
    # The other node's database is not away.
    async with (
        running(settings(**NO_SWEEP)) as other,
        proxied(settings, dsn, **NO_SWEEP) as (
            proxy,
            node,
        ),
    ):
        stream, ended, superseded = [await node.open_live(key) for key in keys]
        await proxy.refuse()
        await eventually(lambda: not node.feed.connected)
        ids = insert(db, "alice", "a", "b")
        end_session(db, keys[1])
        await other.open_live(keys[2])
        query(db, "UPDATE notifications SET read_at = now() WHERE id = %s", read[0])
        query(db, "INSERT INTO user_preferences VALUES ('alice', 'status_change', false)")
        assert stream.ids == read
        assert not ended.closed
        assert not superseded.closed
        await proxy.accept()
        await eventually(lambda: stream.ready == 2)
        assert stream.ids == [*read, *ids]
        assert stream.of("ready")[-1].json["unread_count"] == 2
        assert stream.of("preferences")[-1].json["preferences"] == [
            {"event_type": "status_change", "enabled": False}
        ]
        await eventually(lambda: ended.reason == "session_ended")
        await eventually(lambda: superseded.reason == "superseded")
        assert not stream.closed


async def test_it_listens_before_it_looks(
    node: Node, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What commits right after a reconnect's sweep has looked is announced."""
    monkeypatch.setattr(feed_module, "LEAVING_SECONDS", 30.0)  # no second sweep
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    ids: list[int] = []
    sweep = node.store.feed_sweep

    async def then_commit(*arguments: Any, **options: Any) -> Any:
        page = await sweep(*arguments, **options)
        if not ids:
            ids.extend(insert(db, "alice", "in between"))
        return page

    monkeypatch.setattr(node.store, "feed_sweep", then_commit)
    kill_feeds(db)
    await eventually(lambda: stream.ids)
    assert stream.ids == ids


async def test_a_restart_of_postgresql_loses_nothing(
    node: Node, db: Connection, dsn: str, cluster: EmbeddedPostgres
) -> None:
    """Under live streams PostgreSQL restarts and crashes: they stay, and miss nothing."""
    keys = sign_in(db, "alice", "bob")
    streams = [await node.open_live(key) for key in keys]
    ids = insert(db, "alice", "before")
    await eventually(lambda: streams[0].ids == ids)
    for mode in ("fast", "immediate"):
        connection = node.feed.connection
        await asyncio.to_thread(cluster.restart, mode=mode)
        fresh = connect(dsn)
        try:
            ids += insert(fresh, "alice", mode)
        finally:
            fresh.close()
        await reconnected(node, connection)
        await received(streams[0], len(ids))
    assert streams[0].ids == ids
    assert not any(stream.closed for stream in streams)
    # New ones work as well: what the pool held was lost with the server.
    await node.open_live(keys[1])


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Whatever this process opens from now on has a number above 1,024."""
    allow_descriptors(4096)
    held = [os.open(os.devnull, os.O_RDONLY)]
    while held[-1] < 1100:
        held.append(os.dup(held[0]))
    yield
    for descriptor in held:
        os.close(descriptor)


async def test_a_feed_above_descriptor_1024_notices_its_loss(
    many_descriptors: None,
    settings: SettingsFactory,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a descriptor that select() refuses, the loss of the connection is noticed at once."""
    monkeypatch.setattr(feed_module, "DECIDE_SECONDS", 60.0)  # its query would notice, too
    [key] = sign_in(db, "alice")
    async with running(settings(**NO_SWEEP)) as node:
        stream = await node.open_live(key)
        ids = []
        for _ in range(2):
            connection = node.feed.connection
            assert connection is not None
            assert connection.fileno() > 1024
            kill_feeds(db)
            ids += insert(db, "alice", "while it is away")
            await reconnected(node, connection)
            await received(stream, len(ids))
        assert stream.ids == ids
        assert not stream.closed


async def test_a_black_hole_is_noticed(settings: SettingsFactory, db: Connection, dsn: str) -> None:
    """When the database vanishes without an error, the probe notices, and nothing is lost."""
    keys = sign_in(db, "alice", "bob")
    async with proxied(settings, dsn, probe_seconds=0.2, query_timeout=2.0) as (proxy, node):
        stream, ended = [await node.open_live(key) for key in keys]
        connection = node.feed.connection
        proxy.stall()
        ids = insert(db, "alice", "into the hole")
        end_session(db, keys[1])
        # Not only when the driver gives up, after ten times as long.
        await eventually(lambda: node.feed.connection not in (None, connection), 15)
        await eventually(lambda: stream.ids == ids)
        await eventually(lambda: ended.reason == "session_ended")
        await eventually(lambda: stream.ready == 2)
        assert stream.of("ready")[-1].json["unread_count"] == 1
        assert not stream.closed


async def test_it_reconnects_for_ever(
    settings: SettingsFactory,
    db: Connection,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Try after try fails, with growing pauses in between, until one does not."""
    monkeypatch.setattr(feed_module, "BACKOFF_FIRST", BACKOFF)
    [key] = sign_in(db, "alice")
    async with proxied(settings, dsn, **NO_SWEEP) as (proxy, node):
        stream = await node.open_live(key)
        await proxy.refuse()
        await eventually(lambda: len([r for r in caplog.records if r.name.endswith("feed")]) >= 6)
        pauses = [
            float(found[1])
            for record in caplog.records
            if (found := re.search(r"at most ([0-9.]+) s", record.getMessage()))
        ]
        assert pauses == sorted(pauses)
        assert pauses[5] >= 8 * BACKOFF
        await proxy.accept()
        ids = insert(db, "alice", "at last")
        await eventually(lambda: stream.ids == ids)
        assert not node.app[SUPERVISOR].failed.is_set()


async def test_the_first_connection_fails_fast(settings: SettingsFactory) -> None:
    """A service that cannot reach its database does not start."""
    with pytest.raises(DatabaseUnavailable):
        async with running(settings(database_url="postgresql://postgres@127.0.0.1:1/none")):
            pass


async def test_it_can_be_cancelled_at_any_time(node: Node, db: Connection) -> None:
    """A feed that is stopped in the middle of its work closes its connection."""
    metrics = Metrics()
    for turns in range(1, 13):
        feed = Feed(node.store, Hub(metrics), metrics, probe_seconds=0.001)
        await feed.open()
        connection = feed.connection
        assert connection is not None
        task = asyncio.create_task(feed.run())
        insert(db, "alice", "something to do")
        for _ in range(turns):
            await asyncio.sleep(0)
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
        assert task.cancelled()
        assert connection.closed


# What no NOTIFY announces


async def test_rows_without_a_trigger_arrive_by_the_sweep(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """Rows that replication writes, and so no trigger announces, arrive all the same, once."""
    [key] = sign_in(db, "alice")
    replica = connect(dsn)
    try:
        query(replica, "SET session_replication_role = replica")
        async with running(settings(probe_seconds=0.1)) as node:
            stream = await node.open_live(key)
            ids = insert(replica, "alice", "a", "b")
            await eventually(lambda: stream.ids == ids)
            ids += insert(db, "alice", "c")
            ids += insert(replica, "alice", "d")
            await eventually(lambda: stream.ids == ids)
            # One whose transaction is open during some sweeps, with later ones committing.
            replica.autocommit = False
            late = insert(replica, "alice", "late")
            ids += insert(db, "alice", "e")
            for _ in range(3):
                await swept(node, node.hub.snapshot)
            assert stream.ids == ids
            replica.commit()
            await eventually(lambda: len(stream.ids) == len(ids) + 1)
            assert stream.ids == ids + late
    finally:
        replica.close()


async def test_an_announced_row_does_not_overtake_a_silent_one(
    settings: SettingsFactory, db: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While some transactions notify and others do not, none is sent before one that it covers: a
    client whose line breaks in between would never get the other."""
    [key] = sign_in(db, "alice")
    late = connect(dsn)
    late.autocommit = False
    try:
        async with running(settings(**NO_SWEEP)) as node:
            stream = await node.open_live(key)
            connection = node.feed.connection
            monkeypatch.setattr(feed_module, "LEAVING_SECONDS", 30.0)
            kill_feeds(db)  # a feed that starts cannot know who notifies
            await reconnected(node, connection)
            query(db, "UPDATE settings SET polling_until = clock_timestamp() + interval '1 hour'")
            silent = insert(late, "alice", "from the time of polling")
            query(db, "UPDATE settings SET polling_until = '-infinity'")
            late.commit()
            announced = insert(db, "alice", "notified")
            await received(stream, 2)
            assert stream.ids == silent + announced
    finally:
        late.close()


async def test_a_sweep_of_many_pages_misses_and_repeats_nothing(
    settings: SettingsFactory,
    db: Connection,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More rows than a page, in one transaction or in many, are swept exactly once."""
    monkeypatch.setattr(feed_module, "SWEEP_ROWS", 7)
    without_rate_limit(db)
    keys = sign_in(db, "alice", "bob")
    async with proxied(settings, dsn, **NO_SWEEP) as (proxy, node):
        alice, bob = [await node.open_live(key) for key in keys]
        for round in (1, 2):
            await proxy.refuse()
            await eventually(lambda: not node.feed.connected)
            hers = [id for _ in range(10) for id in insert(db, "alice", "one")]
            hers += insert(db, "alice", *["many"] * 20)
            his = insert(db, "bob", *["his"] * 7)
            await proxy.accept()
            await eventually(lambda: node.feed.connected)
            await received(alice, 30 * round)
            await received(bob, 7 * round)
            assert alice.ids[-30:] == hers
            assert bob.ids[-7:] == his
        assert (len(alice.ids), len(bob.ids)) == (60, 14)


async def test_sweeps_and_announcements_together_repeat_nothing(
    settings: SettingsFactory, db: Connection
) -> None:
    """With a sweep after almost every announcement a stream still gets every row once."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    async with running(settings(probe_seconds=0.001)) as node:
        stream = await node.open_live(key)
        ids = []
        for _ in range(200):
            ids += insert(db, "alice", "x")
            await asyncio.sleep(0)
        await eventually(lambda: len(stream.ids) >= len(ids))
        assert stream.ids == ids


# Payloads


async def test_rows_too_large_for_a_payload_keep_their_place(node: Node, db: Connection) -> None:
    """A row announced by id alone is fetched before the next announcement is dispatched."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    large, small = "\U0001f4e2" * 2000, "small"
    ids = [insert(db, "alice", text)[0] for text in [large, small] * 5]
    ids += insert(db, "alice", large, small, large)
    await eventually(lambda: len(stream.ids) == len(ids))
    assert stream.ids[:10] == ids[:10]
    assert sorted(stream.ids[10:]) == ids[10:]
    assert {event.json["message"] for event in stream.of("notification")} == {large, small}


HOSTILE = [
    "",
    "no JSON",
    "null",
    "[1]",
    "NaN",
    "[" * 5000,
    '{"t": ["a"]}',
    '{"t": "from a newer version"}',
    '{"t": "notification"}',
    '{"t": "notification", "x": "1", "r": [[1, "alice", 1]]}',
    '{"t": "notification", "x": 1e400, "r": [["a", "alice", 1]], "e": 1, "m": 2, "l": 3}',
    '{"t":"notification","x":99999999,"e":"new_message","m":5,"l":null,"r":[[1,"alice",1]]}',
    '{"t":"notification","x":99999999,"e":"new_message","m":"a","l":7,"r":[[1,"alice",1]]}',
    '{"t":"notification","x":99999999,"e":[],"m":"a","l":null,"r":[[1,"alice",1]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[1,"alice",1e300]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[1,"alice",Infinity]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[2,"alice",1'
    + "0" * 20
    + "]]}",
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[3,"alice",1'
    + "0" * 30
    + "]]}",
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[["x","alice",1]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[null,"alice",1]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"a","l":null,"r":[[1,["alice"],1]]}',
    '{"t":"notification","x":99999999,"r":[["x","alice",1]]}',
    '{"t":"notification","x":99999999,"r":[[1e99,"alice",1]]}',
    '{"t":"notification","x":99999999,"e":"e","m":"\\ud800","l":null,"r":[[1,"alice",1]]}',
    '{"t": "read", "r": [["alice"]]}',
    '{"t": "read", "r": 5}',
    '{"t": "preferences", "u": "alice", "p": [1]}',
    '{"t": "preferences", "u": {}, "p": {}}',
    '{"t": "session", "s": [[1, Infinity], [1, NaN], [1, "x"]]}',
    '{"t": "session", "s": [[1, 1' + "0" * 400 + "]]}",
    '{"t": "session", "s": [1]}',
    '{"t": "stream", "s": [[1, "x"]]}',
    '{"t": "stream", "s": [[{}, 1]]}',
    '{"t": "usage", "n": "x", "u": []}',
    '{"t": "usage", "n": "x", "l": ["users"], "u": []}',
    '{"t": "usage", "n": "x", "l": "no such limit", "u": [["user:alice", 1, 120]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": null}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:alice", 1]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:alice", "1", 120]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:alice", NaN, 120]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:bob", Infinity, 120]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:alice", 1, "120"]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:carol", 1' + "0" * 400 + ", 120]]}",
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:carol", -1, 1e-300]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [["user:dave", 1e300, Infinity]]}',
    '{"t": "usage", "n": "x", "l": "users", "u": [[["user:alice"], 1, 120]]}',
]


async def test_a_foreign_payload_is_ignored(
    node: Node, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever may connect may NOTIFY: no payload at all ends the feed or a stream of others."""
    caplog.set_level(logging.WARNING)
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    insert(db, "bob", *"abcde")  # the ids that the payloads below name
    await eventually(lambda: node.count("sse_feed_payloads_total"))
    before = node.count("sse_feed_payloads_total")
    for payload in HOSTILE:
        query(db, "SELECT pg_notify(channel, %s) FROM settings", payload)
    ids = insert(db, "alice", "a real one")
    await eventually(lambda: ids[0] in stream.ids)
    expected = before + len(HOSTILE) + 1
    await eventually(lambda: node.count("sse_feed_payloads_total") >= expected)
    assert not node.app[SUPERVISOR].failed.is_set()
    assert node.feed.connected
    assert node.count("sse_feed_reconnects_total") == 0
    assert not stream.closed
    assert "alice" not in caplog.text


async def test_ten_thousand_recipients_reach_a_thousand_streams(
    settings: SettingsFactory, db: Connection, dsn: str
) -> None:
    """One INSERT … SELECT for 10,000 users is announced by some tens of NOTIFYs and reaches all."""
    allow_descriptors(8192)
    users = [f"user-{number}" for number in range(10_000)]
    keys = sign_in(db, *users[::10])
    listener = connect(dsn)
    try:
        async with running(settings(**NO_SWEEP)) as node:
            streams = await node.clients.open_many(node.port, keys)
            [(channel,)] = query(db, "SELECT channel FROM settings")
            query(listener, f'LISTEN "{channel}"')
            query(
                db,
                "INSERT INTO notifications (user_id, event_type, message) "
                "SELECT u, 'system_alert', 'to all' FROM unnest(%s) AS u",
                users,
            )
            await eventually(lambda: all(len(stream.ids) == 1 for stream in streams), 30)
            rows = query(db, "SELECT user_id, id FROM notifications")
            ids = dict(rows)
            assert [stream.ids for stream in streams] == [[ids[user]] for user in users[::10]]

            def announced() -> list[int]:
                listener.poll()
                messages = [json.loads(notify.payload) for notify in listener.notifies]
                return [len(message["r"]) for message in messages if "r" in message]

            await eventually(lambda: sum(announced()) == 10_000)
            assert 1 < len(announced()) < 100
    finally:
        listener.close()


async def test_writers_that_wait_for_one_another_make_it_poll(
    settings: SettingsFactory,
    db: Connection,
    dsn: str,
    cluster: EmbeddedPostgres,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """However few commits they reach together, writers that queue to notify make it poll."""
    monkeypatch.setattr(feed_module, "POLL_ABOVE", float("inf"))
    monkeypatch.setattr(feed_module, "POLL_ABOVE_WAITING", 1)
    monkeypatch.setattr(feed_module, "DECIDE_SECONDS", 0.02)
    without_rate_limit(db)
    script = tmp_path / "insert.sql"
    script.write_text(
        "INSERT INTO notifications (user_id, event_type, message) "
        "VALUES ('ada', 'new_message', 'x')"
    )
    async with running(settings(**NO_SWEEP)):
        writers = await asyncio.create_subprocess_exec(
            cluster.psql.with_name("pgbench"),
            *("--no-vacuum", "--client=16", "--time=60", f"--file={script}", dsn),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await eventually(
                lambda: query(db, "SELECT polling_until > now() FROM settings") == [(True,)],
                timeout=30,
            )
        finally:
            writers.kill()
            await writers.wait()
