"""``/ops``: what operators look at, behind a key of its own.

The key comes once, in the body of a sign-in, and is answered with a cookie that says until when it
is good and is signed with the key: any process and node can check it, and a new key ends all of
them. Nothing here ever has the text of a message.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from sse_server import __version__, events
from sse_server.api.bodies import (
    DECIMAL,
    Answer,
    Body,
    Id,
    Query,
    Timestamp,
    integer,
    parse,
    parse_query,
)
from sse_server.api.notifications import STORE, json_response
from sse_server.api.operations import GAUGES, HUB
from sse_server.audit import AUDIT
from sse_server.errors import NotOperator
from sse_server.events import MAX_ID
from sse_server.limits import LIMITS, network
from sse_server.metrics import Totals

COOKIE = "sse_operator"
# Browsers insist on Secure, Path=/ and no Domain for the name with the prefix (RFC 6265bis).
SECURE_COOKIE = "__Host-sse_operator"
COOKIE_SECONDS = 12 * 3600

MOST_AUDIT_ROWS = 200


class Operators:
    """Who is let in."""

    def __init__(self, key: str) -> None:
        raw = key.encode("utf-8", "surrogatepass")
        self._hash = hashlib.sha256(raw).digest()
        self._signing_key = hmac.digest(raw, b"sse-server operator cookie", "sha256")

    def admits(self, key: str) -> bool:
        """Whether this is the key; how long that takes says nothing about it."""
        given = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return hmac.compare_digest(given, self._hash)

    def new_cookie(self) -> str:
        """What proves for `COOKIE_SECONDS` that the key was known."""
        said = f"{int(time.time()) + COOKIE_SECONDS}.{secrets.token_hex(8)}"
        return f"{said}.{self._signature(said)}"

    def believes(self, cookie: str) -> bool:
        """Whether it was made with this key, and is not over."""
        said, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(said).encode()):
            return False
        return int(said.partition(".")[0]) > time.time()

    def _signature(self, said: str) -> str:
        return hmac.new(self._signing_key, said.encode(), "sha256").hexdigest()


OPERATORS = web.AppKey("operators", Operators)


class OperatorKey(Body):
    key: Annotated[str, Field(min_length=1, max_length=1024)]


class AuditQuery(Query):
    limit: Annotated[int, Field(ge=1, le=MOST_AUDIT_ROWS), DECIMAL] = 50


class Bucket(Answer):
    """How many took at most so long; cumulative, as in Prometheus."""

    seconds: float | None = Field(description="`null` is: any time.")
    count: int


class Latency(Answer):
    """From `created_at` of the row to the live write, since the start."""

    count: int
    sum: float
    buckets: list[Bucket]


class FeedState(Answer):
    """Of several workers, the worst."""

    connected: bool
    polling: bool
    swept_seconds_ago: float
    heard_seconds_ago: float
    reconnects: int


class Pool(Answer):
    """Database connections."""

    in_use: int
    waiting: int
    size: int


class State(Answer):
    """What is, and totals since the start; of all workers of this node."""

    at: Timestamp
    version: str
    workers: int
    ready: bool
    streams: dict[str, int] = Field(description="Open ones, by state.")
    opened: int
    closed: dict[str, int] = Field(description="By reason.")
    turned_away: dict[str, int] = Field(description="By reason.")
    deliveries: int
    replays: int
    replayed: int
    lagged: int
    latency: Latency
    feed: FeedState
    pool: Pool
    refusals: dict[str, int] = Field(description="By limit.")
    published: dict[str, int] = Field(description="Recipients, by outcome.")
    deleted: dict[str, int] = Field(description="Rows deleted by retention.")


class AuditLine(Answer):
    at: Timestamp
    actor: str
    action: str
    user_id: str | None
    event_type: str | None
    notification_id: int | None
    outcome: str
    detail: dict[str, Any]


class AuditAnswer(Answer):
    """Newest first."""

    lines: list[AuditLine]


class Row(Answer):
    """What stands in the table, the text apart."""

    user_id: str
    event_type: str
    actor: str
    created_at: Timestamp
    read_at: Timestamp | None


class Refused(Answer):
    """Why there is no row, by the audit trail."""

    at: Timestamp
    user_id: str | None
    event_type: str | None
    actor: str
    preference: Annotated[str, Field(pattern="^(user|default)$")] | None = Field(
        description="Which one suppressed it: the user's own, or the event type's default."
    )


class Here(Answer):
    """What the process that answers knows, of the last thousands of notifications."""

    process: int
    streams: int = Field(description="Open ones of its user, now.")
    announced_at: Timestamp | None = Field(
        description="When the feed brought it to streams of its user; `null`: not to streams here, "
        "or too long ago."
    )
    written: int = Field(description="Streams it was written to live.")
    waiting: int = Field(description="Streams that were replaying or slow then.")
    replayed: int = Field(description="Streams that found it in the table.")


class Explained(Answer):
    """The way of one notification."""

    id: Id
    state: Annotated[
        str,
        Field(
            pattern="^(committed|suppressed|rate_limited|deleted|not_committed|not_given_out)$",
            description="`deleted`: older than all rows there are; `not_committed`: rolled back, "
            "not committed yet, or deleted by hand; `not_given_out`: no INSERT has had this id.",
        ),
    ]
    notification: Row | None
    refused: Refused | None
    here: Here


async def _operator(request: web.Request) -> None:
    """Let operators pass.

    Raises:
        NotOperator: No cookie, or none that is good.
        TooManyRequests: And that too often.
    """
    name = SECURE_COOKIE if request.secure else COOKIE
    if not request.app[OPERATORS].believes(request.cookies.get(name, "")):
        await request.app[LIMITS].anonymous.require(f"address:{network(request.remote)}")
        raise NotOperator("Sign in with the operator key.")


def _set_cookie(request: web.Request, response: web.Response, value: str, max_age: int) -> None:
    name, path = (SECURE_COOKIE, "/") if request.secure else (COOKIE, "/ops")
    response.set_cookie(
        name,
        value,
        max_age=max_age,
        path=path,
        secure=request.secure,
        httponly=True,
        samesite="Strict",
    )


async def sign_in(request: web.Request) -> web.Response:
    """POST /ops/api/session: exchanges the operator key for a cookie."""
    audit, address = request.app[AUDIT], f"address:{network(request.remote)}"
    await request.app[LIMITS].sign_ins.require(address)
    body = await parse(request, OperatorKey)
    if not request.app[OPERATORS].admits(body.key):
        audit.note("operator_sign_in", actor=address, outcome=NotOperator.slug)
        raise NotOperator("This is not the operator key.")
    audit.note("operator_sign_in", actor=address, outcome="ok")
    response = web.Response(status=204)
    _set_cookie(request, response, request.app[OPERATORS].new_cookie(), COOKIE_SECONDS)
    return response


async def sign_out(request: web.Request) -> web.Response:
    """DELETE /ops/api/session: takes the cookie away."""
    response = web.Response(status=204)
    _set_cookie(request, response, "", 0)
    return response


async def state(request: web.Request) -> web.Response:
    """GET /ops/api/state"""
    await _operator(request)
    totals = await request.app[GAUGES].totals()
    now = time.time()

    def ago(name: str) -> float:
        at = totals.one(name)
        return round(max(0.0, now - at), 3) if at else 0.0

    return json_response(
        {
            "at": events.timestamp(int(now * 1000)),
            "version": __version__,
            "workers": int(totals.one("sse_workers")),
            "ready": totals.one("sse_ready") > 0,
            "streams": _counts(totals, "sse_streams", "state"),
            "opened": int(totals.one("sse_streams_opened_total")),
            "closed": _counts(totals, "sse_streams_closed_total", "reason"),
            "turned_away": _counts(totals, "sse_streams_turned_away_total", "reason"),
            "deliveries": int(totals.one("sse_deliveries_total")),
            "replays": int(totals.one("sse_replays_total")),
            "replayed": int(totals.one("sse_replayed_notifications_total")),
            "lagged": int(totals.one("sse_streams_lagged_total")),
            "latency": _latency(totals),
            "feed": {
                "connected": totals.one("sse_feed_connected") > 0,
                "polling": totals.one("sse_feed_polling") > 0,
                "swept_seconds_ago": ago("sse_feed_swept_timestamp_seconds"),
                "heard_seconds_ago": ago("sse_feed_heard_timestamp_seconds"),
                "reconnects": int(totals.one("sse_feed_reconnects_total")),
            },
            "pool": {
                "in_use": int(totals.one("sse_pool_connections")),
                "waiting": int(totals.one("sse_pool_waiting")),
                "size": int(totals.one("sse_pool_size")),
            },
            "refusals": _counts(totals, "sse_limiter_refusals_total", "limit"),
            "published": _counts(totals, "sse_publish_recipients_total", "outcome"),
            "deleted": _counts(totals, "sse_retention_deleted_total", "what"),
        }
    )


def _counts(totals: Totals, name: str, label: str) -> dict[str, int]:
    return {value: int(count) for value, count in totals.by(name, label).items()}


def _latency(totals: Totals) -> dict[str, object]:
    name = "sse_created_to_written_seconds"
    buckets = totals.by(f"{name}_bucket", "le")
    return {
        "count": int(totals.one(f"{name}_count")),
        "sum": totals.one(f"{name}_sum"),
        "buckets": [
            {"seconds": None if bound == "+Inf" else float(bound), "count": int(count)}
            for bound, count in sorted(buckets.items(), key=lambda item: float(item[0]))
        ],
    }


async def recent_audit(request: web.Request) -> web.Response:
    """GET /ops/api/audit"""
    await _operator(request)
    asked = parse_query(request, AuditQuery)
    lines = await request.app[STORE].recent_audit(asked.limit)
    return json_response(
        {
            "lines": [
                {
                    "at": events.timestamp(line.at_ms),
                    "actor": line.actor,
                    "action": line.action,
                    "user_id": line.user_id,
                    "event_type": line.event_type,
                    "notification_id": line.notification_id,
                    "outcome": line.outcome,
                    "detail": line.detail,
                }
                for line in lines
            ]
        }
    )


async def explain(request: web.Request) -> web.Response:
    """GET /ops/api/notifications/{id}: what became of it."""
    await _operator(request)
    id = integer(request.match_info["id"], "id", 1, MAX_ID)
    known = await request.app[STORE].explain(id)
    hub = request.app[HUB]
    seen = hub.trace.find(id)
    row, refused = known.row, known.refused
    return json_response(
        {
            "id": id,
            "state": known.state,
            "notification": None
            if row is None
            else {
                "user_id": row.user_id,
                "event_type": row.event_type,
                "actor": row.actor,
                "created_at": events.timestamp(row.created_ms),
                "read_at": None if row.read_ms is None else events.timestamp(row.read_ms),
            },
            "refused": None
            if refused is None
            else {
                "at": events.timestamp(refused.at_ms),
                "user_id": refused.user_id,
                "event_type": refused.event_type,
                "actor": refused.actor,
                "preference": refused.detail.get("preference"),
            },
            "here": {
                "process": os.getpid(),
                "streams": 0 if row is None else hub.streams_of(row.user_id),
                "announced_at": None
                if seen is None or seen.at is None
                else events.timestamp(int(seen.at * 1000)),
                "written": 0 if seen is None else seen.written,
                "waiting": 0 if seen is None else seen.waiting,
                "replayed": 0 if seen is None else seen.replayed,
            },
        },
    )
