"""What a browser meets: the way to the service through every proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise

import aiohttp
from aiohttp import hdrs

from sse_server.client import (
    CONNECT_SECONDS,
    EVENT_STREAM,
    ClientError,
    Event,
    EventParser,
    Service,
    is_loopback,
    problem_of,
)
from sse_server.doctor.faults import Report

# What a browser says it takes.
_BROWSER_ENCODINGS = "gzip, deflate, br, zstd"

# Longest wait for the other side's farewell
CLOSE_SECONDS = 2.0

# A Date header says whole seconds.
_DATE_SECONDS = 1.0

# Events of different times that arrive within this are a batch.
_BATCH_SECONDS = 1.0

# Added to two heartbeats: how long a stream is held by default.
_MARGIN_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SignIn:
    """How to get a session: with a token, by the demo as a user, or with a cookie."""

    token: str | None = None
    user_id: str | None = None
    cookie: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is a finding. Seconds, unless it says days."""

    first_event: float = 5.0
    wait: float | None = None  # for how long to hold the stream; None: two heartbeats
    skew: float = 2.0
    certificate_days: float = 14.0


@dataclass(slots=True)
class _Held:
    """What came over one stream. Times are seconds since it was `asked` for."""

    asked: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)
    skews: list[float] = field(default_factory=list)
    ended: float | None = None

    def first(self, *names: str) -> float | None:
        return next((at for at, event in self.events if event.name in names), None)

    @property
    def last_byte(self) -> float:
        return self.chunks[-1][0] if self.chunks else 0.0


async def examine_service(
    service: Service,
    report: Report,
    *,
    sign_in: SignIn | None,
    tls: ssl.SSLContext,
    limits: Limits,
    said: Callable[[str], None] = lambda _: None,
) -> None:
    """Look at a service from outside.

    Args:
        service: Where it is; signed out of by whoever closes it.
        report: To add to.
        sign_in: How; without one, the stream is not looked at.
        tls: Whom to trust.
        limits: From where on something is a finding.
        said: Told what is being waited for.
    """
    try:
        if service.url.scheme == "https":
            if not await _tls(service, report, tls, limits):
                return
        elif is_loopback(service.url):
            report.skip("TLS and HTTP/2", "this is HTTP on this machine")
        else:
            report.find("plain-http", f"{service.url} is served without TLS.")
        if not await _answers(service, report, limits):
            return
        if sign_in is None:
            report.skip("cookie and stream", "nobody to sign in as (--help)")
        elif await _signed_in(service, report, sign_in):
            await _stream(service, report, limits, said)
    except (aiohttp.ClientError, OSError) as exc:
        report.find("unreachable", f"{service.url}: {str(exc) or type(exc).__name__}.")


# TLS


async def _tls(service: Service, report: Report, context: ssl.SSLContext, limits: Limits) -> bool:
    """Returns: whether the certificate is good enough to go on."""
    host, port = service.url.host, service.url.port
    assert host is not None
    # The context is also that of the requests, which speak HTTP/1.1 alone.
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLCertVerificationError as exc:
        report.find("certificate-invalid", f"{exc.verify_message}.")
        return False
    except TimeoutError:
        report.find("unreachable", f"No connection within {CONNECT_SECONDS:g} s.")
        return False
    finally:
        context.set_alpn_protocols(["http/1.1"])
    shown = writer.get_extra_info("ssl_object")
    certificate, protocol = shown.getpeercert(), shown.selected_alpn_protocol()
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await writer.wait_closed()
    left = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    if left < limits.certificate_days:
        report.find("certificate-expires", f"It is valid for {left:.1f} more days.")
    else:
        report.ok("certificate", f"valid for {left:.0f} more days, {shown.version()}")
    if protocol == "h2":
        report.ok("HTTP/2")
    else:
        report.find("no-http2", f"Offered h2, the server chose {protocol or 'nothing'}.")
    return True


# Answers


async def _answers(service: Service, report: Report, limits: Limits) -> bool:
    """Returns: whether this is the service."""
    before = time.time()
    async with service.http.get(service.path("readyz"), allow_redirects=False) as response:
        after = time.time()
        ready, body = response.status, await response.read()
        date = response.headers.get(hdrs.DATE)
    if ready == 200:
        report.ok("/readyz", "able to serve")
    elif ready == 503 and (failed := _failed(body)):
        report.find("not-ready", f"/readyz names: {', '.join(failed)}.")
    else:
        report.skip("/readyz", f"HTTP {ready}: not served to the outside")
    async with service.http.get(service.path("api/session"), allow_redirects=False) as response:
        if response.content_type not in ("application/json", "application/problem+json"):
            report.find(
                "not-the-service",
                f"GET /api/session: HTTP {response.status}, {response.content_type}.",
            )
            return False
    if not is_loopback(service.url):
        async with service.http.get(service.path("metrics"), allow_redirects=False) as response:
            if response.status == 200:
                report.find("operator-endpoints-public", "GET /metrics: HTTP 200.")
            else:
                report.ok("/metrics", "not served to the outside")
    _clock(date, before, after, report, limits)
    return True


