"""``sse-server``: what each command does, says and returns, on a real database and server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.cli import main, reference
from sse_server.cli.settings import SECTIONS, SET
from sse_server.client import Change, ClientError, Event, EventParser, Follower, Service, parse_url
from sse_server.config import Settings, load
from sse_server.errors import ConfigurationError
from sse_server.services import new_key
from sse_server.store import schema_sql
from tests import sse
from tests.commands import Run, runner, serving, start
from tests.conftest import ROOT, ServerProcessFactory, eventually
from tests.streaming import Clients, insert, query, sign_in
from tests.test_publish import add_service
from tests.test_tokens import AUDIENCE, SECRET

PASSWORD = "hunter2-f549a4dc"


@pytest.fixture
def run(dsn: str, tmp_path: Path) -> Run:
    """Run a command on the test's database."""
    return runner(dsn, tmp_path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# serve


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--port"),
        ("--port",),
        ("--port", "1", "serve", "--port"),
        (ROOT / "run.py", "--port"),
    ],
    ids=["serve", "none", "both", "run.py"],
)
async def test_serve_is_the_default(
    arguments: tuple[str | Path, ...], dsn: str, tmp_path: Path
) -> None:
    """It serves with ``serve`` and without, from the checkout too; options stand on either side."""
    port = free_port()
    process = await start(
        *arguments, str(port), cwd=tmp_path, environment={"DATABASE_URL": dsn, "SSE_DEMO": "1"}
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        line = await process.stdout.readline()
    process.terminate()
    await process.communicate()
    assert line.decode().strip() == f"listening on http://127.0.0.1:{port}"
    assert process.returncode == 0


# schema


async def test_schema_is_printed(run: Run) -> None:
    """``schema`` prints schema.sql, and needs no database for that."""
    result = await run("schema", DATABASE_URL="postgresql://127.0.0.1:1/x")
    assert (result.status, result.stdout) == (0, schema_sql())


async def test_schema_is_applied(run: Run, dsn: str, db: Connection) -> None:
    """``schema --apply`` applies it where it is not, and says so where it is."""
    query(db, "CREATE SCHEMA empty")
    url = f"{dsn}&options=-csearch_path%3Dempty"
    first = await run("schema", "--apply", DATABASE_URL=url)
    again = await run("schema", "--apply", DATABASE_URL=url)
    assert (first.status, again.status) == (0, 0)
    assert "is applied" in first.stderr
    assert "was up to date" in again.stderr
    assert query(db, "SELECT count(*) FROM empty.settings") == [(1,)]


# send

NEW = ("--type", "new_message", "-m", "Hello")


async def test_send(run: Run, db: Connection) -> None:
    """``send`` writes a row for each user, once, and says what became of it."""
    query(db, "INSERT INTO user_preferences VALUES ('bob', 'new_message', false)")
    result = await run("send", "alice", "bob", "alice", *NEW, "--link", "/m/1", "--json")
    assert result.status == 0, result.stderr
    [(id,)] = query(db, "SELECT id FROM notifications WHERE message = 'Hello' AND link = '/m/1'")
    assert result.json == {
        "created": 1,
        "suppressed": 1,
        "rate_limited": 0,
        "not_sent": 0,
        "results": [
            {"user_id": "alice", "outcome": "created", "id": id},
            {"user_id": "bob", "outcome": "suppressed", "id": None},
        ],
    }


async def test_send_over_the_limit(run: Run, db: Connection) -> None:
    """A user over the limit is named, the others get theirs, and the exit status is 1."""
    query(db, "UPDATE settings SET user_rate_per_minute = 1")
    insert(db, "alice", "first")
    result = await run("send", "alice", "bob", *NEW)
    assert result.status == 1
    assert "rate_limited  alice" in result.stdout
    assert "1 created, 0 suppressed, 1 rate limited" in result.stdout


async def test_send_to_many(run: Run, db: Connection) -> None:
    """Thousands of recipients from the standard input go in several transactions."""
    users = [f"user-{number}" for number in range(2500)]
    result = await run(
        "send", "extra", *NEW, "--to", "-", "--json", stdin="\n".join(users) + "\n\n"
    )
    assert result.status == 0, result.stderr
    assert result.json["created"] == 2501
    assert [entry["user_id"] for entry in result.json["results"]] == ["extra", *users]
    assert query(db, "SELECT count(*), count(DISTINCT xact) FROM notifications") == [(2501, 3)]


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (("alice", "--type", "nonsense", "-m", "x"), 1, "unknown event type"),
        (("alice", "--type", "new_message", "-m", "x" * 2001), 1, "message_length"),
        (("alice", *NEW, "--link", "javascript:alert(1)"), 2, "--link"),
        ((*NEW,), 2, "Name a user"),
        (("alice", "-m", "x"), 2, "--type"),
        (("alice", *NEW, "--to", "/missing"), 2, "/missing"),
        (("alice", *NEW, "--url", "https://push.example"), 2, "SSE_KEY"),
        (("alice", *NEW, "--url", "push.example"), 2, "SSE_KEY"),
    ],
)
async def test_send_refused(run: Run, arguments: tuple[str, ...], status: int, said: str) -> None:
    """What cannot be sent is one sentence, and no row."""
    result = await run("send", *arguments)
    assert result.status == status
    assert said in result.stderr
    assert "Traceback" not in result.stderr


