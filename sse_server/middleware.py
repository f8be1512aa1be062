"""What every request passes: who it comes from, what its page may do, errors, headers, time."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from sse_server import spans
from sse_server.config import Network
from sse_server.errors import (
    BadRequest,
    BodyTimeout,
    CrossSite,
    DatabaseError,
    DatabaseUnavailable,
    ServiceError,
    Unavailable,
    UnsupportedMediaType,
    WrongHost,
)
from sse_server.logs import REQUEST_ID

if TYPE_CHECKING:
    # Not imported: it imports prometheus_client, for which a master prepares a directory first.
    from sse_server.metrics import Metrics

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"

# No inline script or style, nothing from elsewhere, in no frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)

# Nobody's answer ever says more to another origin than these.
_EXPOSED_HEADERS = "ETag, Retry-After"
_REQUEST_HEADERS = "Authorization, Content-Type, If-None-Match, Last-Event-ID"
_PREFLIGHT_SECONDS = "3600"

_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?", re.ASCII)

_SAFE_METHODS = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})

# Opening a stream ends the session's other one: a page elsewhere must not make a browser do that.
_STREAM = "/api/stream"
_SESSION = "/api/session"

# Set on the request as aiohttp knows it, for on_response_prepare: that is not given the clone.
_SECURE = web.RequestKey("secure", bool)

# Likewise.
_X_REQUEST_ID = "X-Request-ID"
_REQUEST_ID = web.RequestKey("request_id", str)
_ARRIVED = web.RequestKey("arrived", float)
_SPAN = web.RequestKey("span", object)

# It goes into logs.
_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,64}", re.ASCII)


def problem(error: ServiceError) -> web.Response:
    """The error as a problem document (RFC 9457). `type` is stable; `detail` is for reading."""
    document: dict[str, object] = {
        "type": f"urn:sse-server:problem:{error.slug}",
        "title": error.title,
        "status": error.status,
    }
    if error.detail:
        document["detail"] = error.detail
    document.update(error.members)
    request_id = REQUEST_ID.get()
    if error.status >= 500 and request_id is not None:
        # By which the operator finds what the log says about it.
        document["request_id"] = request_id
    response = web.Response(
        status=error.status, text=json.dumps(document), content_type=PROBLEM_JSON
    )
    response.headers[hdrs.CACHE_CONTROL] = "no-store"
    if error.retry_after is not None:
        response.headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"  # required by RFC 9110, 15.5.2
    return response


def _from_http_exception(exc: web.HTTPException) -> web.Response:
    """One that aiohttp raised by itself: no such route, wrong method, body too large."""
    error = type(
        "HTTPError",
        (ServiceError,),
        {
            "status": exc.status,
            "slug": exc.reason.lower().replace(" ", "-"),
            "title": exc.reason,
        },
    )
    response = problem(error())
    for name in (hdrs.ALLOW, hdrs.RETRY_AFTER):
        if name in exc.headers:
            response.headers[name] = exc.headers[name]
    return response


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure as a problem document. A 500 tells the client nothing, the log all."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        if exc.status < 400:
            raise
        return _from_http_exception(exc)
    except ServiceError as exc:
        response = problem(exc)
        if isinstance(exc, BodyTimeout):
            response.force_close()
        return response
    except DatabaseUnavailable as exc:
        logger.warning("%s %s: %s", request.method, request.path, exc)
        return problem(Unavailable("The database does not answer.", retry_after=2.0))
    except DatabaseError as exc:
        # The database's own words may name tables and values.
        logger.error("%s %s: %s (%s)", request.method, request.path, exc, exc.sqlstate)
        return problem(ServiceError())
    except web.RequestPayloadError:
        # Chunks or compression that are none; what follows cannot be told from the body.
        response = problem(BadRequest("The body is damaged."))
        response.force_close()
        return response
    except ConnectionError:
        if request.transport is not None and not request.transport.is_closing():
            raise
        # The client has gone, which is no failure. What is answered goes nowhere.
        return web.Response()
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return problem(ServiceError())


def security_headers(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Set what every answer bears."""
    headers = response.headers
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
    headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    # Not everybody needs to know what runs here, and which version of it.
    headers[hdrs.SERVER] = "sse-server"
    if request.get(_SECURE, request.secure):
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")


