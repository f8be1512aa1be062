"""Limits: exact, never waiting, forgotten when idle; on every route, and in the database."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.limits import LIMITS, Limit, Limits, network
from sse_server.sessions import COOKIE
from tests.conftest import Client, SettingsFactory, connect, eventually
from tests.sse import EventReader
from tests.streaming import query
from tests.streaming import sign_in as sign_in_by_sql

ClientFactory = Callable[..., Awaitable[Client]]


class Clock:
    """Stands in for the running loop's clock, from which aiolimiter reads the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# One limit


async def test_a_limit_is_exact(clock: Clock) -> None:
    """n at once and no more, then one each 60/n seconds; other keys are not affected."""
    limit = Limit("tests", 120)
    assert [await limit.take("ada") for _ in range(130)] == 120 * [True] + 10 * [False]
    assert await limit.take("bob")
    clock.now += 0.4
    assert not await limit.take("ada")
    clock.now += 0.11
    assert await limit.take("ada")
    assert not await limit.take("ada")
    clock.now += 60
    assert [await limit.take("ada") for _ in range(121)] == 120 * [True] + [False]


async def test_taking_never_waits() -> None:
    """A thousand at once get their answer in one turn of the loop, and no waiter is left."""
    limit = Limit("tests", 10)
    taken = await asyncio.wait_for(asyncio.gather(*(limit.take("ada") for _ in range(1000))), 5)
    assert sum(taken) == 10
    [bucket] = limit._buckets.values()
    assert not bucket._waiters
    assert bucket._waker_handle is None


async def test_zero_is_no_limit() -> None:
    """And keeps nothing."""
    limit = Limit("tests", 0)
    assert all([await limit.take("ada") for _ in range(1000)])
    assert limit.has_room("ada")
    assert len(limit) == 0


async def test_what_is_idle_for_a_period_is_dropped(clock: Clock) -> None:
    """No sooner than the bucket is empty: dropping it lets nobody have more than without."""
    limit = Limit("tests", 2, period=60)
    clock.now += 59
    assert [await limit.take("ada") for _ in range(3)] == [True, True, False]
    clock.now += 1
    limit.rotate()
    assert not await limit.take("ada")  # used a second ago: it counts still
    clock.now += 60
    limit.rotate()
    clock.now += 60
    limit.rotate()
    assert len(limit) == 0
    assert await limit.take("ada")


@given(
    st.lists(st.one_of(st.just("rotate"), st.floats(0, 30), st.just("take")), max_size=200),
)
def test_rotating_changes_no_answer(steps: list[str | float]) -> None:
    """With and without forgetting, every attempt gets the same answer."""

    async def compare() -> None:
        loop = asyncio.get_running_loop()
        now = 1000.0
        loop.time = lambda: now  # type: ignore[method-assign]
        try:
            kept, rotated = Limit("kept", 3, period=60), Limit("rotated", 3, period=60)
            due = now + 60
            for step in steps:
                if isinstance(step, float):
                    now += step
                    while now >= due:
                        rotated.rotate()
                        due += 60
                elif step == "take":
                    assert await kept.take("ada") == await rotated.take("ada")
        finally:
            del loop.time

    asyncio.run(compare())


async def test_many_users_seen_once_cost_no_memory(clock: Clock) -> None:
    """20,000 of them, two periods later: as if they had never been."""
    limits = Limits()
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(20_000):
            await limits.claimed_stream(f"key-{number}", f"{number}")
        used, _ = tracemalloc.get_traced_memory()
        assert used - before > 5_000_000
        for _ in range(2):
            clock.now += 60
            limits.rotate()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        assert after - before < 100_000
    finally:
        tracemalloc.stop()


async def test_it_forgets_by_itself() -> None:
    """Limits.run() is what drops the idle ones in a process."""
    limits = Limits(period=0.05)
    task = asyncio.create_task(limits.run())
    await limits.users.take("user:ada")
    limits.seen("key", "ada")
    await eventually(lambda: not limits.users._buckets and not limits.users._older)
    await eventually(lambda: not limits._sessions and not limits._older_sessions)
    task.cancel()


