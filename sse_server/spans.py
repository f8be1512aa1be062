"""OpenTelemetry spans, if its API is installed and an SDK is set up in this process.

Where they go is the SDK's business (``opentelemetry-instrument sse-server``). Without it nothing of
OpenTelemetry is imported but the API, and nothing at all if that is not installed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sse_server import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

P = ParamSpec("P")
R = TypeVar("R")

# `None` without an SDK: what is called for each notification looks here before it asks for a span.
tracer: Tracer | None = None
_NONE: AbstractContextManager[Span | None] = contextlib.nullcontext()

# What a client may call a method is not bounded; what a span is named should be.
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def enable() -> bool:
    """Make spans from now on, if somebody takes them. Returns: Whether that is so."""
    global tracer
    tracer = None
    try:
        from opentelemetry import trace
    except ImportError:
        return False
    # Without an SDK spans lead nowhere, and are not worth a microsecond of the fan-out.
    if not isinstance(
        trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider
    ):
        tracer = trace.get_tracer("sse_server", __version__)
    return tracer is not None


def span(name: str, **attributes: str | int) -> AbstractContextManager[Span | None]:
    """A span around a block: ``with span("publish", recipients=3) as made:``.

    Never the text of a message, nor whose it is.
    """
    if tracer is None:
        return _NONE
    return tracer.start_as_current_span(
        name, attributes={f"sse.{key}": value for key, value in attributes.items()}
    )


def request(
    method: str, route: str | None, headers: Mapping[str, str]
) -> AbstractContextManager[Span | None]:
    """The span around the answering of a request; a child of the caller's, if that names one.

    Args:
        method: Of HTTP.
        route: The template of its path; `None` if no route has it.
        headers: Of the request.
    """
    if tracer is None:
        return _NONE
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    method = method if method in _METHODS else "_OTHER"
    attributes = {"http.request.method": method}
    if route is not None:
        attributes["http.route"] = route
    return tracer.start_as_current_span(
        method if route is None else f"{method} {route}",
        context=propagate.extract(headers),
        kind=SpanKind.SERVER,
        attributes=attributes,
        end_on_exit=False,
    )


def answered(made: Span | None, status: int) -> None:
    """The answer's head is on its way: the request's span ends, however long a body follows."""
    if made is None or not made.is_recording():
        return
    made.set_attribute("http.response.status_code", status)
    if status >= 500:
        from opentelemetry.trace import StatusCode

        made.set_status(StatusCode.ERROR)
    made.end()


def unanswered(made: Span | None) -> None:
    """Nobody is there to be answered: the request's span ends."""
    if made is not None and made.is_recording():
        made.end()


def traced(name: str) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """A decorator: a span around each call of a coroutine function."""

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if tracer is None:
                return await function(*args, **kwargs)
            with span(name):
                return await function(*args, **kwargs)

        return wrapper

    return decorate
