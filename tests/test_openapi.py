"""The OpenAPI document describes what is served: nothing is missing, and nothing is made up."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
from aiohttp import web
from playwright.async_api import Browser
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server import errors
from sse_server.api import openapi
from sse_server.app import create_app
from sse_server.events import Closing
from sse_server.sessions import COOKIE
from tests.conftest import Client, SettingsFactory
from tests.documented import validate
from tests.sse import Event, EventReader
from tests.streaming import insert, query, sign_in, without_rate_limit

Route = tuple[str, str]


def served(app: web.Application) -> set[Route]:
    """(method, path) of every route; HEAD is GET without a body."""
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        path = route.resource.canonical
        if isinstance(route.resource, web.StaticResource):
            path += "/{filename}"
        found.add((route.method.lower().replace("head", "get"), path))
    return found


def described(document: dict[str, Any]) -> set[Route]:
    return {
        (method, path) for path, operations in document["paths"].items() for method in operations
    }


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("demo", [False, True])
def test_every_route_is_described_and_every_description_is_a_route(
    settings: SettingsFactory, demo: bool, operator: bool
) -> None:
    """The table of routes and the document name the same."""
    app = create_app(settings(demo=demo, operator_key="k" * 32 if operator else None))
    assert served(app) == described(openapi.document(demo=demo, operator=operator))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("demo", [False, True])
def test_the_document_is_openapi(demo: bool, strict: bool) -> None:
    """Every operation has an id of its own, a summary, a known tag, and answers."""
    document = openapi.document(demo=demo, operator=demo, strict=strict)
    assert document["openapi"].startswith("3.1.")
    tags = {tag["name"] for tag in document["tags"]}
    ids = []
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            assert operation["summary"]
            assert set(operation["tags"]) <= tags
            assert operation["responses"]
            for requirement in operation["security"]:
                assert requirement.keys() <= document["components"]["securitySchemes"].keys()
            named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    assert len(ids) == len(set(ids))
    assert {
        tag for ops in document["paths"].values() for o in ops.values() for tag in o["tags"]
    } == (tags)
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})
        assert ("additionalProperties" in schema) or not strict or name in ("Closing",), name


def _references(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*(_references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_references(item) for item in value))
    return set()


def test_every_reference_leads_somewhere() -> None:
    """No schema is missing, and none is left over but what an error may bring along."""
    document = openapi.document(demo=True, operator=True)
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert _references(document) <= named
    assert named - _references(document) == {"#/components/schemas/Fault"}


def _media_types() -> list[Any]:
    found = []
    for path, operations in openapi.document(demo=True, operator=True)["paths"].items():
        for method, operation in operations.items():
            parts = {"body": operation.get("requestBody", {}), **operation["responses"]}
            for part, described in parts.items():
                for media_type, media in described.get("content", {}).items():
                    if "example" in media:
                        found.append(pytest.param(media, id=f"{method} {path} {part} {media_type}"))
    return found


@pytest.mark.parametrize("media", _media_types())
def test_examples_are_what_their_schemas_say(media: dict[str, Any]) -> None:
    """An example that is copied works."""
    validate(media["schema"], media["example"])


def test_bodies_and_answers_in_json_have_examples() -> None:
    """Every model that a reader meets has one, the smallest apart."""
    for path, operations in openapi.document(demo=True, operator=True)["paths"].items():
        for operation in operations.values():
            parts = [operation.get("requestBody", {}), *operation["responses"].values()]
            for part in parts:
                media = part.get("content", {}).get("application/json")
                if media is not None and path not in ("/livez", "/readyz", "/api/openapi.json"):
                    assert "example" in media, path


def _tree(error: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
    return {error}.union(*(_tree(derived) for derived in error.__subclasses__()))


def test_every_error_is_in_the_document() -> None:
    """The types of problem documents are enumerated, each where it may come."""
    document = json.dumps(openapi.document(demo=True, operator=True))
    # All but a failure of ours, a base class, and one with which no operation is reached.
    missing = {
        error.slug
        for error in _tree(errors.ServiceError)
        if error.__module__ == errors.__name__
        and f"urn:sse-server:problem:{error.slug}" not in document
    }
    assert missing == {"internal-error", "conflict", "request-head-too-large"}


async def test_it_is_served_to_everybody(client: Client) -> None:
    """The document needs no session, and says what this server serves."""
    response = await client.get("/api/openapi.json")
    assert response.status == 200
    assert await response.json() == json.loads(json.dumps(openapi.document(demo=True)))


async def test_the_page_has_nothing_inline(client: Client) -> None:
    """The readable page works under the strict policy: nothing inline, only own files."""
    response = await client.get("/api/docs")
    assert response.status == 200
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    page = await response.text()
    assert "style=" not in page
    assert not re.search(r"\son\w+=", page)
    for tag, source in re.findall(r'<(script|link)[^>]*?(?:src|href)="([^"]*)"', page):
        assert (await client.get(source)).status == 200, (tag, source)
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)


async def test_the_page_shows_every_operation(client: Client, browser: Browser) -> None:
    """In a real browser, under the page's own policy, without an error."""
    page = await browser.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: faults.append(str(error)))
    await page.goto(str(client.make_url("/api/docs#mark_read")))
    await page.wait_for_selector("details#stream")
    for path, operations in openapi.document(demo=True)["paths"].items():
        for operation in operations.values():
            text = await page.text_content(f"details#{operation['operationId']} > summary")
            assert text is not None
            assert path in text
    assert await page.is_visible("details#mark_read >> text=Idempotent")
    assert await page.is_hidden("details#stream >> text=EventSource")
    assert faults == []


