"""The frames: what a browser makes of them is what was put in."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sse_server import events
from sse_server.events import Closing, Content, Notification
from tests.sse import Event, EventParser

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]))
times = st.integers(0, 253_402_214_400_000 - 1)  # up to the end of year 9999
ids = st.integers(1, 2**63 - 1)


@st.composite
def notifications(draw: st.DrawFn) -> Notification:
    content = Content.of(draw(texts), draw(texts), draw(st.none() | texts))
    return Notification(draw(ids), draw(texts), content, draw(times), draw(ids))


control_frames = st.one_of(
    st.builds(events.ready, st.integers(0), st.floats(1, 300)),
    st.builds(events.read, st.lists(ids), st.none()),
    st.builds(events.read, st.none(), ids),
    st.builds(events.preferences, st.dictionaries(texts, st.booleans())),
    st.builds(events.reset, texts),
    st.builds(events.ping, times),
    st.builds(events.closing, st.sampled_from(Closing), st.integers(0, events.NEVER_MS)),
)


def unwrap(body: bytes) -> list[bytes]:
    """The chunks of a body, by the letter of RFC 9112, section 7.1."""
    chunks = []
    while body:
        head, _, rest = body.partition(b"\r\n")
        assert head == head.strip().lower()
        size = int(head, 16)
        assert rest[size : size + 2] == b"\r\n"
        chunks.append(rest[:size])
        body = rest[size + 2 :]
    return chunks


def parse(frame: bytes) -> Event:
    """The one event of a frame."""
    (event,) = EventParser().feed(events.unchunk(frame))
    return event


@given(st.lists(notifications(), max_size=5), st.data())
def test_notifications_parse(items: list[Notification], data: st.DataObject) -> None:
    """Whatever they say and wherever the bytes are cut, a browser gets the notifications."""
    stream = b"".join(unwrap(b"".join(map(events.notification, items))))
    parser, parsed, start = EventParser(), [], 0
    while start < len(stream):
        end = data.draw(st.integers(start + 1, len(stream)))
        parsed += parser.feed(stream[start:end])
        start = end
    assert [event.event for event in parsed] == ["notification"] * len(items)
    assert [event.id for event in parsed] == [str(item.id) for item in items]
    assert [event.json for event in parsed] == [item.as_json() for item in items]
    assert [list(event.json) for event in parsed] == [list(item.as_json()) for item in items]
    assert parser.last_event_id == (str(items[-1].id) if items else "")


@given(notifications() | st.none(), control_frames)
def test_control_events_leave_the_cursor(item: Notification | None, frame: bytes) -> None:
    """Only a notification moves the client's cursor."""
    parser = EventParser()
    parser.feed(events.unchunk(events.notification(item)) if item else b"")
    before = parser.last_event_id
    (event,) = parser.feed(events.unchunk(frame))
    assert event.event in {"ready", "read", "preferences", "reset", "ping", "closing"}
    assert event.id is None
    assert parser.last_event_id == before


@given(control_frames | st.builds(events.notification, notifications()))
def test_frames(frame: bytes) -> None:
    """A frame is one chunk with one event, of JSON that cannot break out of a page."""
    (event,) = unwrap(frame)
    assert events.unchunk(frame) == event
    assert event.endswith(b"\n\n")
    assert event.count(b"\n\n") == 1
    assert b"\r" not in event
    data = parse(frame).data
    assert not set(data) & set("<>&\u2028\u2029")
    assert isinstance(json.loads(data), dict)


@given(
    st.recursive(
        st.none() | st.booleans() | texts, lambda v: st.lists(v) | st.dictionaries(texts, v)
    )
)
def test_dumps(value: object) -> None:
    """JSON that is inert in HTML still says the same."""
    text = events.dumps(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029\r\n")


@given(times)
def test_timestamp(ms: int) -> None:
    """A time is ISO 8601 in UTC with milliseconds, and exact."""
    text = events.timestamp(ms)
    assert len(text) == 24
    assert text.endswith("Z")
    assert datetime.fromisoformat(text) - EPOCH == timedelta(milliseconds=ms)


def test_control_events() -> None:
    """Each control event says what its members are named for."""
    assert parse(events.ready(3, 15.0)).json == {"unread_count": 3, "heartbeat_seconds": 15.0}
    assert parse(events.read([1, 2], None)).json == {"ids": [1, 2]}
    assert parse(events.read(None, 7)).json == {"up_to": 7}
    assert parse(events.preferences({"a": True, "b": False})).json == {
        "preferences": [{"event_type": "a", "enabled": True}, {"event_type": "b", "enabled": False}]
    }
    assert parse(events.reset("unknown_cursor")).json == {"reason": "unknown_cursor"}
    assert parse(events.ping(1_700_000_000_123)).json == {"time": "2023-11-14T22:13:20.123Z"}


@pytest.mark.parametrize("reason", Closing)
def test_closing(reason: Closing) -> None:
    """The last event names its reason and sets the reconnection time to fit it."""
    low, high = events.RETRY_MS[reason]
    assert 0 < low <= high
    event = parse(events.closing(reason, low))
    assert event.json == {"reason": reason.value, "retry_ms": low}
    assert event.retry == low
    # Two tabs without the bundled client must not chase each other, nor one that is signed out.
    for_good = reason in {Closing.SUPERSEDED, Closing.SESSION_ENDED}
    assert (low == high == 365 * 24 * 3600 * 1000) is for_good
    # Those that all end at once must not all come back at once.
    assert for_good or high >= 2 * low


def test_retry() -> None:
    """The reconnection time alone is no event."""
    parser = EventParser()
    assert parser.feed(events.unchunk(events.retry(1234))) == []
    assert parser.retry == 1234
