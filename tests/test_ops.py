"""The operators' page: who is let in, what it is told, and the way of one notification."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812
from yarl import URL

from sse_server.api import ops
from sse_server.api.ops import COOKIE, Operators
from sse_server.app import create_app
from sse_server.audit import AUDIT
from sse_server.config import load
from sse_server.errors import ConfigurationError
from sse_server.trace import Seen, Trace
from tests.conftest import Client, ServerProcessFactory, SettingsFactory, eventually
from tests.streaming import Node, insert, query, running, sign_in, without_rate_limit
from tests.test_metrics import until
from tests.test_publish import add_service, send

KEY = "an operator key of more than 32 characters"
TEXT = "confidential-7be1"

ClientFactory = Callable[..., Awaitable[Client]]

DATA = ("/ops/api/state", "/ops/api/audit", "/ops/api/notifications/1")


@pytest.fixture
async def client(aiohttp_client: ClientFactory, settings: SettingsFactory) -> Client:
    """Of an application with an operator key; not signed in."""
    return await aiohttp_client(create_app(settings(operator_key=KEY)))


async def enter(client: Client, key: str = KEY) -> int:
    response = await client.post("/ops/api/session", json={"key": key})
    return response.status


def cookie(client: Client) -> str | None:
    cookies = client.session.cookie_jar.filter_cookies(client.make_url("/ops/api/state"))
    return cookies[COOKIE].value if COOKIE in cookies else None


# Who is let in


async def test_without_a_key_there_is_no_such_page(settings: SettingsFactory) -> None:
    """Without the setting the page and its API answer 404, whatever is asked."""
    async with (
        running(settings()) as node,
        aiohttp.ClientSession(f"http://127.0.0.1:{node.port}") as session,
    ):
        for path in ("/ops", *DATA):
            async with session.get(path) as response:
                assert response.status == 404
        async with session.post("/ops/api/session", json={"key": KEY}) as response:
            assert response.status == 404


@pytest.mark.parametrize("key", ["", "short", "k" * 31])
def test_a_key_that_can_be_guessed_is_refused(key: str) -> None:
    """Less than 32 characters end the start, in a sentence that does not quote them."""
    with pytest.raises(ConfigurationError) as failure:
        load(operator_key=key, _env_file=None)
    assert "SSE_OPERATOR_KEY" in str(failure.value)
    assert "32" in str(failure.value)
    assert not key or key not in str(failure.value)


async def test_the_page_needs_no_key_and_has_nothing_inline(client: Client) -> None:
    """The page itself shows nothing but a form, and works under the strict policy."""
    response = await client.get("/ops")
    assert response.status == 200
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    page = await response.text()
    assert "style=" not in page
    assert "<script>" not in page
    for path in ("/static/ops.js", "/static/ops.css"):
        assert path in page
        assert (await client.get(path)).status == 200


@pytest.mark.parametrize("path", DATA)
async def test_the_data_needs_the_cookie(client: Client, db: Connection, path: str) -> None:
    """Nobody, a user, a service, and whoever has the key itself in a wrong place get nothing."""
    [session] = sign_in(db, "alice")
    callers: list[dict[str, str]] = [
        {},
        {"Cookie": f"sse_session={session}"},
        {"Authorization": f"Bearer {add_service(db)}"},
        {"Authorization": f"Bearer {KEY}"},
        {"Cookie": f"{COOKIE}={KEY.replace(' ', '')}"},
    ]
    for headers in callers:
        response = await client.get(path, headers=headers)
        assert response.status == 401, headers
        assert (await response.json())["type"].endswith("not-an-operator")
    assert (await client.get(f"{path}?key={KEY}")).status == 401


async def test_the_key_lets_in_and_only_the_key(client: Client) -> None:
    """The key is exchanged for a cookie that no script can read and no other site can use."""
    for wrong in (KEY[:-1], KEY + " ", KEY.upper(), "x"):
        assert await enter(client, wrong) == 401
        assert cookie(client) is None
    response = await client.post("/ops/api/session", json={"key": KEY})
    assert response.status == 204
    header = response.headers["Set-Cookie"]
    assert KEY not in header
    for attribute in ("HttpOnly", "SameSite=Strict", "Path=/ops", "Max-Age=43200"):
        assert attribute in header
    for path in DATA:
        assert (await client.get(path)).status == 200


async def test_over_tls_the_cookie_is_for_this_host_only(
    aiohttp_client: ClientFactory, settings: SettingsFactory
) -> None:
    """Behind a proxy that speaks TLS the cookie bears the prefix and Secure."""
    client = await aiohttp_client(
        create_app(settings(operator_key=KEY, trusted_proxies="127.0.0.1", demo=False))
    )
    response = await client.post(
        "/ops/api/session", json={"key": KEY}, headers={"X-Forwarded-Proto": "https"}
    )
    header = response.headers["Set-Cookie"]
    assert header.startswith(f"{ops.SECURE_COOKIE}=")
    assert "Secure" in header.split("; ")
    assert "Path=/" in header.split("; ")


async def test_signing_out_takes_the_cookie_away(client: Client) -> None:
    """After it the browser has none."""
    await enter(client)
    assert (await client.delete("/ops/api/session")).status == 204
    assert cookie(client) is None
    assert (await client.get("/ops/api/state")).status == 401


async def test_other_sites_cannot_sign_in(client: Client) -> None:
    """Neither a form of another site nor its script can send the key."""
    response = await client.post(
        "/ops/api/session", json={"key": KEY}, headers={"Origin": "https://evil.example"}
    )
    assert response.status == 403
    response = await client.post("/ops/api/session", data={"key": KEY})
    assert response.status == 415


def test_cookies_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cookie is good for its time, for its key, and for no other expiry than it says."""
    operators = Operators(KEY)
    made = operators.new_cookie()
    assert operators.believes(made)
    assert not Operators(KEY + "!").believes(made)
    expires, nonce, signature = made.split(".")
    for forged in (
        f"{int(expires) + 1}.{nonce}.{signature}",
        f"{expires}.{nonce}.{'0' * 64}",
        f"{expires}.{signature}",
        "",
        "..",
        "é.é.é",
    ):
        assert not operators.believes(forged)
    later = time.time() + ops.COOKIE_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert not operators.believes(made)


