"""What is logged, how it looks, under which request; what must never be in it; and spans."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server import audit, logs, spans
from sse_server.logs import REQUEST_ID, JsonFormatter, TextFormatter
from sse_server.services import new_key
from tests.conftest import (
    ROOT,
    ServerProcess,
    ServerProcessFactory,
    SettingsFactory,
    eventually,
)
from tests.streaming import Clients, Node, insert, query, running, sign_in, without_rate_limit
from tests.test_publish import add_service

TEXT = "confidential-5d20"
KEY = "an operator key of more than 32 characters"


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "sse_server.x", "levelname": "INFO", "msg": message, "args": args, "created": 0.25}
    )
    vars(made).update(extra)
    return made


def lines(process: ServerProcess) -> list[dict[str, Any]]:
    """Of standard error, which must be JSON and nothing else."""
    return [json.loads(line) for line in process.stderr.splitlines()]


# Formats


def test_a_line_of_json() -> None:
    """Time, level, logger, message, and what was given as extra as members of their own."""
    line = JsonFormatter().format(record("%d sent", 3, reason="gone", seconds=1.5))
    assert json.loads(line) == {
        "at": "1970-01-01T00:00:00.250Z",
        "level": "INFO",
        "logger": "sse_server.x",
        "message": "3 sent",
        "reason": "gone",
        "seconds": 1.5,
    }


def test_a_line_is_one_line() -> None:
    """Whatever is in a message or a traceback: one line of ASCII."""
    fault = ValueError("a\nb\u2028c\x1b[31m")
    line = JsonFormatter().format(record("x\ny\x1b[2J", exc_info=(ValueError, fault, None)))
    assert line.isascii()
    assert line.isprintable()
    assert "ValueError" in json.loads(line)["exception"]


def test_an_extra_cannot_pass_for_something_else() -> None:
    """The members that every line has are the logger's own."""
    line = json.loads(JsonFormatter().format(record("true", at="never", level="NONE", logger="y")))
    assert (line["at"], line["level"], line["logger"]) == (
        "1970-01-01T00:00:00.250Z",
        "INFO",
        "sse_server.x",
    )


def test_a_record_of_the_audit_is_nested() -> None:
    """JSON within JSON is an object, not a string full of escapes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    audit.logger.addHandler(handler)
    level = audit.logger.level
    audit.logger.setLevel(logging.INFO)
    try:
        audit.line({"action": "sign_in", "user_id": 'a"}\n'})
    finally:
        audit.logger.removeHandler(handler)
        audit.logger.setLevel(level)
    line = json.loads(stream.getvalue())
    assert line["logger"] == "sse_server.audit"
    assert line["audit"]["user_id"] == 'a"}\n'
    assert "message" not in line


def test_a_line_for_people() -> None:
    """Time, level, logger and message; the id of the request comes last."""
    token = REQUEST_ID.set("abc")
    try:
        text = TextFormatter().format(record("%d sent", 3, reason="gone"))
    finally:
        REQUEST_ID.reset(token)
    assert text.endswith("INFO    sse_server.x: 3 sent [abc]")
    assert TextFormatter().format(record("3 sent")).endswith("3 sent")


@pytest.mark.parametrize(
    "chosen, terminal, json_expected",
    [
        ("auto", True, False),
        ("auto", False, True),
        ("text", False, False),
        ("json", True, True),
    ],
)
def test_the_format_depends_on_who_reads(
    monkeypatch: pytest.MonkeyPatch, chosen: logs.Format, terminal: bool, json_expected: bool
) -> None:
    """Text on a terminal, JSON elsewhere, unless it is said."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    logs.configure("INFO", chosen, stream)
    logging.root.info("hello")
    assert stream.getvalue().startswith("{") is json_expected


# The process


async def test_a_stream_is_two_lines(server_process: ServerProcessFactory, db: Connection) -> None:
    """One when it opens, one when it has ended: the reason, the totals, the request."""
    process = await server_process()
    [key] = sign_in(db, "alice")
    async with Clients() as clients:
        stream = await clients.open(int(process.url.rpartition(":")[2]), key)
        await eventually(lambda: stream.ready)
        insert(db, "alice", TEXT)
        await eventually(lambda: stream.ids)
        query(db, "DELETE FROM sessions")
        await eventually(lambda: stream.complete)
    await eventually(lambda: "closed" in process.stderr)
    opened, closed = [line for line in lines(process) if line["logger"] == "sse_server.stream"]
    assert opened["message"].endswith("opened by 127.0.0.1")
    assert opened["stream"] == closed["stream"]
    assert opened["request_id"] == stream.headers["x-request-id"]
    assert closed["reason"] == "session_ended"
    assert closed["sent"] == 1
    assert 0 < closed["seconds"] < 60


