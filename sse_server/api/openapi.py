"""``/api/openapi.json``: the description of everything that is served, and a page to read it.

Bodies and query strings are described by the models that validate them, errors by their classes.
The tests check every answer they get against the document, and that no route is missing in it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from aiohttp import hdrs, web
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from sse_server import __version__
from sse_server.api import notifications, ops, preferences, publish, session
from sse_server.api.bodies import Answer, Id, Query, Timestamp, left_out
from sse_server.api.notifications import NotificationAnswer, json_response
from sse_server.errors import (
    BadRequest,
    BodyTimeout,
    ContentTooLarge,
    CrossSite,
    Forbidden,
    IdempotencyConflict,
    InvalidBody,
    InvalidKey,
    InvalidToken,
    NotFound,
    NotOperator,
    NotSignedIn,
    RequiredEventType,
    RevokedKey,
    ServiceError,
    TokensNotAccepted,
    TokenUsed,
    TooManyRequests,
    Unavailable,
    UnknownEventType,
    UnsupportedMediaType,
    WrongHost,
)
from sse_server.events import MAX_ID, Closing
from sse_server.middleware import PROBLEM_JSON

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

# Answers


class Fault(Answer):
    field: str = Field(description="Path of the member; empty for the whole.")
    problem: str


class Problem(BaseModel):
    """A problem document (RFC 9457). `type` is stable; `detail` is for reading."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str = ""


class SessionAnswer(Answer):
    user_id: str
    expires_at: Timestamp


class DemoPublished(Answer):
    outcome: Literal["created", "suppressed", "rate_limited"]
    id: Id | None