async def test_guessing_is_slow(aiohttp_client: ClientFactory, settings: SettingsFactory) -> None:
    """Attempts of an address count against its limit of sign-ins, the right key's too."""
    client = await aiohttp_client(create_app(settings(operator_key=KEY, sign_ins_per_minute=3)))
    assert [await enter(client, "wrong") for _ in range(4)] == [401, 401, 401, 429]
    assert await enter(client) == 429


async def test_who_signs_in_is_audited(client: Client, db: Connection) -> None:
    """Each attempt is a record, with the address and never the key."""
    await enter(client, "wrong" * 10)
    await enter(client)
    await client.app[AUDIT].close()
    rows = query(db, "SELECT actor, outcome FROM audit_log WHERE action = 'operator_sign_in'")
    assert sorted(rows) == [
        ("address:127.0.0.1", "not-an-operator"),
        ("address:127.0.0.1", "ok"),
    ]
    [(text,)] = query(db, "SELECT string_agg(audit_log::text, ' ') FROM audit_log")
    assert KEY not in text
    assert "wrong" not in text


# What is told


@pytest.fixture
async def node(settings: SettingsFactory, db: Connection) -> AsyncIterator[Node]:
    without_rate_limit(db)
    async with running(settings(operator_key=KEY)) as node:
        yield node