async def test_nothing_secret_is_logged(
    server_process: ServerProcessFactory, db: Connection, dsn: str, tmp_path: Any
) -> None:
    """At the chattiest level: no cookie, key, token, DSN, and no message, also when it fails."""
    process = await server_process(SSE_LOG_LEVEL="DEBUG", SSE_OPERATOR_KEY=KEY)
    service_key = add_service(db)
    [cookie] = sign_in(db, "alice")
    jar = aiohttp.CookieJar(unsafe=True)
    operator_cookie = ""
    body = {"recipients": ["alice"], "event_type": "new_message", "message": TEXT}
    async with Clients() as clients, aiohttp.ClientSession(process.url, cookie_jar=jar) as session:
        stream = await clients.open(int(process.url.rpartition(":")[2]), cookie)
        await eventually(lambda: stream.ready)
        headers = {"Authorization": f"Bearer {service_key}"}
        for changes in ({}, {"event_type": "no_such"}, {"link": f"javascript:{TEXT}"}):
            await session.post("/api/publish", json=body | changes, headers=headers)
        await eventually(lambda: stream.ids)
        await session.post("/ops/api/session", json={"key": KEY[::-1]})
        async with session.post("/ops/api/session", json={"key": KEY}) as response:
            operator_cookie = response.cookies["sse_operator"].value
        await session.get("/ops/api/state")
        await session.get("/api/session", headers={"Authorization": f"Bearer {TEXT}.a.b"})
        # What the database refuses is logged with its own words.
        query(
            db, "ALTER TABLE notifications ADD CONSTRAINT no CHECK (message !~ 'dential') NOT VALID"
        )
        async with session.post("/api/publish", json=body, headers=headers) as response:
            assert response.status == 500
        query(db, "ALTER TABLE notifications RENAME TO gone")
        async with session.post("/api/publish", json=body, headers=headers) as response:
            assert response.status == 500
    process.terminate()
    assert await process.wait() == 0
    text = process.stdout + process.stderr
    assert len(lines(process)) > 8
    for secret in (TEXT, KEY, KEY[::-1], service_key, cookie, operator_cookie, dsn):
        assert secret
        assert secret not in text, secret


# The id of a request


@pytest.fixture
async def node(settings: SettingsFactory, db: Connection) -> AsyncIterator[Node]:
    without_rate_limit(db)
    async with running(settings()) as node:
        yield node


async def get(node: Node, path: str, **headers: str) -> aiohttp.ClientResponse:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{node.port}{path}", headers=headers) as response,
    ):
        await response.read()
        return response


async def test_every_answer_has_an_id_of_its_own(node: Node, db: Connection) -> None:
    """Answers, errors, files and streams: each has a fresh one."""
    [key] = sign_in(db, "alice")
    paths = ("/livez", "/livez", "/nowhere", "/api/session", "/static/ops.js")
    ids = [(await get(node, path)).headers["X-Request-ID"] for path in paths]
    ids.append((await node.open_live(key)).headers["x-request-id"])
    assert len(set(ids)) == len(ids)
    assert all(len(id) == 16 for id in ids)


@pytest.mark.parametrize("proxies", ["", "192.0.2.0/24"])
async def test_an_id_is_not_taken_from_anybody(settings: SettingsFactory, proxies: str) -> None:
    """A client that is no proxy of ours does not choose under which id it is logged."""
    async with running(settings(trusted_proxies=proxies)) as node:
        response = await get(node, "/livez", **{"X-Request-ID": "mine"})
    assert response.headers["X-Request-ID"] != "mine"


