"""Clients that keep to the protocol (docs/protocol.md), and write down all that happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from sse_server.sessions import COOKIE
from tests.faults.nodes import Node
from tests.sse import Event, EventParser

# The protocol's times are for millions of clients and for hours; a run lasts for seconds.
RETRY_SCALE = 0.05
# Longest wait for an answer, or for anything at all on an open stream (two heartbeats and more).
PATIENCE_SECONDS = 5.0
CALL_SECONDS = 10.0
RECEIVE_BUFFER_BYTES = 8 * 1024


class Refused(Exception):
    """The API did not do it, now or at all."""


@dataclass(slots=True, eq=False)
class Record:
    """What came over one connection.

    Attributes:
        number: Of the client's connections.
        node: The node that it went to.
        cursor: The Last-Event-ID that it began with.
        opened_at: Time since 1970, before the request was sent.
        ready_at: Number of ids that had come when the first `ready` did.
        ids: Of the notifications, in the order in which they came.
        unread_counts: One for each `ready`.
        reason: Of `closing`.
        end: How it ended, in words.
        left: Whether the client has turned away from it, and something else is its stream now.
        log: Everything but the notifications: (time, what).
    """

    number: int
    node: int
    cursor: str | None
    opened_at: float = field(default_factory=time.time)
    closed_at: float | None = None
    ready_at: int | None = None
    ids: list[int] = field(default_factory=list)
    unread_counts: list[int] = field(default_factory=list)
    reason: str | None = None
    end: str = ""
    left: bool = False
    reset: bool = False
    log: list[tuple[float, str]] = field(default_factory=list)

    def note(self, what: str) -> None:
        if len(self.log) < 200:
            self.log.append((time.time(), what))


class Line(asyncio.Protocol):
    """One connection to a node: a request for the stream, and what is answered."""

    def __init__(
        self, request: bytes, record: Record, on_event: Callable[[Line, Event], None]
    ) -> None:
        self.record = record
        self.status = 0
        self.heard = asyncio.get_running_loop().time()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = EventParser()
        self._transport: asyncio.Transport | None = None
        self._request = request
        self._on_event = on_event
        self._data = bytearray()
        self._complete = False
        self._paused = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self.record.end:  # cut meanwhile
            transport.abort()
        else:
            transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.heard = asyncio.get_running_loop().time()
        self._data += data
        if not self.status:
            head, separator, rest = bytes(self._data).partition(b"\r\n\r\n")
            if not separator:
                return
            self.status = int(head.split(b" ", 2)[1])
            self._data = bytearray(rest)
            self.record.note(f"status {self.status}")
        if self.status == 200:
            self._chunks()

    def _chunks(self) -> None:
        at = 0
        while (end := self._data.find(b"\r\n", at)) != -1:
            size = int(self._data[at:end], 16)
            after = end + 2 + size + 2
            if len(self._data) < after:
                break
            if not size:
                self._complete = True
            for event in self.parser.feed(bytes(self._data[end + 2 : after - 2])):
                self._on_event(self, event)
            at = after
        del self._data[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.record.end:
            self.record.end = (
                "complete" if self._complete else f"lost: {exc!r}" if exc else "cut short"
            )
        self.record.closed_at = time.time()
        if not self.ended.done():
            self.ended.set_result(None)

    # What the client does

    def pause(self) -> None:
        if self._transport is not None and not self.ended.done() and not self._paused:
            self._paused = True
            self.record.note("stops reading")
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.heard = asyncio.get_running_loop().time()
            self.record.note("reads again")
            if self._transport is not None and not self.ended.done():
                self._transport.resume_reading()

    @property
    def silent_for(self) -> float:
        """Seconds without a word, while somebody was listening."""
        return 0.0 if self._paused else asyncio.get_running_loop().time() - self.heard

    def cut(self, why: str) -> None:
        if not self.record.end:
            self.record.end = why
        if self._transport is not None:
            self._transport.abort()


class Client:
    """One session of one user, with one stream at a time.

    Attributes:
        received: All ids in the order in which they came over the streams that were its own,
            repeats included.
        records: One for each connection.
        sign_ins: How often it had to sign in.
        sign_outs: How often it was made to sign out, whether or not that worked.
        superseded: How often it was told that it had opened another stream, and had not.
    """

    def __init__(
        self, number: int, user_id: str, device: int, nodes: Sequence[Node], rng: random.Random
    ) -> None:
        self.number = number
        self.user_id = user_id
        self.name = f"{user_id}/{device}"
        self.received: list[int] = []
        self.had: set[int] = set()
        self.records: list[Record] = []
        self.sign_ins = 0
        self.sign_outs = 0
        self.superseded = 0
        self.foreign: list[str] = []
        self.messages: dict[int, str] = {}
        self.cursor: str | None = None
        self._nodes = nodes
        self._node = rng.randrange(len(nodes))
        self._rng = rng
        self._key: str | None = None
        self._line: Line | None = None
        self._left: list[Line] = []
        self._retry = 0.1
        self._session: aiohttp.ClientSession | None = None

    # What a run asks

    @property
    def live(self) -> bool:
        """Whether its stream has been told that it is live, and is still there."""
        line = self._line
        return (
            line is not None
            and not line.ended.done()
            and line.record.ready_at is not None
            and line.record.reason is None
        )

    @property
    def record(self) -> Record | None:
        return self._line.record if self._line is not None else None

    @property
    def left_open(self) -> list[Record]:
        """Streams that the client has turned away from and that nobody has ended yet."""
        return [line.record for line in self._left if not line.ended.done()]

    # Its life

    async def run(self) -> None:
        """Be connected, for ever."""
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=CALL_SECONDS),
        ) as self._session:
            try:
                while True:
                    await self._connect()
                    await asyncio.sleep(self._retry)
            finally:
                for line in [*self._left, *([self._line] if self._line else [])]:
                    line.cut("the end")

    async def _connect(self) -> None:
        if self._key is None and not await self._sign_in():
            return
        line = await self._open(self._node)
        if line is None:
            # Elsewhere, perhaps, as a load balancer does.
            self._node = self._rng.randrange(len(self._nodes))
            return
        # It may become another one meanwhile.
        while self._line is not None and not (line := self._line).ended.done():
            await self._listen(line)
        self._ended(line)

    async def _listen(self, line: Line) -> None:
        """Until the line has ended, has been silent for too long, or is another one."""
        while line is self._line and not line.ended.done():
            await asyncio.wait({line.ended}, timeout=0.1)
            if line.silent_for > PATIENCE_SECONDS:
                line.cut("silent for too long")
            for left in self._left:
                if not left.ended.done() and left.silent_for > PATIENCE_SECONDS:
                    left.cut("left, and silent for too long")
            self._left = [left for left in self._left if not left.ended.done()]

    def _ended(self, line: Line) -> None:
        record = line.record
        if record.reason == "superseded":
            # By a request of its own that it had given up long before, most likely. It cannot be
            # as patient as the protocol asks it to be.
            self.superseded += 1
            record.note("superseded by nobody")
            self._retry = 0.1
        if record.reason == "session_ended" or line.status == 401:
            self._key = None

    async def _open(self, node: int) -> Line | None:
        """Ask a node for the stream; from now on it is the one that counts."""
        link = self._nodes[node].link
        record = Record(len(self.records), node, self.cursor)
        self.records.append(record)
        lines = [
            "GET /api/stream HTTP/1.1",
            f"Host: 127.0.0.1:{link.port}",
            "Accept: text/event-stream",
            f"Cookie: {COOKIE}={self._key}",
        ]
        if self.cursor is not None:
            lines.append(f"Last-Event-ID: {self.cursor}")
        request = "".join(f"{line}\r\n" for line in [*lines, ""]).encode()
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", link.port))
            line = Line(request, record, self._on_event)
            self._leave(line)
            await loop.create_connection(lambda: line, sock=sock)
        except OSError as exc:
            sock.close()
            record.end = record.end or f"refused: {exc}"
            return None
        except BaseException:
            sock.close()
            raise
        return line

    def _leave(self, line: Line) -> None:
        """Turn from the present stream, if there is one, to another."""
        left, self._line = self._line, line
        if left is not None and not left.ended.done():
            left.record.left = True
            left.record.note(f"left for connection {line.record.number}")
            left.resume()
            self._left.append(left)

    def _on_event(self, line: Line, event: Event) -> None:
        record = line.record
        if event.retry is not None:
            self._retry = min(2.0, event.retry / 1000 * RETRY_SCALE)
        if event.event == "notification":
            self._on_notification(line, event)
        elif event.event == "ready":
            record.unread_counts.append(event.json["unread_count"])
            if record.ready_at is None:
                record.ready_at = len(record.ids)
            record.note(f"ready, {event.json['unread_count']} unread, {len(record.ids)} came")
        elif event.event == "closing":
            record.reason = event.json["reason"]
            record.note(f"closing: {record.reason}, {len(record.ids)} came")
        elif event.event == "reset":
            record.reset = True
            record.note("reset")
        elif event.event != "ping":
            record.note(event.event)

    def _on_notification(self, line: Line, event: Event) -> None:
        data = event.json
        id = int(data["id"])
        if event.id != str(id):
            self.foreign.append(f"id: {event.id} on the notification {id}")
        self.remember(id, data["message"])
        line.record.ids.append(id)
        if line is self._line:
            self.received.append(id)
            self.had.add(id)
            self.cursor = event.id

    def remember(self, id: int, message: str) -> None:
        """What a notification said, to be compared with the table."""
        if self.messages.setdefault(id, message) != message:
            self.foreign.append(f"{id} came with another message")

    # What it is made to do

    def cut(self) -> None:
        """Lose the connection without a word."""
        if self._line is not None:
            self._line.cut("cut")

    async def pause(self, seconds: float) -> None:
        """Stop reading for a while."""
        line = self._line
        if line is None:
            return
        line.pause()
        try:
            await asyncio.sleep(seconds)
        finally:
            line.resume()

    def switch(self, node: int) -> None:
        """Come back at another node."""
        self._node = node
        self.cut()

    async def double(self, node: int) -> None:
        """Open another stream while this one is open; from now on that is the one that counts."""
        if self._key is not None and self._line is not None and not self._line.ended.done():
            self._node = node
            await self._open(node)

    async def sign_out(self) -> None:
        """End the session, and with it the stream."""
        self.sign_outs += 1
        await self.call("DELETE", "/api/session")

    # The API

    async def _sign_in(self) -> bool:
        try:
            _, key = await self._call("POST", "/demo/session", {"user_id": self.user_id})
        except Refused:
            self._node = self._rng.randrange(len(self._nodes))
            self._retry = 0.2
            return False
        self._key = key
        self.sign_ins += 1
        return True

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """One call of the API, at the node that the client is at.

        Raises:
            Refused: Whatever the reason is.
        """
        return (await self._call(method, path, body))[0]

    async def _call(self, method: str, path: str, body: object = None) -> tuple[Any, str | None]:
        assert self._session is not None
        port = self._nodes[self._node].link.port
        headers = {} if self._key is None else {"Cookie": f"{COOKIE}={self._key}"}
        try:
            async with self._session.request(
                method, f"http://127.0.0.1:{port}{path}", json=body, headers=headers
            ) as response:
                text = await response.text()
                if response.status >= 400:
                    raise Refused(f"{response.status} {text[:200]}")
                cookie = response.cookies.get(COOKIE)
                return json.loads(text) if text else None, cookie.value if cookie else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            raise Refused(repr(exc)) from exc

    async def mark_read(self, how: str) -> None:
        """Mark something read that it has received."""
        if not self.received:
            return
        ids = self._rng.sample(self.received, min(3, len(self.received)))
        if how == "one":
            await self.call("POST", f"/api/notifications/{ids[0]}/read", {})
        elif how == "ids":
            await self.call("POST", "/api/notifications/read", {"ids": sorted(set(ids))})
        else:
            # Not the newest: what is read need not arrive, and then nothing would be checked.
            up_to = self.received[len(self.received) // 4]
            await self.call("POST", "/api/notifications/read", {"up_to": up_to})

    def describe(self, *, around: float | None = None, lines: int = 12) -> str:
        """Its connections, as text: the last ones, or those around a time."""
        records = self.records
        if around is not None:
            near = [
                n
                for n, record in enumerate(records)
                if record.opened_at <= around <= (record.closed_at or around)
            ]
            first = max(0, (near[0] if near else len(records)) - lines // 2)
            records = records[first : first + lines]
        else:
            records = records[-lines:]
        text = []
        for record in records:
            told = "; ".join(f"{at % 1000:.3f} {what}" for at, what in record.log)
            span = f"{min(record.ids)}…{max(record.ids)}" if record.ids else "-"
            text.append(
                f"  #{record.number} node {record.node} cursor {record.cursor} "
                f"{record.opened_at % 1000:.3f}: {len(record.ids)} ids ({span}); {told}; "
                f"{record.end or 'open'}"
            )
        return "\n".join(text)


@contextlib.asynccontextmanager
async def living(clients: Sequence[Client]) -> Any:
    """Run the clients."""
    tasks = [asyncio.create_task(client.run(), name=client.name) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
