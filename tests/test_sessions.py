"""Sessions: in with a token, once; who it is; and out, wherever the stream is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.api.notifications import STORE
from sse_server.app import create_app
from sse_server.sessions import COOKIE
from tests.conftest import Client, ServerProcessFactory, SettingsFactory, eventually
from tests.sse import EventReader
from tests.test_tokens import AUDIENCE, ED, SECRET, claims, pem, sign, unsigned

Make = Callable[..., Awaitable[Client]]


@pytest.fixture
def make(aiohttp_client: Callable[..., Awaitable[Client]], settings: SettingsFactory) -> Make:
    """Build a client of a node that takes tokens; several share the database."""

    async def build(**changes: Any) -> Client:
        values = {
            "jwt_secret": SECRET,
            "jwt_audience": AUDIENCE,
            "sign_ins_per_minute": 0,
            "demo": False,
        }
        return await aiohttp_client(create_app(settings(**values | changes)))

    return build


async def exchange(client: Client, token: str, **options: Any) -> aiohttp.ClientResponse:
    headers = {"Authorization": f"Bearer {token}"} | options.pop("headers", {})
    return await client.post("/api/session", headers=headers, **options)


async def slug(response: aiohttp.ClientResponse) -> str:
    assert response.content_type == "application/problem+json"
    return str((await response.json())["type"]).rpartition(":")[2]


def count(db: Connection, table: str) -> int:
    with db.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {table}")
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


async def test_sign_in_and_out(make: Make, db: Connection) -> None:
    """A token becomes a session that lasts as long as configured, until it is ended."""
    client = await make(session_seconds=3600)
    response = await exchange(client, sign(sub="alice"))
    assert response.status == 200
    answer = await response.json()
    assert answer["user_id"] == "alice"
    expires = datetime.fromisoformat(answer["expires_at"])
    assert abs((expires - datetime.now(UTC)).total_seconds() - 3600) < 60
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    assert {"HttpOnly", "Path=/", "SameSite=Lax", "Max-Age=3600"} <= set(cookie.split("; "))

    response = await client.get("/api/session")
    assert await response.json() == answer
    async with client.get("/api/stream") as stream:
        events = EventReader(stream)
        await events.next_of("ready")
        response = await client.delete("/api/session")
        assert response.status == 204
        closing = await events.next_of("closing", timeout=1)
        assert closing.json["reason"] == "session_ended"
    assert (await client.get("/api/session")).status == 401
    assert count(db, "sessions") == 0
    key = cookie.partition("=")[2].partition(";")[0]
    stolen = {"Cookie": f"{COOKIE}={key}"}
    assert (await client.get("/api/session", headers=stolen)).status == 401


async def test_bodies(make: Make) -> None:
    """The token says it all: no body, or an empty object, of whatever type; nothing else."""
    client = await make()
    for options, status in (
        ({}, 200),
        ({"json": {}}, 200),
        ({"data": b"{}"}, 200),
        ({"data": b""}, 200),
        ({"json": {"user_id": "bob"}}, 422),
        ({"json": []}, 422),
        ({"data": b"{"}, 400),
        ({"data": b" " * 70_000}, 413),
    ):
        token = sign()
        response = await exchange(client, token, **options)
        assert response.status == status, options
        if status == 422 and options["json"]:
            assert "user_id" in (await response.json())["detail"]
        if status != 200:
            # The token has not been used up.
            assert (await exchange(client, token)).status == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YWxpY2U6c2VjcmV0",
        "Bearer a b",
        "Token {token}",
        "{token}",
        "Bearer {token} {token}",
        "Bearer {token},{token}",
        'Bearer "{token}"',
        "Bearer {token}\u00e9",
        "Bearer " + "x" * 8000,
    ],
)
async def test_no_token(make: Make, db: Connection, authorization: str | None) -> None:
    """Whatever is no token is refused as a problem document, and nothing is stored."""
    client = await make()
    token = sign()
    headers = (
        {} if authorization is None else {"Authorization": authorization.replace("{token}", token)}
    )
    response = await client.post("/api/session", headers=headers, json={})
    assert (response.status, await slug(response)) == (401, "invalid-token")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "Set-Cookie" not in response.headers
    assert token not in await response.text()
    # The scheme's case does not matter, nor do more spaces.
    response = await client.post("/api/session", headers={"Authorization": f"bEARER  {token}"})
    assert response.status == 200
    assert count(db, "sessions") == count(db, "used_tokens") == 1


async def test_users(make: Make) -> None:
    """Who a token names must be somebody who can get notifications."""
    client = await make()
    for user_id, valid in (
        ("a" * 255, True),
        ("ü" * 127, True),
        ("ünï\u2603 <b>", True),
        (" ", True),
        ("a" * 256, False),
        ("ü" * 128, False),
        ("a\0", False),
        ("a\n", False),
        ("\x7f", False),
        ("\x85", False),
        ("\ud800", False),
    ):
        response = await exchange(client, sign(sub=user_id))
        assert response.status == (200 if valid else 401), ascii(user_id)
        if valid:
            assert (await response.json())["user_id"] == user_id
        else:
            assert await slug(response) == "invalid-token"


async def test_without_a_key(make: Make) -> None:
    """A server without a key takes no token, and says so."""
    client = await make(jwt_secret=None, jwt_audience=None)
    response = await exchange(client, sign())
    assert (response.status, await slug(response)) == (403, "tokens-not-accepted")


async def test_a_token_works_once(make: Make, db: Connection) -> None:
    """50 at once, on two nodes: exactly one session. Later, not even after a sign-out."""
    nodes = [await make(), await make()]
    token = sign(jti="once")

    async def attempt(number: int) -> tuple[int, str]:
        async with aiohttp.ClientSession() as browser:
            url = nodes[number % 2].make_url("/api/session")
            async with browser.post(url, headers={"Authorization": f"Bearer {token}"}) as response:
                return response.status, "" if response.ok else await slug(response)

    results = await asyncio.gather(*(attempt(number) for number in range(50)))
    assert sorted(results) == [(200, "")] + [(401, "token-used")] * 49
    assert count(db, "sessions") == count(db, "used_tokens") == 1
    with db.cursor() as cursor:
        cursor.execute("DELETE FROM sessions")
    # The same jti is the same token, whatever else it says.
    for again in (token, sign(jti="once", sub="bob")):
        response = await exchange(nodes[0], again)
        assert (response.status, await slug(response)) == (401, "token-used")
        assert token not in await response.text()
    # A jti is its issuer's own.
    assert (await exchange(nodes[0], sign(jti="once", iss="another"))).status == 200


async def test_used_tokens_are_forgotten_in_time(make: Make, db: Connection) -> None:
    """What is forgotten can no longer be used: neither by the node's clock, nor the database's."""
    client = await make()
    store = client.app[STORE]
    assert (await exchange(client, sign())).status == 200
    assert await store.delete_expired_sessions() == 0
    with db.cursor() as cursor:
        cursor.execute("SELECT expires_at > now() + interval '59 minutes' FROM used_tokens")
        assert cursor.fetchone() == (True,)
        cursor.execute("UPDATE used_tokens SET expires_at = now()")
        cursor.execute("UPDATE sessions SET expires_at = now()")
    assert await store.delete_expired_sessions() == 1
    assert count(db, "sessions") == count(db, "used_tokens") == 0
    # A node whose clock is hours behind would take a token that the database has forgotten.
    row = await store.insert_session(
        b"k" * 32, "alice", {}, 60, token_hash=b"t" * 32, token_expires=time.time() - 3601
    )
    assert row is None
    assert count(db, "sessions") == 0


async def test_each_sign_in_has_a_fresh_key(make: Make, db: Connection) -> None:
    """The session that was there before ends with its stream; a planted key is worth nothing."""
    client = await make()
    planted = "p" * 43
    response = await exchange(client, sign(), headers={"Cookie": f"{COOKIE}={planted}"})
    first = response.cookies[COOKIE].value
    assert first != planted
    async with client.get("/api/stream") as stream:
        events = EventReader(stream)
        await events.next_of("ready")
        response = await exchange(client, sign(sub="bob"))
        assert response.status == 200
        closing = await events.next_of("closing", timeout=1)
        assert closing.json["reason"] == "session_ended"
    second = response.cookies[COOKIE].value
    assert second != first
    for key, status in ((first, 401), (planted, 401), (second, 200)):
        client.session.cookie_jar.clear()
        response = await client.get("/api/session", headers={"Cookie": f"{COOKIE}={key}"})
        assert response.status == status
    assert count(db, "sessions") == 1


async def test_a_refused_token_ends_nothing(make: Make) -> None:
    """Who fails to sign in stays who they were."""
    client = await make()
    token = sign()
    assert (await exchange(client, token)).status == 200
    for refused in (token, sign(aud="another"), "x.y.z"):
        assert (await exchange(client, refused)).status == 401
        assert (await (await client.get("/api/session")).json())["user_id"] == "alice"


async def test_sessions_end_in_time(make: Make, db: Connection) -> None:
    """Expired, revoked and handed to another user: each ends the stream within a second."""
    node, other = await make(), await make()
    for statement in (
        "UPDATE sessions SET expires_at = now()",
        "UPDATE sessions SET user_id = 'bob'",
        "DELETE FROM sessions",
        "TRUNCATE sessions",
    ):
        response = await exchange(node, sign())
        key = response.cookies[COOKIE].value
        async with other.get("/api/stream", headers={"Cookie": f"{COOKIE}={key}"}) as stream:
            events = EventReader(stream)
            await events.next_of("ready")
            with db.cursor() as cursor:
                cursor.execute(statement)
            closing = await events.next_of("closing", timeout=2)
            assert closing.json["reason"] == "session_ended", statement


async def test_nothing_secret_is_logged(
    server_process: ServerProcessFactory, tmp_path: Any, db: Connection
) -> None:
    """Whatever happens to keys and tokens, none is in the process's output, at any level."""
    key_file = tmp_path / "key.pem"
    key_file.write_bytes(pem(ED))
    server = await server_process(
        SSE_DEMO=None,
        SSE_LOG_LEVEL="DEBUG",
        SSE_JWT_PUBLIC_KEY_FILE=str(key_file),
        SSE_JWT_AUDIENCE=AUDIENCE,
    )
    tokens = [
        sign(ED, "EdDSA"),
        sign(ED, "EdDSA", exp=int(time.time()) - 5),
        sign(ED, "EdDSA", aud="another"),
        sign(),
        unsigned({"alg": "none"}, claims(), b""),
        "not.a.token-at-all",
    ]
    secrets = {part for token in tokens for part in token.split(".") if len(part) > 12}
    jar = aiohttp.CookieJar(unsafe=True)  # takes cookies of an address, too
    async with aiohttp.ClientSession(server.url, cookie_jar=jar) as browser:
        for token in [*tokens, tokens[0]]:
            headers = {"Authorization": f"Bearer {token}"}
            async with browser.post("/api/session", headers=headers) as response:
                text = await response.text()
                assert not [secret for secret in secrets if secret in text]
                if response.ok:
                    secrets.add(response.cookies[COOKIE].value)
        async with browser.get("/api/stream") as stream:
            await EventReader(stream).next_of("ready")
        service_key = "sse_" + "k" * 40
        secrets.add(service_key)
        async with browser.post(
            "/api/publish", json={}, headers={"Authorization": f"Bearer {service_key}"}
        ) as response:
            assert response.status in (401, 403)
    # What is not even HTTP, with a cookie in it.
    host, port = server.url.removeprefix("http://").split(":")
    planted = "planted-" + "s" * 35
    secrets.add(planted)
    for request in (
        f"GET / HTTP/1.1\r\nHost: a\r\nCookie: {COOKIE}={planted}\x01\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: a\r\nCookie{planted}\r\n\r\n",
        f"GET /{planted} HTTQ/1.1\r\n\r\n",
        f"{planted}\r\n\r\n",
        f"GET / HTTP/1.1\r\nCookie: {COOKIE}={planted}{'x' * 9000}\r\n\r\n",
        f"GET / HTTP/1.1\r\nAuthorization: Bearer {planted}\r\nContent-Length: x\r\n\r\n",
        f"POST /api/session HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {planted}\r\n"
        "Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request.encode())
        answer = (await reader.read()).decode()
        writer.close()
        assert " 4" in answer.partition("\r\n")[0], answer
        assert planted not in answer
        assert "nosniff" in answer
    # The database is away while somebody signs in.
    with db.cursor() as cursor:
        cursor.execute("ALTER TABLE used_tokens RENAME TO gone")
    lost = sign(ED, "EdDSA")
    secrets |= set(lost.split(".")[1:])
    async with (
        aiohttp.ClientSession(server.url) as browser,
        browser.post("/api/session", headers={"Authorization": f"Bearer {lost}"}) as response,
    ):
        assert response.status == 500
    await eventually(lambda: "gone" in server.stderr or "used_tokens" in server.stderr)
    server.terminate()
    assert await server.wait() == 0
    for secret in secrets:
        assert secret not in server.stderr + server.stdout, secret[:20]