class Headers:
    """For ``on_response_prepare``: streams set theirs long before their handler is done."""

    def __init__(self, allowed_origins: Collection[str], *, framed_page: bool = False) -> None:
        """
        Args:
            allowed_origins: Those whose pages may read the API's answers, with the user's session.
            framed_page: Whether this origin may frame its own page (the demo shows two users).
        """
        self._allowed_origins = frozenset(allowed_origins)
        self._page_policy = CONTENT_SECURITY_POLICY
        if framed_page:
            self._page_policy = CONTENT_SECURITY_POLICY.replace(
                "frame-ancestors 'none'", "frame-ancestors 'self'"
            )

    async def __call__(self, request: web.Request, response: web.StreamResponse) -> None:
        if request.path == "/":
            response.headers["Content-Security-Policy"] = self._page_policy
        security_headers(request, response)
        if not self._allowed_origins or not request.path.startswith(("/api/", "/static/")):
            return
        # A cache must not hand one origin's answer to another.
        response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin in self._allowed_origins:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED_HEADERS


def _trusted(address: str | None, networks: Sequence[Network]) -> bool:
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in networks)


class Observer:
    """Gives every request an id, a span, and a place in the metrics; around all other middlewares.

    `prepared` is for ``on_response_prepare``: a stream's head is on its way long before its end.
    """

    def __init__(self, metrics: Metrics, networks: Sequence[Network]) -> None:
        """
        Args:
            metrics: Where answers are counted.
            networks: Of the proxies whose ``X-Request-ID`` is taken, if it is well-formed.
        """
        self._metrics = metrics
        self._networks = networks

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request.headers.get(_X_REQUEST_ID, "")
        if not (
            _ID.fullmatch(request_id)
            and self._networks
            and _trusted(request.remote, self._networks)
        ):
            request_id = secrets.token_hex(8)
        request[_REQUEST_ID] = request_id
        request[_ARRIVED] = time.perf_counter()
        token = REQUEST_ID.set(request_id)
        try:
            with spans.request(request.method, _template(request), request.headers) as span:
                request[_SPAN] = span
                try:
                    return await handler(request)
                except BaseException:
                    spans.unanswered(span)
                    raise
        finally:
            REQUEST_ID.reset(token)

    async def prepared(self, request: web.Request, response: web.StreamResponse) -> None:
        arrived = request.get(_ARRIVED)
        if arrived is None:  # no request of ours
            return
        response.headers[_X_REQUEST_ID] = request[_REQUEST_ID]
        spans.answered(request.get(_SPAN), response.status)
        route = _template(request) or "other"
        self._metrics.requests.labels(route, f"{response.status // 100}xx").inc()
        self._metrics.request_seconds.labels(route).observe(time.perf_counter() - arrived)


def _template(request: web.Request) -> str | None:
    """The template of the request's path; `None` if no route has it."""
    resource = request.match_info.route.resource
    return None if resource is None else resource.canonical


def trusted_proxies(networks: Sequence[Network]) -> Middleware:
    """Believe X-Forwarded-For and X-Forwarded-Proto from these networks, and from nobody else."""

    def trusted(address: str | None) -> bool:
        return _trusted(address, networks)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not networks or not trusted(request.remote):
            return await handler(request)
        changes: dict[str, str] = {}
        # From the right, as each proxy appends: the first address that is not a proxy of ours.
        hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
        for hop in reversed([hop.strip() for hop in hops if hop.strip()]):
            try:
                changes["remote"] = str(ipaddress.ip_address(hop))
            except ValueError:
                break
            if not trusted(hop):
                break
        protocol = request.headers.get("X-Forwarded-Proto", "").rpartition(",")[2].strip().lower()
        if protocol in ("http", "https"):
            changes["scheme"] = protocol
            request[_SECURE] = protocol == "https"
        return await handler(request.clone(**changes) if changes else request)  # type: ignore[arg-type]

    return middleware


