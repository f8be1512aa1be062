"""The command: arguments, logging, the process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import resource
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import click
from aiohttp import web

from sse_server import __version__, audit
from sse_server.app import SUPERVISOR, create_app
from sse_server.config import Settings, load
from sse_server.connections import Limits, Site
from sse_server.database import Database
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.events import timestamp
from sse_server.services import hash_key, new_key
from sse_server.store import Store
from sse_server.tls import Certificate

logger = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

# Exit statuses
EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2


def _options(command: Any) -> Any:
    """A command-line option for each setting, of the same name."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = "--" + name.replace("_", "-")
        variable = "DATABASE_URL" if name == "database_url" else f"SSE_{name.upper()}"
        text = f"{field.description}  [{variable}]"
        if field.annotation is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(
                command
            )
        else:
            command = click.option(flag, name, default=None, metavar="VALUE", help=text)(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sse-server")
@_options
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Push notifications from PostgreSQL to browsers over Server-Sent Events.

    Without DATABASE_URL it runs a PostgreSQL of its own and lets you sign in as anybody, on this
    machine only.
    """
    context.obj = {name: value for name, value in options.items() if value is not None}
    if context.invoked_subcommand is None:
        sys.exit(serve(context.obj))


def serve(options: dict[str, Any]) -> int:
    """Run the server until it is told to stop. Returns: the exit status."""
    postgres: EmbeddedPostgres | None = None
    try:
        settings = load(**options)
        logging.basicConfig(
            level=settings.log_level,
            format=LOG_FORMAT,
            stream=sys.stderr,
        )
        _raise_file_limit()
        # Until the event loop takes over: what has been started must be stopped.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if settings.database_url is None:
            postgres = EmbeddedPostgres(settings.data_dir or default_data_dir())
            dsn = postgres.start()
            demo = {"demo": True} if settings.loopback else {}
            settings = load(**{**options, **demo, "database_url": dsn})
        return asyncio.run(_serve(settings, postgres))
    except ConfigurationError as exc:
        click.echo(f"sse-server: {exc}", err=True)
        return EXIT_MISCONFIGURED
    except DatabaseError as exc:
        click.echo(f"sse-server: The database cannot be used: {exc}.", err=True)
        return EXIT_MISCONFIGURED
    finally:
        if postgres is not None:
            postgres.stop()


def _raise_file_limit() -> None:
    """Allow as many open files as this process may: each stream is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # "Unlimited" is more than some kernels grant.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@main.group()
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

    _on_database(options, add)
    click.echo(f"The key of {name}. It is shown this once:", err=True)
    click.echo(key)


@service.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def service_list(options: dict[str, Any], *, as_json: bool) -> None:
    """Show all services."""

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

    _on_database(options, show)


@service.command("revoke")
@click.argument("name", callback=_service_name)
@click.pass_obj
def service_revoke(options: dict[str, Any], name: str) -> None:
    """Make a service's key invalid, from the next request on."""

    async def revoke(store: Store) -> None:
        if not await store.revoke_service(name):
            raise click.ClickException(f"There is no valid service {name}.")
        _audit_service("service_revoked", name)

    _on_database(options, revoke)
    click.echo(f"The key of {name} is revoked.", err=True)


def _audit_service(action: str, name: str, **detail: object) -> None:
    # The row is written by a trigger, which sees changes by plain SQL as well.
    audit.line({"action": action, "actor": "operator", "outcome": "ok", "service": name, **detail})


def _on_database(options: dict[str, Any], work: Callable[[Store], Awaitable[None]]) -> None:
    """Do something with the database that the server uses, whether it is running or not."""
    postgres: EmbeddedPostgres | None = None
    try:
        settings = load(**options)
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, stream=sys.stderr)
        audit.logger.setLevel(logging.INFO)
        if settings.database_url is not None:
            dsn = settings.database_url.get_secret_value()
        else:
            postgres = EmbeddedPostgres(settings.data_dir or default_data_dir())
            dsn = postgres.attach() or postgres.start()
        asyncio.run(_with_store(settings, dsn, work))
    except ConfigurationError as exc:
        click.echo(f"sse-server: {exc}", err=True)
        sys.exit(EXIT_MISCONFIGURED)
    except DatabaseError as exc:
        click.echo(f"sse-server: The database cannot be used: {exc}.", err=True)
        sys.exit(EXIT_MISCONFIGURED)
    finally:
        if postgres is not None:
            postgres.stop()


async def _with_store(
    settings: Settings, dsn: str, work: Callable[[Store], Awaitable[None]]
) -> None:
    database = Database(
        dsn,
        size=1,
        connect_timeout=settings.connect_timeout,
        query_timeout=settings.query_timeout,
    )
    try:
        store = Store(database)
        await store.apply_schema()
        await work(store)
    finally:
        await database.close()


async def _serve(settings: Settings, postgres: EmbeddedPostgres | None) -> int:
    certificate = (
        Certificate(settings.tls_cert, settings.tls_key)
        if settings.tls_cert is not None and settings.tls_key is not None
        else None
    )
    app = create_app(settings)
    # What a connection may do is said by Site.
    runner = web.AppRunner(app, shutdown_timeout=settings.drain_seconds)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if certificate is not None:
        # Without one, SIGHUP keeps its meaning: the terminal has gone.
        loop.add_signal_handler(signal.SIGHUP, _reload, certificate)
    try:
        await runner.setup()
        site = Site(
            runner,
            settings.host,
            settings.port,
            limits=Limits.of(settings),
            ssl_context=None if certificate is None else certificate.context,
        )
        try:
            await site.start()
        except OSError as exc:
            raise ConfigurationError(
                f"Cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}."
            ) from exc
        host, port = runner.addresses[0][:2]
        scheme = "http" if certificate is None else "https"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        _announce(url, settings, postgres)
        failed = asyncio.create_task(app[SUPERVISOR].failed.wait(), name="failed")
        stopped = asyncio.create_task(stop.wait(), name="stopped")
        await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (failed, stopped):
            task.cancel()
        logger.info("stopping")
    finally:
        await runner.cleanup()
    return EXIT_FAILED if app[SUPERVISOR].failed.is_set() else 0


def _reload(certificate: Certificate) -> None:
    try:
        certificate.reload()
    except ConfigurationError as exc:
        logger.error("the certificate stays as it was: %s", exc)
    else:
        logger.info("the certificate was read again")


def _insert_command(postgres: EmbeddedPostgres, settings: Settings) -> str:
    assert settings.database_url is not None
    psql = [str(postgres.psql), settings.database_url.get_secret_value(), "-c"]
    statement = (
        "INSERT INTO notifications (user_id, event_type, message) "
        "VALUES ('alice', 'new_message', 'Hello from SQL')"
    )
    return f'{shlex.join(psql)} "{statement}"'


def _announce(url: str, settings: Settings, postgres: EmbeddedPostgres | None) -> None:
    click.echo(f"listening on {url}")
    if postgres is not None:
        click.echo(
            "\nOpen the page, sign in as alice, then send her a notification from another terminal:"
            f"\n\n  {_insert_command(postgres, settings)}\n"
        )
    elif settings.demo:
        click.echo("demo sign-in is on: anybody on this machine can sign in as anybody")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
