"""Sessions: aiohttp-session over a PostgreSQL storage of our own, and the claim to a stream.

A session starts with a signed token, once; or in a demo, just so.
The cookie holds a random key and nothing else; the table holds its hash. A key that is malformed,
unknown or expired is no session. Signing out deletes the row, and a trigger tells every node.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import hdrs, web
from aiohttp_session import AbstractStorage, Session, get_session, new_session

from sse_server.errors import NotSignedIn, TokenUsed
from sse_server.store import Claim, SessionRow, Store
from sse_server.tasks import Batcher
from sse_server.tokens import Token

COOKIE = "sse_session"
# The prefix makes browsers insist on Secure, Path=/ and no Domain (RFC 6265bis, 4.1.3.2): nobody
# can plant it from a sibling domain or over plain HTTP.
SECURE_COOKIE = "__Host-sse_session"

_KEY_BYTES = 32  # 256 bits
_KEY = re.compile(r"[A-Za-z0-9_-]{43}")

SESSION_ROW = web.RequestKey("session_row", SessionRow)

# Sessions claimed by one query: 200 announcements fill a good half of a NOTIFY payload.
CLAIM_BATCH = 200


def hash_key(key: str) -> bytes:
    """What is stored of a random key. SHA-256 will do: there are no 2^256 guesses."""
    return hashlib.sha256(key.encode("ascii")).digest()


class PostgresStorage(AbstractStorage):
    """aiohttp-session's storage in the table ``sessions``. ``session["user_id"]`` is its user."""

    def __init__(
        self,
        store: Store,
        *,
        seconds: float,
        streams_per_user: int,
        stream_seconds: float,
        cross_site: bool = False,
    ) -> None:
        """
        Args:
            store: Where the table is.
            seconds: How long a session lasts. It is not prolonged by use.
            streams_per_user: How many may be open, on all nodes together.
            stream_seconds: The longest that a stream lasts.
            cross_site: Whether pages of other sites may use the session. The cookie is then no
                longer withheld by SameSite; what keeps the other sites out is `same_site()`, and
                that the cookie is partitioned, where the browser knows that.
        """
        super().__init__(
            cookie_name=COOKIE, max_age=int(seconds), httponly=True, samesite="Lax", path="/"
        )
        self._store = store
        self._seconds = seconds
        self._cross_site = cross_site
        self._claims: Batcher[bytes, Claim | None] = Batcher(
            "claim streams",
            partial(store.claim_streams, most=streams_per_user, seconds=stream_seconds),
            size=CLAIM_BATCH,
            concurrency=2,
        )

    def key(self, request: web.Request) -> str | None:
        """The key that the request's cookie holds, if it looks like one."""
        key = request.cookies.get(SECURE_COOKIE if request.secure else COOKIE)
        return key if key is not None and _KEY.fullmatch(key) else None

    async def load_session(self, request: web.Request) -> Session:
        key = self.key(request)
        row = None if key is None else await self._store.session_by_key(hash_key(key))
        if row is None:
            return await self.new_session()
        request[SESSION_ROW] = row
        data: dict[str, Any] = {**row.data, "user_id": row.user_id}
        # aiohttp-session would judge the age by this node's clock; the database has judged it.
        return Session(
            key, data={"created": row.created_ms // 1000, "session": data}, new=False, max_age=None
        )

    async def save_session(
        self, request: web.Request, response: web.StreamResponse, session: Session
    ) -> None:
        key = session.identity
        if session.empty:
            if key is not None:
                await self._store.delete_session(hash_key(key))
            self._forget_cookie(request, response)
            return
        assert key is not None  # sign_in() has inserted it
        if not session.new:
            data = {name: value for name, value in session.items() if name != "user_id"}
            await self._store.update_session(hash_key(key), session["user_id"], data)
            return
        self._set_cookie(request, response, key, int(self._seconds))

    def _forget_cookie(self, request: web.Request, response: web.StreamResponse) -> None:
        self._set_cookie(request, response, "", 0)

    def _set_cookie(
        self, request: web.Request, response: web.StreamResponse, value: str, max_age: int
    ) -> None:
        name = SECURE_COOKIE if request.secure else COOKIE
        parts = [f"{name}={value}", f"Max-Age={max_age}", "Path=/", "HttpOnly"]
        if request.secure:
            parts.append("Secure")
        if self._cross_site and request.secure:
            # Browsers take both with Secure only. Partitioned (CHIPS): those that block the cookies
            # of other sites take this one all the same, and send it to us from pages of the site
            # that it was set on, and from no other.
            parts += ["SameSite=None", "Partitioned"]
        else:
            parts.append("SameSite=Lax")
        # By hand: http.cookies knows Partitioned from Python 3.14 on.
        response.headers.add(hdrs.SET_COOKIE, "; ".join(parts))

    async def start(
        self, user_id: str, *, old_key: str | None, token: Token | None
    ) -> tuple[str, SessionRow]:
        """Insert a session under a fresh key.

        Args:
            user_id: Whose it is.
            old_key: Of the session that it replaces, if any.
            token: To be used up with it, if any.

        Returns: The key and the row.

        Raises:
            TokenUsed: The token has been used before; nothing has changed.
        """
        key = secrets.token_urlsafe(_KEY_BYTES)
        row = await self._store.insert_session(
            hash_key(key),
            user_id,
            {},
            self._seconds,
            old_key_hash=None if old_key is None else hash_key(old_key),
            token_hash=None if token is None else token.id_hash,
            token_expires=None if token is None else token.expires,
        )
        if row is None:
            raise TokenUsed("Get a new one: each works once.")
        return key, row

    def claim_stream(self, request: web.Request) -> asyncio.Future[Claim | None] | None:
        """Make the stream that is about to open the one that counts for its session.

        Claims that arrive together become one query.

        Returns: The claim, in time (`None` in it: no valid session); `None` at once without a key.
        """
        key = self.key(request)
        return None if key is None else self._claims.ask(hash_key(key))

    async def close(self) -> None:
        """Cancel the claims that are under way."""
        await self._claims.close()


STORAGE = web.AppKey("session_storage", PostgresStorage)


@dataclass(frozen=True, slots=True)
class SignedIn:
    """Who is asking. `expires_ms` is since 1970."""

    user_id: str
    expires_ms: int


async def signed_in(request: web.Request) -> SignedIn:
    """Who is asking.

    Raises:
        NotSignedIn: No session, or none that is still valid.
    """
    session = await get_session(request)
    if session.new or session.empty:
        raise NotSignedIn("Sign in first.")
    row = request[SESSION_ROW]
    return SignedIn(row.user_id, row.expires_ms)


async def sign_in(request: web.Request, user_id: str, *, token: Token | None = None) -> SignedIn:
    """Start a session for this user, under a fresh key that the response's cookie will hold.

    The session of the request's cookie ends: a key that was there before the sign-in may be known
    to somebody else.

    Raises:
        TokenUsed: The token has been used before; nothing has changed.
    """
    storage = request.app[STORAGE]
    key, row = await storage.start(user_id, old_key=storage.key(request), token=token)
    session = await new_session(request)
    session.set_new_identity(key)
    session["user_id"] = user_id
    request[SESSION_ROW] = row
    return SignedIn(row.user_id, row.expires_ms)


async def sign_out(request: web.Request) -> None:
    """End the session of the request; with the response, its row is deleted."""
    (await get_session(request)).invalidate()
