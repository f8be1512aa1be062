"""A client of the service for the terminal: signs in, follows a stream, comes back where it was.

What the bundled ``client.js`` does for a page, this does for ``sse-server tail``; the doctor uses
its parts. It knows the service by HTTP alone.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ipaddress
import json
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import hdrs
from yarl import URL

from sse_server.errors import ConfigurationError

# Timeouts, in seconds
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 15.0
PROBLEM_SECONDS = 2.0  # for the body of an error
FIRST_EVENT_SECONDS = 10.0  # a proxy that holds back shows by silence
HEARTBEATS = 2.5  # without a sign of life for so many, the line is dead

# Waiting before the next try: from the stream's own `retry:`, doubled with each failure.
BACKOFF_FIRST = 1.0
BACKOFF_MOST = 30.0

# Ids that are remembered to drop repeats.
SEEN = 10_000

# Most that is read of an error's body
PROBLEM_BYTES = 65_536

# Longest line, in characters; a notification has a few thousand.
_LINE = 1_000_000

EVENT_STREAM = "text/event-stream"


class ClientError(Exception):
    """The service cannot be used like this; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream. `id` is empty if it had none."""

    name: str
    data: str
    id: str = ""

    @property
    def json(self) -> Any:
        """The data; `None` if it is no JSON object."""
        try:
            value = json.loads(self.data)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


class EventParser:
    """Turns bytes, cut anywhere, into events (WHATWG HTML, 9.2.6).

    Attributes:
        retry_ms: The last ``retry:`` that came.
    """

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._begun = False
        self._name = ""
        self._id = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes.

        Raises:
            ClientError: This is no event stream: a line has no end.
        """
        self._text += self._decode(chunk)
        if not self._begun and self._text:
            self._text = self._text.removeprefix("\ufeff")
            self._begun = True
        # A CR at the end may be the first half of a CRLF.
        held = "\r" if self._text.endswith("\r") else ""
        text = self._text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        *lines, rest = text.split("\n")
        if len(rest) > _LINE:
            raise ClientError("The answer is no event stream.")
        self._text = rest + held
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            name, data = self._name or "message", self._data
            self._name, self._data = "", []
            return Event(name, "\n".join(data), self._id) if data else None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._name = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isascii() and value.isdecimal() and len(value) < 16:
                self.retry_ms = int(value)
        return None


@dataclass(frozen=True, slots=True)
class Change:
    """How the stream stands: ``connecting``, ``live``, ``waiting`` or ``ended``, and why."""

    state: str
    detail: str = ""


