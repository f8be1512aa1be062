"""``sse-server settings``: what is set, and the table of all that can be."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from sse_server.cli.options import json_option
from sse_server.cli.process import EXIT_MISCONFIGURED
from sse_server.config import Settings, load, variable
from sse_server.errors import ConfigurationError

# Where a section of the table begins.
SECTIONS = {
    "host": "Address",
    "database_url": "Database",
    "demo": "Sign-in",
    "heartbeat_seconds": "Streams",
    "probe_seconds": "Feed",
    "link_hosts": "Text",
    "api_calls_per_minute": "Limits",
    "log_level": "Logging",
    "secrets_dir": "Secrets",
}

# What is shown of a secret.
SET = "(set)"

_HEAD = """# Settings

<!-- Written by `sse-server settings --markdown`; a test compares. -->

Each setting is an environment variable and, in lower case with dashes, an option of `sse-server`
and of `sse-server serve` (`SSE_PORT` is `--port`). Looked for in this order, the first wins: the
command line, the environment, the file `.env` of the working directory, the directory
`SSE_SECRETS_DIR`. Durations are seconds. Anything wrong is one sentence and exit status 2, before a
socket is opened. `sse-server settings` shows what holds; of a secret it shows only that it is set.

**Secrets** belong neither on the command line, where every account of the machine can read them,
nor in an image. A file in `SSE_SECRETS_DIR`, named like the variable (case does not matter), holds
one; white space around it is dropped.

* systemd: `LoadCredential=SSE_JWT_SECRET:/etc/sse-server/jwt-secret` and
  `Environment=SSE_SECRETS_DIR=%d`
* Docker Compose: a secret called `sse_jwt_secret`, and `SSE_SECRETS_DIR=/run/secrets`
* Kubernetes: mount a Secret with the keys `DATABASE_URL` and `SSE_JWT_SECRET` as a volume, and name
  its path
"""


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in typing.get_args(field.annotation)


def _text(value: object) -> str:
    """A value as it would stand in the environment."""
    match value:
        case None:
            return ""
        case SecretStr():
            return SET
        case bool():
            return "1" if value else "0"
        case float():
            return f"{value:g}" if value < 1e6 else f"{value:.0f}"
        case str() | int() | Path():
            return str(value)
        case Collection():
            return ",".join(sorted(map(str, value)))
        case _:
            raise TypeError(type(value))


def _range(field: FieldInfo) -> str:
    least = most = ""
    for bound in field.metadata:
        if hasattr(bound, "ge"):
            least = f"{bound.ge} or more"
        elif hasattr(bound, "gt"):
            least = f"more than {bound.gt}"
        elif hasattr(bound, "le"):
            most = f"at most {bound.le}"
    return f"{least}, {most}" if least and most else least or most


def _kind(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if isinstance(annotation, types.UnionType):
        [annotation] = [kind for kind in annotation.__args__ if kind is not type(None)]
    names = {bool: "0 or 1", int: "integer", float: "number", str: "text"}
    names |= {Path: "path", SecretStr: "secret"}
    kind = names.get(annotation, "list")
    bounds = _range(field)
    return f"{kind}, {bounds}" if bounds else kind


def markdown() -> str:
    """The page of the documentation."""
    lines = [_HEAD.rstrip()]
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            lines += ["", f"## {SECTIONS[name]}", "", "| variable | default | |", "|---|---|---|"]
        default = _text(field.default)
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{variable(name)}` | {shown} | {field.description} *({_kind(field)})* |")
    return "\n".join(lines) + "\n"


@click.command("settings")
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="All settings there are, as a page.")
@click.pass_obj
def settings(options: dict[str, Any], *, as_json: bool, as_markdown: bool) -> None:
    """Show the settings that hold, and never a secret.

    \b
    Example:
      sse-server settings | grep SSE_JWT_SECRET
    """
    if as_markdown:
        click.echo(markdown(), nl=False)
        return
    try:
        found = load(**options)
    except ConfigurationError as exc:
        click.echo(f"sse-server: {exc}", err=True)
        sys.exit(EXIT_MISCONFIGURED)
    values = {variable(name): _text(getattr(found, name)) for name in Settings.model_fields}
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for name, value in values.items():
        click.echo(f"{name}={value}")
