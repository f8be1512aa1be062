"""``POST /api/publish``: services send notifications."""

from __future__ import annotations

from typing import Annotated

from aiohttp import web
from pydantic import AfterValidator, FailFast, Field, StringConstraints

from sse_server import spans
from sse_server.api.bodies import Answer, Body, parse
from sse_server.api.notifications import json_response
from sse_server.api.operations import METRICS
from sse_server.errors import (
    BadRequest,
    ContentTooLarge,
    DatabaseError,
    DatabaseUnavailable,
    InvalidBody,
    ServiceError,
    Unavailable,
)
from sse_server.limits import network
from sse_server.services import SERVICES
from sse_server.store import Publication, Published

# Limits
BODY_BYTES = 1024 * 1024
MOST_RECIPIENTS = 10_000

# Repeated here so that a fault is answered with the name of its field; the constraints in
# schema.sql are what holds.
_MOST_USER_ID_BYTES = 255
_MOST_MESSAGE = 2_000
_MOST_LINK = 2_048


def _user_id(value: str) -> str:
    # At most 10,000 of them: most are decided by their number of characters.
    if len(value) * 4 > _MOST_USER_ID_BYTES and len(value.encode()) > _MOST_USER_ID_BYTES:
        raise ValueError(f"must have at most {_MOST_USER_ID_BYTES} bytes")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL (U+0000)")
    return value


Recipient = Annotated[
    str,
    StringConstraints(
        min_length=1, max_length=_MOST_USER_ID_BYTES, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$"
    ),
    AfterValidator(_user_id),
]


class Publish(Body):
    """One notification for up to 10,000 users."""

    recipients: Annotated[
        list[Recipient],
        FailFast(),  # ten thousand faults would say no more than the first
        Field(
            min_length=1,
            max_length=MOST_RECIPIENTS,
            description="Ids of users. One that is named twice gets it once.",
        ),
    ]
    event_type: Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,62}$")]
    message: Annotated[
        str,
        Field(min_length=1, max_length=_MOST_MESSAGE, description="Plain text."),
        AfterValidator(_no_nul),
    ]
    link: (
        Annotated[
            str,
            Field(
                min_length=1,
                max_length=_MOST_LINK,
                description="A path on the application's own site, or an https: URL of an allowed "
                "host.",
            ),
            AfterValidator(_no_nul),
        ]
        | None
    ) = None
    idempotency_key: (
        Annotated[
            str,
            Field(
                pattern="^[!-~]{1,255}$",
                description="The same key with the same body within 24 hours sends once and gets "
                "the same answer.",
            ),
        ]
        | None
    ) = None


class PublishedTo(Answer):
    """What became of it for one recipient."""

    user_id: str
    outcome: Annotated[str, Field(pattern="^(created|suppressed|rate_limited)$")]
    id: int | None


class PublishAnswer(Answer):
    """What became of it, for each distinct recipient in the order of the request."""

    results: list[PublishedTo]
    created: int
    suppressed: int
    rate_limited: int


async def publish(request: web.Request) -> web.Response:
    """POST /api/publish

    The answer to a request that repeats an earlier one bears ``Idempotent-Replayed: true``.
    """
    metrics = request.app[METRICS]
    try:
        published = await _publish(request)
    except ServiceError as exc:
        metrics.publish_requests.labels(exc.slug).inc()
        raise
    except DatabaseUnavailable:
        metrics.publish_requests.labels(Unavailable.slug).inc()
        raise
    except DatabaseError:
        metrics.publish_requests.labels(ServiceError.slug).inc()
        raise
    metrics.publish_requests.labels(published.outcome).inc()
    counts = {"created": 0, "suppressed": 0, "rate_limited": 0}
    results = []
    for user_id, outcome, id in published.results or []:
        results.append({"user_id": user_id, "outcome": outcome, "id": id})
        counts[outcome] += 1
    response = json_response({"results": results, **counts})
    if published.outcome == "repeated":
        response.headers["Idempotent-Replayed"] = "true"
    else:
        for outcome, count in counts.items():
            metrics.publish_recipients.labels(outcome).inc(count)
    return response


async def _publish(request: web.Request) -> Published:
    services = request.app[SERVICES]
    asking = await services.admit(request, f"address:{network(request.remote)}")
    try:
        body = await parse(request.clone(client_max_size=BODY_BYTES), Publish)
        if body.link is not None and not services.allows(body.link):
            reason = "must be a path on this site or an https: URL of an allowed host"
            raise InvalidBody(f"link: {reason}", errors=[{"field": "link", "problem": reason}])
    except (BadRequest, ContentTooLarge) as exc:
        raise await services.invalid(asking, exc) from None
    with spans.span("publish", recipients=len(body.recipients), event_type=body.event_type) as span:
        published = await services.publish(
            asking,
            Publication(
                body.recipients, body.event_type, body.message, body.link, body.idempotency_key
            ),
        )
        if span is not None:
            span.set_attribute("sse.outcome", published.outcome)
    return published
