"""What goes on the wire: notifications, and the frames of the event stream.

A frame is one event of the WHATWG HTML standard, section 9.2 (server-sent events), already wrapped
as one chunk of HTTP/1.1 (RFC 9112, section 7.1), so that the same bytes go to every stream.
Only `notification` carries an ``id:``; a control event with an id would move the client's cursor.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

# A plain `retry:` for the browser's own EventSource: as good as never, in milliseconds.
NEVER_MS = 365 * 86_400_000

# The largest id there can be (bigint); a greater cursor cannot be anybody's.
MAX_ID = 2**63 - 1


class Closing(StrEnum):
    """Why a stream ended; the last event of every stream names it."""

    SUPERSEDED = "superseded"  # the session has opened another stream
    SESSION_ENDED = "session_ended"  # signed out, revoked or expired
    SHUTDOWN = "shutdown"  # this process is going away
    OVERLOAD = "overload"  # this process has no room for another stream
    LIMIT = "limit"  # this user has no room for another stream
    UNAVAILABLE = "unavailable"  # the database does not answer
    SLOW = "slow"  # the client does not read
    MAX_AGE = "max_age"  # streams do not live for ever
    # Not on the wire: the client has gone and nobody is there to be told.
    GONE = "gone"


# Milliseconds after which a client should come back, as a range to draw from. Clients that all lose
# their stream at the same moment must not all come back at the same moment.
RETRY_MS: dict[Closing, tuple[int, int]] = {
    Closing.SUPERSEDED: (NEVER_MS, NEVER_MS),
    Closing.SESSION_ENDED: (NEVER_MS, NEVER_MS),
    Closing.SHUTDOWN: (500, 5_000),
    Closing.OVERLOAD: (10_000, 30_000),
    Closing.LIMIT: (60_000, 120_000),
    Closing.UNAVAILABLE: (2_000, 10_000),
    Closing.SLOW: (1_000, 5_000),
    Closing.MAX_AGE: (100, 2_000),
    Closing.GONE: (1_000, 5_000),
}

# What a stream is told at its start, for when the line is cut without a word.
DEFAULT_RETRY_MS = (1_000, 5_000)

# JSON may be pasted into a page: none of these may end a script or start a tag or an entity.
_UNSAFE_IN_HTML = {
    ord("<"): "\\u003c",
    ord(">"): "\\u003e",
    ord("&"): "\\u0026",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def dumps(value: object) -> str:
    """Compact JSON that is inert in HTML: ``<``, ``>``, ``&``, U+2028 and U+2029 are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_UNSAFE_IN_HTML)


@functools.lru_cache(maxsize=256)  # all recipients of a statement have the same
def timestamp(ms: int) -> str:
    """ISO 8601 in UTC with milliseconds, of milliseconds since 1970."""
    seconds, rest = divmod(ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a notification says, sanitised; shared by all recipients of one message.

    Attributes:
        tail: The end of the JSON object, encoded once: ``,"event_type":…,"message":…,"link":…}``.
    """

    event_type: str
    message: str
    link: str | None
    tail: bytes

    @classmethod
    def of(cls, event_type: str, message: str, link: str | None) -> Content:
        """Build one from text that is sanitised already."""
        fields = dumps({"event_type": event_type, "message": message, "link": link})
        return cls(event_type, message, link, b"," + fields[1:].encode())


@dataclass(frozen=True, slots=True, eq=False)
class Notification:
    """One row on its way to its user.

    Attributes:
        created_ms: Milliseconds since 1970.
        xact: The transaction that wrote it (a full 64-bit id).
        read_ms: When it was read, or ``None``.
    """

    id: int
    user_id: str
    content: Content
    created_ms: int
    xact: int
    read_ms: int | None = None

    def as_json(self) -> dict[str, object]:
        """The members of the stream's data object, in its order."""
        return {
            "id": self.id,
            "created_at": timestamp(self.created_ms),
            "event_type": self.content.event_type,
            "message": self.content.message,
            "link": self.content.link,
        }


class Cursor:
    """The cursor that a client came with.

    Attributes:
        id: Of the last notification it has; `None` if it has none.
        malformed: It said something that is no id; it is to reset its list.
    """

    __slots__ = ("id", "malformed")

    def __init__(self, text: str | None) -> None:
        self.id: int | None = None
        self.malformed = False
        if not text:
            return
        # str.isdigit() alone would take "²" and "٣".
        if text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= MAX_ID:
            # 0 has never been anybody's: "I have nothing yet".
            self.id = int(text) or None
        else:
            self.malformed = True


def chunk(event: bytes) -> bytes:
    """One event as one chunk."""
    return b"%x\r\n%b\r\n" % (len(event), event)


def unchunk(frame: bytes) -> bytes:
    """The event in a frame, for HTTP/1.0, which knows no chunks."""
    return frame[frame.index(b"\n") + 1 : -2]


def notification(item: Notification) -> bytes:
    """The frame of a notification."""
    return chunk(
        b'id: %d\nevent: notification\ndata: {"id":%d,"created_at":"%b"%b\n\n'
        % (item.id, item.id, timestamp(item.created_ms).encode(), item.content.tail)
    )


def _control(name: str, data: dict[str, object], retry_ms: int | None = None) -> bytes:
    retry = "" if retry_ms is None else f"retry: {retry_ms}\n"
    return chunk(f"{retry}event: {name}\ndata: {dumps(data)}\n\n".encode())


def retry(retry_ms: int) -> bytes:
    """Only the reconnection time; dispatches no event."""
    return chunk(b"retry: %d\n\n" % retry_ms)


def ready(unread_count: int, heartbeat_seconds: float) -> bytes:
    """The replay is done, live from here."""
    return _control("ready", {"unread_count": unread_count, "heartbeat_seconds": heartbeat_seconds})


def read(ids: list[int] | None, up_to: int | None) -> bytes:
    """Marked read, here or on another device: either some ids, or everything up to one."""
    return _control("read", {"ids": ids} if up_to is None else {"up_to": up_to})


def preferences(changed: dict[str, bool]) -> bytes:
    """Switched on or off, here or elsewhere."""
    return _control(
        "preferences",
        {
            "preferences": [
                {"event_type": name, "enabled": enabled} for name, enabled in changed.items()
            ]
        },
    )


def reset(reason: str) -> bytes:
    """The cursor was unknown: all unread rows follow, the client should reload its list."""
    return _control("reset", {"reason": reason})


def ping(now_ms: int) -> bytes:
    """The heartbeat: a named event, since comments cannot feed a watchdog in the page."""
    return _control("ping", {"time": timestamp(now_ms)})


def closing(reason: Closing, retry_ms: int) -> bytes:
    """The last event of a stream."""
    return _control("closing", {"reason": reason.value, "retry_ms": retry_ms}, retry_ms)