class Status(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    status: Literal["ok", "unavailable"]
    failed: list[Literal["feed", "draining", "database"]]


# The stream's events, by their names

# The others are not on the wire.
_CLOSING = tuple(reason.value for reason in Closing if reason is not Closing.GONE)


class Ready(Answer):
    """The replay is done, live from here."""

    unread_count: int = Field(ge=0)
    heartbeat_seconds: float


class Read(Answer):
    """Marked read, here or on another device: some ids, or all up to one."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    ids: list[Id] = Field([], json_schema_extra=left_out)
    up_to: Id = Field(MAX_ID, json_schema_extra=left_out)


class ChangedPreference(Answer):
    event_type: notifications.EventTypeName
    enabled: bool


class Changed(Answer):
    """Switched on or off, here or elsewhere."""

    preferences: list[ChangedPreference]


class Reset(Answer):
    """The cursor was unknown: all unread notifications follow, the list is to be reloaded."""

    reason: Literal["unknown_cursor"]


class Ping(Answer):
    """The heartbeat."""

    time: Timestamp


class Closed(Answer):
    """The last event of every stream, together with a `retry:` of the same value."""

    reason: Annotated[str, Field(json_schema_extra={"enum": list(_CLOSING)})]
    retry_ms: int = Field(ge=0)


STREAM_EVENTS: Mapping[str, type[BaseModel]] = {
    "notification": NotificationAnswer,
    "ready": Ready,
    "read": Read,
    "preferences": Changed,
    "reset": Reset,
    "ping": Ping,
    "closing": Closed,
}

# Operations

Security = Literal["session", "token", "serviceKey", "operator"]


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer that is no error.

    Attributes:
        model: Of its JSON.
        content: Instead of JSON: media types and their schemas.
        headers: Besides those that every answer bears, with what they are for.
        example: Of its JSON.
        more: Further members of the media types.
    """

    description: str
    model: type[BaseModel] | None = None
    content: Mapping[str, JsonSchemaValue] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    example: object = None
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Attributes:
        path: As in the table of routes.
        parameters: Of path and headers; those of the query string come from `query`.
        example: Of the body.
        errors: What it may be answered with, apart from what all operations of its kind may.
        demo: Whether it is there in demo mode only.
        operator: Whether it is there only if an operator key is set.
    """

    id: str
    method: str
    path: str
    tag: str
    summary: str
    description: str = ""
    security: Security | None = None
    parameters: Sequence[Mapping[str, object]] = ()
    query: type[Query] | None = None
    body: type[BaseModel] | None = None
    example: object = None
    body_required: bool = True
    replies: Mapping[int, Reply] = field(default_factory=dict)
    errors: Sequence[type[ServiceError]] = ()
    demo: bool = False
    operator: bool = False

    def all_errors(self) -> list[type[ServiceError]]:
        """All that it may be answered with, by status."""
        found: set[type[ServiceError]] = set(self.errors)
        if self.path.startswith("/api/"):
            # Counted for the user, and whose session it is stands in the database.
            found |= {TooManyRequests, Unavailable}
        if self.security == "operator":
            found |= {NotOperator, TooManyRequests}
        if self.security == "session":
            found |= {NotSignedIn, Unavailable}
        if self.query is not None:
            found.add(BadRequest)
        if self.method != "get":
            found.add(CrossSite)
            if self.method != "delete":
                found.add(UnsupportedMediaType)
        if self.body is not None:
            found |= {BadRequest, BodyTimeout, ContentTooLarge, InvalidBody}
        return sorted(found, key=lambda error: (error.status, error.slug))


def _in_path(name: str, description: str, **schema: object) -> dict[str, object]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema,
    }


def _file(media_type: str, description: str) -> dict[int, Reply]:
    content: Mapping[str, JsonSchemaValue] = {media_type: {}}
    return {
        200: Reply(description, content=content),
        206: Reply("The range that was asked for.", content=content),
        304: Reply("The client has it."),
        412: Reply("It has changed."),
        416: Reply("It has no such range."),
    }


def _problem_type(error: type[ServiceError]) -> str:
    return f"urn:sse-server:problem:{error.slug}"


def _problem_schema(errors: Sequence[type[ServiceError]]) -> JsonSchemaValue:
    """For errors of one status."""
    return {
        "allOf": [{"$ref": "#/components/schemas/Problem"}],
        "properties": {
            "type": {"enum": [_problem_type(error) for error in errors]},
            "status": {"const": errors[0].status},
        },
    }


# Examples

_NOTIFICATION = {
    "id": 17,
    "created_at": "2026-01-31T12:00:00.000Z",
    "event_type": "new_message",
    "message": "Your order has shipped.",
    "link": "/orders/17",
}
_MARKED = {"marked": 1, "unread_count": 3}
_PREFERENCE = {
    "event_type": "new_message",
    "description": "Somebody wrote to you",
    "enabled": True,
    "required": False,
}
_PREFERENCES = {"preferences": [_PREFERENCE]}
_SESSION = {"user_id": "alice", "expires_at": "2026-02-07T12:00:00.000Z"}
_SIGNED_IN = Reply(
    "Signed in.", SessionAnswer, headers={"Set-Cookie": "The session."}, example=_SESSION
)

_STATE = {
    "at": "2026-01-31T12:00:00.000Z",
    "version": "1.0.0",
    "workers": 1,
    "ready": True,
    "streams": {"live": 1200, "replaying": 3, "lagging": 0},
    "opened": 1500,
    "closed": {"gone": 290, "max_age": 7},
    "turned_away": {},
    "deliveries": 88000,
    "replays": 1497,
    "replayed": 4100,
    "lagged": 0,
    "latency": {
        "count": 80000,
        "sum": 240.5,
        "buckets": [{"seconds": 0.005, "count": 79000}, {"seconds": None, "count": 80000}],
    },
    "feed": {
        "connected": True,
        "polling": False,
        "swept_seconds_ago": 1.2,
        "heard_seconds_ago": 0.1,
        "reconnects": 0,
    },
    "pool": {"in_use": 1, "waiting": 0, "size": 8},
    "refusals": {"api_calls": 0},
    "published": {"created": 500},
    "deleted": {"notifications": 12000},
}
_AUDIT_LINE = {
    "at": "2026-01-31T12:00:00.000Z",
    "actor": "service:shop",
    "action": "send",
    "user_id": "alice",
    "event_type": "new_message",
    "notification_id": 17,
    "outcome": "created",
    "detail": {},
}
_EXPLAINED = {
    "id": 17,
    "state": "committed",
    "notification": {
        "user_id": "alice",
        "event_type": "new_message",
        "actor": "service:shop",
        "created_at": "2026-01-31T12:00:00.000Z",
        "read_at": None,
    },
    "refused": None,
    "here": {
        "process": 4711,
        "streams": 2,
        "announced_at": "2026-01-31T12:00:00.004Z",
        "written": 2,
        "waiting": 0,
        "replayed": 0,
    },
}

OPERATIONS: Sequence[Operation] = (
    Operation(
        "stream",
        "get",
        "/api/stream",
        "Notifications",
        "The event stream",
        "For `EventSource`. Unread notifications after the cursor, then `ready`, then what comes. "
        "Each event's data is described under `x-events`; only `notification` has an `id`. A new "
        "stream of the same session supersedes the older one. With `Accept: text/event-stream`, "
        "what cannot be served now is answered with 200, `retry:` and `closing`, since a browser "
        "gives up for good on anything else.",
        security="session",
        parameters=(
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The cursor: id of the last notification received. A browser sends "
                "it by itself when it reconnects. An unknown one is answered with `reset`.",
                "schema": {"type": "string"},
            },
            {
                "name": "last_event_id",
                "in": "query",
                "description": "The same, for a first connect; the header wins.",
                "schema": {"type": "string"},
            },
        ),
        replies={
            200: Reply(
                "Events until either side ends it.",
                content={EVENT_STREAM: {"type": "string"}},
                more={
                    "x-events": {
                        name: {"$ref": f"#/components/schemas/{model.__name__}"}
                        for name, model in STREAM_EVENTS.items()
                    },
                    "example": 'id: 17\nevent: notification\ndata: {"id":17,"created_at":'
                    '"2026-01-31T12:00:00.000Z","event_type":"new_message","message":"Hello",'
                    '"link":null}\n\nevent: ready\ndata: {"unread_count":1,'
                    '"heartbeat_seconds":15.0}\n\n',
                },
            )
        },
        errors=(CrossSite,),
    ),
    Operation(
        "list_notifications",
        "get",
        "/api/notifications",
        "Notifications",
        "History, newest first",
        security="session",
        query=notifications.HistoryQuery,
        replies={
            200: Reply(
                "One page.",
                notifications.HistoryAnswer,
                example={
                    "notifications": [{**_NOTIFICATION, "read_at": None}],
                    "unread_count": 1,
                    "next_before": None,
                },
            )
        },
    ),
    Operation(
        "list_unread",
        "get",
        "/api/notifications/unread",
        "Notifications",
        "What the stream would send, polled",
        "For where streaming fails: the stream's order, cursor and content. Give the `next` of "
        "each answer as `after` of the following request: no notification is left out, however "
        "late it was committed; a few may come twice, as in the stream.",
        security="session",
        query=notifications.UnreadQuery,
        parameters=(
            {
                "name": "If-None-Match",
                "in": "header",
                "description": "The `ETag` of the answer that the client has.",
                "schema": {"type": "string"},
            },
        ),
        replies={
            200: Reply(
                "One page.",
                notifications.UnreadAnswer,
                example={
                    "notifications": [_NOTIFICATION],
                    "unread_count": 1,
                    "reset": False,
                    "more": False,
                    "next": "17",
                },
                headers={"ETag": "Changes whenever the answer does, `next` apart."},
            ),
            304: Reply("The client has this answer.", headers={"ETag": "The same."}),
        },
    ),
    Operation(
        "mark_read",
        "post",
        "/api/notifications/read",
        "Notifications",
        "Mark some, or all up to an id, or all read",
        "Idempotent. Ids that are not the user's change nothing and are not told apart. The user's "
        "other streams get a `read` event.",
        security="session",
        body=notifications.MarkRead,
        example={"ids": [17, 18]},
        replies={200: Reply("Done.", notifications.MarkedAnswer, example=_MARKED)},
    ),
    Operation(
        "mark_one_read",
        "post",
        "/api/notifications/{id}/read",
        "Notifications",
        "Mark one read",
        "As `mark_read` with one id; for a click on a link.",
        security="session",
        parameters=(
            _in_path("id", "Of the notification.", type="integer", minimum=1, maximum=MAX_ID),
        ),
        body=notifications.Nothing,
        example={},
        replies={200: Reply("Done.", notifications.MarkedAnswer, example=_MARKED)},
    ),
    Operation(
        "get_preferences",
        "get",
        "/api/preferences",
        "Preferences",
        "Which event types reach the user",
        security="session",
        replies={
            200: Reply("All event types.", preferences.PreferencesAnswer, example=_PREFERENCES)
        },
    ),
    Operation(
        "change_preferences",
        "patch",
        "/api/preferences",
        "Preferences",
        "Switch several event types on or off",
        "All of them or, if one is refused, none. Holds from the next notification on; what is "
        "there stays. The user's other streams get `preferences` events.",
        security="session",
        body=preferences.Switches,
        example={"new_message": True, "status_change": False},
        replies={
            200: Reply("All event types.", preferences.PreferencesAnswer, example=_PREFERENCES)
        },
        errors=(UnknownEventType, RequiredEventType),
    ),
    Operation(
        "set_preference",
        "put",
        "/api/preferences/{event_type}",
        "Preferences",
        "Switch one event type on or off",
        security="session",
        parameters=(_in_path("event_type", "Its name.", type="string", examples=["new_message"]),),
        body=preferences.Switch,
        example={"enabled": True},
        replies={200: Reply("As it is now.", preferences.PreferenceAnswer, example=_PREFERENCE)},
        errors=(UnknownEventType, RequiredEventType),
    ),
    Operation(
        "sign_in",
        "post",
        "/api/session",
        "Session",
        "Exchange a token for a session",
        "The token is a JWT of the application's backend. Needs `sub`, `exp`, `iat`, `jti` and "
        "`aud`; lives at most 15 minutes; works once. The session that the cookie holds ends.",
        security="token",
        body=session.SignIn,
        example={},
        body_required=False,
        replies={200: _SIGNED_IN},
        errors=(InvalidToken, TokenUsed, TokensNotAccepted),
    ),
    Operation(
        "get_session",
        "get",
        "/api/session",
        "Session",
        "Who is signed in",
        security="session",
        replies={200: Reply("The user.", SessionAnswer, example=_SESSION)},
    ),
    Operation(
        "sign_out",
        "delete",
        "/api/session",
        "Session",
        "End the session, and its stream on whatever node",
        security="session",
        replies={204: Reply("It has ended.")},
    ),
    Operation(
        "publish",
        "post",
        "/api/publish",
        "Publishing",
        "Send a notification to up to 10,000 users",
        "One row for each distinct recipient who has not switched the type off and is not over "
        "the limit; the answer says which. The body may have 1 MiB. With an idempotency key, the "
        "same request within 24 hours gets the same answer and sends nothing.",
        security="serviceKey",
        body=publish.Publish,
        example={
            "recipients": ["alice", "bob"],
            "event_type": "new_message",
            "message": "Your order has shipped.",
            "link": "/orders/17",
            "idempotency_key": "order-17-shipped",
        },
        replies={
            200: Reply(
                "What became of it, for each recipient.",
                publish.PublishAnswer,
                example={
                    "results": [
                        {"user_id": "alice", "outcome": "created", "id": 17},
                        {"user_id": "bob", "outcome": "suppressed", "id": None},
                    ],
                    "created": 1,
                    "suppressed": 1,
                    "rate_limited": 0,
                },
                headers={"Idempotent-Replayed": "`true` if it had been sent before."},
            )
        },
        errors=(IdempotencyConflict, InvalidKey, RevokedKey),
    ),
    Operation(
        "operator_sign_in",
        "post",
        "/ops/api/session",
        "Operator",
        "Exchange the operator key for a cookie",
        f"The cookie is good for {ops.COOKIE_SECONDS // 3600} hours, or until the key is another.",
        body=ops.OperatorKey,
        example={"key": "the operator key, of at least 32 characters"},
        replies={204: Reply("Signed in.", headers={"Set-Cookie": "Proves it."})},
        errors=(NotOperator, TooManyRequests),
        operator=True,
    ),
    Operation(
        "operator_sign_out",
        "delete",
        "/ops/api/session",
        "Operator",
        "Take the cookie away",
        replies={204: Reply("Done.", headers={"Set-Cookie": "An empty one."})},
        operator=True,
    ),
    Operation(
        "operator_state",
        "get",
        "/ops/api/state",
        "Operator",
        "What is, and totals since the start",
        "Of all workers of this node. Ask again and subtract for rates.",
        security="operator",
        replies={200: Reply("Now.", ops.State, example=_STATE)},
        operator=True,
    ),
    Operation(
        "operator_audit",
        "get",
        "/ops/api/audit",
        "Operator",
        "The newest lines of the audit trail",
        security="operator",
        query=ops.AuditQuery,
        replies={200: Reply("Newest first.", ops.AuditAnswer, example={"lines": [_AUDIT_LINE]})},
        errors=(Unavailable,),
        operator=True,
    ),
    Operation(
        "explain",
        "get",
        "/ops/api/notifications/{id}",
        "Operator",
        "What became of a notification",
        "What the database knows of it, and what the process that answers has done with it lately.",
        security="operator",
        parameters=(
            _in_path("id", "Of the notification.", type="integer", minimum=1, maximum=MAX_ID),
        ),
        replies={200: Reply("Its way.", ops.Explained, example=_EXPLAINED)},
        errors=(BadRequest, NotFound, Unavailable),
        operator=True,
    ),
    Operation(
        "operator_page",
        "get",
        "/ops",
        "Operator",
        "The operators' page",
        replies=_file("text/html", "A page."),
        operator=True,
    ),
    Operation(
        "demo_sign_in",
        "post",
        "/demo/session",
        "Demo",
        "Sign in as anybody",
        body=session.DemoSignIn,
        example={"user_id": "alice"},
        replies={200: _SIGNED_IN},
        errors=(Unavailable,),
        demo=True,
    ),
    Operation(
        "demo_publish",
        "post",
        "/demo/publish",
        "Demo",
        "Send a notification to anybody",
        security="session",
        body=session.DemoPublish,
        example={"user_id": "alice", "event_type": "new_message", "message": "Hello"},
        replies={
            200: Reply(
                "What became of it.", DemoPublished, example={"outcome": "created", "id": 17}
            )
        },
        demo=True,
    ),
    Operation(
        "openapi",
        "get",
        "/api/openapi.json",
        "Service",
        "This document",
        replies={200: Reply("OpenAPI 3.1.", content={JSON: {"type": "object"}})},
    ),
    Operation(
        "docs",
        "get",
        "/api/docs",
        "Service",
        "This document, to be read",
        replies=_file("text/html", "A page."),
    ),
    Operation(
        "livez",
        "get",
        "/livez",
        "Service",
        "The process answers",
        replies={200: Reply("It does.", Status)},
    ),
    Operation(
        "readyz",
        "get",
        "/readyz",
        "Service",
        "Able to serve: database and feed",
        replies={200: Reply("It is.", Readiness), 503: Reply("Not now.", Readiness)},
    ),
    Operation(
        "metrics",
        "get",
        "/metrics",
        "Service",
        "Metrics for Prometheus",
        replies={200: Reply("The text format.", content={"text/plain": {"type": "string"}})},
    ),
    Operation(
        "page",
        "get",
        "/",
        "Service",
        "The inbox",
        replies=_file("text/html", "A page."),
    ),
    Operation(
        "static",
        "get",
        "/static/{filename}",
        "Service",
        "The client and what else pages load",
        parameters=(_in_path("filename", "Its path.", type="string", examples=["client.js"]),),
        replies={
            **_file("*/*", "A file."),
            404: Reply(
                "There is no such file.",
                content={
                    "application/octet-stream": {},
                    PROBLEM_JSON: _problem_schema([NotFound]),
                },
            ),
        },
        errors=(Forbidden,),
    ),
)

_SECURITY_SCHEMES = {
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": "sse_session",
        "description": "Set by `POST /api/session`; `__Host-sse_session` over TLS.",
    },
    "token": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "Signed by the application's backend; at most 15 minutes, works once.",
    },
    "operator": {
        "type": "apiKey",
        "in": "cookie",
        "name": "sse_operator",
        "description": "Set by `POST /ops/api/session`; `__Host-sse_operator` over TLS.",
    },
    "serviceKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "Printed once by `sse-server service add NAME`.",
    },
}

_DESCRIPTION = """\
Rows in PostgreSQL become Server-Sent Events in the browser.

Bodies are JSON in UTF-8 with `Content-Type: application/json`; members and parameters that are not
described are refused. Errors are problem documents (RFC 9457), to be told apart by `type`. Answers
may get further members. Calls that change something are refused if another site makes them.
"""


class _Generator(GenerateJsonSchema):
    """Without what only repeats the names, and without defaults that mean "left out"."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        value = super().default_schema(schema)
        if value.get("default", 0) is None:
            del value["default"]
        return value


def _problems(errors: Sequence[type[ServiceError]]) -> dict[str, object]:
    """The response for errors of one status."""
    response: dict[str, object] = {
        "description": "; or ".join(f"{error.title} (`{error.slug}`)" for error in errors),
        "content": {
            PROBLEM_JSON: {
                "schema": _problem_schema(errors),
                "example": {
                    "type": _problem_type(errors[0]),
                    "title": errors[0].title,
                    "status": errors[0].status,
                },
            }
        },
    }
    if errors[0].status in (429, 503):
        response["headers"] = {
            "Retry-After": {
                "description": "Seconds after which to try again.",
                "schema": {"type": "integer", "minimum": 1},
            }
        }
    return response


def _media_type(model: type[BaseModel], example: object) -> dict[str, object]:
    described: dict[str, object] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if example is not None:
        described["example"] = example
    return described


def _reply(reply: Reply) -> dict[str, object]:
    response: dict[str, object] = {"description": reply.description}
    if reply.model is not None:
        response["content"] = {JSON: _media_type(reply.model, reply.example)}
    elif reply.content is not None:
        response["content"] = {
            media_type: {"schema": dict(schema), **reply.more}
            for media_type, schema in reply.content.items()
        }
    if reply.headers:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in reply.headers.items()
        }
    return response