def _failed(body: bytes) -> list[str]:
    try:
        return [str(name) for name in json.loads(body)["failed"]]
    except (ValueError, KeyError, TypeError):
        return []


def _clock(date: str | None, before: float, after: float, report: Report, limits: Limits) -> None:
    """The Date header, which may be the proxy's."""
    try:
        told = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        report.skip("clock", "the answer has no Date")
        return
    # It was cut off to the second somewhere between the two.
    if told + _DATE_SECONDS < before - limits.skew or told > after + limits.skew:
        report.find("clock-skew", f"Date is {told - after:+.0f} s from this machine's clock.")
    else:
        report.ok("clock", "Date is that of this machine")


# Signing in


async def _signed_in(service: Service, report: Report, sign_in: SignIn) -> bool:
    if sign_in.cookie is not None:
        service.use_cookie(*sign_in.cookie)
        async with service.http.get(service.path("api/session")) as response:
            if response.status != 200:
                report.find("stream-refused", f"The cookie: {await problem_of(response)}.")
                return False
        report.skip("cookie's flags", "the session was there already")
        return True
    asked = {"token": sign_in.token, "user_id": sign_in.user_id}
    # As a page of the service's own would.
    response = await service.sign_in(**asked, origin=str(service.url.origin()))
    if response.status == 403 and "cross-site" in await response.text():
        report.find("proxy-hides-host", f"With Origin: {service.url.origin()} it answers 403.")
        response = await service.sign_in(**asked)
    if response.status != 200:
        report.find("stream-refused", f"Signing in: {await problem_of(response)}.")
        return False
    secure = service.url.scheme == "https"
    for line in response.headers.getall(hdrs.SET_COOKIE, []):
        if line.partition("=")[0].endswith("sse_session"):
            _cookie(line, report, secure=secure)
            return True
    report.find("not-the-service", "Signing in was answered without a cookie.")
    return False


def _cookie(line: str, report: Report, *, secure: bool) -> None:
    flags = dict[str, str]()
    for part in line.split(";")[1:]:
        name, _, value = part.strip().partition("=")
        flags[name.lower()] = value.lower()
    name = line.partition("=")[0]
    if "httponly" not in flags:
        report.find("cookie-not-httponly", f"{name} can be read by scripts.")
    if secure and "secure" not in flags:
        report.find("cookie-not-secure", f"{name} was set over HTTPS without Secure.")
    site = flags.get("samesite", "")
    if site not in ("lax", "strict") and not (site == "none" and "partitioned" in flags):
        report.find("cookie-samesite", f"{name}: {f'SameSite={site}' if site else 'none is set'}.")
    if not report.found("cookie-not-httponly", "cookie-not-secure", "cookie-samesite"):
        report.ok("cookie's flags", "; ".join(line.split("; ")[1:]))


# The stream


async def _stream(
    service: Service, report: Report, limits: Limits, said: Callable[[str], None]
) -> None:
    # A proxy that holds back may hold back the head as well.
    patience = limits.first_event
    asked = time.monotonic()
    try:
        async with asyncio.timeout(patience):
            response = await service.stream(**{hdrs.ACCEPT_ENCODING: _BROWSER_ENCODINGS})
    except TimeoutError:
        response = None
        report.find("stream-buffered", f"Not even the head of the answer came in {patience:g} s.")
    if response is None:
        return
    async with response:
        encoding = response.headers.get(hdrs.CONTENT_ENCODING, "identity")
        if response.status != 200 or response.content_type != EVENT_STREAM:
            said_of = await problem_of(response)
            report.find("stream-refused", f"{said_of}, {response.content_type}.")
            return
        _cacheable(response, report)
        if encoding == "identity":
            report.ok("compression", "the stream has none")
            await _hold(response, asked, report, limits, said)
            return
        report.find("stream-compressed", f"Content-Encoding: {encoding}.")
    # What is in it shows without.
    asked = time.monotonic()
    async with service.stream(**{hdrs.ACCEPT_ENCODING: "identity"}) as response:
        if hdrs.CONTENT_ENCODING in response.headers or response.status != 200:
            report.skip("stream", "it is compressed for everybody")
            return
        await _hold(response, asked, report, limits, said)


def _cacheable(response: aiohttp.ClientResponse, report: Report) -> None:
    control = response.headers.get(hdrs.CACHE_CONTROL, "").lower()
    directives = {part.strip() for part in control.split(",")}
    if hdrs.AGE in response.headers:
        report.find(
            "stream-cacheable", f"It comes from a cache: Age: {response.headers[hdrs.AGE]}."
        )
    elif not directives & {"no-store", "no-cache"}:
        report.find("stream-cacheable", f"Cache-Control: {control or 'none'}.")
    else:
        report.ok("caching", f"Cache-Control: {control}")


