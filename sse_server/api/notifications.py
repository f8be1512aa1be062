"""``/api/notifications``: history, the polling fallback, marking read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Self

from aiohttp import hdrs, web
from aiohttp.helpers import ETag
from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator

from sse_server import events
from sse_server.api.bodies import (
    DECIMAL,
    TRUE_OR_FALSE,
    Answer,
    Body,
    Id,
    Query,
    Timestamp,
    integer,
    left_out,
    parse,
    parse_query,
)
from sse_server.events import MAX_ID, Cursor, Notification
from sse_server.sessions import signed_in
from sse_server.snapshot import Snapshot
from sse_server.store import Position, Store

STORE = web.AppKey("store", Store)

# Limits
HISTORY_ROWS = 50
UNREAD_ROWS = 500
MOST_ROWS = 500
MOST_IDS = 1000
# Running transactions that a place names; an address of more would be too long for some proxies.
PLACE_XIP = 64

# As the table's constraint has it.
EVENT_TYPE = re.compile(r"[a-z][a-z0-9_]{0,62}")

EventTypeName = Annotated[
    str, Field(pattern=f"^{EVENT_TYPE.pattern}$", examples=["new_message", "status_change"])
]


class HistoryQuery(Query):
    before: Annotated[int, Field(ge=1, le=MAX_ID), DECIMAL] = Field(
        MAX_ID,
        description="Only those with a smaller id: `next_before` of the previous page.",
        json_schema_extra=left_out,
    )
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS), DECIMAL] = HISTORY_ROWS
    event_type: EventTypeName = Field(
        "", description="Only those of this type.", json_schema_extra=left_out
    )
    unread: Annotated[bool, TRUE_OR_FALSE] = Field(
        False, description="Only those that are not read yet."
    )


class UnreadQuery(Query):
    after: str = Field(
        "",
        description="The id of the last notification received, or `next` of the previous page. "
        "Without it: all unread ones. An unknown one is no error, but a `reset`.",
    )
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS), DECIMAL] = UNREAD_ROWS


def _true(value: bool) -> bool:
    # Not Literal[True]: 1 is that, too.
    if not value:
        raise ValueError("must be true")
    return value


class MarkRead(Body):
    """Exactly one of: some ids, all up to an id, or all."""

    model_config = ConfigDict(
        json_schema_extra={
            "minProperties": 1,
            "maxProperties": 1,
            "examples": [{"ids": [17, 18]}, {"up_to": 18}, {"all": True}],
        }
    )

    ids: list[Id] = Field([], min_length=1, max_length=MOST_IDS, json_schema_extra=left_out)
    up_to: Id = Field(MAX_ID, json_schema_extra=left_out)
    all: Annotated[bool, AfterValidator(_true), WithJsonSchema({"const": True})] = Field(
        True, json_schema_extra=left_out
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError('give exactly one of "ids", "up_to" and "all": true')
        return self


class Nothing(Body):
    """An empty object."""


class NotificationAnswer(Answer):
    """A notification, as the stream sends it."""

    id: Id
    created_at: Timestamp
    event_type: EventTypeName
    message: str = Field(description="Plain text; inert even where a page pastes it as HTML.")
    link: str | None = Field(description="A relative path or an https: URL of an allowed host.")


class HistoryItem(NotificationAnswer):
    read_at: Timestamp | None


UnreadCount = Annotated[
    int, Field(ge=0, description="Of all unread notifications, by the database.")
]


class HistoryAnswer(Answer):
    """Newest first. List and count are of the same moment."""

    notifications: list[HistoryItem]
    unread_count: UnreadCount
    next_before: Id | None = Field(description="`before` of the next page; null on the last one.")


class UnreadAnswer(Answer):
    """In the order of the stream. List and count are of the same moment."""

    notifications: list[NotificationAnswer]
    unread_count: UnreadCount
    reset: bool = Field(
        description="The cursor was unknown: these are all unread ones, the list is to be reloaded."
    )
    more: bool = Field(description="There is another page, to be asked for at once.")
    next: str | None = Field(
        description="`after` of the next request. Opaque while there is more; then the id of the "
        "last notification received."
    )


class MarkedAnswer(Answer):
    marked: int = Field(ge=0, description="How many were unread before.")
    unread_count: UnreadCount


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pass over the unread rows stands between two pages; `next` of an answer.

    An id alone would not do. All pages of a pass see one snapshot: otherwise a row that commits
    between two pages, with an id of the first, would be skipped, and the cursor, by then in the
    second, would cover it. And rows of one transaction, or written while a long one ran, are all
    "not older than" each other: after the last row of the first page, the first page would come
    again.

    Made up by somebody, it shows them nothing but rows of their own.

    Attributes:
        cursor: With which the pass began.
        after_id: Last id of the page before.
        snapshot: What the pass sees.
    """

    cursor: int | None
    after_id: int
    snapshot: Snapshot

    def __str__(self) -> str:
        seen = self.snapshot
        xip = sorted(seen.xip)
        # A snapshot in which fewer have ended loses nothing: what it hides is not older than any
        # row that it shows, so that the cursor, whichever it will be, does not cover it.
        ends = f"{seen.xmin}-{seen.xmax}" if len(xip) <= PLACE_XIP else f"{seen.xmin}-{seen.xmin}"
        running = "_".join(map(str, xip)) if len(xip) <= PLACE_XIP else ""
        return f"{self.cursor or 0}.{self.after_id}.{ends}-{running}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The place that `text` names; `None` if it names none."""
        match = _PLACE.fullmatch(text)
        if match is None:
            return None
        cursor, after_id, xmin, xmax = (int(match[part]) for part in range(1, 5))
        xip = [int(part) for part in match[5].split("_")] if match[5] else []
        # What PostgreSQL would refuse must not get there.
        if (
            max(cursor, after_id, xmax) > MAX_ID
            or not 3 <= xmin <= xmax
            or len(xip) > PLACE_XIP
            or any(not xmin <= xact < xmax for xact in xip)
            or xip != sorted(set(xip))
        ):
            return None
        snapshot = Snapshot(f"{xmin}:{xmax}:{','.join(map(str, xip))}")
        return cls(cursor or None, after_id, snapshot)


