"""Sign-in tokens: what is taken, and every way in which one is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import strategies as st

from sse_server.config import Settings, load
from sse_server.errors import ConfigurationError, InvalidToken
from sse_server.tokens import TOKEN_BYTES, Verifier

SECRET = "a-secret-of-a-backend-that-is-long-enough"
AUDIENCE = "notifications"

RSA = rsa.generate_private_key(65537, 2048)
WEAK_RSA = rsa.generate_private_key(65537, 1024)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
OTHER_ED = ed25519.Ed25519PrivateKey.generate()

Claims = dict[str, Any]


@dataclass(frozen=True)
class At:
    """A time so many seconds from when the token is made; the tables are made at import."""

    seconds: float
    kind: Callable[[Any], Any] = int

    def value(self) -> Any:
        now = time.time() + self.seconds
        return self.kind(now if self.kind is float else int(now))


def claims(**changes: Any) -> Claims:
    """Those of a good token; ``None`` leaves one out."""
    now = int(time.time())
    values = {
        "sub": "alice",
        "aud": AUDIENCE,
        "iat": now,
        "exp": now + 60,
        "jti": base64.b64encode(os.urandom(12)).decode(),
        **changes,
    }
    return {
        name: value.value() if isinstance(value, At) else value
        for name, value in values.items()
        if value is not None
    }


def sign(
    key: Any = SECRET, algorithm: str = "HS256", /, *, header: Any = None, **changes: Any
) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers=header)


def pem(key: Any) -> bytes:
    content: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return content


def private_pem(key: Any) -> bytes:
    content: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return content


def jwk(key: Any, kid: str | None = None, **changes: Any) -> dict[str, Any]:
    kinds: dict[type, Any] = {
        rsa.RSAPublicKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePublicKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PublicKey: jwt.algorithms.OKPAlgorithm,
    }
    public = key.public_key()
    [kind] = [kind for base, kind in kinds.items() if isinstance(public, base)]
    member: dict[str, Any] = kind.to_jwk(public, as_dict=True)
    return member | ({} if kid is None else {"kid": kid}) | changes


def encoded(value: object) -> str:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def unsigned(header: object, body: object, signature: bytes = b"x" * 32) -> str:
    return ".".join([encoded(header), encoded(body), encoded(signature)])


@pytest.fixture
def verifier() -> Verifier:
    return Verifier(audience=AUDIENCE, secret=SECRET)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes | object], Path]:
    def build(content: bytes | object, name: str = "key") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return build


Write = Callable[..., Path]


def reason(verifier: Verifier, token: str) -> str:
    """Why it is refused; nothing of the token may stand in it."""
    with pytest.raises(InvalidToken) as caught:
        verifier.verify(token)
    text = caught.value.detail
    for part in token.split("."):
        assert len(part) < 4 or part not in text
    return text


# Taken


@pytest.mark.parametrize(
    "key, algorithm", [(RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA")], ids=lambda v: str(v)[:5]
)
@pytest.mark.parametrize("as_set", [False, True])
def test_each_kind_of_key(key: Any, algorithm: str, as_set: bool, write: Write) -> None:
    """A public key verifies its tokens, as PEM and as a key set."""
    if as_set:
        verifier = Verifier(audience=AUDIENCE, jwks_file=write({"keys": [jwk(key, "k1")]}))
    else:
        verifier = Verifier(audience=AUDIENCE, public_key_file=write(pem(key)))
    assert verifier.verify(sign(key, algorithm, header={"kid": "k1"})).user_id == "alice"
    assert "algorithm" in reason(verifier, sign(SECRET))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"aud": ["somebody", AUDIENCE]},
        {"iat": At(20), "exp": At(100)},
        {"nbf": At(20)},
        {"iat": At(-890), "exp": At(10)},
        {"iat": At(-0.5, float), "exp": At(60.25, float)},
        {"iss": "https://backend.example", "role": "admin"},
        {"sub": "ünïcödé \u2603"},
        {"jti": "\ud800"},
    ],
)
def test_taken(verifier: Verifier, changes: Claims) -> None:
    """A good token, and what is still good: a small skew, a list of audiences, other claims."""
    token = verifier.verify(sign(**changes))
    assert token.user_id == changes.get("sub", "alice")
    assert len(token.id_hash) == 32


def test_id_hash(verifier: Verifier) -> None:
    """The same jti is the same token whatever else differs; another issuer's is another."""
    first = verifier.verify(sign(jti="1", iss="a"))
    assert verifier.verify(sign(jti="1", iss="a", sub="bob")).id_hash == first.id_hash
    for other in ({"jti": "2", "iss": "a"}, {"jti": "1", "iss": "b"}, {"jti": "1"}):
        assert verifier.verify(sign(**other)).id_hash != first.id_hash
    for one, two in (("a", "bc"), ("ab", "c")), (("a", 'b", "c'), ('a", "b', "c")):
        hashes = [verifier.verify(sign(iss=iss, jti=jti)).id_hash for iss, jti in (one, two)]
        assert hashes[0] != hashes[1]


