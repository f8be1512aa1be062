"""Services, the publishers of ``POST /api/publish``: their keys, and what they send.

A key is looked up in the database with each request, in the same round trip that publishes: a
revoked one is refused from the next request on, on every node.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass

from aiohttp import hdrs, web

from sse_server.audit import Audit
from sse_server.errors import (
    DatabaseError,
    IdempotencyConflict,
    InvalidBody,
    InvalidKey,
    RevokedKey,
    ServiceError,
)
from sse_server.limits import Limits
from sse_server.sanitize import safe_link
from sse_server.store import Publication, Published, Store

# So that people, and scanners for leaked secrets, see what it is.
KEY_PREFIX = "sse_"

_KEY_BYTES = 24  # 192 bits
_BEARER = re.compile(r"Bearer +(sse_[0-9a-f]{48})", re.IGNORECASE)

# Recipients that the audit of a refused request names; it always has their number.
_AUDITED_RECIPIENTS = 20

# Constraints of the table that are not checked before: what PostgreSQL takes for a control
# character depends on the locale of the database.
_FIELDS = {
    "notifications_user_id_format": "recipients: one of them contains control characters",
    "notifications_message_length": "message: must have 1 to 2000 characters",
    "notifications_link_length": "link: must have 1 to 2048 characters",
}


def new_key() -> str:
    """A random key, to be shown once."""
    return KEY_PREFIX + secrets.token_hex(_KEY_BYTES)


def hash_key(key: str) -> bytes:
    """What is stored of a key. SHA-256 will do: there are no 2^192 guesses."""
    return hashlib.sha256(key.encode("ascii")).digest()


def _body_hash(publication: Publication) -> bytes:
    """The same for requests that say the same, whatever their spacing and order of members."""
    body = asdict(publication)
    del body["idempotency_key"]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("ascii")).digest()


@dataclass(frozen=True, slots=True)
class Asking:
    """Who wants to publish, as far as is known before the database is asked.

    Attributes:
        key_hash: Of the key that the request bears.
        address: Under which failures are counted, as the audit names it (``address:…``).
        name: Of the service, if this key was good when it was last used here.
    """

    key_hash: bytes
    address: str
    name: str | None

    @property
    def actor(self) -> str:
        """As the audit names it."""
        return self.address if self.name is None else f"service:{self.name}"


class Services:
    """Publishing in the name of services. One per process."""

    def __init__(
        self, store: Store, limits: Limits, audit: Audit, *, link_hosts: frozenset[str]
    ) -> None:
        self._store = store
        self._limits = limits
        self._audit = audit
        self._link_hosts = link_hosts
        # Name and rate of the services whose keys were good when they were last used here. Not a
        # cache of who may publish: only so that the limit can be applied before the database.
        self._known: dict[bytes, tuple[str, int]] = {}
        # Keys that are being used here for the first time.
        self._first: dict[bytes, asyncio.Future[None]] = {}

    def allows(self, link: str) -> bool:
        """Whether a notification's link would reach its user."""
        return safe_link(link, self._link_hosts) is not None

    async def admit(self, request: web.Request, address: str) -> Asking:
        """Refuse as much as can be before the body is read.

        Raises:
            InvalidKey: The request bears nothing that looks like a key.
            TooManyRequests: The service is over its limit, or the address has failed too often.
        """
        match = _BEARER.fullmatch(request.headers.get(hdrs.AUTHORIZATION, "").strip())
        if match is None:
            raise await self._failed(
                Asking(b"", address, None),
                InvalidKey("Send a service key as Authorization: Bearer sse_…"),
            )
        key_hash = hash_key(match[1].lower())
        known = self._known.get(key_hash)
        if known is not None:
            await self._limits.services.require(f"service:{known[0]}", rate=known[1])
            return Asking(key_hash, address, known[0])
        if not self._limits.sign_ins.has_room(address):
            await self._limits.sign_ins.require(address)
        return Asking(key_hash, address, None)

    async def _failed(
        self,
        asking: Asking,
        error: ServiceError,
        publication: Publication | None = None,
        *,
        service: str | None = None,
    ) -> ServiceError:
        """What to answer to a request that fails: counted, unless the key is known as good."""
        if asking.name is None:
            await self._limits.sign_ins.require(asking.address)
        self._note(asking, error.slug, publication, service)
        return error

    def _note(
        self,
        asking: Asking,
        outcome: str,
        publication: Publication | None,
        service: str | None = None,
    ) -> None:
        """Audit a request with which nothing was sent."""
        detail: dict[str, object] = {}
        if service is not None:
            detail["service"] = service
        if publication is not None:
            detail["recipients"] = len(publication.user_ids)
            detail["user_ids"] = list(publication.user_ids[:_AUDITED_RECIPIENTS])
            if publication.idempotency_key is not None:
                detail["idempotency_key"] = publication.idempotency_key
        self._audit.note(
            "publish",
            actor=asking.actor,
            outcome=outcome,
            event_type=None if publication is None else publication.event_type,
            detail=detail,
        )

    async def invalid(self, asking: Asking, error: ServiceError) -> ServiceError:
        """The answer to a body that is not understood.

        Raises:
            TooManyRequests: The key is not known here, and the address has failed too often.
        """
        return await self._failed(asking, error)

    async def publish(self, asking: Asking, publication: Publication) -> Published:
        """Send, once for each idempotency key.

        Returns: With `outcome` ``published``, or ``repeated`` if it had been sent before.

        Raises:
            InvalidKey: No service has this key, or (`RevokedKey`) it is revoked.
            TooManyRequests: The service is over its limit.
            InvalidBody: There is no such event type, or the table refuses the row.
            IdempotencyConflict: The key was used for another request.
            DatabaseError: As ever; whether it was sent is then not known.
        """
        key_hash = asking.key_hash
        # How much a service may is known only after its first request. Until that is answered, the
        # others wait: they would all pass.
        while (known := self._known.get(key_hash)) is None and key_hash in self._first:
            await asyncio.wait({self._first[key_hash]})
        if known is not None:
            if asking.name is None:  # admit() could not do it
                await self._limits.services.require(f"service:{known[0]}", rate=known[1])
            return await self._publish(Asking(key_hash, asking.address, known[0]), publication)
        first = self._first[key_hash] = asyncio.get_running_loop().create_future()
        try:
            return await self._publish(asking, publication)
        finally:
            del self._first[key_hash]
            first.set_result(None)

    async def _publish(self, asking: Asking, publication: Publication) -> Published:
        try:
            published = await self._store.publish_as_service(
                asking.key_hash, publication, _body_hash(publication)
            )
        except DatabaseError as exc:
            if exc.sqlstate is None or not exc.sqlstate.startswith("23"):
                raise
            reason = next((text for name, text in _FIELDS.items() if name in str(exc)), None)
            if reason is None:
                raise
            raise await self._failed(asking, InvalidBody(reason), publication) from exc
        service = published.service
        if service is None or published.outcome == "revoked_key":
            self._known.pop(asking.key_hash, None)
            # Of no service's limit any more, so of the address's.
            asking = Asking(asking.key_hash, asking.address, None)
            if service is None:
                raise await self._failed(asking, InvalidKey("No service has this key."))
            error: ServiceError = RevokedKey("This key has been revoked.")
            raise await self._failed(asking, error, publication, service=service)
        rate = published.rate_per_minute
        assert rate is not None
        if self._known.get(asking.key_hash) is None:
            await self._limits.services.take(f"service:{service}", rate=rate)
        self._known[asking.key_hash] = (service, rate)
        asking = Asking(asking.key_hash, asking.address, service)
        match published.outcome:
            case "conflict":
                error = IdempotencyConflict(
                    "This idempotency key was used for another request within the last 24 hours."
                )
                raise await self._failed(asking, error, publication)
            case "unknown_event_type":
                error = InvalidBody(
                    "event_type: there is no such event type",
                    errors=[{"field": "event_type", "problem": "there is no such event type"}],
                    known=published.results or [],
                )
                raise await self._failed(asking, error, publication)
            case "repeated":
                self._note(asking, "repeated", publication)
            case _:
                results = published.results or []
                await self._audit.sent(
                    asking.actor, publication.event_type, ((r[0], r[1], r[2]) for r in results)
                )
        return published


SERVICES = web.AppKey("services", Services)
