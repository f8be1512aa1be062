"""What every request passes: origins, hosts, cookies, headers, errors, the time for a body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from sse_server.app import create_app
from sse_server.config import load
from sse_server.errors import ConfigurationError
from sse_server.sessions import COOKIE
from tests.conftest import Client, SettingsFactory
from tests.sse import EventReader

FRONT_END = "https://app.example"
OTHER = "https://evil.example"

Make = Callable[..., Awaitable[Client]]


@pytest.fixture
def make(aiohttp_client: Callable[..., Awaitable[Client]], settings: SettingsFactory) -> Make:
    """Build a client of an application: ``await make(allowed_origins="https://a")``."""

    async def build(**changes: Any) -> Client:
        # The tables are longer than the limits.
        unlimited = {"sign_ins_per_minute": 0, "api_calls_per_minute": 0}
        return await aiohttp_client(create_app(settings(**unlimited | changes)))

    return build


async def sign_in(client: Client, user_id: str = "alice", **headers: str) -> None:
    response = await client.post("/demo/session", json={"user_id": user_id}, headers=headers)
    assert response.status == 200


async def problem(response: aiohttp.ClientResponse) -> str:
    """The slug of a problem document."""
    assert response.content_type == "application/problem+json"
    body = await response.json()
    assert body["status"] == response.status
    return str(body["type"]).rpartition(":")[2]


async def raw(client: Client, request: bytes, timeout: float = 5.0) -> tuple[int, bytes]:
    """Send bytes as they are, and read until the server closes. Returns: status and answer."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(request)
    async with asyncio.timeout(timeout):
        answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


# Origins

OWN = "http://127.0.0.1"  # with the port of the test's server


# Headers; whether they pass, and whether they do when FRONT_END is allowed.
ORIGINS: list[tuple[dict[str, str], bool, bool]] = [
    # Backends and command lines
    ({}, True, True),
    # Pages of this server
    ({"Origin": OWN}, True, True),
    ({"Origin": OWN, "Sec-Fetch-Site": "same-origin"}, True, True),
    ({"Sec-Fetch-Site": "same-origin"}, True, True),
    ({"Sec-Fetch-Site": "none"}, True, True),
    # The allowed front end
    ({"Origin": FRONT_END}, False, True),
    ({"Origin": FRONT_END, "Sec-Fetch-Site": "cross-site"}, False, True),
    ({"Origin": FRONT_END, "Sec-Fetch-Site": "same-site"}, False, True),
    # Everybody else
    ({"Origin": OTHER}, False, False),
    ({"Origin": OTHER, "Sec-Fetch-Site": "cross-site"}, False, False),
    ({"Origin": OTHER, "Sec-Fetch-Site": "same-origin"}, False, False),
    ({"Sec-Fetch-Site": "cross-site"}, False, False),
    ({"Sec-Fetch-Site": "same-site"}, False, False),
    ({"Sec-Fetch-Site": "made-up"}, False, False),
    ({"Origin": OWN, "Sec-Fetch-Site": "cross-site"}, False, False),
    ({"Origin": "null"}, False, False),
    ({"Origin": ""}, False, False),
    ({"Origin": "*"}, False, False),
    ({"Origin": "http://app.example"}, False, False),
    ({"Origin": f"{FRONT_END}:8443"}, False, False),
    ({"Origin": f"{FRONT_END}.evil.example"}, False, False),
    ({"Origin": f"{FRONT_END}/"}, False, False),
    ({"Origin": f"{FRONT_END}, {FRONT_END}"}, False, False),
    ({"Origin": "https://APP.example"}, False, False),
    ({"Origin": "http://localhost"}, False, False),
    ({"Origin": "http://127.0.0.1:1"}, False, False),
]


@pytest.mark.parametrize("front_end", [False, True])
async def test_origins(make: Make, front_end: bool) -> None:
    """Only this origin and an allowed one may change something, or open a stream."""
    client = await make(allowed_origins=FRONT_END if front_end else "")
    own = f"{OWN}:{client.port}"
    calls: list[tuple[str, str, dict[str, Any], int]] = [
        ("POST", "/api/notifications/read", {"json": {"all": True}}, 200),
        ("PUT", "/api/preferences/new_message", {"json": {"enabled": True}}, 200),
        ("POST", "/demo/session", {"json": {"user_id": "alice"}}, 200),
        ("GET", "/api/stream", {}, 200),
        # With what no form can send, and what no page has: the origin counts all the same.
        ("POST", "/api/session", {"headers": {"Authorization": "Bearer x"}}, 403),
        ("POST", "/api/publish", {"json": {}, "headers": {"Authorization": "Bearer x"}}, 401),
        # Last, it ends the session.
        ("DELETE", "/api/session", {}, 204),
    ]
    for headers, without, with_front_end in ORIGINS:
        await sign_in(client)
        sent = {name: own if value == OWN else value for name, value in headers.items()}
        for method, path, options, status in calls:
            options = options | {"headers": options.get("headers", {}) | sent}
            async with client.request(method, path, **options) as response:
                slug = await problem(response) if response.status >= 400 else ""
                if with_front_end if front_end else without:
                    assert response.status == status, (method, path, headers)
                    assert slug != "cross-site", (method, path, headers)
                else:
                    assert (response.status, slug) == (403, "cross-site"), (method, path, headers)