@pytest.fixture
async def operator(node: Node) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Ask as an operator: ``await operator("/ops/api/state")``."""
    base = URL(f"http://127.0.0.1:{node.port}")
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(base, cookie_jar=jar) as session:
        async with session.post("/ops/api/session", json={"key": KEY}) as response:
            assert response.status == 204

        async def ask(path: str) -> Any:
            async with session.get(path) as response:
                text = await response.text()
                assert response.status == 200, text
                assert TEXT not in text
                return await response.json()

        yield ask


Operator = Callable[[str], Awaitable[Any]]


async def test_state(node: Node, db: Connection, operator: Operator) -> None:
    """What is open, what was written, how long it took, and how the feed is."""
    insert(db, "alice", TEXT)
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    insert(db, "alice", TEXT, TEXT)
    await eventually(lambda: len(stream.ids) == 3)
    state = await operator("/ops/api/state")
    assert state["streams"] == {"live": 1, "replaying": 0, "lagging": 0}
    assert (state["opened"], state["replayed"], state["deliveries"]) == (1, 1, 2)
    assert state["latency"]["count"] == 2
    assert state["latency"]["buckets"][-1] == {"seconds": None, "count": 2}
    assert [b["seconds"] for b in state["latency"]["buckets"][:2]] == [0.001, 0.002]
    assert state["feed"]["connected"] is True
    assert 0 <= state["feed"]["swept_seconds_ago"] < 60
    assert state["pool"]["size"] == 8
    assert state["ready"] is True
    assert state["workers"] == 1


async def test_the_audit_trail_newest_first(node: Node, db: Connection, operator: Operator) -> None:
    """The newest lines of both tables, as the view has them, and no more than asked for."""
    query(db, "INSERT INTO user_preferences VALUES ('bob', 'new_message', false)")
    for user_id in ("alice", "bob", "carol"):
        insert(db, user_id, TEXT)
        query(db, "SELECT pg_sleep(0.002)")  # rows are dated to the millisecond
    lines = (await operator("/ops/api/audit"))["lines"]
    sends = [(line["user_id"], line["outcome"]) for line in lines if line["action"] == "send"]
    assert sends == [("carol", "created"), ("bob", "suppressed"), ("alice", "created")]
    view = query(
        db, "SELECT actor, action, user_id, outcome, detail FROM audit_trail ORDER BY at DESC"
    )
    told = [(x["actor"], x["action"], x["user_id"], x["outcome"], x["detail"]) for x in lines]
    assert told == view
    assert len((await operator("/ops/api/audit?limit=1"))["lines"]) == 1


async def test_a_notification_that_was_written_live_and_read(
    node: Node, db: Connection, operator: Operator
) -> None:
    """Who wrote it, when, to how many streams it went, and when it was read."""
    streams = [await node.open_live(key) for key in sign_in(db, "alice", "alice")]
    [id] = insert(db, "alice", TEXT)
    await eventually(lambda: all(stream.ids == [id] for stream in streams))
    query(db, "UPDATE notifications SET read_at = clock_timestamp()")
    told = await operator(f"/ops/api/notifications/{id}")
    assert told["state"] == "committed"
    assert told["notification"]["user_id"] == "alice"
    assert told["notification"]["event_type"] == "new_message"
    assert told["notification"]["actor"] == "role:postgres"
    assert told["notification"]["read_at"] > told["notification"]["created_at"]
    assert told["refused"] is None
    here = told["here"]
    assert here["announced_at"] >= told["notification"]["created_at"]
    assert (here["streams"], here["written"], here["waiting"], here["replayed"]) == (2, 2, 0, 0)


async def test_a_notification_that_was_replayed(
    node: Node, db: Connection, operator: Operator
) -> None:
    """One that came before its streams was not announced to any, and found by each."""
    [id] = insert(db, "alice", TEXT)
    before = (await operator(f"/ops/api/notifications/{id}"))["here"]
    assert (before["announced_at"], before["replayed"]) == (None, 0)
    for key in sign_in(db, "alice", "alice"):
        await node.open_live(key)
    here = (await operator(f"/ops/api/notifications/{id}"))["here"]
    assert (here["announced_at"], here["written"], here["replayed"]) == (None, 0, 2)


async def test_a_notification_that_met_a_slow_stream(
    settings: SettingsFactory, db: Connection
) -> None:
    """For a stream that cannot take it, it waits; when that has found it, it was replayed."""
    without_rate_limit(db)
    [key] = sign_in(db, "alice")
    async with running(settings(operator_key=KEY, stream_buffer_bytes=4096)) as node:
        stream = await node.open_live(key, receive_buffer=4096)
        stream.pause()
        ids: list[int] = []

        def waited() -> int | None:
            ids.extend(insert(db, "alice", *["x" * 2000] * 50))
            found = ((id, node.hub.trace.find(id)) for id in ids)
            return next((id for id, seen in found if seen is not None and seen.waiting), None)

        id = await eventually(waited, 30)
        assert id is not None
        stream.resume()
        await eventually(lambda: len(stream.ids) == len(ids), 30)
        seen = node.hub.trace.find(id)
        assert seen is not None
        assert (seen.written, seen.waiting, seen.replayed) == (0, 1, 1)


@pytest.mark.parametrize("by", ["user", "default"])
async def test_a_notification_that_was_suppressed(
    node: Node, db: Connection, operator: Operator, by: str
) -> None:
    """By whose setting: the user's own, or the event type's default."""
    if by == "user":
        query(db, "INSERT INTO user_preferences VALUES ('alice', 'new_message', false)")
    else:
        query(db, "UPDATE event_types SET enabled_by_default = false")
    assert insert(db, "alice", TEXT) == []
    told = await operator("/ops/api/notifications/1")
    assert told["state"] == "suppressed"
    assert told["notification"] is None
    assert told["refused"]["preference"] == by
    assert told["refused"]["user_id"] == "alice"
    assert told["refused"]["event_type"] == "new_message"


async def test_notifications_that_are_not_there(
    node: Node, db: Connection, operator: Operator
) -> None:
    """Deleted, rolled back, over the limit, never written: each is told apart."""
    first, rolled_back, kept = insert(db, "alice", TEXT, TEXT, TEXT)
    query(db, "DELETE FROM notifications WHERE id < %s", kept)

    async def state(id: int) -> str:
        told = await operator(f"/ops/api/notifications/{id}")
        assert told["notification"] is None
        return str(told["state"])

    assert await state(first) == "deleted"
    query(db, "BEGIN")
    [gone] = insert(db, "alice", TEXT)
    query(db, "ROLLBACK")
    insert(db, "alice", TEXT)
    assert await state(gone) == "not_committed"
    assert await state(rolled_back) == "deleted"
    assert await state(10**6) == "not_given_out"
    query(db, "UPDATE settings SET user_rate_per_minute = 1")
    query(db, "SELECT * FROM notify_users(ARRAY['alice'], 'new_message', 'x')")
    assert await state(gone + 2) == "rate_limited"


@pytest.mark.parametrize("id", ["0", "-1", "x", "9223372036854775808", "1e3"])
async def test_what_is_no_id_is_refused(client: Client, id: str) -> None:
    """An id is a decimal number that PostgreSQL's bigint takes."""
    await enter(client)
    assert (await client.get(f"/ops/api/notifications/{id}")).status in (400, 404)