# Refused


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"sub": None}, "no sub"),
        ({"exp": None}, "no exp"),
        ({"iat": None}, "no iat"),
        ({"jti": None}, "no jti"),
        ({"aud": None}, "no aud"),
        ({"sub": ""}, "empty"),
        ({"jti": ""}, "empty"),
        ({"sub": 7}, "cannot be used|can be used"),
        ({"jti": 7}, "can be used"),
        ({"sub": ["alice"]}, "can be used"),
        ({"aud": "another"}, "another audience"),
        ({"aud": ["another"]}, "another audience"),
        ({"aud": [AUDIENCE, 7]}, "another audience"),
        ({"aud": {AUDIENCE: 1}}, "another audience"),
        ({"aud": AUDIENCE.upper()}, "another audience"),
        ({"exp": At(-1)}, "expired"),
        ({"exp": At(-3600), "iat": At(-3660)}, "expired"),
        ({"iat": At(300), "exp": At(360)}, "not valid yet"),
        ({"iat": At(60), "exp": At(360)}, "not valid yet"),
        ({"nbf": At(60)}, "not valid yet"),
        ({"exp": At(901), "iat": At(0)}, "15 minutes"),
        ({"exp": At(60), "iat": At(-3600)}, "15 minutes"),
        ({"exp": At(20), "iat": At(25)}, "15 minutes"),
        ({"exp": At(60, str)}, "no time"),
        ({"iat": At(0, str)}, "no time"),
        ({"iat": True}, "no time"),
        ({"exp": float("inf")}, "can be used"),
        ({"exp": float("nan")}, "can be used"),
        ({"exp": 10**400}, "can be used|15 minutes"),
        ({"exp": "soon"}, "can be used"),
        ({"exp": [1]}, "can be used"),
        ({"nbf": "1"}, "no time"),
        ({"nbf": {}}, "can be used"),
    ],
)
def test_refused_claims(verifier: Verifier, changes: Claims, expected: str) -> None:
    """Each claim is there, of its type, and in time."""
    text = reason(verifier, sign(**changes))
    assert any(part in text for part in expected.split("|")), text


def test_refused_algorithms(write: Write) -> None:
    """The configured key alone decides on the algorithm."""
    public = pem(RSA)
    verifiers = {
        "HS256": Verifier(audience=AUDIENCE, secret=SECRET),
        "RS256": Verifier(audience=AUDIENCE, public_key_file=write(public, "rsa")),
        "ES256": Verifier(audience=AUDIENCE, public_key_file=write(pem(EC), "ec")),
        "EdDSA": Verifier(audience=AUDIENCE, public_key_file=write(pem(ED), "ed")),
        "set": Verifier(audience=AUDIENCE, jwks_file=write({"keys": [jwk(RSA)]}, "set")),
    }
    body = claims()
    forged = {
        # Everybody knows the public key; with it as HMAC secret, PyJWT refuses to sign for us.
        name: hmac_signed(body, content)
        for name, content in {
            "pem": public,
            "stripped": public.strip(),
            "der": RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        }.items()
    }
    tokens = {
        **forged,
        "none": unsigned({"alg": "none", "typ": "JWT"}, body, b""),
        "none, signed": unsigned({"alg": "none"}, body),
        "None": unsigned({"alg": "None"}, body),
        "empty": unsigned({"alg": ""}, body),
        "missing": unsigned({"typ": "JWT"}, body),
        "null": unsigned({"alg": None}, body),
        "list": unsigned({"alg": ["HS256"]}, body),
        "HS512": sign("x" * 64, "HS512"),
        "PS256": sign(RSA, "PS256"),
        "RS512": sign(RSA, "RS512"),
        "lower case": unsigned({"alg": "hs256"}, body),
        # A key that comes along with the token is nobody's.
        "jwk": sign(OTHER_ED, "EdDSA", header={"jwk": jwk(OTHER_ED)}),
        "jku": sign(OTHER_ED, "EdDSA", header={"jku": "https://evil.example/keys"}),
        "x5u": sign(OTHER_ED, "EdDSA", header={"x5u": "https://evil.example/cert"}),
    }
    for verifier in verifiers.values():
        for token in tokens.values():
            reason(verifier, token)
    assert "algorithm" in reason(verifiers["RS256"], forged["pem"])
    assert "no signed token" in reason(verifiers["HS256"], tokens["none"])
    assert "algorithm" in reason(verifiers["HS256"], tokens["none, signed"])
    assert "signature" in reason(verifiers["EdDSA"], tokens["jwk"])