def _query_parameters(schema: JsonSchemaValue) -> list[dict[str, object]]:
    parameters = []
    for name, described in schema["properties"].items():
        described = dict(described)
        text = described.pop("description", "")
        parameter: dict[str, object] = {"name": name, "in": "query", "schema": described}
        if text:
            parameter["description"] = text
        parameters.append(parameter)
    return parameters


def _operation(
    operation: Operation, schemas: Mapping[str, JsonSchemaValue], *, demo: bool
) -> dict[str, object]:
    described: dict[str, object] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [operation.tag],
        "security": [] if operation.security is None else [{operation.security: []}],
    }
    if operation.description:
        described["description"] = operation.description
    parameters = [dict(parameter) for parameter in operation.parameters]
    if operation.query is not None:
        parameters += _query_parameters(schemas[operation.query.__name__])
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": operation.body_required,
            "content": {JSON: _media_type(operation.body, operation.example)},
        }
    responses: dict[str, object] = {
        str(status): _reply(reply) for status, reply in operation.replies.items()
    }
    by_status: dict[int, list[type[ServiceError]]] = {}
    # The demo is served under names of this machine only.
    everywhere: list[type[ServiceError]] = [WrongHost] if demo else []
    for error in operation.all_errors() + everywhere:
        by_status.setdefault(error.status, []).append(error)
    for status, errors in by_status.items():
        responses[str(status)] = _problems(errors)
    described["responses"] = dict(sorted(responses.items()))
    return described