async def test_the_events_of_a_stream_are_described(client: Client, db: Connection) -> None:
    """What a stream sends is what ``x-events`` says."""
    operation = openapi.document(demo=True, strict=True)["paths"]["/api/stream"]["get"]
    described = operation["responses"]["200"]["content"][openapi.EVENT_STREAM]["x-events"]
    without_rate_limit(db)
    [key, other] = sign_in(db, "alice", "alice")
    ids = insert(db, "alice", "hello", *(str(number) for number in range(101)))
    seen = set()

    def check(event: Event) -> None:
        validate(described[event.event], event.json)
        seen.add(event.event)

    headers = {"Cookie": f"{COOKIE}={key}", "Last-Event-ID": "garbage"}
    async with client.get("/api/stream", headers=headers) as response:
        events = EventReader(response)
        while "ready" not in seen:
            check(await events.next_event())
        cookie = {"Cookie": f"{COOKIE}={other}"}
        # As a list of ids, then, being many, as "up_to".
        await client.post("/api/notifications/read", json={"ids": ids[:1]}, headers=cookie)
        await client.post("/api/notifications/read", json={"all": True}, headers=cookie)
        await client.patch("/api/preferences", json={"new_message": False}, headers=cookie)
        query(db, "DELETE FROM sessions")
        for event in await events.rest():
            check(event)
    assert seen | {"ping"} == described.keys()


def test_every_reason_to_close_is_described() -> None:
    """All reasons but the one that is never sent."""
    closed = openapi.document()["components"]["schemas"]["Closed"]
    assert set(closed["properties"]["reason"]["enum"]) == set(Closing) - {Closing.GONE}


async def test_the_description_of_a_route_is_needed(client: Client) -> None:
    """The test client fails on what is not described (the check that all other tests rely on)."""
    with pytest.raises(AssertionError):
        validate({"$ref": "#/components/schemas/MarkedAnswer"}, {"marked": 1})
    with pytest.raises(AssertionError):
        validate(
            {"$ref": "#/components/schemas/MarkedAnswer"},
            {"marked": 1, "unread_count": 0, "more": 1},
        )
    with pytest.raises(AssertionError):
        validate({"$ref": "#/components/schemas/HistoryItem"}, {"created_at": "yesterday"})
