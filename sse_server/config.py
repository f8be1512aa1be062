"""Settings: environment variables with the prefix ``SSE_``, each with a command-line option.

``DATABASE_URL`` keeps its usual name. What is not in the environment is looked for in ``.env``,
then in the directory of secrets. Nothing is read at import; `load()` reads, checks and answers with
`ConfigurationError`, one sentence, if something is wrong.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from sse_server.errors import ConfigurationError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Nobody guesses one of these, if it is random: openssl rand -hex 32.
OPERATOR_KEY_CHARACTERS = 32

# Neither "*" nor "null", and international names in punycode, as browsers send them.
_ORIGIN = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(:(?P<port>[1-9][0-9]{0,4}))?",
    re.ASCII,
)


class Settings(BaseSettings):
    """All settings of one process. Durations are seconds, sizes bytes unless they say rows."""

    model_config = SettingsConfigDict(
        env_prefix="SSE_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,
    )

    # Address
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(
        8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it."
    )
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="Addresses or networks (comma-separated) of proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are believed.",
    )
    tls_cert: Path | None = Field(
        None, description="Certificate chain (PEM) to serve HTTPS with; SIGHUP reads it again."
    )
    tls_key: Path | None = Field(None, description="Private key (PEM) of the certificate.")
    allowed_origins: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Origins (comma-separated, https://host[:port]) of front ends elsewhere that "
        "may use the API with the user's session.",
    )
    header_timeout: float = Field(
        10.0, gt=0, description="Longest that the head of a request may take to arrive."
    )
    body_timeout: float = Field(
        30.0, gt=0, description="Longest that the body of a request may take to arrive."
    )
    keepalive_timeout: float = Field(
        75.0, gt=0, description="How long a connection may stay open between two requests."
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="Most open connections of each process; by default as many as there may be "
        "open files, less some for the database.",
    )

    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that serve, on one port; as many as there are processors to spare. "
        "Each has limits, database connections and streams of its own.",
    )

    # Database
    database_url: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="libpq URL or DSN. Without it the server runs a PostgreSQL of its own.",
    )
    listen_database_url: SecretStr | None = Field(
        None,
        description="The same database past any pooler (PgBouncer in transaction mode passes no "
        "NOTIFY on); for the one connection of each process that listens. By default DATABASE_URL.",
    )
    data_dir: Path | None = Field(
        None, description="Where the embedded PostgreSQL keeps its data (without DATABASE_URL)."
    )
    pool_size: int = Field(
        8,
        ge=1,
        le=200,
        description="Most database connections of each process, the one that listens apart.",
    )
    query_timeout: float = Field(
        10.0, gt=0, description="Longest that a query may take before it counts as failed."
    )
    connect_timeout: float = Field(
        5.0, gt=0, description="Longest that connecting to one database host may take."
    )

    # Sign-in
    demo: bool = Field(
        False,
        description="Sign-in as anybody without a password, for trials; loopback only. On by "
        "default with the embedded PostgreSQL.",
    )
    session_seconds: float = Field(
        7 * 86400.0, ge=60, description="How long a session lasts after sign-in."
    )
    jwt_secret: SecretStr | None = Field(
        None, description="Secret of at least 32 bytes that sign-in tokens are signed with (HS256)."
    )
    jwt_public_key_file: Path | None = Field(
        None,
        description="Public key (PEM) that sign-in tokens are verified with, by its type: "
        "RS256, ES256 or EdDSA.",
    )
    jwt_jwks_file: Path | None = Field(
        None, description="The same, as a JSON Web Key Set; read again when it changes."
    )
    jwt_audience: str | None = Field(
        None, min_length=1, description="What aud of a sign-in token must be; required with a key."
    )
    jwt_issuer: str | None = Field(
        None, min_length=1, description="What iss of a sign-in token must be, if anything."
    )

    # Streams
    heartbeat_seconds: float = Field(
        15.0, ge=1, le=300, description="Time between two ping events of a stream."
    )
    stream_max_seconds: float = Field(
        3600.0, ge=1, description="Longest life of a stream; each ends at a random 80-100 % of it."
    )
    stream_buffer_bytes: int = Field(
        256 * 1024,
        ge=4096,
        description="A stream with more than this unsent goes back to replaying from the table.",
    )
    slow_seconds: float = Field(
        60.0, gt=0, description="A stream that takes nothing for this long is closed."
    )
    send_timeout: float = Field(
        120.0, gt=0, description="TCP_USER_TIMEOUT of a stream: how long a dead peer may stay."
    )
    streams_per_user: int = Field(
        20,
        ge=1,
        description="Most streams (sessions) of one user, on all processes together; a further one "
        "is turned away.",
    )
    streams_per_address: int = Field(
        0,
        ge=0,
        description="Most streams of one address (/64 for IPv6) in each process; 0 is no limit. "
        "Whole companies may share an address.",
    )
    max_streams: int = Field(
        50_000,
        ge=1,
        description="Most streams of one process; a further one is told to come back later. Each "
        "takes about 3 KB.",
    )
    buffer_memory_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024 * 1024,
        description="Most that may be buffered in one process for clients that are slow: with many "
        "streams each may have less unsent than SSE_STREAM_BUFFER_BYTES.",
    )
    replay_page_rows: int = Field(500, ge=1, le=5000, description="Rows in one page of a replay.")
    drain_seconds: float = Field(
        10.0, gt=0, description="Time in which all streams are ended after SIGTERM."
    )

    # Feed
    probe_seconds: float = Field(
        3.0,
        gt=0,
        le=30,
        description="How often the LISTEN connection is probed and swept for missed rows.",
    )

    # Text
    link_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Hosts (comma-separated) that an https: link of a notification may name; "
        "relative links are always allowed.",
    )

    # Limits
    api_calls_per_minute: int = Field(
        120,
        ge=0,
        description="Most API calls of one user in a minute; 0 is no limit.",
    )
    anonymous_calls_per_minute: int = Field(
        600,
        ge=0,
        description="Most API calls without a valid session from one address (/64 for IPv6) in a "
        "minute; 0 is no limit.",
    )
    sign_ins_per_minute: int = Field(
        60,
        ge=0,
        description="Most attempts to sign in, or with a wrong service key, from one address "
        "(/64 for IPv6) in a minute; 0 is no limit.",
    )

    # Logging
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Log level.")
    log_format: Literal["auto", "text", "json"] = Field(
        "auto",
        description="text for people, json (an object per line) for machines; auto is text on a "
        "terminal.",
    )

    # Operators
    operator_key: SecretStr | None = Field(
        None,
        description="Key of at least 32 characters that lets operators in at /ops; without it "
        "there is no such page.",
    )

    # Secrets
    secrets_dir: Path | None = Field(
        None,
        description="Directory in which any setting may be a file with the name of its variable "
        "(DATABASE_URL, SSE_JWT_SECRET), as Docker, Kubernetes and systemd hand out secrets.",
    )

    @field_validator("trusted_proxies", "link_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("link_hosts", mode="after")
    @classmethod
    def _lower(cls, value: frozenset[str]) -> frozenset[str]:
        return frozenset(host.lower() for host in value)

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _origins(cls, value: frozenset[str]) -> frozenset[str]:
        return frozenset(_origin(text) for text in value)

    @field_validator("operator_key", mode="after")
    @classmethod
    def _long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < OPERATOR_KEY_CHARACTERS:
            raise ValueError(f"the key needs at least {OPERATOR_KEY_CHARACTERS} characters")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _origin(text: str) -> str:
    """An origin as browsers write it in ``Origin`` (RFC 6454, 6.2): no path, no default port."""
    match = _ORIGIN.fullmatch(text.lower())
    if match is None or (match["port"] and int(match["port"]) > 65535):
        raise ValueError("an origin is https://host or https://host:port; list each one")
    scheme, host, port = match["scheme"], match["host"], match["port"]
    default = {"http": "80", "https": "443"}[scheme]
    return f"{scheme}://{host}" if port in (None, default) else f"{scheme}://{host}:{port}"


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return "DATABASE_URL" if name == "database_url" else f"SSE_{name.upper()}"


class _SecretsDir(BaseSettings):
    """Where the secrets are; asked before all else, and not in that directory itself."""

    model_config = SettingsConfigDict(env_prefix="SSE_", env_file=".env", extra="ignore")

    secrets_dir: Path | None = None


def _secrets_dir(options: dict[str, Any]) -> Path | None:
    given = options.get("secrets_dir")
    directory = _SecretsDir().secrets_dir if given is None else Path(given)
    if directory is not None and not directory.is_dir():
        # Left to pydantic-settings, a mount that is missing would be a server without a key.
        raise ConfigurationError(f"SSE_SECRETS_DIR: {directory} is no directory.")
    return directory


def load(**options: Any) -> Settings:
    """Read the settings: `options` (from the command line) win over the environment, that over
    ``.env``, and that over the directory of secrets.

    Raises:
        ConfigurationError: One sentence that names the setting, never its value.
    """
    try:
        secrets_dir = _secrets_dir(options)
        settings = Settings(_secrets_dir=secrets_dir, **options)
    except (OSError, UnicodeDecodeError, SettingsError) as exc:
        raise ConfigurationError(
            "A file with settings (.env, or one in SSE_SECRETS_DIR) cannot be read: "
            f"{getattr(exc.__cause__ or exc, 'strerror', None) or 'it is not UTF-8'}."
        ) from None
    except ValidationError as exc:
        error = exc.errors(include_input=False, include_url=False)[0]
        field = str(error["loc"][0])
        name = field if field.isupper() else variable(field)
        raise ConfigurationError(f"{name}: {error['msg']}.") from None
    if settings.demo and not settings.loopback:
        raise ConfigurationError(
            f"The demo sign-in lets anybody in as anybody: it is refused on {settings.host}; "
            "listen on 127.0.0.1 or leave SSE_DEMO unset."
        )
    if settings.listen_database_url is not None and settings.database_url is None:
        raise ConfigurationError(
            "SSE_LISTEN_DATABASE_URL is another way to the database of DATABASE_URL: set both."
        )
    _check_tls(settings)
    _check_jwt(settings)
    return settings


def _check_tls(settings: Settings) -> None:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigurationError("SSE_TLS_CERT and SSE_TLS_KEY only work together: set both.")
    if not (settings.loopback or settings.tls_cert or settings.trusted_proxies):
        raise ConfigurationError(
            f"On {settings.host} sessions would travel unencrypted: set SSE_TLS_CERT and "
            "SSE_TLS_KEY, or SSE_TRUSTED_PROXIES to the address of the proxy that does TLS, or "
            "listen on 127.0.0.1."
        )


def _check_jwt(settings: Settings) -> None:
    keys = {
        "SSE_JWT_SECRET": settings.jwt_secret,
        "SSE_JWT_PUBLIC_KEY_FILE": settings.jwt_public_key_file,
        "SSE_JWT_JWKS_FILE": settings.jwt_jwks_file,
    }
    given = [name for name, value in keys.items() if value is not None]
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} exclude each other: set one of them.")
    if given and settings.jwt_audience is None:
        raise ConfigurationError(
            f"{given[0]} needs SSE_JWT_AUDIENCE: a token made for another service must not sign in "
            "here."
        )
    if not given and (settings.jwt_audience or settings.jwt_issuer):
        raise ConfigurationError(
            f"SSE_JWT_AUDIENCE and SSE_JWT_ISSUER need a key: set one of {', '.join(keys)}."
        )