async def test_the_text_is_nowhere(client: Client, db: Connection) -> None:
    """Not in the state, the trail or the explanation of what was published and refused."""
    key = add_service(db)
    await send(client, key, message=TEXT)
    await send(client, key, message=TEXT, event_type="no_such")
    await client.app[AUDIT].close()
    await enter(client)
    for path in DATA:
        response = await client.get(path)
        assert response.status == 200
        assert TEXT not in await response.text()


async def test_of_several_workers_the_state_is_the_sum(
    server_process: ServerProcessFactory, tmp_path: Any
) -> None:
    """Whichever worker answers tells of all; a cookie of one is good for the other."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    one, other = [
        await server_process(PROMETHEUS_MULTIPROC_DIR=str(directory), SSE_OPERATOR_KEY=KEY)
        for _ in range(2)
    ]
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(cookie_jar=jar) as session:
        async with session.post(f"{one.url}/ops/api/session", json={"key": KEY}) as response:
            assert response.status == 204

        async def told() -> bool:
            async with session.get(f"{other.url}/ops/api/state") as response:
                state = await response.json()
                return bool(state["workers"] == 2 and state["pool"]["size"] == 16)

        await until(told)


# The trace


def test_the_trace_is_bounded() -> None:
    """However many pass, it keeps the last ones and no more."""
    trace = Trace(published=10, replayed=10)
    for id in range(1000):
        trace.published(id, 1, 0)
        trace.replayed(id)
    assert [id for id in range(1000) if trace.find(id) is not None] == list(range(990, 1000))


def test_the_trace_adds_up() -> None:
    """What happens to one notification, in whatever order, is told in one."""
    trace = Trace()
    trace.replayed(1)
    trace.published(1, 3, 1)
    trace.published(2, 1, 0)
    trace.replayed(1)
    seen = trace.find(1)
    assert seen is not None
    assert seen.at is not None
    assert (seen.written, seen.waiting, seen.replayed) == (3, 1, 2)
    trace.replayed(3)
    assert trace.find(3) == Seen(None, 0, 0, 1)
    assert trace.find(4) is None