async def test_refusals_are_told_once_and_then_counted(clock: Clock) -> None:
    """A flood of refusals is two reports per key and period, and few for many keys."""
    told: list[tuple[str, str, int]] = []
    limit = Limit("tests", 1, refused=lambda *report: told.append(report))
    for _ in range(50):
        await limit.take("ada")
    assert told == [("tests", "ada", 1)]
    limit.rotate()
    assert told == [("tests", "ada", 1), ("tests", "ada", 48)]
    limit.rotate()
    assert len(told) == 2
    for number in range(3000):
        await limit.take(f"{number}")
        await limit.take(f"{number}")
    assert len(told) == 2 + 1000
    limit.rotate()
    assert told[-1] == ("tests", "others", 2000)


def test_addresses() -> None:
    """IPv4 by address, however it is written; IPv6 by /64; a Unix socket as one."""
    assert network("192.0.2.1") == network("::ffff:192.0.2.1") == "192.0.2.1"
    assert network("2001:db8:1:2:3::4") == network("2001:db8:1:2::") == "2001:db8:1:2::/64"
    assert network("2001:db8:1:3::4") != network("2001:db8:1:2::4")
    assert network("fe80::1%eth0") == "fe80::/64"
    assert network(None) == network("") == "unknown"


# On the routes


async def sign_in(client: Client, user_id: str) -> None:
    assert (await client.post("/demo/session", json={"user_id": user_id})).status == 200