def _names_of_answers(model: type[Answer]) -> Iterator[str]:
    yield model.__name__
    for derived in model.__subclasses__():
        yield from _names_of_answers(derived)


@functools.cache
def document(*, demo: bool = False, operator: bool = False, strict: bool = False) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        demo: Whether the demo's routes are served.
        operator: Whether those of operators are.
        strict: Forbid members of answers that are not described, for tests. Clients must expect
            them: later versions may have more.
    """
    operations = [
        operation
        for operation in OPERATIONS
        if (demo or not operation.demo) and (operator or not operation.operator)
    ]
    models: set[type[BaseModel]] = {Problem, Fault, *STREAM_EVENTS.values()}
    for operation in operations:
        models.update(reply.model for reply in operation.replies.values() if reply.model)
        models.update(model for model in (operation.body, operation.query) if model)
    _, generated = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Generator,
    )
    schemas = cast(dict[str, JsonSchemaValue], generated["$defs"])
    paths: dict[str, dict[str, object]] = {}
    for operation in operations:
        path = paths.setdefault(operation.path, {})
        path[operation.method] = _operation(operation, schemas, demo=demo)
    for model in Query.__subclasses__():
        schemas.pop(model.__name__, None)  # described as parameters
    if not strict:
        for name in _names_of_answers(Answer):
            if name in schemas:
                schemas[name].pop("additionalProperties", None)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sse-server",
            "version": __version__,
            "summary": "A notification push service.",
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "Notifications"},
            {"name": "Preferences"},
            {"name": "Session"},
            {"name": "Publishing"},
            {"name": "Service"},
            *([{"name": "Operator", "description": "Behind a key."}] if operator else []),
            *([{"name": "Demo", "description": "For trials on this machine."}] if demo else []),
        ],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SECURITY_SCHEMES},
    }


DOCUMENT = web.AppKey("openapi_document", dict[str, Any])


async def get(request: web.Request) -> web.Response:
    """GET /api/openapi.json"""
    return json_response(request.app[DOCUMENT], headers={hdrs.CACHE_CONTROL: "no-cache"})
