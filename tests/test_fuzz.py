"""Whatever is sent: no 5xx, no answer that the document does not have, no hang, nothing left over.

``SSE_FUZZ_SECONDS=1200 pytest tests/test_fuzz.py`` takes that long in all; by default it is less
than a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from psycopg2.extensions import connection as Connection  # noqa: N812
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from sse_server.api import openapi
from sse_server.services import new_key
from sse_server.sessions import COOKIE
from tests.conftest import ServerProcess, ServerProcessFactory, SettingsFactory, eventually
from tests.streaming import query, running, sign_in

SECONDS = float(os.environ.get("SSE_FUZZ_SECONDS", "36"))
pytestmark = pytest.mark.timeout(60 + 2 * SECONDS)

SECRET = "a secret of more than thirty-two bytes"
AUDIENCE = "notifications"

# Limits
ANSWER_SECONDS = 10.0  # what takes longer hangs
GROWTH_BYTES = 48 * 1024 * 1024  # caches fill; a leak does not stop there


class Server:
    """A real process, and the ways into it."""

    def __init__(self, process: ServerProcess, db: Connection) -> None:
        self.url = process.url
        self.db = db
        self.port = int(process.url.rpartition(":")[2])
        self.key = new_key()
        self.process = process
        self._process = psutil.Process(process.pid)
        self._users = itertools.count()
        query(
            db,
            "INSERT INTO services (name, key_hash, rate_per_minute) VALUES ('fuzz', %s, 1000000)",
            hashlib.sha256(self.key.encode()).digest(),
        )

    def session(self) -> str:
        """The cookie of a user whom nobody has seen before."""
        [key] = sign_in(self.db, f"fuzz-{next(self._users)}")
        return f"{COOKIE}={key}"

    def token(self) -> str:
        now = int(time.time())
        claims = {"sub": "fuzz", "aud": AUDIENCE, "iat": now, "exp": now + 60}
        return jwt.encode({**claims, "jti": secrets.token_hex()}, SECRET, "HS256")

    @property
    def memory(self) -> int:
        return int(self._process.memory_info().rss)

    @property
    def descriptors(self) -> int:
        return int(self._process.num_fds())


@pytest.fixture
async def server(server_process: ServerProcessFactory, db: Connection) -> Server:
    process = await server_process(
        SSE_JWT_SECRET=SECRET,
        SSE_JWT_AUDIENCE=AUDIENCE,
        SSE_API_CALLS_PER_MINUTE="0",
        SSE_ANONYMOUS_CALLS_PER_MINUTE="0",
        SSE_SIGN_INS_PER_MINUTE="0",
        SSE_STREAM_MAX_SECONDS="1",
        SSE_BODY_TIMEOUT="1",
        SSE_HEADER_TIMEOUT="1",
    )
    return Server(process, db)


def rounds(end: float) -> Iterator[int]:
    """Seeds, until then; one at least."""
    for number in itertools.count():
        if number and time.monotonic() > end:
            return
        yield number


def examples(count: int) -> hypothesis_settings:
    return hypothesis_settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


async def left_over(server: Server, work: Callable[[], None]) -> None:
    """Do the work; fails if memory or descriptors grow with it, or something has failed inside."""
    await asyncio.to_thread(requests.get, f"{server.url}/readyz", timeout=ANSWER_SECONDS)
    descriptors, memory = server.descriptors, server.memory
    await asyncio.to_thread(work)
    # Those of the pool may have come, and stay.
    await eventually(lambda: server.descriptors <= descriptors + 8, 10)
    assert server.memory - memory < GROWTH_BYTES
    # Nonsense is refused, not stumbled over.
    assert "Traceback" not in server.process.stderr, server.process.stderr[-5000:]
    answer = await asyncio.to_thread(requests.get, f"{server.url}/readyz", timeout=ANSWER_SECONDS)
    assert answer.status_code == 200


# By the document


def _headers(server: Server, operation: openapi.Operation) -> dict[str, str]:
    match operation.security:
        case "token":
            return {"Authorization": f"Bearer {server.token()}"}
        case "serviceKey":
            return {"Authorization": f"Bearer {server.key}"}
        case _:
            return {"Cookie": server.session()}


#: Each case needs a credential of its own: the one it has is used up.
ONCE = {"sign_in", "sign_out", "demo_sign_in"}

#: Too large, or too slow to arrive, is refused as well.
REFUSALS = ["400", "401", "403", "404", "405", "408", "409", "413", "415", "422", "429"]
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)

#: Judged by more than the schema: does the event type exist, is there a token?
JUDGED = {"publish", "demo_sign_in", "demo_publish", "sign_in"}


def checks_of(operation: openapi.Operation) -> list[Any]:
    return [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
        checks.unsupported_method,
        *([] if operation.id in JUDGED else [checks.positive_data_acceptance]),
    ]


@pytest.mark.parametrize("signed_in", [False, True], ids=["nobody", "signed in"])
async def test_the_document_holds(server: Server, signed_in: bool) -> None:
    """Requests made from the document, and such as it forbids: each answer is one of it."""
    document = json.loads(json.dumps(openapi.document(demo=True, strict=True)))
    del document["paths"]["/api/stream"]  # does not end; see below
    # Not generated: each case gets a good one, or none.
    del document["components"]["securitySchemes"]
    for described in (it for path in document["paths"].values() for it in path.values()):
        del described["security"]
    schema = schemathesis.openapi.from_dict(document, config=CONFIG)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    described = {(it.path, it.method): it for it in openapi.OPERATIONS}
    http = requests.Session()
    http.cookies.set_policy(_NoCookies())
    end = time.monotonic() + SECONDS / 3

    def run(operation: Any, mode: GenerationMode, number: int) -> None:
        it = described[operation.path, operation.method]
        headers = _headers(server, it) if signed_in else {}

        @examples(4)
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: schemathesis.Case[Any]) -> None:
            if number and time.monotonic() > end:
                return
            case.call_and_validate(
                base_url=server.url,
                session=http,
                headers=_headers(server, it) if signed_in and it.id in ONCE else headers,
                checks=checks_of(it),
                timeout=ANSWER_SECONDS,
                allow_redirects=False,
            )

        seed(number)(attempt)()

    def work() -> None:
        with warnings.catch_warnings():
            # Of the tool: about what hypothesis makes of a schema.
            warnings.simplefilter("ignore")
            for number in rounds(end):
                for operation in operations:
                    run(operation, GenerationMode.POSITIVE, number)
                    # Without parameters there is nothing to get wrong.
                    with contextlib.suppress(Unsatisfiable):
                        run(operation, GenerationMode.NEGATIVE, number)

    await left_over(server, work)


class _NoCookies(requests.cookies.cookielib.DefaultCookiePolicy):  # type: ignore[name-defined,misc]
    def set_ok(self, cookie: object, request: object) -> bool:
        return False


# Raw

ROUTES = sorted((it.method.upper(), it.path) for it in openapi.OPERATIONS)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [2**63, -(2**63), 2**64, 10**400, 1e308, "\0", "\ud800", "\u202e", "x" * 9000]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
fields = st.dictionaries(
    st.sampled_from(
        [
            *("ids", "up_to", "all", "enabled", "new_message", "recipients", "event_type"),
            *("message", "link", "user_id", "idempotency_key"),
        ]
    )
    | st.text(max_size=5),
    values
    | st.lists(st.integers(0, 99), max_size=3)
    | st.lists(st.sampled_from(["alice", "a\0", "\ud800", "x" * 256]), max_size=3)
    | st.sampled_from(["new_message", "https://x.example/", "//x", "javascript:1", "/ok"]),
    max_size=5,
)
texts = st.one_of(
    (fields | values).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            b"",
            b"{",
            b"[" * 50_000,
            b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
            b"9" * 6_000,
            b"-" + b"9" * 400 + b"e" + b"9" * 9,
            b'{"ids":[1e400]}',
            b'{"all":true,"all":false}',
            b"NaN",
            b'"\\ud800"',
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            b"\x00" * 100,
            b"x" * 70_000,
        ]
    ),
    st.binary(max_size=200),
)
names = st.sampled_from(
    [
        *("Accept", "Accept-Encoding", "Authorization", "Content-Type", "Content-Encoding"),
        *("Content-Length", "Cookie", "Expect", "Host", "If-None-Match", "If-Match", "If-Range"),
        *("If-Modified-Since", "Last-Event-ID", "Origin", "Range", "Sec-Fetch-Site", "Upgrade"),
        *("Transfer-Encoding", "Connection", "X-Forwarded-For", "X-Forwarded-Proto", "Forwarded"),
        *("Sec-WebSocket-Key", "X-Http-Method-Override"),
    ]
).map(str.encode)
contents = st.one_of(
    st.binary(max_size=40),
    st.text("0123456789,;=\"'-*/ W<>%", max_size=40).map(str.encode),
    st.sampled_from(
        [
            b"text/event-stream",
            b"application/json; charset=utf-16",
            b"application/json; charset=nonsense",
            b"multipart/form-data; boundary=x",
            b"multipart/form-data",
            b"gzip",
            b"deflate",
            b"br",
            b"identity",
            b"chunked",
            b"100-continue",
            b"bytes=0-,-1,5-2",
            b"bytes=99999999999999999999-",
            b'W/"' + b"a" * 5_000 + b'"',
            b"Bearer",
            b"Bearer " + b"a." * 2_000,
            b"Basic Og==",
            b"sse_session=" + b"a" * 43,
            b"sse_session=\xff; =; ;;; a=b=c; $Version=1",
            b"websocket",
            b"null",
            b"9" * 400,
            b"a" * 9_000,
        ]
    ),
)
bad_paths = st.sampled_from(
    ["/", "//", "/%", "/%00", "*", "/api/%2e%2e/", "/static/../x", "http://x/", "/api/session/"]
)
parameters = st.sampled_from(
    ["1", "1", "1", "new_message", "", "0", "-1", "9" * 20, "%00", "%ff", "%ED%A0%80", "a%2Fb"]
)
queries = st.one_of(
    st.just(""),
    st.text("abefornlimtuadvp_=&?%0123456789.-+;", max_size=30).map("?{}".format),
    st.sampled_from(
        [
            "?before=1&before=2",
            "?after=" + "1" * 3_000,
            "?after=0.0.3-9-4_5",
            "?after=9.9.9-9-",
            "?limit=1&after=%00",
            "?last_event_id=%F0%9F%92%A9",
        ]
    ),
)
bad_methods = st.sampled_from(
    ["POST", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "X" * 300, "G\0T", ""]
)
encodings = st.sampled_from(
    [
        (b"Content-Encoding: gzip\r\n", gzip.compress),
        (b"Content-Encoding: gzip\r\n", lambda body: gzip.compress(body)[:-3]),
        (b"Content-Encoding: gzip\r\n", lambda body: gzip.compress(b"{" + b" " * 10**7)),
        (b"Content-Encoding: deflate\r\n", zlib.compress),
        (b"Content-Encoding: br\r\n", lambda body: body),
        (b"Content-Encoding: nonsense\r\n", lambda body: body),
    ]
)


@st.composite
def raw_requests(draw: st.DrawFn) -> bytes:
    """Requests from nearly right to nonsense; ``SESSION`` and ``KEY`` stand for good ones."""

    def rarely() -> bool:
        # Of requests with a fault in every part, all end at the first.
        return draw(st.integers(0, 7)) == 7

    method, path = draw(st.sampled_from(ROUTES))
    if rarely():
        method = draw(bad_methods)
    if rarely():
        path = draw(bad_paths)
    path = re.sub(r"{\w+}", draw(parameters), path)
    if rarely():
        path += draw(queries)
    head = f"{method} {path} HTTP/1.1\r\n".encode("latin-1")
    head += b"Host: 127.0.0.1\r\nConnection: close\r\n"
    head += draw(
        st.sampled_from(
            [*[b"Cookie: SESSION\r\n"] * 4, b"Authorization: Bearer KEY\r\n", b""],
        )
    )
    if not rarely():
        head += b"Content-Type: application/json\r\n"
    for name, value in draw(st.lists(st.tuples(names, contents), max_size=3)) if rarely() else ():
        head += name + b": " + value + b"\r\n"
    header, encode = draw(encodings) if rarely() else (b"", bytes)
    body = bytes(encode(draw(texts)))
    head += header
    match draw(st.integers(0, 40)):
        case 0:
            head += b"Content-Length: %d\r\n" % (len(body) + 1)  # one byte never comes
        case 1:
            head += b"Transfer-Encoding: chunked\r\n"
            body = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
        case 2:
            head += b"Transfer-Encoding: chunked\r\n"  # what follows are no chunks
        case 3:
            head += b"Content-Length: %d\r\nContent-Length: 0\r\n" % len(body)
        case _:
            head += b"Content-Length: %d\r\n" % len(body)
    if draw(st.integers(0, 40)) == 40:
        return draw(st.binary(min_size=1, max_size=300)) + b"\r\n\r\n"
    return bytes(head + b"\r\n" + body)


STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


def exchange(port: int, request: bytes) -> bytes:
    """Send, and read the answer; of an event stream only the beginning.

    Fails if there is none, and the connection stays.
    """
    answer = b""
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as sock:
        try:
            sock.sendall(request)
            while True:
                received = sock.recv(65536)
                answer += received
                if not received or b"text/event-stream" in answer:
                    break
                # Not until the connection ends: the server waits for the rest of the body, a while.
                head, _, body = answer.partition(b"\r\n\r\n")
                length = re.search(rb"Content-Length: (\d+)", head)
                if length is not None and len(body) >= int(length[1]):
                    break
        except ConnectionError:
            pass  # cut: as good an answer as any to nonsense
        except TimeoutError as exc:
            raise AssertionError(f"no end after {ANSWER_SECONDS} s") from exc
    return answer


def check(answer: bytes) -> int:
    """Fails on a 5xx and on a problem document that is none. Returns: the status, 0 if none."""
    for status in STATUS.findall(answer):
        assert status[:1] != b"5", answer[:2000]
    match = STATUS.match(answer)
    if match is None:
        assert not answer, answer[:200]
        return 0
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"application/problem+json" in head and body:
        assert json.loads(body)["status"] == int(match[1])
    assert b"Traceback" not in body
    return int(match[1])


#: Those that show that the requests get to where it matters.
EXPECTED = {200, 400, 401, 404, 422}


async def test_raw_requests(server: Server) -> None:
    """Malformed heads, cookies, bodies and encodings: refused or cut off, never a failure."""
    seen: dict[int, int] = {}
    session = server.session().encode()
    end = time.monotonic() + SECONDS / 3

    @examples(100)
    @given(request=raw_requests())
    def attempt(request: bytes) -> None:
        nonlocal session
        if seen.keys() >= EXPECTED and time.monotonic() > end:
            return
        request = request.replace(b"KEY", server.key.encode())
        status = check(exchange(server.port, request.replace(b"SESSION", session)))
        if b"/session" in request:
            session = server.session().encode()  # it may have ended
        seen[status] = seen.get(status, 0) + 1

    def work() -> None:
        for number in rounds(end):
            seed(number)(attempt)()
        for number in range(1, 10):
            if not seen.keys() >= EXPECTED:
                seed(-number)(attempt)()

    await left_over(server, work)
    assert seen.keys() >= EXPECTED, seen


NASTY = [
    b"GET /api/notifications HTTP/1.1\r\n\r\n",
    b"GET /api/notifications HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\r\n b\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 1000,
    b"\x00" * 1000,
    b"POST /api/publish HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % 10**20,
    b"POST /api/publish HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/notifications/read HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nCookie: SESSION\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"ffffffffffffffffff\r\n",
    b"POST /api/notifications/read HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nCookie: SESSION\r\nContent-Length: 100\r\n\r\n{",
    b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: SESSION\r\n\r\n",
    b"GET /api/stream HTTP/1.0\r\nHost: 127.0.0.1\r\nCookie: SESSION\r\n"
    b"Last-Event-ID: \xff\r\n\r\n",
    b"GET /api/stream?last_event_id=%00 HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: SESSION\r\n"
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200,
]


async def test_nothing_is_left_of_broken_connections(
    settings: SettingsFactory, db: Connection
) -> None:
    """Connections that are broken at any moment leave no task, stream or descriptor behind."""
    [key] = sign_in(db, "alice")
    limits = {"api_calls_per_minute": 0, "anonymous_calls_per_minute": 0}
    async with running(settings(heartbeat_seconds=1, **limits)) as node:

        async def break_off(request: bytes, pause: float) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
            writer.write(request.replace(b"SESSION", f"{COOKIE}={key}".encode()))
            try:
                async with asyncio.timeout(pause):
                    answer = await reader.read(65536)
                # 503: a stream that was superseded before it began.
                assert not answer.startswith((b"HTTP/1.1 500", b"HTTP/1.1 502")), answer[:500]
            except (TimeoutError, ConnectionError):
                pass  # no answer yet, or cut off: both are fine
            finally:
                writer.transport.abort()

        async def all_of_them(pause: float) -> None:
            async with asyncio.timeout(30):
                await asyncio.gather(*(break_off(request, pause) for request in NASTY * 4))

        def descriptors() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        await all_of_them(0.2)
        await eventually(lambda: not list(node.hub))
        tasks, files = len(asyncio.all_tasks()), descriptors()
        for pause in (0, 0.01, 0.1, 0):
            await all_of_them(pause)
        await eventually(lambda: not list(node.hub))
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
        await eventually(lambda: descriptors() <= files + 8)
