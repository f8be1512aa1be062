"""``sse-server service``: who may publish."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from sse_server import audit
from sse_server.cli.options import json_option
from sse_server.cli.process import on_database
from sse_server.events import timestamp
from sse_server.services import hash_key, new_key
from sse_server.store import Store


@click.group()
def service() -> None:
    """The services that may use POST /api/publish, and their keys."""


def _service_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value) is None:
        raise click.BadParameter(
            "letters, digits, '.', '_' and '-', at most 63, with a letter or digit at the start"
        )
    return value


@service.command("add")
@click.argument("name", callback=_service_name)
@click.option(
    "--rate",
    type=click.IntRange(1, 1_000_000),
    default=600,
    show_default=True,
    help="Most requests in a minute.",
)
@click.pass_obj
def service_add(options: dict[str, Any], name: str, rate: int) -> None:
    """Give a service a key, and print it: it is stored nowhere.

    A service that was revoked gets a new one.

    \b
    Example:
      sse-server service add billing --rate 60
    """
    key = new_key()

    async def add(store: Store) -> None:
        if await store.role_exists(name):
            raise click.ClickException(
                f"The database has a role {name}: the audit could not tell them apart."
            )
        if not await store.add_service(name, hash_key(key), rate):
            raise click.ClickException(f"There is a service {name} already.")
        _audit_service("service_added", name, rate_per_minute=rate)

    on_database(options, add)
    click.echo(f"The key of {name}. It is shown this once:", err=True)
    click.echo(key)


@service.command("list")
@json_option
@click.pass_obj
def service_list(options: dict[str, Any], *, as_json: bool) -> None:
    """Show all services.

    \b
    Example:
      sse-server service list --json
    """

    async def show(store: Store) -> None:
        services = [
            {
                "name": found.name,
                "rate_per_minute": found.rate_per_minute,
                "created_at": timestamp(found.created_ms),
                "revoked_at": None if found.revoked_ms is None else timestamp(found.revoked_ms),
            }
            for found in await store.services()
        ]
        if as_json:
            click.echo(json.dumps(services, indent=2))
            return
        for found in services:
            state = f"revoked {found['revoked_at']}" if found["revoked_at"] else "valid"
            click.echo(
                f"{found['name']:<24} {found['rate_per_minute']:>7}/min  "
                f"added {found['created_at']}  {state}"
            )

    on_database(options, show)


@service.command("revoke")
@click.argument("name", callback=_service_name)
@click.pass_obj
def service_revoke(options: dict[str, Any], name: str) -> None:
    """Make a service's key invalid, from the next request on.

    \b
    Example:
      sse-server service revoke billing
    """

    async def revoke(store: Store) -> None:
        if not await store.revoke_service(name):
            raise click.ClickException(f"There is no valid service {name}.")
        _audit_service("service_revoked", name)

    on_database(options, revoke)
    click.echo(f"The key of {name} is revoked.", err=True)


def _audit_service(action: str, name: str, **detail: object) -> None:
    # The row is written by a trigger, which sees changes by plain SQL as well.
    audit.line({"action": action, "actor": "operator", "outcome": "ok", "service": name, **detail})