async def test_a_form_is_refused(make: Make) -> None:
    """What a form can send is no JSON, whatever its content says."""
    client = await make()
    await sign_in(client)
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain", ""):
        response = await client.post(
            "/api/notifications/read",
            data=b'{"all": true}',
            headers={"Content-Type": kind} if kind else {},
            skip_auto_headers=["Content-Type"],
        )
        assert (response.status, await problem(response)) == (415, "unsupported-media-type")


async def test_default_port_is_no_other_origin(make: Make) -> None:
    """Browsers leave out the default port, proxies may add it to Host."""
    client = await make(demo=False)
    for host, origin, status in (
        ("app.test:80", "http://app.test", 401),
        ("APP.test", "http://app.test", 401),
        ("app.test:8080", "http://app.test:8080", 401),
        ("app.test:8080", "http://app.test", 403),
    ):
        response = await client.post(
            "/api/notifications/read", json={"all": True}, headers={"Host": host, "Origin": origin}
        )
        assert response.status == status


# Front ends elsewhere


async def test_allowed_origin_may_read(make: Make) -> None:
    """Every answer of the API to an allowed origin may be read by it, errors and streams, too."""
    client = await make(allowed_origins=FRONT_END)
    headers = {"Origin": FRONT_END}
    response = await client.get("/api/session", headers=headers)
    assert response.status == 401
    await sign_in(client, **headers)
    paths = ("/api/notifications", "/api/nothing", "/api/stream", "/static/client.js")
    answers = [response, *[await client.get(path, headers=headers) for path in paths]]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == FRONT_END
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        assert "ETag" in answer.headers["Access-Control-Expose-Headers"]
        assert "Origin" in answer.headers.getall("Vary")
    stream = answers[3]
    assert stream.status == 200
    await EventReader(stream).next_of("ready")
    for answer in answers:
        answer.close()


async def test_others_may_not_read(make: Make) -> None:
    """Nobody else is told that it may read; caches are told that it depends on who asks."""
    client = await make(allowed_origins=FRONT_END)
    for origin in (None, OTHER, "null", "https://APP.EXAMPLE", "*"):
        headers = {} if origin is None else {"Origin": origin}
        response = await client.get("/api/session", headers=headers)
        assert not [name for name in response.headers if name.startswith("Access-Control-")]
        assert response.headers["Vary"] == "Origin"


async def test_without_allowed_origins(make: Make) -> None:
    """Without a list there is nothing about origins in any answer."""
    client = await make()
    for method in ("GET", "OPTIONS"):
        response = await client.request(
            method,
            "/api/session",
            headers={"Origin": OTHER, "Access-Control-Request-Method": "POST"},
        )
        assert response.status in (401, 405)
        assert not [name for name in response.headers if name.startswith("Access-Control-")]


async def test_preflight(make: Make) -> None:
    """A preflight is told the methods that the path has, and the headers that the API reads."""
    client = await make(allowed_origins=FRONT_END)
    for path, methods in (
        ("/api/session", "DELETE, GET, POST"),
        ("/api/stream", "GET"),
        ("/api/notifications/read", "POST"),
        ("/api/notifications/7/read", "POST"),
        ("/api/preferences/new_message", "PUT"),
    ):
        response = await client.options(
            path,
            headers={
                "Origin": FRONT_END,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type, x-made-up",
            },
        )
        assert response.status == 204
        assert response.headers["Access-Control-Allow-Origin"] == FRONT_END
        assert response.headers["Access-Control-Allow-Credentials"] == "true"
        assert response.headers["Access-Control-Allow-Methods"] == methods
        named = response.headers["Access-Control-Allow-Headers"].lower()
        assert "content-type" in named
        assert "*" not in named
        assert "x-made-up" not in named
        assert int(response.headers["Access-Control-Max-Age"]) > 0
        assert "Origin" in response.headers.getall("Vary")


