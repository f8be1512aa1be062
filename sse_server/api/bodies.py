"""What goes in and out: the models of bodies, query strings and answers, and reading them.

What is not as described is refused by name. The OpenAPI document is built from the same models.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sse_server.errors import BadRequest, ContentTooLarge, InvalidBody, ServiceError
from sse_server.events import MAX_ID

# Limits
MOST_ERRORS = 20  # faults of one body that are listed


class Body(BaseModel):
    """The base of all request bodies: nothing unknown, no conversions ("1" is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Query(BaseModel):
    """The base of all query strings: nothing unknown, nothing twice."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Answer(BaseModel):
    """The base of all answers. The handlers do not build these; the tests check each answer against
    the document that describes them."""

    model_config = ConfigDict(extra="forbid")


def _decimal(value: object) -> object:
    if not isinstance(value, str):
        return value
    # str.isdigit() alone would take "²" and "٣", int() alone " 1" and "1_000".
    if value.isascii() and value.isdigit() and len(value) <= 19:
        return int(value)
    raise ValueError("must be a decimal number")


def _true_or_false(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise ValueError('must be "true" or "false"')


# An id in a body.
Id = Annotated[int, Field(ge=1, le=MAX_ID)]


def left_out(schema: dict[str, Any]) -> None:
    """Take the default out of a field's JSON Schema, where it only stands for "not given".

    Such a field is not ``| None``: null is refused, and a fault would be told twice, for the value
    and for the null that it is not.
    """
    schema.pop("default", None)


# Numbers and truth values as query strings have them. Each goes last in its `Annotated`: bounds
# that follow would be lost to the JSON Schema.
DECIMAL = BeforeValidator(_decimal)
TRUE_OR_FALSE = BeforeValidator(_true_or_false)
Timestamp = Annotated[
    str,
    Field(
        description="ISO 8601 in UTC with milliseconds.",
        json_schema_extra={"format": "date-time"},
        examples=["2026-01-31T12:00:00.000Z"],
    ),
]


B = TypeVar("B", bound=BaseModel)
Q = TypeVar("Q", bound=Query)


async def parse(request: web.Request, model: type[B]) -> B:
    """The request's body as a `model`.

    Raises:
        BadRequest: It is not JSON, or names a member twice.
        ContentTooLarge: It is longer than the application allows.
        InvalidBody: It is something else than the model; `errors` lists where and why, never the
            values themselves.
    """
    try:
        raw = await request.read()
    except web.HTTPRequestEntityTooLarge as exc:
        # Otherwise the connection would go on reading what nobody wants.
        raise ContentTooLarge("The body is too large.") from exc
    try:
        # A fixed encoding and no NaN: RFC 8259.
        value = json.loads(
            raw.decode("utf-8"),
            parse_float=_number,
            parse_constant=_no_constant,
            object_pairs_hook=_no_repeats,
        )
    except _RepeatedMemberError as exc:
        raise BadRequest("The body names a member of an object twice.") from exc
    except (ValueError, RecursionError) as exc:
        raise BadRequest("The body is not JSON in UTF-8.") from exc
    try:
        return model.model_validate(value)
    except ValidationError as exc:
        raise _refusal(exc, InvalidBody, "body") from None


def parse_query(request: web.Request, model: type[Q]) -> Q:
    """The request's query string as a `model`.

    Raises:
        BadRequest: It is something else; `errors` lists where and why.
    """
    query = request.query
    if len(query) != len(set(query)):
        raise BadRequest("A parameter of the query string is given twice.")
    try:
        return model.model_validate(dict(query))
    except ValidationError as exc:
        raise _refusal(exc, BadRequest, "query string") from None


def _refusal(exc: ValidationError, error: type[ServiceError], whole: str) -> ServiceError:
    problems = [
        {"field": ".".join(str(part) for part in fault["loc"])[:200], "problem": fault["msg"]}
        for fault in exc.errors(include_input=False, include_url=False, include_context=False)
    ]
    return error(
        "; ".join(f"{p['field'] or whole}: {p['problem']}" for p in problems[:5]),
        errors=problems[:MOST_ERRORS],
    )


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _number(text: str) -> float | int:
    # 17.0 is the integer 17 (JSON Schema, 6.1.1), and how some languages write it.
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


class _RepeatedMemberError(ValueError):
    pass


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # The last one would win here, the first one in whatever looked at the body before.
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _RepeatedMemberError
    return value


def integer(text: str, name: str, least: int, most: int) -> int:
    """A decimal integer within bounds.

    Raises:
        BadRequest: It is not one; the message names the parameter.
    """
    if text.isascii() and text.isdigit() and len(text) <= 19 and least <= int(text) <= most:
        return int(text)
    raise BadRequest(f"{name} must be a number from {least} to {most}.")
