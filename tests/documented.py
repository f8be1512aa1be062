"""Checks answers against the OpenAPI document: status, media type, headers, and every member.

The test client does so with each answer that it gets (see ``aiohttp_client`` in conftest.py).
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import aiohttp
import jsonschema_rs
from aiohttp.client_middlewares import ClientHandlerType

from sse_server import errors
from sse_server.api import openapi

PROBLEM = "application/problem+json"

#: What a request may meet before it is known where it leads, by status.
BEFORE_ROUTING: tuple[type[errors.ServiceError], ...] = (
    errors.BadRequest,
    errors.BodyTimeout,
    errors.CrossSite,
    errors.TooManyRequests,
    errors.Unavailable,
    errors.UnsupportedMediaType,
    errors.WrongHost,
)


def _pattern(path: str) -> re.Pattern[str]:
    if path.startswith("/static/"):
        return re.compile("/static/.*")
    return re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)))


@functools.cache
def _document() -> dict[str, Any]:
    return openapi.document(demo=True, operator=True, strict=True)


@functools.cache
def _paths() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    # A path without parameters wins, as in the routes.
    found = sorted(_document()["paths"].items(), key=lambda item: "{" in item[0])
    return [(_pattern(path), operations) for path, operations in found]


@functools.cache
def _validator(schema: str) -> jsonschema_rs.Validator:
    """For a schema of the document, as JSON."""
    whole = {**json.loads(schema), "components": _document()["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def validate(schema: dict[str, Any], value: object) -> None:
    """Fails unless `value` is as a schema of the document says, with nothing besides."""
    problems = [
        f"{error.instance_path}: {error.message}"
        for error in _validator(json.dumps(schema)).iter_errors(value)
    ]
    assert not problems, f"{problems} in {value!r}"


def operation(method: str, path: str) -> dict[str, Any] | None:
    """The operation that a request leads to, if there is one."""
    method = "get" if method == "HEAD" else method.lower()
    for pattern, operations in _paths():
        if pattern.fullmatch(path) and method in operations:
            return dict(operations[method])
    return None


def check(method: str, path: str, status: int, headers: dict[str, str], body: bytes | None) -> None:
    """Fails unless the document has this answer.

    Args:
        method: Of the request.
        path: Of the request, decoded and without query string.
        status: Of the answer.
        headers: Of the answer, names in lower case.
        body: Of the answer; `None` if it is not to be looked at.
    """
    what = f"{method} {path} -> {status}"
    media_type = headers.get("content-type", "").partition(";")[0]
    found = operation(method, path)
    if found is None or (method == "HEAD" and status == 405):
        _check_elsewhere(what, method, status, media_type, body)
        return
    described = found["responses"].get(str(status))
    if described is None:
        raise AssertionError(f"{what} is not in the document: {(body or b'')[:500]!r}")
    for name in described.get("headers", {}):
        if name in ("ETag", "Set-Cookie"):
            assert name.lower() in headers, f"{what}: {name} is missing"
    content = described.get("content")
    if content is None:
        assert not body, f"{what}: the document has no body, there is {body!r}"
        return
    media = content.get(media_type) or content.get("*/*")
    assert media is not None, f"{what}: the document has no {media_type}"
    if body is not None and media_type.endswith("json") and "*/*" not in content:
        validate(media["schema"], json.loads(body))


def _check_elsewhere(
    what: str, method: str, status: int, media_type: str, body: bytes | None
) -> None:
    """An answer to a request that leads nowhere."""
    if method == "OPTIONS" and status == 204:
        return  # a preflight
    allowed = {404, 405, *(error.status for error in BEFORE_ROUTING)}
    assert status in allowed, f"{what}, where there is no such operation"
    assert media_type == PROBLEM, f"{what}: {media_type}"
    if body:
        validate({"$ref": "#/components/schemas/Problem"}, json.loads(body))


async def documented(
    request: aiohttp.ClientRequest, handler: ClientHandlerType
) -> aiohttp.ClientResponse:
    """A middleware of aiohttp's client that checks each answer."""
    response = await handler(request)
    headers = {name.lower(): value for name, value in response.headers.items()}
    body = None
    if response.content_type != openapi.EVENT_STREAM and request.method != "HEAD":
        body = await response.read()
    check(request.method, request.url.path, response.status, headers, body)
    return response