def hmac_signed(body: Claims, secret: bytes, **header: Any) -> str:
    """Past PyJWT's own checks of what it signs."""
    signed = f"{encoded({'alg': 'HS256'} | header)}.{encoded(body)}"
    return f"{signed}.{encoded(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "a.b.c.d",
        "not a token",
        "e30.e30.e30",
        "\x00.\x00.\x00",
        "é.é.é",
        unsigned(b"[" * 2000, b"{}"),
        unsigned({"alg": "HS256"}, b"[" * 2000),
        unsigned([], {}),
        unsigned("HS256", {}),
        unsigned({"alg": "HS256", "kid": 7}, {}),
        unsigned({"alg": "HS256", "crit": ["b64"], "b64": False}, b""),
    ],
)
def test_refused_shapes(verifier: Verifier, token: str) -> None:
    """What is no token is refused like a wrong one."""
    reason(verifier, token)


def test_refused_details(verifier: Verifier) -> None:
    """A changed byte, another secret, other tokens' parts, extensions, size."""
    good = sign()
    head, body, signature = good.split(".")
    _, other_body, other_signature = sign(sub="bob").split(".")
    assert "signature" in reason(verifier, sign("another-secret-that-is-also-long-enough"))
    for token in (
        f"{head}.{other_body}.{signature}",
        f"{head}.{body}.{other_signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{body}.{signature}=",
        f"{head}.{body}.",
        f"{head}.{body}",
        f" {good}",
        f"{good}\n",
    ):
        reason(verifier, token)
    reason(verifier, sign(header={"crit": ["exp"], "exp": 1}))
    extensions: list[Claims] = [{"crit": ["b64"], "b64": True}, {"crit": []}, {"crit": None}]
    for header in extensions:
        reason(verifier, hmac_signed(claims(), SECRET.encode(), **header))
    assert "longer" in reason(verifier, sign(more="x" * TOKEN_BYTES))
    assert verifier.verify(good).user_id == "alice"


def test_issuer() -> None:
    """A configured issuer is required, and exact."""
    verifier = Verifier(audience=AUDIENCE, issuer="https://a.example", secret=SECRET)
    verifier.verify(sign(iss="https://a.example"))
    assert "issuer" in reason(verifier, sign(iss="https://b.example"))
    assert "no iss" in reason(verifier, sign())
    reason(verifier, sign_raw({"iss": ["https://a.example"]}))


def sign_raw(changes: Claims) -> str:
    return hmac_signed(claims(**changes), SECRET.encode())


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    ),
    st.sampled_from(["sub", "exp", "iat", "nbf", "jti", "aud", "iss"]),
)
def test_any_claim(value: Any, name: str) -> None:
    """Whatever a claim holds, the token is taken or refused; nothing else happens."""
    verifier = Verifier(audience=AUDIENCE, secret=SECRET)
    try:
        token = verifier.verify(sign_raw({name: value}))
    except InvalidToken:
        return
    assert isinstance(token.user_id, str)
    assert time.time() < token.expires <= time.time() + 960


# Key sets


def test_key_set(write: Write) -> None:
    """The token's kid chooses the key; without one, only a single key will do."""
    keys = [jwk(RSA, "rsa"), jwk(ED, "ed"), jwk(EC, "ec", use="sig", alg="ES256")]
    verifier = Verifier(
        audience=AUDIENCE, jwks_file=write({"keys": [*keys, jwk(OTHER_ED, "enc", use="enc")]})
    )
    for key, algorithm, kid in ((RSA, "RS256", "rsa"), (ED, "EdDSA", "ed"), (EC, "ES256", "ec")):
        verifier.verify(sign(key, algorithm, header={"kid": kid}))
    assert "algorithm" in reason(verifier, sign(ED, "EdDSA", header={"kid": "rsa"}))
    assert "names no key" in reason(verifier, sign(ED, "EdDSA"))
    assert "names no key" in reason(verifier, sign(OTHER_ED, "EdDSA", header={"kid": "enc"}))
    assert "signature" in reason(verifier, sign(OTHER_ED, "EdDSA", header={"kid": "ed"}))