async def test_preflight_refused(make: Make) -> None:
    """Another origin's preflight is refused, and so is one for nothing."""
    client = await make(allowed_origins=FRONT_END)
    asked = {"Access-Control-Request-Method": "POST"}
    for path, headers, status in (
        ("/api/session", {"Origin": OTHER, **asked}, 403),
        ("/api/session", asked, 403),
        ("/api/session", {"Origin": FRONT_END}, 405),
        ("/api/nothing", {"Origin": FRONT_END, **asked}, 404),
    ):
        response = await client.options(path, headers=headers)
        assert response.status == status
        assert "Access-Control-Allow-Methods" not in response.headers


@pytest.mark.parametrize(
    "text, origins",
    [
        ("", set()),
        (FRONT_END, {FRONT_END}),
        (
            " https://A.example:443 , http://b.example:80,",
            {"https://a.example", "http://b.example"},
        ),
        ("https://a.example:8443", {"https://a.example:8443"}),
        ("http://[::1]:3000,http://127.0.0.1:3000", {"http://[::1]:3000", "http://127.0.0.1:3000"}),
        ("*", None),
        ("null", None),
        ("https://*.example", None),
        ("https://a.example/", None),
        ("https://a.example/path", None),
        ("https://user@a.example", None),
        ("https://a.example:0", None),
        ("https://a.example:99999", None),
        ("a.example", None),
        ("file://", None),
        ("https://ünï.example", None),
    ],
)
def test_allowed_origins_setting(text: str, origins: set[str] | None) -> None:
    """The list is exact: an origin as a browser writes it, and nothing that stands for several."""
    if origins is None:
        with pytest.raises(ConfigurationError, match="SSE_ALLOWED_ORIGINS"):
            load(allowed_origins=text)
    else:
        assert load(allowed_origins=text).allowed_origins == origins


# Hosts


LOOPBACK = [
    "127.0.0.1:8080",
    "127.0.0.1",
    "127.1.2.3",
    "localhost",
    "LOCALHOST:80",
    "localhost.",
    "inbox.localhost:8080",
    "[::1]:8080",
]
ELSEWHERE = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evillocalhost",
    "0.0.0.0",
    "10.0.0.1",
    "[::]",
    "[::ffff:10.0.0.1]",
    "localhost@evil.example",
    "localhost/evil",
    "",
]


async def test_demo_hosts(make: Make) -> None:
    """In a demo no other name is served, so that no other name can be pointed to this address."""
    client = await make()
    for host in LOOPBACK:
        assert (await client.get("/", headers={"Host": host})).status == 200, host
    for host in ELSEWHERE:
        headers = {"Host": host, "Origin": f"http://{host}"}
        response = await client.post("/demo/session", json={"user_id": "alice"}, headers=headers)
        assert (response.status, await problem(response)) == (403, "wrong-host"), host
        assert "Set-Cookie" not in response.headers
        for path in ("/", "/static/client.js", "/api/session", "/metrics"):
            assert (await client.get(path, headers=headers)).status == 403


async def test_other_hosts_without_a_demo(make: Make) -> None:
    """Elsewhere the name is the proxy's business, and the page is in no frame."""
    client = await make(demo=False)
    response = await client.get("/", headers={"Host": "app.example"})
    assert response.status == 200
    assert response.headers["Content-Security-Policy"].endswith("frame-ancestors 'none'")


# Cookies


COOKIES = [
    "",
    ";",
    "=",
    COOKIE,
    f"{COOKIE}=",
    f"{COOKIE}=x",
    f'{COOKIE}="',
    f'{COOKIE}="unfinished',
    f"{COOKIE}={'a' * 42}",
    f"{COOKIE}={'a' * 44}",
    f"{COOKIE}={'a' * 43}",
    f"{COOKIE}={'a' * 4000}",
    f"{COOKIE}={'a' * 42}\u00e4",
    f"{COOKIE}={'a' * 42}%00",
    f"{COOKIE}=\\000\\777",
    f"{COOKIE}=' OR 1=1 --",
    f"{COOKIE}=a; {COOKIE}=b",
    f"__Host-{COOKIE}={'a' * 43}",
    f"a=b=c; [1]=2; {COOKIE}",
    "\u20ac\u20ac\u20ac",
    "$Version=1; $Path=/",
    "; ".join(f"c{n}=v" for n in range(500)),
]