def same_site(allowed_origins: Collection[str]) -> Middleware:
    """Refuse what another site makes a browser send, and answer the preflights of allowed ones.

    Every call that changes something needs a JSON body, which a form cannot send, and comes from
    this origin or an allowed one: by ``Sec-Fetch-Site`` where the browser sends it, and by
    ``Origin``. Backends send neither.

    Args:
        allowed_origins: As browsers write them; the session is theirs to use.
    """
    allowed = frozenset(allowed_origins)

    def check(request: web.Request) -> None:
        origins = request.headers.getall(hdrs.ORIGIN, [])
        if len(origins) == 1 and origins[0] in allowed:
            return
        site = request.headers.get("Sec-Fetch-Site")
        if site not in (None, "same-origin", "none") or any(
            not _is_own(request, origin) for origin in origins
        ):
            raise CrossSite("This request was made by another site.")

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method in _SAFE_METHODS:
            if request.path == _STREAM:
                check(request)
            if request.method == hdrs.METH_OPTIONS and allowed:
                return await _preflight(request, handler, allowed)
            return await handler(request)
        check(request)
        # No form can send a token, and no script of another site may.
        with_token = request.path == _SESSION and hdrs.AUTHORIZATION in request.headers
        if (
            request.method != hdrs.METH_DELETE
            and not with_token
            and request.content_type != "application/json"
        ):
            raise UnsupportedMediaType("Send the body as application/json.")
        return await handler(request)

    return middleware


def _is_own(request: web.Request, origin: str) -> bool:
    scheme, host = request.scheme, request.host.lower()
    return origin == f"{scheme}://{host.removesuffix({'http': ':80', 'https': ':443'}[scheme])}"


async def _preflight(
    request: web.Request, handler: Handler, allowed: Collection[str]
) -> web.StreamResponse:
    """What a browser asks before it lets a page of another origin call (Fetch standard, 4.8)."""
    missing = request.match_info.http_exception
    if hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers or not isinstance(
        missing, web.HTTPMethodNotAllowed
    ):
        return await handler(request)
    if request.headers.get(hdrs.ORIGIN) not in allowed:
        raise CrossSite("This origin may not use the API.")
    return web.Response(
        status=204,
        headers={
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(sorted(missing.allowed_methods)),
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: _REQUEST_HEADERS,
            hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_SECONDS,
        },
    )


@web.middleware
async def loopback_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Serve under names of this machine only, for the demo, where anybody may sign in.

    A page elsewhere could let its own name point to 127.0.0.1 (DNS rebinding); to the browser this
    server would then be of that page's origin. The name in ``Host`` gives it away.
    """
    host = request.headers.get(hdrs.HOST)
    if host is not None and not _is_loopback(host):
        raise WrongHost("The demo is only served under localhost, 127.0.0.1 or [::1].")
    return await handler(request)


def _is_loopback(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match["name"].lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, 6.3
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class _LateBody(BodyTimeout, TimeoutError):
    # TimeoutError, because aiohttp itself, when it discards the rest of the body, waits for that.
    pass


def timely_bodies(seconds: float) -> Middleware:
    """Bound the time that a body may take to arrive.

    Args:
        seconds: From the head of the request to the end of its body.
    """

    def late(request: web.Request) -> None:
        if not request.content.is_eof():
            request.content.set_exception(_LateBody())

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.content.is_eof():
            return await handler(request)
        timer = asyncio.get_running_loop().call_later(seconds, late, request)
        try:
            return await handler(request)
        finally:
            timer.cancel()

    return middleware
