"""What can go wrong, in one tree.

``ConfigurationError`` ends the process before it opens a socket. Every ``ServiceError`` has an HTTP
status and a stable slug and is answered as ``application/problem+json`` (RFC 9457); its ``detail``
is for the client to read, its ``__cause__`` for the log.
"""

from __future__ import annotations

from typing import ClassVar


class ConfigurationError(Exception):
    """The service cannot start like this; the message is one sentence for the operator."""


class DatabaseError(Exception):
    """A statement failed in the database.

    Attributes:
        sqlstate: The five characters of PostgreSQL's SQLSTATE, or ``None`` if there was none.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


class DatabaseUnavailable(DatabaseError):
    """The database could not be reached, or did not answer in time."""


class ServiceError(Exception):
    """A request that is answered with an error."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal server error"

    def __init__(
        self,
        detail: str = "",
        *,
        retry_after: float | None = None,
        **members: object,
    ) -> None:
        """
        Args:
            detail: One sentence for the client.
            retry_after: Seconds after which it may try again.
            members: Extension members of the problem document.
        """
        super().__init__(detail or self.title)
        self.detail = detail
        self.retry_after = retry_after
        self.members = members


class BadRequest(ServiceError):
    status, slug, title = 400, "bad-request", "Bad request"


class InvalidBody(BadRequest):
    status, slug, title = 422, "invalid-body", "The body is not what this endpoint takes"


class NotSignedIn(ServiceError):
    status, slug, title = 401, "not-signed-in", "No valid session"


class InvalidToken(ServiceError):
    status, slug, title = 401, "invalid-token", "The sign-in token is refused"


class TokenUsed(InvalidToken):
    slug, title = "token-used", "The sign-in token has been used before"


class InvalidKey(ServiceError):
    status, slug, title = 401, "invalid-key", "No valid service key"


class RevokedKey(InvalidKey):
    slug, title = "revoked-key", "This service key has been revoked"


class NotOperator(ServiceError):
    status, slug, title = 401, "not-an-operator", "No valid operator key"


class Forbidden(ServiceError):
    status, slug, title = 403, "forbidden", "Forbidden"


class CrossSite(Forbidden):
    slug, title = "cross-site", "Cross-site request refused"


class WrongHost(Forbidden):
    slug, title = "wrong-host", "Not served under this name"


class TokensNotAccepted(Forbidden):
    slug, title = "tokens-not-accepted", "This server has no key to verify tokens with"


class NotFound(ServiceError):
    status, slug, title = 404, "not-found", "Not found"


class UnknownEventType(NotFound):
    slug, title = "unknown-event-type", "Unknown event type"


class BodyTimeout(ServiceError):
    status, slug, title = 408, "request-timeout", "The body took too long to arrive"


class Conflict(ServiceError):
    status, slug, title = 409, "conflict", "Conflict"


class RequiredEventType(Conflict):
    slug, title = "required-event-type", "This event type cannot be switched off"


class IdempotencyConflict(Conflict):
    slug, title = "idempotency-conflict", "This idempotency key was used for another request"


class ContentTooLarge(ServiceError):
    status, slug, title = 413, "content-too-large", "The body is too large"


class UnsupportedMediaType(ServiceError):
    status, slug, title = 415, "unsupported-media-type", "The body must be application/json"


class HeadTooLarge(ServiceError):
    status, slug, title = 431, "request-head-too-large", "Too many or too large header fields"


class TooManyRequests(ServiceError):
    status, slug, title = 429, "too-many-requests", "Too many requests"


class Unavailable(ServiceError):
    status, slug, title = 503, "unavailable", "Temporarily unavailable"
