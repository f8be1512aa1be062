"""``/api/session``: signing in with a token, who is signed in; and the demo's way in as anybody."""

from __future__ import annotations

from typing import Annotated

from aiohttp import hdrs, web
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from sse_server import events
from sse_server.api.bodies import Body, parse
from sse_server.api.notifications import STORE, EventTypeName, json_response
from sse_server.audit import AUDIT
from sse_server.errors import DatabaseError, InvalidBody, InvalidToken, TokensNotAccepted
from sse_server.sessions import SignedIn, sign_in, sign_out, signed_in
from sse_server.tokens import Token, Verifier


def _user_id(value: str) -> str:
    if len(value.encode("utf-8", "surrogatepass")) > 255:
        raise ValueError("longer than 255 bytes")
    if any(
        ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) < 0xE000 for char in value
    ):
        raise ValueError("contains control characters")
    return value


UserId = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_user_id)]

_USER_ID: TypeAdapter[str] = TypeAdapter(UserId)

# Absent if no key is configured.
VERIFIER = web.AppKey("verifier", Verifier)


class SignIn(Body):
    """Nothing: the token says it all."""


class DemoSignIn(Body):
    user_id: UserId


class DemoPublish(Body):
    user_id: UserId
    event_type: EventTypeName
    message: Annotated[str, Field(min_length=1, max_length=2000)]
    link: Annotated[str, Field(min_length=1, max_length=2048)] | None = None


async def create(request: web.Request) -> web.Response:
    """POST /api/session: exchanges a token for a session.

    The token is a JWT that the application's backend has signed, in ``Authorization: Bearer``; each
    works once. A session that the request's cookie holds ends.
    """
    audit, actor = request.app[AUDIT], f"address:{request.remote}"
    user_id: str | None = None
    try:
        token = _verified(request)
        user_id = token.user_id
        if request.can_read_body:
            await parse(request, SignIn)
        who = await sign_in(request, user_id, token=token)
    except InvalidToken as exc:
        # The reason is one of a few sentences; nothing of the token is in it.
        audit.note(
            "sign_in", actor=actor, outcome=exc.slug, user_id=user_id, detail={"reason": str(exc)}
        )
        raise
    audit.note("sign_in", actor=actor, outcome="ok", user_id=user_id)
    return _who(who)


def _verified(request: web.Request) -> Token:
    verifier = request.app.get(VERIFIER)
    if verifier is None:
        raise TokensNotAccepted("Set SSE_JWT_SECRET or another key to let users sign in.")
    scheme, _, text = ",".join(request.headers.getall(hdrs.AUTHORIZATION, [])).partition(" ")
    if scheme.lower() != "bearer":
        raise InvalidToken("Send the token as Authorization: Bearer TOKEN.")
    token = verifier.verify(text.strip())
    try:
        _USER_ID.validate_python(token.user_id)
    except ValidationError as exc:
        raise InvalidToken("The token's sub is no user id.") from exc
    return token


def _who(who: SignedIn) -> web.Response:
    return json_response({"user_id": who.user_id, "expires_at": events.timestamp(who.expires_ms)})


async def get(request: web.Request) -> web.Response:
    """GET /api/session"""
    return _who(await signed_in(request))


async def delete(request: web.Request) -> web.Response:
    """DELETE /api/session: ends it, and its stream on whatever node."""
    who = await signed_in(request)
    await sign_out(request)
    request.app[AUDIT].note(
        "sign_out",
        actor=f"user:{who.user_id}",
        outcome="ok",
        user_id=who.user_id,
        detail={"address": request.remote},
    )
    return web.Response(status=204)


async def demo_sign_in(request: web.Request) -> web.Response:
    """POST /demo/session (demo mode only)"""
    body = await parse(request, DemoSignIn)
    who = await sign_in(request, body.user_id)
    request.app[AUDIT].note(
        "sign_in",
        actor=f"address:{request.remote}",
        outcome="ok",
        user_id=body.user_id,
        detail={"demo": True},
    )
    return _who(who)


async def demo_publish(request: web.Request) -> web.Response:
    """POST /demo/publish (demo mode only): writes a real row, as a backend would."""
    who = await signed_in(request)
    body = await parse(request, DemoPublish)
    if "\0" in body.message or "\0" in (body.link or ""):
        raise InvalidBody("message: PostgreSQL's text has no NUL")
    try:
        [(_, outcome, id)] = await request.app[STORE].publish(
            source=f"demo:{who.user_id}",
            user_ids=[body.user_id],
            event_type=body.event_type,
            message=body.message,
            link=body.link,
        )
    except DatabaseError as exc:
        if exc.sqlstate == "23503":
            raise InvalidBody("event_type: there is no such event type") from exc
        raise
    await request.app[AUDIT].sent(
        f"demo:{who.user_id}", body.event_type, [(body.user_id, outcome, id)]
    )
    return json_response({"outcome": outcome, "id": id})