@pytest.mark.parametrize(
    "given, taken",
    [
        ("7f3c9a/b+c=.:-_", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("two words", False),
        ('"}', False),
        ("é", False),
        ("", False),
    ],
)
async def test_an_id_of_a_proxy_is_taken_if_it_is_one(
    settings: SettingsFactory, given: str, taken: bool
) -> None:
    """A trusted proxy's id goes through, what cannot stand in a log does not."""
    async with running(settings(trusted_proxies="127.0.0.1")) as node:
        response = await get(node, "/livez", **{"X-Request-ID": given})
    assert (response.headers["X-Request-ID"] == given) is taken


async def test_a_500_and_its_log_have_the_same_id(
    server_process: ServerProcessFactory, db: Connection
) -> None:
    """Who reports a failure can name it, and it is found in the log; a 4xx needs none."""
    process = await server_process()
    async with aiohttp.ClientSession(process.url) as session:
        async with session.get("/api/session") as response:
            assert "request_id" not in await response.json()
        query(db, "ALTER TABLE sessions RENAME TO gone")
        [key] = ["k" * 43]
        headers = {"Cookie": f"sse_session={key}"}
        async with session.get("/api/session", headers=headers) as response:
            assert response.status == 500
            problem = await response.json()
            assert problem["request_id"] == response.headers["X-Request-ID"]
    await eventually(lambda: problem["request_id"] in process.stderr)
    [line] = [line for line in lines(process) if line.get("request_id") == problem["request_id"]]
    assert line["level"] == "ERROR"
    assert "/api/session" in line["message"]


async def test_what_no_request_does_has_no_id(
    server_process: ServerProcessFactory, db: Connection
) -> None:
    """Batches that serve many requests at once are logged under none of them."""
    process = await server_process()
    query(db, "ALTER TABLE audit_log RENAME TO gone")
    async with aiohttp.ClientSession(process.url) as session:
        headers = {"Authorization": f"Bearer {new_key()}"}
        body = {"recipients": ["a"], "event_type": "new_message", "message": TEXT}
        await session.post("/api/publish", json=body, headers=headers)
    await eventually(lambda: "in the log only" in process.stderr)
    [line] = [line for line in lines(process) if "in the log only" in line.get("message", "")]
    assert "request_id" not in line


# Spans


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """What every span of this process is given to; there can be one provider only."""
    made = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    trace.set_tracer_provider(provider)
    return made


@pytest.fixture
def finished(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    spans.tracer = None


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


async def test_spans(
    finished: InMemorySpanExporter, settings: SettingsFactory, db: Connection
) -> None:
    """Requests, publishing, dispatching and replaying are spans; no text and no user in them."""
    key = add_service(db)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with running(settings()) as node:
        [session_key] = sign_in(db, "alice-4711")
        stream = await node.open_live(session_key)
        body = {"recipients": ["alice-4711"], "event_type": "new_message", "message": TEXT}
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{node.port}") as session,
            session.post(
                "/api/publish",
                json=body,
                headers={"Authorization": f"Bearer {key}", "traceparent": parent},
            ) as response,
        ):
            assert response.status == 200
        await eventually(lambda: stream.ids)
        await get(node, "/nowhere/at/all")
        await eventually(lambda: named(finished, "dispatch"))
        # With its head, while it goes on.
        [opened] = named(finished, "GET /api/stream")
        [replay] = named(finished, "replay")
        assert opened.context is not None
        assert replay.parent is not None
        assert replay.parent.span_id == opened.context.span_id
    [request] = named(finished, "POST /api/publish")
    assert request.context is not None
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{request.parent.span_id:016x}" == parent.split("-")[2]
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    [publish] = named(finished, "publish")
    assert publish.parent is not None
    assert publish.parent.span_id == request.context.span_id
    assert publish.attributes == {
        "sse.recipients": 1,
        "sse.event_type": "new_message",
        "sse.outcome": "published",
    }
    [dispatch] = named(finished, "dispatch")
    assert dispatch.attributes == {"sse.notification_id": stream.ids[0], "sse.streams_written": 1}
    [nowhere] = named(finished, "GET")
    assert nowhere.attributes is not None
    assert nowhere.attributes["http.response.status_code"] == 404
    everything = " ".join(span.to_json() for span in finished.get_finished_spans())
    for secret in (TEXT, "alice-4711", key, session_key, "/nowhere"):
        assert secret not in everything


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
import runpy
sys.argv = ["sse-server", "--version"]
from sse_server import spans
assert spans.enable() is False
with spans.span("x", a=1) as made:
    assert made is None
assert spans.tracer is None
runpy.run_module("sse_server", run_name="__main__")
"""


def test_it_runs_without_the_library() -> None:
    """Without opentelemetry-api nothing is missing, and there are no spans."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sse-server" in done.stdout


def test_it_is_not_imported_before_it_is_needed() -> None:
    """Importing the service imports nothing of OpenTelemetry; asking for it, only the API."""
    code = (
        "import sys, sse_server.app; from sse_server import spans\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "assert spans.enable() is False\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