async def test_every_route_of_the_api_counts(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """Whatever route a user calls, there or not, 429 follows with Retry-After."""
    app = create_app(settings(api_calls_per_minute=1, anonymous_calls_per_minute=1))
    client = await aiohttp_client(app)
    routes = sorted(
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.resource.canonical.startswith("/api/")
    )
    assert len(routes) > 8
    for number, (method, path) in enumerate([*routes, ("GET", "/api/no/such")]):
        if (method, path) in (("POST", "/api/session"), ("POST", "/api/publish")):
            continue  # not of users
        await sign_in(client, f"user-{number}")
        used = await client.get("/api/preferences")
        assert used.status == 200
        path = path.replace("{id}", "1").replace("{event_type}", "new_message")
        response = await client.request(method, path, json={} if method != "GET" else None)
        assert response.status == 429, (method, path)
        assert response.content_type == "application/problem+json"
        # A stream that is turned away is told to stay away somewhat longer.
        assert 60 <= int(response.headers["Retry-After"]) <= 120
        assert (await response.json())["type"] == "urn:sse-server:problem:too-many-requests"


async def test_120_calls_of_a_user_and_no_more(client: Client) -> None:
    """As delivered: 120 at once, on all devices together; other users go on."""
    await sign_in(client, "ada")
    responses = await asyncio.gather(*(client.get("/api/session") for _ in range(150)))
    passed = sum(response.status == 200 for response in responses)
    # A bucket of 120 a minute gives room for one more each half second.
    assert 120 <= passed <= 126
    await sign_in(client, "ada")
    assert (await client.get("/api/session")).status in (200, 429)
    assert {response.status for response in responses} == {200, 429}
    await sign_in(client, "bob")
    assert (await client.get("/api/session")).status == 200


async def test_without_a_session_the_address_counts(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """Behind a trusted proxy it is the client's address; users with a session are unaffected."""
    app = create_app(settings(anonymous_calls_per_minute=3, trusted_proxies="127.0.0.1"))
    client = await aiohttp_client(app)

    async def statuses(address: str, path: str = "/api/session") -> list[int]:
        headers = {"X-Forwarded-For": address}
        return [(await client.get(path, headers=headers)).status for _ in range(5)]

    assert await statuses("192.0.2.1") == 3 * [401] + 2 * [429]
    assert await statuses("192.0.2.2", "/api/stream") == 3 * [401] + 2 * [429]
    assert await statuses("2001:db8::1") == 3 * [401] + 2 * [429]
    assert await statuses("2001:db8::2") == 5 * [429]
    await sign_in(client, "ada")
    assert await statuses("192.0.2.1") == 5 * [200]


async def test_sign_in_attempts_are_limited_by_address(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """Attempts count, whether they succeed or not."""
    client = await aiohttp_client(create_app(settings(sign_ins_per_minute=4)))
    statuses = [
        (await client.post("/api/session", json={}, headers={"Authorization": "Bearer x"})).status
        for _ in range(6)
    ]
    assert statuses[4:] == [429, 429]
    assert 429 not in statuses[:4]


async def test_opening_streams_counts(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """Over the limit an EventSource gets 200 and `closing`, others 429; the open one stays."""
    client = await aiohttp_client(create_app(settings(api_calls_per_minute=2)))
    await sign_in(client, "ada")
    accept = {"Accept": "text/event-stream"}
    await client.get("/api/session")
    stream = await client.get("/api/stream", headers=accept)
    reader = EventReader(stream)
    await reader.next_of("ready")

    refused = await client.get("/api/stream", headers=accept)
    assert refused.status == 200
    [closing] = await EventReader(refused).rest()
    assert (closing.event, closing.json["reason"]) == ("closing", "limit")
    assert closing.retry is not None
    plain = await client.get("/api/stream")
    assert plain.status == 429
    assert int(plain.headers["Retry-After"]) > 0
    # Not superseded by those that were refused.
    await client.post(
        "/demo/publish",
        json={"user_id": "ada", "event_type": "new_message", "message": "still here"},
    )
    event = await reader.next_of("notification", "closing")
    assert event.event == "notification"
    stream.close()


async def test_calls_on_another_device_count_for_a_stream_too(
    aiohttp_client: ClientFactory, settings: SettingsFactory, db: Connection
) -> None:
    """A session that has not been seen here before is of a user who is over the limit."""
    client = await aiohttp_client(create_app(settings(api_calls_per_minute=1)))
    phone, laptop = sign_in_by_sql(db, "ada", "ada")
    assert (await client.get("/api/session", headers={"Cookie": f"{COOKIE}={phone}"})).status == 200
    refused = await client.get(
        "/api/stream", headers={"Cookie": f"{COOKIE}={laptop}", "Accept": "text/event-stream"}
    )
    [closing] = await EventReader(refused).rest()
    assert closing.json["reason"] == "limit"


async def test_health_and_pages_do_not_count(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """A load balancer's probes are never refused."""
    app = create_app(settings(api_calls_per_minute=1, anonymous_calls_per_minute=1))
    client = await aiohttp_client(app)
    for path in ("/livez", "/metrics", "/", "/static/client.js"):
        assert [(await client.get(path)).status for _ in range(4)] == 4 * [200]
    assert len(app[LIMITS].anonymous) == 0


# In the database


def test_100_notifications_are_exact_for_one_writer(db: Connection) -> None:
    """The 101st within a minute is refused, also when all are of one statement."""
    insert = (
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT 'ada', 'new_message', 'x' FROM generate_series(1, %s)"
    )
    with pytest.raises(psycopg2.Error) as refused:
        query(db, insert, 101)
    assert refused.value.pgcode == "SR429"
    query(db, insert, 100)
    with pytest.raises(psycopg2.Error):
        query(db, insert, 1)
    query(db, "UPDATE notifications SET created_at = created_at - interval '1 minute'")
    query(db, insert, 100)


def test_100_notifications_are_nearly_exact_for_many_writers(dsn: str, db: Connection) -> None:
    """16 at once exceed it by less than 16: each may overlook the row that another is writing."""
    writers = 16
    start = threading.Barrier(writers)

    def write() -> None:
        connection = connect(dsn)
        start.wait()
        for _ in range(30):
            # Like an INSERT, but it does not fail: the same trigger decides.
            query(connection, "SELECT * FROM notify_user('ada', 'new_message', 'x')")
        connection.close()

    with ThreadPoolExecutor(writers) as pool:
        for done in [pool.submit(write) for _ in range(writers)]:
            done.result()
    [(written,)] = query(db, "SELECT count(*) FROM notifications")
    assert 100 <= written < 100 + writers