async def _hold(
    response: aiohttp.ClientResponse,
    asked: float,
    report: Report,
    limits: Limits,
    said: Callable[[str], None],
) -> None:
    """Read the stream for a while, and judge when what came."""
    held = _Held(asked)
    said("the first event")
    heartbeat: float | None = None
    wait = limits.first_event
    parser = EventParser()
    while held.ended is None:
        at = time.monotonic() - held.asked
        left = wait - at
        if heartbeat is None and held.first("ready") is not None:
            heartbeat = _heartbeat(held)
            wait = 2 * heartbeat + _MARGIN_SECONDS if limits.wait is None else limits.wait
            said(f"two heartbeats, {wait:.0f} s")
            continue
        if left <= 0:
            break
        try:
            async with asyncio.timeout(left):
                chunk = await response.content.readany()
        except TimeoutError:
            continue
        except aiohttp.ClientError:
            chunk = b""
        at = time.monotonic() - held.asked
        if not chunk:
            held.ended = at
            break
        held.chunks.append((at, len(chunk)))
        try:
            for event in parser.feed(chunk):
                held.events.append((at, event))
                _note_skew(held, event)
        except ClientError as exc:
            report.find("stream-refused", str(exc))
            return
    _judge(held, heartbeat, report, limits)


def _heartbeat(held: _Held) -> float:
    for _, event in held.events:
        if event.name == "ready":
            seconds = (event.json or {}).get("heartbeat_seconds")
            if isinstance(seconds, int | float) and 0 < seconds <= 3600:
                return float(seconds)
    return 15.0


def _note_skew(held: _Held, event: Event) -> None:
    """By how much a ping's time is behind the clock here, the way included."""
    if event.name == "ping":
        try:
            told = datetime.fromisoformat(str((event.json or {}).get("time")))
        except ValueError:
            return
        if told.tzinfo is not None:
            held.skews.append((datetime.now(UTC) - told).total_seconds())


def _judge(held: _Held, heartbeat: float | None, report: Report, limits: Limits) -> None:
    closing = next((event for _, event in held.events if event.name == "closing"), None)
    if closing is not None:
        reason = (closing.json or {}).get("reason")
        if reason not in ("max_age", "shutdown"):
            report.find("stream-refused", f"The service closed it: {reason}.")
            return
    first = held.first("ready", "notification", "reset")
    if heartbeat is None and closing is None:
        if held.ended is None or first is None:
            report.find(
                "stream-buffered",
                f"No event came within {limits.first_event:g} s"
                + (f", {sum(size for _, size in held.chunks)} bytes did." if held.chunks else "."),
            )
        return
    report.ok("buffering", f"the first event came after {(first or 0) * 1000:.0f} ms")
    if held.ended is not None and closing is None:
        silence = held.ended - held.last_byte
        report.find(
            "stream-cut",
            f"The line was cut after {silence:.1f} s without a byte, before any closing event; the "
            f"heartbeat is {heartbeat:g} s.",
        )
        return
    pings = [at for at, event in held.events if event.name == "ping"]
    until = held.ended if held.ended is not None else time.monotonic() - held.asked
    assert heartbeat is not None or closing is not None
    if heartbeat is None or closing is not None:
        report.skip("heartbeat", "the stream ended as it should before one was due")
        return
    # Batches: one heartbeat at least between two, and they came together.
    together = any(b - a < min(_BATCH_SECONDS, heartbeat / 2) for a, b in pairwise(pings))
    if together:
        report.find("stream-buffered", "Heartbeats of different times came at once.")
    elif not pings and until < heartbeat + _MARGIN_SECONDS:
        report.skip("heartbeat", f"the stream was held for {until:.0f} s, less than one")
    elif not pings or max(b - a for a, b in pairwise([0.0, *pings, until])) > (
        1.5 * heartbeat + _MARGIN_SECONDS
    ):
        report.find(
            "heartbeat-late",
            f"{len(pings)} in {until:.0f} s, and there should be one every {heartbeat:g} s.",
        )
    else:
        report.ok("heartbeat", f"{len(pings)} in {until:.0f} s, nothing cut the line")
    if held.skews:
        # The least delayed one is the nearest to the truth.
        skew = min(held.skews, key=abs)
        if abs(skew) > limits.skew:
            report.find(
                "clock-skew",
                f"The service's clock is {abs(skew):.1f} s {'behind' if skew > 0 else 'ahead of'} "
                "this machine's.",
            )
        else:
            report.ok("service's clock", f"{skew:+.2f} s, the way included")