_PLACE = re.compile(
    r"([0-9]{1,19})\.([0-9]{1,19})\.([0-9]{1,19})-([0-9]{1,19})-((?:[0-9]{1,19}(?:_[0-9]{1,19})*)?)"
)


def _with_read_at(notification: Notification) -> dict[str, object]:
    read_ms = notification.read_ms
    return {
        **notification.as_json(),
        "read_at": None if read_ms is None else events.timestamp(read_ms),
    }


async def history(request: web.Request) -> web.Response:
    """GET /api/notifications: newest first, page by page."""
    who = await signed_in(request)
    query = parse_query(request, HistoryQuery)
    # One more than asked for: whether there is another page.
    rows, unread_count = await request.app[STORE].history(
        who.user_id,
        before=query.before if "before" in query.model_fields_set else None,
        event_type=query.event_type or None,
        only_unread=query.unread,
        limit=query.limit + 1,
    )
    page = rows[: query.limit]
    return json_response(
        {
            "notifications": [_with_read_at(row) for row in page],
            "unread_count": unread_count,
            "next_before": page[-1].id if len(rows) > len(page) else None,
        }
    )


async def unread(request: web.Request) -> web.StreamResponse:
    """GET /api/notifications/unread: for where streaming fails.

    Same order, same cursor and same content as the stream: `after` is the id of the last
    notification that the client has received, or the `next` of an answer.
    """
    who = await signed_in(request)
    query = parse_query(request, UnreadQuery)
    store = request.app[STORE]
    place = Place.parse(query.after)
    if place is None:
        cursor = Cursor(query.after)
        position = Position(who.user_id, cursor=cursor.id)
    else:
        cursor = Cursor(str(place.cursor or 0))
        position = Position(
            who.user_id, cursor=place.cursor, snapshot=place.snapshot, after_id=place.after_id
        )
    # One more than asked for: whether there is another page.
    [page] = await store.replay([position], query.limit + 1)
    if place is not None and page.snapshot is not place.snapshot:
        # Another cluster's: what has been sent in this pass means nothing here.
        position = Position(who.user_id, cursor=place.cursor)
        [page] = await store.replay([position], query.limit + 1)
    rows = page.notifications[: query.limit]
    more = len(page.notifications) > len(rows)
    last = rows[-1].id if rows else position.after_id or (cursor.id if page.known else None)
    answer: dict[str, object] = {
        "notifications": [row.as_json() for row in rows],
        "unread_count": page.unread_count,
        "reset": cursor.malformed or not page.known,
        "more": more,
    }
    # Without `next`, which names another snapshot each time: an older one leads on as well, from a
    # page that is the same. Hence a weak one (RFC 9110, 8.8.1).
    tag = hashlib.sha256(events.dumps(answer).encode()).hexdigest()[:32]
    headers: dict[str, str] = {hdrs.ETAG: f'W/"{tag}"', hdrs.CACHE_CONTROL: "no-store"}
    if _has(request, tag):
        return web.Response(status=304, headers=headers)
    if more:
        assert last is not None
        answer["next"] = str(Place(cursor.id, last, page.snapshot))
    else:
        answer["next"] = None if last is None else str(last)
    return json_response(answer, headers=headers)


def _has(request: web.Request, tag: str) -> bool:
    """Whether the client has this very answer (RFC 9110, 13.1.2: compared weakly)."""
    held: tuple[ETag, ...] = request.if_none_match or ()
    return any(etag.value in (tag, "*") for etag in held)


async def mark_read(request: web.Request) -> web.Response:
    """POST /api/notifications/read"""
    who = await signed_in(request)
    body = await parse(request, MarkRead)
    store = request.app[STORE]
    if body.ids:
        return _marked(await store.mark_read(who.user_id, ids=body.ids))
    return _marked(await store.mark_read(who.user_id, up_to=body.up_to))


async def mark_one_read(request: web.Request) -> web.Response:
    """POST /api/notifications/{id}/read; marking one twice, or another's, changes nothing."""
    who = await signed_in(request)
    id = integer(request.match_info["id"], "id", 1, MAX_ID)
    # As everywhere: a form could send an empty body, but no JSON.
    await parse(request, Nothing)
    return _marked(await request.app[STORE].mark_read(who.user_id, ids=[id]))


def _marked(counts: tuple[int, int]) -> web.Response:
    marked, unread_count = counts
    return json_response({"marked": marked, "unread_count": unread_count})


def json_response(
    value: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """JSON that is inert in HTML and that no cache keeps."""
    return web.json_response(
        value,
        status=status,
        dumps=events.dumps,
        headers={hdrs.CACHE_CONTROL: "no-store", **(headers or {})},
    )