async def test_send_over_http(
    run: Run, db: Connection, server_process: ServerProcessFactory
) -> None:
    """With a URL it goes through POST /api/publish, with the key from the environment."""
    key = add_service(db)
    server = await server_process()
    result = await run("send", "alice", "bob", *NEW, "--url", server.url, SSE_KEY=key)
    assert result.status == 0, result.stderr
    assert "2 created" in result.stdout
    assert query(db, "SELECT DISTINCT source FROM notifications") == [("shop",)]
    wrong = await run("send", "alice", *NEW, "--url", server.url, "--json", SSE_KEY=new_key())
    assert wrong.status == 1
    assert "HTTP 401" in wrong.stderr
    assert wrong.json["not_sent"] == 1
    assert key not in result.stdout + result.stderr + wrong.stdout + wrong.stderr


async def test_send_over_http_is_repeated(run: Run) -> None:
    """What was not answered is asked again under the same idempotency key."""
    bodies: list[Any] = []

    async def publish(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        if len(bodies) == 1:
            return web.Response(status=503, headers={"Retry-After": "0"})
        if len(bodies) == 2:
            assert request.transport is not None
            request.transport.abort()
        results = [{"user_id": "alice", "outcome": "created", "id": 1}]
        return web.json_response({"results": results})

    app = web.Application()
    app.router.add_post("/api/publish", publish)
    async with serving(app) as url:
        result = await run("send", "alice", *NEW, "--url", url, SSE_KEY=new_key())
    assert result.status == 0, result.stderr
    assert len(bodies) == 3
    assert bodies[0]["idempotency_key"]
    assert bodies[0] == bodies[1] == bodies[2]


# tail


class Tail:
    """A running ``sse-server tail``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        self._tasks = [
            asyncio.create_task(self._read(process.stdout, self.out)),
            asyncio.create_task(self._read(process.stderr, self.err)),
        ]

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        while line := await stream.readline():
            lines.append(line.decode().rstrip("\n"))

    async def live(self, times: int = 1) -> None:
        """Wait until it has been live so often."""
        await eventually(
            lambda: sum("-- live" in line for line in self.err) >= times, 30, f"{self.err}"
        )

    async def end(self, number: int = signal.SIGINT) -> int:
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(20):
            status = await self.process.wait()
        await asyncio.gather(*self._tasks)
        return status


@pytest.fixture
async def tails(tmp_path: Path) -> AsyncIterator[Any]:
    """Start one: ``await tails("alice", "--url", url)``."""
    started: list[Tail] = []

    async def build(*arguments: str, **environment: str | None) -> Tail:
        process = await start("tail", *arguments, cwd=tmp_path, environment=environment)
        started.append(Tail(process))
        return started[-1]

    yield build
    for tail in started:
        await tail.end(signal.SIGKILL)


async def test_tail_over_a_restart(
    tails: Any, db: Connection, server_process: ServerProcessFactory
) -> None:
    """It shows each notification once over a restart of the server, and signs out on Ctrl-C."""
    server = await server_process()
    insert(db, "alice", "before")
    tail = await tails("alice", "--url", server.url)
    await tail.live()
    insert(db, "alice", "live")
    await eventually(lambda: len(tail.out) == 2)
    server.kill()
    await server.wait()
    insert(db, "alice", "meanwhile")
    await server_process("--port", str(urlsplit(server.url).port))
    await tail.live(2)
    insert(db, "alice", "after")
    await eventually(lambda: len(tail.out) == 4, 20)
    assert await tail.end() == 0
    assert [line.rsplit("  ", 1)[-1] for line in tail.out] == [
        "before",
        "live",
        "meanwhile",
        "after",
    ]
    assert any("-- waiting" in line for line in tail.err)
    assert query(db, "SELECT count(*) FROM sessions") == [(0,)]


async def test_tail_as_json(
    tails: Any, db: Connection, server_process: ServerProcessFactory, tmp_path: Path
) -> None:
    """With --json every event is a line; --after begins there, --count ends it."""
    server = await server_process()
    first, second = insert(db, "alice", "one", "two")
    tail = await tails(
        "alice", "--url", server.url, "--json", "--after", str(first), "--count", "1"
    )
    async with asyncio.timeout(20):
        assert await tail.process.wait() == 0
    assert await tail.end() == 0
    [line] = [line for line in tail.out if json.loads(line)["event"] == "notification"]
    event = json.loads(line)
    assert event["id"] == str(second)
    assert event["data"]["message"] == "two"


async def test_tail_shows_nothing_that_a_terminal_obeys(tails: Any) -> None:
    """Escape sequences, from whatever server, do not reach the terminal."""
    hostile = "a\x1b]0;owned\x07b\nc\x9b2J"

    async def signed_in(request: web.Request) -> web.Response:
        return web.json_response({})

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        data = json.dumps({"id": 1, "message": hostile, "event_type": "x", "link": hostile})
        await response.write(f"id: 1\nevent: notification\ndata: {data}\n\n".encode())
        await asyncio.Event().wait()
        return response

    app = web.Application()
    app.router.add_post("/demo/session", signed_in)
    app.router.add_get("/api/stream", stream)
    async with serving(app) as url:
        text = await tails("alice", "--url", url, "--count", "1")
        as_json = await tails("alice", "--url", url, "--count", "1", "--json")
        for tail in (text, as_json):
            async with asyncio.timeout(20):
                assert await tail.process.wait() == 0
            await tail.end()
    [line] = text.out
    assert line.isprintable()
    assert "a\ufffd]0;owned\ufffdb\ufffdc\ufffd2J" in line
    [line] = as_json.out
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["data"]["message"] == hostile


async def test_tail_ends_with_its_session(
    tails: Any, run: Run, db: Connection, server_process: ServerProcessFactory
) -> None:
    """When its session is ended it says so, and the exit status is 1."""
    server = await server_process()
    tail = await tails("alice", "--url", server.url)
    await tail.live()
    assert (await run("sessions", "end", "alice")).status == 0
    async with asyncio.timeout(5):
        assert await tail.process.wait() == 1
    await tail.end()
    assert "-- ended: the session has ended" in tail.err


async def test_tail_signs_in_with_a_token(
    tails: Any, run: Run, server_process: ServerProcessFactory, tmp_path: Path
) -> None:
    """``token`` signs what ``tail --token-file`` takes; with the secret, tail signs one itself."""
    jwt: dict[str, str | None] = {"SSE_JWT_SECRET": SECRET, "SSE_JWT_AUDIENCE": AUDIENCE}
    server = await server_process(wait=True, **{"SSE_DEMO": "0", **jwt})
    result = await run("token", "alice", **jwt)
    assert result.status == 0
    file = tmp_path / "token.txt"
    file.write_text(result.stdout)
    by_file = await tails("--token-file", str(file), "--url", server.url)
    await by_file.live()
    by_secret = await tails("alice", "--url", server.url, **jwt)
    await by_secret.live()
    assert await by_file.end(signal.SIGTERM) == 0
    assert await by_secret.end() == 0
    again = await tails("--token-file", str(file), "--url", server.url)
    assert await again.process.wait() == 1
    await again.end()
    assert "HTTP 401" in again.err[0]
    assert SECRET not in "".join(by_secret.err + by_secret.out)


async def test_token_without_a_secret(run: Run) -> None:
    """Where there is nothing to sign with, ``token`` says what it needs."""
    result = await run("token", "alice")
    assert result.status == 2
    assert "SSE_JWT_SECRET" in result.stderr


# The client below it


class Stub:
    """A server of streams that breaks off, falls silent and repeats as it is told."""

    def __init__(self, *bodies: tuple[str, bool]) -> None:
        self.bodies = list(bodies)  # what to send, and whether to hold the line then
        self.cursors: list[str | None] = []

    async def stream(self, request: web.Request) -> web.StreamResponse:
        self.cursors.append(request.headers.get("Last-Event-ID"))
        if not self.bodies:
            return web.Response(status=401)
        text, hold = self.bodies.pop(0)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(text.encode())
        if hold:
            await asyncio.Event().wait()
        return response

    async def follow(self) -> list[Event | Change]:
        app = web.Application()
        app.router.add_get("/api/stream", self.stream)
        async with serving(app) as url:
            service = Service(parse_url(url))
            try:
                async with asyncio.timeout(30):
                    return [item async for item in Follower(service).follow()]
            finally:
                await service.close()


def notification(id: int) -> str:
    return f'id: {id}\nevent: notification\ndata: {{"id":{id}}}\n\n'


READY = 'event: ready\ndata: {"unread_count":0,"heartbeat_seconds":0.2}\n\n'


def ids(items: list[Event | Change]) -> list[str]:
    return [item.id for item in items if isinstance(item, Event) and item.name == "notification"]


async def test_follower_resumes_without_repeats() -> None:
    """Cut off, it comes back with the last id it had, and drops what it has had."""
    stub = Stub(
        ("retry: 10\n\n" + notification(7) + notification(5) + READY, False),
        (notification(7) + notification(8), False),
    )
    items = await stub.follow()
    assert ids(items) == ["7", "5", "8"]
    assert stub.cursors == [None, "5", "8"]
    assert items[-1] == Change("ended", "not signed in")


async def test_follower_notices_silence() -> None:
    """Without a heartbeat for two and a half of them the line is taken for dead."""
    stub = Stub(("retry: 10\n\n" + READY, True))
    items = await stub.follow()
    waits = [item for item in items if isinstance(item, Change) and item.state == "waiting"]
    assert "nothing came for 0.5 s" in waits[0].detail


@pytest.mark.parametrize("reason", ["superseded", "session_ended"])
async def test_follower_does_not_chase(reason: str) -> None:
    """After these reasons it does not come back: another tab would be thrown out in turn."""
    data = json.dumps({"reason": reason, "retry_ms": 1})
    stub = Stub((f"{READY}event: closing\ndata: {data}\n\n", False))
    items = await stub.follow()
    assert isinstance(items[-1], Change)
    assert items[-1].state == "ended"
    assert len(stub.cursors) == 1


async def test_follower_comes_back_when_told() -> None:
    """A closing event says when to come back."""
    stub = Stub(('event: closing\ndata: {"reason":"shutdown","retry_ms":20}\n\n', False))
    items = await stub.follow()
    assert Change("waiting", "shutdown; next try in 0.0 s") in items
    assert len(stub.cursors) == 2


TEXT = st.lists(
    st.sampled_from(["\r", "\n", "\r\n", " ", ":", "\ufeff", "é", "data", "id", "event", "retry"]),
    max_size=30,
).map("".join)


@given(TEXT, st.integers(1, 5))
def test_events_are_read_as_a_browser_does(text: str, step: int) -> None:
    """However the bytes are cut, the events are those of the other reading of the standard."""
    data = text.encode()
    ours, theirs = EventParser(), sse.EventParser()
    read = [
        (event.name, event.data)
        for at in range(0, len(data), step)
        for event in ours.feed(data[at : at + step])
    ]
    assert read == [(event.event, event.data) for event in theirs.feed(data)]


def test_a_line_without_an_end() -> None:
    """What is no event stream does not fill the memory."""
    parser = EventParser()

    def feed() -> None:
        for _ in range(100):
            parser.feed(b"x" * 100_000)

    with pytest.raises(ClientError):
        feed()


# sessions, stats


async def test_sessions(run: Run, db: Connection, server_process: ServerProcessFactory) -> None:
    """They are listed without their keys; ending a user's ends the streams, and is audited."""
    key, other = sign_in(db, "alice", "bob")
    server = await server_process()
    port = urlsplit(server.url).port
    assert port is not None
    async with Clients() as clients:
        stream = await clients.open(port, key)
        beside = await clients.open(port, other)
        await eventually(lambda: stream.ready and beside.ready)
        listed = await run("sessions", "list", "--json")
        assert [row["user_id"] for row in listed.json] == ["bob", "alice"]
        assert set(listed.json[0]) == {
            "id", "user_id", "created_at", "expires_at", "streams_opened",
        }  # fmt: skip
        text = await run("sessions", "list", "alice")
        assert "alice" in text.stdout
        assert "bob" not in text.stdout
        [(hash,)] = query(
            db, "SELECT encode(key_hash, 'hex') FROM sessions WHERE user_id = 'alice'"
        )
        for result in (listed, text):
            assert key not in result.stdout
            assert hash not in result.stdout
        assert (await run("sessions", "end", "alice")).status == 0
        await eventually(lambda: stream.reason, 1)
        assert stream.reason == "session_ended"
        assert beside.reason is None
    assert query(db, "SELECT user_id, action, outcome FROM audit_log") == [
        ("alice", "end_session", "ok")
    ]
    assert (await run("sessions", "end", "alice")).status == 1
    assert (await run("sessions", "end", "--id", str(listed.json[0]["id"]))).status == 0
    assert query(db, "SELECT count(*) FROM sessions") == [(0,)]
    assert (await run("sessions", "end")).status == 2


async def test_stats(run: Run, db: Connection) -> None:
    """The numbers are those of the database."""
    insert(db, "alice", "one", "two")
    query(db, "UPDATE notifications SET read_at = now() WHERE message = 'one'")
    sign_in(db, "alice", "alice")
    result = await run("stats", "--json")
    assert result.status == 0, result.stderr
    totals = result.json["totals"]
    assert (totals["unread"], totals["sessions"], totals["users_with_session"]) == (1, 2, 1)
    assert (totals["feed_mode"], totals["polling"], totals["queue_usage"]) == ("auto", False, 0)
    [day] = result.json["days"]
    assert (day["event_type"], day["notifications"], day["unread"]) == ("new_message", 2, 1)
    sizes = {size["name"]: size for size in result.json["sizes"]}
    assert sizes["notifications_unread_idx"]["of"] == "notifications"
    assert sizes["notifications"]["bytes"] > 0
    text = await run("stats", "--days", "0")
    assert "unread notifications  1\n" in text.stdout
    assert "new_message" not in text.stdout


# Settings and secrets


def test_every_section_has_its_setting() -> None:
    """The sections of the table begin at settings that there are."""
    assert set(SECTIONS) <= set(Settings.model_fields)
    assert next(iter(Settings.model_fields)) in SECTIONS


@pytest.mark.parametrize(
    "page, command",
    [
        ("settings", "sse_server settings --markdown"),
        ("command-line", "sse_server.cli.reference"),
        ("doctor", "sse_server.doctor.faults"),
    ],
)
def test_pages_are_current(page: str, command: str) -> None:
    """The pages made from the code say what the code says."""
    # In a process of its own: click remembers how a command was first called.
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    file = ROOT / "docs" / f"{page}.md"
    assert file.read_text(encoding="utf-8") == done.stdout, f"run: python -m {command}"


def test_secrets_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting may be a file of its name; the environment and .env win over it."""
    monkeypatch.chdir(tmp_path)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "DATABASE_URL").write_text("postgresql://from-file/x\n")
    (secrets / "sse_jwt_secret").write_text(SECRET + "\n")
    (secrets / "SSE_JWT_AUDIENCE").write_text("file")
    (tmp_path / ".env").write_text("SSE_SECRETS_DIR=secrets\nSSE_JWT_AUDIENCE=dotenv\n")
    found = load()
    assert found.database_url is not None
    assert found.database_url.get_secret_value() == "postgresql://from-file/x"
    assert found.jwt_secret is not None
    assert found.jwt_secret.get_secret_value() == SECRET
    assert found.jwt_audience == "dotenv"
    monkeypatch.setenv("SSE_JWT_AUDIENCE", "environment")
    assert load().jwt_audience == "environment"
    assert load(jwt_audience="option").jwt_audience == "option"
    assert SECRET not in repr(found) + str(found)


@pytest.mark.parametrize("fault", ["missing", "no directory", "no text"])
def test_secrets_that_cannot_be_read(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Secrets that are not there, or are no text, are a mistake and not a default."""
    directory = tmp_path / "secrets"
    if fault == "no directory":
        directory.write_text("x")
    elif fault == "no text":
        directory.mkdir()
        (directory / "SSE_JWT_SECRET").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("SSE_SECRETS_DIR", str(directory))
    with pytest.raises(ConfigurationError, match="SSE_SECRETS_DIR"):
        load()


async def test_secrets_are_never_printed(run: Run) -> None:
    """No help, no list of settings and no error shows a secret, from wherever it comes."""
    url = f"postgresql://alice:{PASSWORD}@127.0.0.1:1/x"
    environment: dict[str, str | None] = {
        "DATABASE_URL": url,
        "SSE_JWT_SECRET": SECRET,
        "SSE_JWT_AUDIENCE": AUDIENCE,
    }
    shown = await run("settings", **environment)
    assert f"DATABASE_URL={SET}" in shown.stdout.splitlines()
    assert f"SSE_JWT_SECRET={SET}" in shown.stdout.splitlines()
    assert f"SSE_JWT_AUDIENCE={AUDIENCE}" in shown.stdout.splitlines()
    results = [
        shown,
        await run("settings", "--json", **environment),
        await run("settings", "--markdown", **environment),
        await run("--help", **environment),
        await run("serve", "--help", **environment),
        await run("stats", **environment),
        await run("doctor", **environment),
        await run("serve", **{**environment, "SSE_PORT": SECRET}),
        await run("stats", **{**environment, "DATABASE_URL": f"password={PASSWORD} nonsense"}),
        await run("token", "alice", **{**environment, "SSE_JWT_SECRET": PASSWORD}),
    ]
    assert [result.status for result in results] == [0, 0, 0, 0, 0, 2, 1, 2, 2, 2]
    for result in results:
        assert SECRET not in result.stdout + result.stderr
        assert PASSWORD not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


# All of them


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats",),
        ("sessions", "list"),
        ("sessions", "end", "alice"),
        ("service", "list"),
        ("schema", "--apply"),
        ("send", "alice", *NEW),
    ],
    ids=" ".join,
)
async def test_a_database_that_is_not_there(run: Run, arguments: tuple[str, ...]) -> None:
    """Without its database a command says one sentence, and the exit status is 2."""
    result = await run(*arguments, DATABASE_URL="postgresql://127.0.0.1:1/x")
    assert result.status == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words, expected",
    [
        ("sse-server do", {"doctor"}),
        ("sse-server service ", {"add", "list", "revoke"}),
        ("sse-server send --l", {"--link"}),
        ("sse-server serve --heart", {"--heartbeat-seconds"}),
    ],
)
async def test_completion(words: str, expected: set[str]) -> None:
    """The shell completes commands and options, as the documentation says."""
    script = Path(sys.executable).parent / "sse-server"
    process = await asyncio.create_subprocess_exec(
        script,
        env={
            "_SSE_SERVER_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    stdout, _ = await process.communicate()
    assert {line.partition(",")[2] for line in stdout.decode().splitlines()} == expected


def test_every_command_has_an_example() -> None:
    """Every help text that is not only a list of commands shows how it is used."""
    for path, text in reference._commands(main, "sse-server"):
        if path not in ("sse-server service", "sse-server sessions"):
            assert "Example:\n    sse-server" in text, path