def test_key_set_is_read_again(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    """A changed file counts from the next token on; one that cannot be used changes nothing."""
    path = write({"keys": [jwk(ED, "old")]})
    verifier = Verifier(audience=AUDIENCE, jwks_file=path)
    old = {"header": {"kid": "old"}}
    new = {"header": {"kid": "new"}}
    verifier.verify(sign(ED, "EdDSA", **old))

    path.write_text('{"keys": [')
    verifier.verify(sign(ED, "EdDSA", **old))
    verifier.verify(sign(ED, "EdDSA", **old))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    path.unlink()
    verifier.verify(sign(ED, "EdDSA", **old))

    write({"keys": [jwk(OTHER_ED, "new")]})
    verifier.verify(sign(OTHER_ED, "EdDSA", **new))
    assert "names no key" in reason(verifier, sign(ED, "EdDSA", **old))

    # Replaced, as deployment tools do it, by one that is as old and as long.
    status = path.stat()
    replacement = write({"keys": [jwk(ED, "old")]}, "other")
    os.utime(replacement, ns=(status.st_atime_ns, status.st_mtime_ns))
    replacement.rename(path)
    verifier.verify(sign(ED, "EdDSA", **old))


# Configuration


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Verifier(audience=AUDIENCE, **changes)
    return str(caught.value)


def test_secrets_that_are_refused() -> None:
    """A short secret, and a public key where a secret should be."""
    assert "32 bytes" in refused(secret="x" * 31)
    assert "x" * 31 not in refused(secret="x" * 31)
    assert "32 bytes" in refused(secret="")
    assert "SSE_JWT_PUBLIC_KEY_FILE" in refused(secret=pem(RSA).decode())
    Verifier(audience=AUDIENCE, secret="ü" * 16)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        (private_pem(RSA), "private key"),
        (private_pem(ED), "private key"),
        (pem(WEAK_RSA), "2048"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (pem(ed448.Ed448PrivateKey.generate()), "Ed25519"),
    ],
)
def test_pem_files_that_are_refused(content: bytes, expected: str, write: Write) -> None:
    """One sentence that names the setting and the file."""
    text = refused(public_key_file=write(content))
    assert expected in text
    assert text.startswith("SSE_JWT_PUBLIC_KEY_FILE: ")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "no key set"),
        (b"[]", "no key set"),
        (b"\xff", "no key set"),
        (b"[" * 100_000, "no key set"),
        ({"keys": [1]}, "no key set"),
        ({"keys": []}, "no key"),
        ({"keys": [jwk(ED, use="enc")]}, "no key"),
        ({"keys": [jwk(ED), jwk(RSA)]}, "kid"),
        ({"keys": [jwk(ED, "a"), jwk(RSA, "a")]}, "same kid"),
        ({"keys": [jwk(ED) | {"kid": 7}]}, "kid"),
        ({"keys": [jwk(ED, d="AAAA")]}, "private"),
        ({"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}, "secret"),
        ({"keys": [{"kty": "oct"}]}, "not for"),
        ({"keys": [jwk(RSA, alg="RS512")]}, "not for"),
        ({"keys": [jwk(WEAK_RSA)]}, "2048"),
        ({"keys": [jwk(EC) | {"crv": "P-384"}]}, "cannot be read"),
        ({"keys": [{"kty": "RSA"}]}, "cannot be read"),
        ({"keys": [{"kty": ["RSA"]}]}, "not for"),
    ],
)
def test_key_sets_that_are_refused(content: object, expected: str, write: Write) -> None:
    """One sentence that names the setting and the file."""
    text = refused(jwks_file=write(content))
    assert expected in text
    assert text.startswith("SSE_JWT_JWKS_FILE: ")


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there stops the start."""
    assert "No such file" in refused(public_key_file=tmp_path / "missing")
    assert "SSE_JWT_JWKS_FILE" in refused(jwks_file=tmp_path)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"jwt_secret": SECRET}, "SSE_JWT_SECRET needs SSE_JWT_AUDIENCE"),
        ({"jwt_public_key_file": "a"}, "SSE_JWT_PUBLIC_KEY_FILE needs SSE_JWT_AUDIENCE"),
        ({"jwt_secret": SECRET, "jwt_jwks_file": "a", "jwt_audience": "b"}, "exclude each other"),
        ({"jwt_audience": "a"}, "need a key"),
        ({"jwt_issuer": "a"}, "need a key"),
        ({"jwt_secret": SECRET, "jwt_audience": ""}, "SSE_JWT_AUDIENCE"),
    ],
)
def test_settings_that_are_refused(options: dict[str, str], expected: str) -> None:
    """What does not go together; the secret is not repeated."""
    with pytest.raises(ConfigurationError) as caught:
        load(**options)
    assert expected in str(caught.value)
    assert SECRET not in str(caught.value)


def test_no_key_no_verifier() -> None:
    """Without a key, no token is taken."""
    assert Verifier.of(Settings(_env_file=None)) is None
