"""Limits over several processes: what one has let through counts for the others."""

from __future__ import annotations

import asyncio

import aiohttp
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.app import SUPERVISOR
from sse_server.database import Database
from sse_server.limits import LIMITS, Limit, Limits
from sse_server.sessions import COOKIE
from sse_server.store import Store
from sse_server.usage import MOST_KEYS, Usage
from tests.conftest import SettingsFactory, eventually
from tests.listener import Listener
from tests.streaming import Node, Proxy, running, sign_in

# One limit


async def test_untold() -> None:
    """What was taken is told once; what was refused, never."""
    limit = Limit("tests", 2)
    assert limit.untold() == []
    assert [await limit.take("ada") for _ in range(3)] == [True, True, False]
    await limit.take("shop", rate=600)
    assert limit.untold() == [("ada", 2, 2), ("shop", 1, 600)]
    assert limit.untold() == []
    await limit.heard("bob", 1, 2)
    assert limit.untold() == []


@given(rate=st.integers(1, 300), taken=st.integers(0, 300), heard=st.integers(0, 1000))
def test_heard(rate: int, taken: int, heard: int) -> None:
    """As if it had been taken here, as far as there is room."""

    async def compare() -> None:
        limit = Limit("tests", rate, period=10**9)
        for _ in range(taken):
            await limit.take("ada")
        await limit.heard("ada", heard, rate)
        left = 0
        while await limit.take("ada"):
            left += 1
        assert left == max(0, rate - taken - heard)

    asyncio.run(compare())


async def test_heard_of_another_rate() -> None:
    """A rate that somebody tells of is for keys that are unknown here, and for no others."""
    limit = Limit("tests", 600)
    for _ in range(5):
        assert await limit.take("shop", rate=5)
    await limit.heard("shop", 1, 1000)
    assert not await limit.take("shop", rate=5)
    await limit.heard("stall", 3, 5)
    assert [await limit.take("stall", rate=5) for _ in range(3)] == [True, True, False]
    unlimited = Limit("tests", 0)
    await unlimited.heard("ada", 1, 1)
    assert len(unlimited) == 0


async def test_a_good_part_of_a_limit_is_urgent() -> None:
    """A tenth used up here has to be told soon, less has time."""
    limits = Limits(api_calls=120)
    for _ in range(11):
        await limits.users.take("user:ada")
        await limits.users.take("user:bob")
    assert not limits.urgent.is_set()
    await limits.users.take("user:ada")
    assert limits.urgent.is_set()


async def test_payloads_fit(dsn: str) -> None:
    """Each fits into a NOTIFY, however long the names are; those who used most are told of."""
    limits = Limits(api_calls=1000)
    keys = ["user:" + 80 * "\u20ac" + f"{number}" for number in range(MOST_KEYS + 100)]
    for key in [*keys, *keys[-100:]]:
        await limits.users.take(key)
    listener = Listener(dsn)
    database = Database(dsn, size=1, connect_timeout=5, query_timeout=10)
    try:
        await Usage(Store(database), limits).share()
        payloads = listener.of("usage")
    finally:
        await database.close()
        listener.close()
    told = {key: count for payload in payloads for key, count, _ in payload["u"]}
    assert len(told) == MOST_KEYS
    assert {told[key] for key in keys[-100:]} == {2}
    assert len(payloads) > MOST_KEYS * 250 / 8000


# Processes


async def calls(node: Node, key: str, count: int) -> list[int]:
    """The statuses of so many calls of the API, one after the other."""
    headers = {"Cookie": f"{COOKIE}={key}"}
    url = f"http://127.0.0.1:{node.port}/api/session"
    async with aiohttp.ClientSession() as client:
        return [(await client.get(url, headers=headers)).status for _ in range(count)]


async def test_calls_count_on_all_nodes(settings: SettingsFactory, db: Connection) -> None:
    """A user who has used up the limit on one node is over it on the other, others are not; and
    by turns on both it is one limit, but for what was under way."""
    keys = sign_in(db, "ada", "bob", "carol")
    async with running(settings()) as here, running(settings()) as there:
        assert await calls(here, keys[0], 120) == 120 * [200]
        # Meanwhile there is room for one more each half second.
        ada = there.app[LIMITS].users._bucket("user:ada", 120)
        await eventually(lambda: not ada.has_capacity(20))
        assert (await calls(there, keys[0], 40)).count(200) <= 25
        assert await calls(there, keys[1], 1) == [200]

        passed = 0
        for _ in range(24):
            for node in (here, there):
                passed += (await calls(node, keys[2], 10)).count(200)
        # One more each half second, and a tenth of the limit that may be untold.
        assert 120 <= passed <= 160


async def test_a_stream_counts_for_a_user_who_called_elsewhere(
    settings: SettingsFactory, db: Connection
) -> None:
    """Streams are calls: over the limit by calls on another node, one is turned away."""
    [key] = sign_in(db, "ada")
    configured = settings(api_calls_per_minute=5)
    async with running(configured) as here, running(configured) as there:
        assert await calls(here, key, 5) == 5 * [200]
        await eventually(lambda: not there.app[LIMITS].users.has_room("user:ada"))
        stream = await there.open(key)
        await eventually(lambda: stream.reason)
        assert stream.reason == "limit"


async def test_sign_ins_and_services_count_on_all_nodes(
    settings: SettingsFactory, db: Connection
) -> None:
    """Attempts of an address, and the requests of a service by its own rate."""
    configured = settings(sign_ins_per_minute=4)
    async with running(configured) as here, running(configured) as there:
        for _ in range(4):
            assert await here.app[LIMITS].sign_ins.take("address:192.0.2.1")
        assert await here.app[LIMITS].services.take("service:shop", rate=1)
        sign_ins = there.app[LIMITS].sign_ins
        await eventually(lambda: not sign_ins.has_room("address:192.0.2.1"))
        services = there.app[LIMITS].services
        await eventually(lambda: len(services) == 1)
        assert not await services.take("service:shop", rate=1)
        assert here.app[LIMITS].sign_ins.has_room("address:192.0.2.2")


async def test_what_is_told_is_not_counted_twice(settings: SettingsFactory, db: Connection) -> None:
    """NOTIFY brings a process its own payloads."""
    async with running(settings(api_calls_per_minute=1000)) as node:
        for _ in range(100):
            assert await node.app[LIMITS].users.take("user:ada")
        before = node.count("sse_feed_payloads_total")
        await eventually(lambda: node.count("sse_feed_payloads_total") > before)
        [(_, bucket)] = node.app[LIMITS].users._buckets.items()
        assert bucket._level <= 100


async def test_without_a_database_nothing_ends(settings: SettingsFactory, dsn: str) -> None:
    """What cannot be told is forgotten; what is used later is told again."""
    parameters = parse_dsn(dsn)
    async with Proxy(f"{parameters['host']}/.s.PGSQL.{parameters['port']}") as proxy:
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{parameters['dbname']}"
        configured = settings(database_url=url, query_timeout=1.0)
        async with running(configured) as here, running(settings()) as there:
            await proxy.refuse()
            await here.app[LIMITS].users.take("user:ada")
            await eventually(lambda: not here.app[LIMITS].users._untold)
            await proxy.accept()

            async def told() -> None:
                while "user:bob" not in there.app[LIMITS].users._buckets:
                    await here.app[LIMITS].users.take("user:bob")
                    await asyncio.sleep(0.1)

            await asyncio.wait_for(told(), 20)
            assert "user:ada" not in there.app[LIMITS].users._buckets
            assert not here.app[SUPERVISOR].failed.is_set()
