"""Sign-in tokens: signed by the application's backend, verified here (JWT, RFC 7519 and RFC 8725).

`sign()` does the backend's part, for trials from the command line; a server never calls it.

The only module that knows PyJWT. Which algorithm is accepted depends on the configured key alone,
never on what a token says of itself. Nothing of a token is logged or repeated in an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from sse_server.config import Settings
from sse_server.errors import ConfigurationError, InvalidToken

logger = logging.getLogger(__name__)

# Limits
LIFETIME_SECONDS = 15 * 60  # from iat to exp
SKEW_SECONDS = 30  # how far a backend's clock may be ahead of ours
TOKEN_BYTES = 4096  # a token is a few hundred; what is larger is not worth a look
SECRET_BYTES = 32  # RFC 7518, 3.2: no shorter than the hash
RSA_BITS = 2048  # RFC 7518, 3.3

REQUIRED = ("sub", "exp", "iat", "jti", "aud")

# The compact serialisation (RFC 7515, 7.1). An unsigned token has nothing behind the last dot.
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")

_PRIVATE_JWK_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


@dataclass(frozen=True, slots=True)
class Token:
    """What a verified token says.

    Attributes:
        user_id: Its ``sub``; a string, not yet known to be a user id.
        id_hash: SHA-256 of issuer and ``jti``: by this it is known again.
        expires: Seconds since 1970.
    """

    user_id: str
    id_hash: bytes
    expires: float


@dataclass(frozen=True, slots=True)
class _Key:
    """One key, and the one algorithm that it is good for."""

    algorithm: str
    key: Any = field(repr=False)
    id: str | None = None


class Verifier:
    """Verifies the tokens of one issuer. Key files are read again when they have changed."""

    def __init__(
        self,
        *,
        audience: str,
        issuer: str | None = None,
        secret: str | None = None,
        public_key_file: Path | None = None,
        jwks_file: Path | None = None,
    ) -> None:
        """
        Args:
            audience: What ``aud`` must be, or name among others.
            issuer: What ``iss`` must be, if anything.
            secret: For HS256; else one of the files.
            public_key_file: PEM.
            jwks_file: JSON Web Key Set (RFC 7517).

        Raises:
            ConfigurationError: The key cannot be used; the message names the setting.
        """
        self._audience = audience
        self._issuer = issuer
        self._file: Path | None = public_key_file or jwks_file
        self._is_jwks = jwks_file is not None
        self._stamp: tuple[int, ...] | None = None
        if secret is not None:
            self._keys = [_secret_key(secret)]
        else:
            self._keys = self._load()

    @classmethod
    def of(cls, settings: Settings) -> Verifier | None:
        """The verifier of these settings, `None` if no key is configured.

        Raises:
            ConfigurationError: The key cannot be used.
        """
        if settings.jwt_audience is None:
            return None
        secret = settings.jwt_secret
        return cls(
            audience=settings.jwt_audience,
            issuer=settings.jwt_issuer,
            secret=None if secret is None else secret.get_secret_value(),
            public_key_file=settings.jwt_public_key_file,
            jwks_file=settings.jwt_jwks_file,
        )

    def verify(self, text: str) -> Token:
        """Check everything that can be known without the database; it may have been used before.

        Raises:
            InvalidToken: With one of a few fixed sentences.
        """
        if len(text) > TOKEN_BYTES:
            raise InvalidToken(f"The token is longer than {TOKEN_BYTES} bytes.")
        if not _COMPACT.fullmatch(text):
            raise InvalidToken("This is no signed token (JWT).")
        self._reload()
        try:
            header = jwt.get_unverified_header(text)
            if "crit" in header:
                # RFC 7515, 4.1.11: whoever does not know an extension must refuse. We know none.
                raise InvalidToken("The token has a critical extension.")
            key = self._select(header.get("kid"))
            claims = jwt.decode(
                text,
                key.key,
                algorithms=[key.algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=SKEW_SECONDS,
                options={"require": list(REQUIRED)},
            )
            return self._judge(claims)
        except jwt.ExpiredSignatureError as exc:
            raise InvalidToken("The token has expired.") from exc
        except jwt.ImmatureSignatureError as exc:
            raise InvalidToken("The token is not valid yet.") from exc
        except jwt.MissingRequiredClaimError as exc:
            raise InvalidToken(f"The token has no {exc.claim}.") from exc
        except jwt.InvalidAudienceError as exc:
            raise InvalidToken("The token is for another audience.") from exc
        except jwt.InvalidIssuerError as exc:
            raise InvalidToken("The token has another issuer.") from exc
        except jwt.InvalidAlgorithmError as exc:
            raise InvalidToken("The token is signed with another algorithm.") from exc
        except jwt.InvalidSignatureError as exc:
            raise InvalidToken("The token's signature is wrong.") from exc
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as exc:
            raise InvalidToken("This is no token that can be used here.") from exc

    def _judge(self, claims: dict[str, Any]) -> Token:
        """What PyJWT leaves open: it takes "1" and true for times, and allows a skew for exp."""
        times = {name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}
        for name, value in times.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InvalidToken(f"The token's {name} is no time.")
        user_id, jti, issuer = claims["sub"], claims["jti"], claims.get("iss")
        if not user_id or not jti:
            raise InvalidToken("The token's sub or jti is empty.")
        if times["exp"] <= time.time():
            raise InvalidToken("The token has expired.")
        if not 0 < times["exp"] - times["iat"] <= LIFETIME_SECONDS:
            raise InvalidToken(f"A token may live for {LIFETIME_SECONDS // 60} minutes at most.")
        # As JSON: no other pair looks the same, and a lone surrogate has bytes, too.
        identity = json.dumps([issuer, jti]).encode("ascii")
        return Token(user_id, hashlib.sha256(identity).digest(), float(times["exp"]))

    def _select(self, id: object) -> _Key:
        if not self._is_jwks:
            return self._keys[0]
        if id is None and len(self._keys) == 1:
            return self._keys[0]
        for key in self._keys:
            if id is not None and key.id == id:
                return key
        raise InvalidToken("The token names no key that is known here.")

    # Keys

    def _reload(self) -> None:
        """Read the key file again if it has changed. One that cannot be used changes nothing."""
        if self._file is None:
            return
        try:
            if _stamp(self._file) == self._stamp:
                return
            self._keys = self._load()
        except (OSError, ConfigurationError) as exc:
            if self._stamp is not None:  # said once for each change
                logger.error("the keys stay as they were: %s", exc)
                self._stamp = None
        else:
            logger.info("read %s again: %d keys", self._file.name, len(self._keys))

    def _load(self) -> list[_Key]:
        path = self._file
        assert path is not None
        name = "SSE_JWT_JWKS_FILE" if self._is_jwks else "SSE_JWT_PUBLIC_KEY_FILE"
        try:
            # Before the content: what is written in between is read the next time.
            stamp = _stamp(path)
            content = path.read_bytes()
        except OSError as exc:
            raise ConfigurationError(f"{name}: {path} cannot be read: {exc.strerror}.") from exc
        try:
            keys = _jwks(content) if self._is_jwks else [_pem_key(content)]
        except ValueError as exc:
            raise ConfigurationError(f"{name}: {path}: {exc}.") from exc
        self._stamp = stamp
        return keys


def sign(settings: Settings, user_id: str, *, seconds: int = 300) -> str:
    """A token as the application's backend would make it, for one sign-in.

    Args:
        settings: With a ``jwt_secret`` and an audience.
        user_id: Who signs in with it.
        seconds: How long it can be used; at most `LIFETIME_SECONDS`.

    Raises:
        ConfigurationError: There is no secret here to sign with.
    """
    if settings.jwt_secret is None:
        raise ConfigurationError(
            "Signing a token needs SSE_JWT_SECRET and SSE_JWT_AUDIENCE as the server has them; "
            "with a public key or a JWKS only your backend can sign."
        )
    key = _secret_key(settings.jwt_secret.get_secret_value())
    now = int(time.time())
    claims = {
        "sub": user_id,
        "aud": settings.jwt_audience,
        "iat": now,
        "exp": now + seconds,
        "jti": secrets.token_urlsafe(16),
        **({} if settings.jwt_issuer is None else {"iss": settings.jwt_issuer}),
    }
    return jwt.encode(claims, key.key, key.algorithm)


def _stamp(path: Path) -> tuple[int, ...]:
    # The inode, too: a file that is replaced may be as old and as long as the one before.
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _secret_key(secret: str) -> _Key:
    if len(secret.encode("utf-8", "surrogateescape")) < SECRET_BYTES:
        raise ConfigurationError(
            f"SSE_JWT_SECRET is shorter than {SECRET_BYTES} bytes: make one with "
            "'openssl rand -base64 48'."
        )
    if "-----BEGIN" in secret:
        # Everybody may know a public key; as an HMAC secret it would let everybody sign.
        raise ConfigurationError(
            "SSE_JWT_SECRET holds a key in PEM: name its file in SSE_JWT_PUBLIC_KEY_FILE."
        )
    return _Key("HS256", secret.encode("utf-8", "surrogateescape"))


def _pem_key(content: bytes) -> _Key:
    """Raises: ValueError: one sentence without a full stop."""
    if b"PRIVATE KEY-----" in content:
        raise ValueError("this is a private key; the server needs the public one only")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ValueError("there is no public key in PEM (-----BEGIN PUBLIC KEY-----)") from exc
    return _Key(_algorithm(key), key)


def _jwks(content: bytes) -> list[_Key]:
    """Raises: ValueError: one sentence without a full stop."""
    try:
        entries = json.loads(content)["keys"]
        members = [dict(entry) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ValueError('this is no key set: {"keys": [...]}') from exc
    keys: list[_Key] = []
    for member in members:
        if member.get("use", "sig") != "sig":
            continue
        if _PRIVATE_JWK_MEMBERS & member.keys():
            raise ValueError("it holds a private or secret key; the server needs public ones only")
        id = member.get("kid")
        if id is not None and (not isinstance(id, str) or id in {key.id for key in keys}):
            raise ValueError("two keys have the same kid, or one is no string")
        keys.append(_jwk(member, id))
    if not keys:
        raise ValueError("there is no key for signatures in it")
    if len(keys) > 1 and any(key.id is None for key in keys):
        raise ValueError("with several keys, each needs a kid")
    return keys


def _jwk(member: dict[str, Any], id: str | None) -> _Key:
    algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}.get(str(member.get("kty")))
    if algorithm is None or member.get("alg", algorithm) != algorithm:
        raise ValueError("it holds a key that is not for RS256, ES256 or EdDSA")
    try:
        key = jwt.PyJWK(member, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ValueError("it holds a key that cannot be read") from exc
    return _Key(_algorithm(key), key, id)


def _algorithm(key: object) -> str:
    """The one algorithm for a key of this type.

    Raises:
        ValueError: There is none, or the key is too weak.
    """
    match key:
        case RSAPublicKey():
            if key.key_size < RSA_BITS:
                raise ValueError(f"an RSA key needs {RSA_BITS} bits or more")
            return "RS256"
        case EllipticCurvePublicKey(curve=SECP256R1()):
            return "ES256"
        case Ed25519PublicKey():
            return "EdDSA"
        case _:
            raise ValueError("the key must be RSA, EC on P-256, or Ed25519")
