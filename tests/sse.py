"""Reads a text/event-stream the way a browser does.

https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

import aiohttp


class StreamEnded(Exception):
    """The server ended the stream, with a proper last chunk."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event as it stood on the wire.

    `id` and `retry` (milliseconds) are those of its own block, ``None`` if it had none.
    """

    event: str
    data: str
    id: str | None = None
    retry: int | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventParser:
    """Turns bytes, cut anywhere, into events.

    Attributes:
        last_event_id: What a browser would send in ``Last-Event-ID``.
        retry: The last reconnection time received, in milliseconds.
        comments: How many comment lines came.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self.comments = 0
        self._decode = codecs.getincrementaldecoder("utf-8")("strict").decode
        self._text = ""
        self._at_start = True
        self._fields: dict[str, str] = {}
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """Return the events that `chunk` completes."""
        self._text += self._decode(chunk)
        if self._at_start and self._text:
            self._text = self._text.removeprefix("\ufeff")
            self._at_start = False
        # A CR at the end may be the first half of a CRLF.
        held = "\r" if self._text.endswith("\r") else ""
        text = self._text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        *lines, rest = text.split("\n")
        self._text = rest + held
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments += 1
            return None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event" or (name == "id" and "\0" not in value):
            self._fields[name] = value
        elif name == "retry" and value.isascii() and value.isdecimal():
            self._fields[name] = value
            self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        fields, self._fields = self._fields, {}
        data, self._data = self._data, []
        self.last_event_id = fields.get("id", self.last_event_id)
        if not data:
            return None
        return Event(
            event=fields.get("event") or "message",
            data="\n".join(data),
            id=fields.get("id"),
            retry=int(fields["retry"]) if "retry" in fields else None,
        )


class EventReader:
    """Reads the events of one response as they come.

    Nothing is read ahead: while nobody asks for events, the server meets backpressure.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.parser = EventParser()
        self._events: deque[Event] = deque()

    async def next_event(self, timeout: float = 5.0) -> Event:
        """Return the next event, whatever it is.

        Raises:
            StreamEnded: There are no more.
            TimeoutError: None came within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while not self._events:
                chunk = await self.response.content.readany()
                if not chunk:
                    raise StreamEnded
                self._events.extend(self.parser.feed(chunk))
        return self._events.popleft()

    async def next_of(self, *names: str, timeout: float = 5.0) -> Event:
        """Return the next event of one of these names, leaving out those before it."""
        async with asyncio.timeout(timeout):
            while (event := await self.next_event(timeout)).event not in names:
                pass
        return event

    async def take(self, count: int, *names: str, timeout: float = 5.0) -> list[Event]:
        """Return the next `count` events of these names."""
        async with asyncio.timeout(timeout):
            return [await self.next_of(*names, timeout=timeout) for _ in range(count)]

    async def rest(self, timeout: float = 5.0) -> list[Event]:
        """Return all events up to the end of the stream."""
        events = []
        async with asyncio.timeout(timeout):
            while True:
                try:
                    events.append(await self.next_event(timeout))
                except StreamEnded:
                    return events