def is_loopback(url: URL) -> bool:
    """Whether this URL leads to this machine."""
    host = (url.host or "").removesuffix(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_url(text: str) -> URL:
    """The address of a service.

    Raises:
        ConfigurationError: It is none.
    """
    try:
        url = URL(text.rstrip("/"))
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.query_string or url.fragment:
        raise ConfigurationError(
            "The address of a service is http://host[:port] or https://host[:port]."
        )
    if url.user is not None or url.password is not None:
        raise ConfigurationError("The address of a service holds no user and no password.")
    return url


def trust(cafile: Path | None) -> ssl.SSLContext:
    """The authorities of this machine, or those of a file (PEM).

    Raises:
        ConfigurationError: There are none in the file.
    """
    try:
        return ssl.create_default_context(cafile=cafile)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigurationError(f"{cafile} holds no certificates (PEM).") from exc


class Service:
    """A service as one client sees it, with the cookies that it was given."""

    def __init__(self, url: URL, *, tls: ssl.SSLContext | None = None) -> None:
        self.url = url
        self._signed_in = False
        # Nothing is decompressed: the doctor wants to see it, the others ask for none.
        self.http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls if tls is not None else True),
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS
            ),
            headers={"User-Agent": "sse-server", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Sign out, if this is what signed in, and close."""
        try:
            if self._signed_in:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with self.http.delete(self.path("api/session")):
                        pass
        finally:
            await self.http.close()

    def path(self, path: str) -> URL:
        return self.url / path

    def use_cookie(self, name: str, value: str) -> None:
        """Use a session that somebody has opened elsewhere; it is not ended here."""
        self.http.cookie_jar.update_cookies({name: value}, self.url)

    async def sign_in(
        self, *, token: str | None = None, user_id: str | None = None, origin: str | None = None
    ) -> aiohttp.ClientResponse:
        """With a token, or in a demo as anybody. The answer has been read; its status may be any.

        Args:
            token: As the application's backend signs it.
            user_id: For the demo's sign-in, without a token.
            origin: To ask as a page of this origin would.
        """
        headers = {} if origin is None else {hdrs.ORIGIN: origin}
        if token is not None:
            headers[hdrs.AUTHORIZATION] = f"Bearer {token}"
            asked = self.http.post(self.path("api/session"), headers=headers, allow_redirects=False)
        else:
            asked = self.http.post(
                self.path("demo/session"),
                json={"user_id": user_id},
                headers=headers,
                allow_redirects=False,
            )
        async with asked as response:
            await response.read()
        self._signed_in = self._signed_in or response.status == 200
        return response

    def stream(self, cursor: str = "", **headers: str) -> Any:
        """Ask for the stream: ``async with service.stream() as response``."""
        if cursor:
            headers["Last-Event-ID"] = cursor
        return self.http.get(
            self.path("api/stream"),
            headers={hdrs.ACCEPT: EVENT_STREAM, hdrs.CACHE_CONTROL: "no-store", **headers},
            allow_redirects=False,
            # Silence is judged by those who read.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )


async def problem_of(response: aiohttp.ClientResponse) -> str:
    """What an answer that is no success says, in one sentence."""
    document: Any = None
    # Whatever this is, it may be endless.
    with contextlib.suppress(ValueError, LookupError, aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(PROBLEM_SECONDS):
            document = json.loads(await response.content.read(PROBLEM_BYTES))
    said = ""
    if isinstance(document, dict):
        said = str(document.get("detail") or document.get("title") or "")
    return f"HTTP {response.status}{': ' + said if said else ''}"


class Follower:
    """Follows one user's stream over as many connections as it takes."""

    def __init__(self, service: Service, *, cursor: str = "") -> None:
        self._service = service
        self._cursor = cursor
        self._seen: dict[str, None] = {}
        self._failures = 0
        self._retry = BACKOFF_FIRST

    async def follow(self) -> AsyncGenerator[Event | Change, None]:
        """Every event once, and between them how the stream stands. Ends after ``ended``."""
        while True:
            yield Change("connecting")
            wait: float | None = None
            reason = "the connection was lost"
            try:
                async for item in self._one():
                    if isinstance(item, Change) and item.state == "ended":
                        yield item
                        return
                    if isinstance(item, Event) and item.name == "closing":
                        wait, reason = self._closing(item)
                        if wait is None:
                            yield Change("ended", reason)
                            return
                        break
                    yield item
            except (aiohttp.ClientError, OSError, ClientError) as exc:
                reason = str(exc) or type(exc).__name__
            if wait is None:
                wait = self._backoff()
            yield Change("waiting", f"{reason}; next try in {wait:.1f} s")
            await asyncio.sleep(wait)

    async def _one(self) -> AsyncIterator[Event | Change]:
        """The events of one connection, repeats left out."""
        async with self._service.stream(self._cursor) as response:
            if response.status == 401:
                yield Change("ended", "not signed in")
                return
            if response.status != 200:
                raise ClientError(await problem_of(response))
            if response.content_type != EVENT_STREAM:
                raise ClientError("the answer is no event stream")
            silence = FIRST_EVENT_SECONDS
            parser = EventParser()
            while True:
                try:
                    async with asyncio.timeout(silence):
                        chunk = await response.content.readany()
                except TimeoutError:
                    raise ClientError(f"nothing came for {silence:g} s") from None
                if not chunk:
                    return
                for event in parser.feed(chunk):
                    data = event.json
                    if event.name == "ready" and data:
                        heartbeat = data.get("heartbeat_seconds")
                        if isinstance(heartbeat, int | float) and heartbeat > 0:
                            silence = HEARTBEATS * heartbeat
                        yield Change("live", f"{data.get('unread_count')} unread")
                    if event.name == "ping":
                        # Not before: what fails right after it was opened has not worked.
                        self._failures = 0
                    if event.name != "notification" or self._is_new(event.id):
                        yield event
                if parser.retry_ms is not None:
                    self._retry = parser.retry_ms / 1000

    def _is_new(self, id: str) -> bool:
        if id:
            self._cursor = id
        if id in self._seen:
            return False
        self._seen[id] = None
        if len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]
        return True

    def _closing(self, event: Event) -> tuple[float | None, str]:
        """When to come back after the last event of a stream, if at all."""
        data = event.json or {}
        reason = str(data.get("reason"))
        if reason == "superseded":
            return None, "the session has opened another stream"
        if reason == "session_ended":
            return None, "the session has ended"
        retry_ms = data.get("retry_ms")
        if not isinstance(retry_ms, int | float) or not 0 <= retry_ms <= 3_600_000:
            return self._backoff(), reason
        return retry_ms / 1000, reason

    def _backoff(self) -> float:
        wait: float = min(BACKOFF_MOST, max(self._retry, 0.1) * 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        # Many clients lose the same server at the same moment.
        return wait * random.uniform(0.5, 1.0)


def read_cookie(text: str) -> tuple[str, str]:
    """The session's cookie from ``name=value`` or from a file of curl's (Netscape).

    Raises:
        ConfigurationError: There is none.
    """
    for name, value in _cookies(text):
        if name.endswith("sse_session"):
            return name, value
    raise ConfigurationError("The file holds no cookie sse_session or __Host-sse_session.")


def _cookies(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) == 7:
            yield fields[5], fields[6]
        else:
            for pair in line.removeprefix("Cookie:").split(";"):
                name, separator, value = pair.strip().partition("=")
                if separator:
                    yield name, value