async def test_malformed_cookies(make: Make) -> None:
    """A cookie that is none is no session, and never an error."""
    client = await make(anonymous_calls_per_minute=0)
    for cookie in COOKIES:
        for path in ("/api/session", "/api/notifications", "/api/stream"):
            response = await client.get(path, headers={"Cookie": cookie})
            assert (response.status, await problem(response)) == (401, "not-signed-in"), cookie
            assert response.headers["WWW-Authenticate"] == "Bearer"


# Headers and errors


async def test_security_headers(make: Make) -> None:
    """Whatever is answered: no inline script, no guessing of types, no referrer, no frames."""
    client = await make()
    await sign_in(client)
    for path in ("/", "/static/client.js", "/api/session", "/api/stream", "/api/no", "/livez"):
        async with client.get(path) as response:
            headers = response.headers
            policy = headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            # The demo's page shows two users, each in a frame; both are its own.
            frames = "frame-ancestors 'self'" if path == "/" else "frame-ancestors 'none'"
            assert policy.endswith(frames)
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Server"] == "sse-server"
            assert "Strict-Transport-Security" not in headers


async def test_behind_a_proxy(make: Make) -> None:
    """A trusted proxy's word on TLS gives Secure cookies and HSTS; nobody else's does."""
    client = await make(trusted_proxies="127.0.0.1/32", allowed_origins=FRONT_END)
    stranger = await make()
    secure = {"X-Forwarded-Proto": "https"}
    for asked in (client, stranger):
        response = await asked.post("/demo/session", json={"user_id": "alice"}, headers=secure)
        cookie = response.headers["Set-Cookie"]
        if asked is client:
            assert cookie.startswith(f"__Host-{COOKIE}=")
            assert {"Secure", "HttpOnly", "Path=/", "SameSite=None", "Partitioned"} <= set(
                cookie.split("; ")
            )
            assert "Domain" not in cookie
            assert "max-age" in response.headers["Strict-Transport-Security"]
        else:
            assert cookie.startswith(f"{COOKIE}=")
            assert {"HttpOnly", "Path=/", "SameSite=Lax"} <= set(cookie.split("; "))
            assert "Strict-Transport-Security" not in response.headers
    # Browsers take SameSite=None with Secure only.
    response = await client.post("/demo/session", json={"user_id": "alice"})
    assert "SameSite=Lax" in response.headers["Set-Cookie"]
    assert "Strict-Transport-Security" not in response.headers
    for path in ("/api/no", "/", "/livez"):
        response = await client.get(path, headers=secure)
        assert "Strict-Transport-Security" in response.headers


async def test_damaged_bodies(make: Make) -> None:
    """A body that cannot be decoded is the client's fault, and its connection ends."""
    client = await make()
    for head, body in (
        (b"Transfer-Encoding: chunked", b"ZZ\r\n"),
        (b"Transfer-Encoding: chunked", b"5\r\nhello5\r\n"),
        (b"Content-Encoding: gzip\r\nContent-Length: 4", b"nope"),
        (b"Content-Encoding: deflate\r\nContent-Length: 4", b"nope"),
    ):
        status, _ = await raw(
            client,
            b"POST /demo/session HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n%b\r\n\r\n%b" % (head, body),
        )
        assert status == 400, head


async def test_body_that_trickles(make: Make) -> None:
    """A body has a time to arrive in, however often a byte of it comes."""
    client = await make(body_timeout=0.4)
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(
        b"POST /demo/session HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    answer = asyncio.create_task(reader.read())
    async with asyncio.timeout(8):
        while not answer.done():
            writer.write(b" ")
            await asyncio.wait({answer}, timeout=0.05)
    writer.close()
    assert (await answer).startswith(b"HTTP/1.1 408 ")
    assert b"request-timeout" in await answer


async def test_a_slow_handler_is_no_slow_body(make: Make) -> None:
    """The time for a body ends with the body: a stream lives on."""
    client = await make(body_timeout=0.2, heartbeat_seconds=1)
    await sign_in(client)
    async with client.get("/api/stream") as response:
        reader = EventReader(response)
        await reader.next_of("ping")
        await reader.next_of("ping")


async def test_problem_documents_have_a_type(make: Make) -> None:
    """What aiohttp refuses by itself looks like what we refuse."""
    client = await make()
    for method, path, status, slug in (
        ("GET", "/api/no", 404, "not-found"),
        ("PATCH", "/api/session", 405, "method-not-allowed"),
        ("GET", "/static/../schema.sql", 404, "not-found"),
        ("GET", "/static/%2e%2e/schema.sql", 404, "not-found"),
    ):
        response = await client.request(method, path, json={} if method == "PATCH" else None)
        assert (response.status, await problem(response)) == (status, slug)
