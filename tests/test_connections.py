"""Connections: what takes too long is cut, what is too large is refused, what is too many as well.

Against the real process: the test client's server has none of these limits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import aiohttp

from tests.conftest import ServerProcess, ServerProcessFactory, eventually
from tests.sse import EventReader

HEAD = b"Host: localhost\r\n"
JSON = HEAD + b"Content-Type: application/json\r\n"


async def connect(server: ServerProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = server.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def talk(server: ServerProcess, *parts: bytes, trickle: bytes = b"") -> tuple[bytes, float]:
    """Send each part and then, all the time, the trickle.

    Returns: what came until the server closed, and how long that took after the last part.
    """
    reader, writer = await connect(server)
    answer = bytearray()

    async def read() -> None:
        try:
            while chunk := await reader.read(65536):
                answer.extend(chunk)
        except ConnectionError:
            pass  # reset: cut all the same

    reading = asyncio.create_task(read())
    async with asyncio.timeout(20):
        for number, part in enumerate(parts):
            if number:
                # The answer to the one before.
                await eventually(lambda: b"\r\n\r\n" in answer)
            writer.write(part)
        started = time.monotonic()
        while not reading.done():
            if trickle and not writer.is_closing():
                writer.write(trickle)
            await asyncio.wait({reading}, timeout=0.1)
    writer.close()
    return bytes(answer), time.monotonic() - started


async def sign_in(browser: aiohttp.ClientSession) -> None:
    async with browser.post("/demo/session", json={"user_id": "alice"}) as response:
        assert response.status == 200


async def test_what_takes_too_long_is_cut(server_process: ServerProcessFactory) -> None:
    """A head, a body and a pause each have their time, however often a byte comes; streams do not
    count as any of them."""
    server = await server_process(
        SSE_HEADER_TIMEOUT="1",
        SSE_BODY_TIMEOUT="2",
        SSE_KEEPALIVE_TIMEOUT="4",
        SSE_HEARTBEAT_SECONDS="1",
    )
    whole = b"GET /livez HTTP/1.1\r\n" + HEAD + b"\r\n"
    post = b"POST /demo/session HTTP/1.1\r\n" + JSON + b"Content-Length: 9000\r\n\r\n"
    chunked = b"POST /demo/session HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    unread = b"POST /api/notifications/read HTTP/1.1\r\n" + JSON + b"Content-Length: 9000\r\n\r\n"
    cases: dict[str, tuple[Awaitable[tuple[bytes, float]], bytes, float, float]] = {
        "nothing": (talk(server), b"", 0.5, 3),
        "half a head": (talk(server, b"GET / HTTP/1.1\r\nHost:"), b"", 0.5, 3),
        "a trickle of fields": (
            talk(server, b"GET / HTTP/1.1\r\n" + HEAD, trickle=b"a: b\r\n"),
            b"",
            0.5,
            3,
        ),
        "a trickle of a line": (talk(server, b"GET /", trickle=b"a"), b"", 0.5, 3),
        "empty lines": (talk(server, trickle=b"\r\n"), b"", 0.5, 3),
        "half of the next head": (talk(server, whole, b"GET / HT"), b" 200 ", 0.5, 3),
        "a trickle of the next head": (
            talk(server, whole, b"GET /", trickle=b"a"),
            b" 200 ",
            0.5,
            3,
        ),
        "a pause": (talk(server, whole), b" 200 ", 3, 7),
        "a body that stops": (talk(server, post), b" 408 ", 1, 5),
        "a trickle of a body": (talk(server, post, trickle=b" "), b" 408 ", 1, 5),
        "a trickle of chunks": (talk(server, chunked, trickle=b"1\r\n \r\n"), b" 408 ", 1, 5),
        "a body that nobody reads": (talk(server, unread, trickle=b" "), b" 401 ", 0, 9),
    }

    async def stream() -> None:
        async with aiohttp.ClientSession(
            server.url, cookie_jar=aiohttp.CookieJar(unsafe=True)
        ) as browser:
            await sign_in(browser)
            async with browser.get("/api/stream") as response:
                events = EventReader(response)
                await events.next_of("ready")
                for _ in range(6):
                    await events.next_of("ping")

    streaming = asyncio.create_task(stream())
    answers = await asyncio.gather(*(case[0] for case in cases.values()))
    for (name, (_, expected, least, most)), (answer, seconds) in zip(
        cases.items(), answers, strict=True
    ):
        status = answer.partition(b"\r\n")[0]
        assert expected in status if expected else not answer, (name, answer)
        assert least <= seconds <= most, (name, seconds)
    await streaming
    assert "Traceback" not in server.stderr


async def test_slow_clients_keep_nobody_out(server_process: ServerProcessFactory) -> None:
    """With hundreds of half-sent requests open, others are served, and the hundreds are cut."""
    server = await server_process(SSE_HEADER_TIMEOUT="1.5")
    slow = [await connect(server) for _ in range(300)]
    for _, writer in slow:
        writer.write(b"GET /livez HTTP/1.1\r\nX: ")
    async with aiohttp.ClientSession(server.url) as browser, browser.get("/livez") as response:
        assert response.status == 200
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*(reader.read() for reader, _ in slow), return_exceptions=True)
    for end in ends:
        assert end == b"" or isinstance(end, ConnectionError)
    for _, writer in slow:
        writer.close()


async def test_heads_that_are_too_large(server_process: ServerProcessFactory) -> None:
    """Lines, fields and their number are limited; within the limits all is well."""
    server = await server_process()
    get = b"GET /livez HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n"
    for request, status in (
        (get + b"a: " + b"x" * 8000 + b"\r\n\r\n", 200),
        (get + b"".join(b"a%d: b\r\n" % number for number in range(50)) + b"\r\n", 200),
        (get + b"a: " + b"x" * 8200 + b"\r\n\r\n", 431),
        (get + b"a" * 8200 + b": x\r\n\r\n", 431),
        (get + b"a: " + b"x" * 200_000 + b"\r\n\r\n", 431),
        (get + b"".join(b"a%d: b\r\n" % number for number in range(70)) + b"\r\n", 431),
        (get + b"".join(b"a%d: b\r\n" % number for number in range(20_000)) + b"\r\n", 431),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nno field\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + HEAD + HEAD + b"\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),  # the beginning of TLS
        (
            b"POST /livez HTTP/1.1\r\n"
            + HEAD
            + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
    ):
        answer, _ = await talk(server, request)
        # Whoever sends on while being refused may meet a reset before the answer.
        if answer or len(request) < 64 * 1024:
            assert b" %d " % status in answer.partition(b"\r\n")[0], (request[:60], answer[:60])
        if status != 200 and answer:
            assert b"application/problem+json" in answer
    assert "Traceback" not in server.stderr


async def test_number_of_connections(server_process: ServerProcessFactory) -> None:
    """One too many is closed at once; when another has gone, there is room again."""
    server = await server_process(SSE_MAX_CONNECTIONS="5")
    open_ones = [await connect(server) for _ in range(5)]
    whole = b"GET /livez HTTP/1.1\r\n" + HEAD + b"\r\n"

    async def attempt() -> bool:
        reader, writer = await connect(server)
        try:
            writer.write(whole)
            async with asyncio.timeout(5):
                return b" 200 " in await reader.read(100)
        except ConnectionError:
            return False
        finally:
            writer.close()

    served: Any = attempt
    for reader, writer in open_ones:
        writer.write(whole)
        assert b" 200 " in await reader.read(100)
    assert not await served()
    assert not await served()
    await eventually(lambda: "no more are taken" in server.stderr)
    assert server.stderr.count("no more are taken") == 1
    open_ones.pop()[1].close()
    await eventually(served)
    for _, writer in open_ones:
        writer.close()
