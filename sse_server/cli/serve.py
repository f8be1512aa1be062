"""``sse-server serve``: the process that serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import shlex
import signal
import sys
from typing import Any

import click
from aiohttp import web

from sse_server.app import SUPERVISOR, create_app
from sse_server.cli.process import EXIT_FAILED, EXIT_MISCONFIGURED, LOG_FORMAT
from sse_server.config import Settings, load
from sse_server.connections import Limits, Site
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.tls import Certificate

logger = logging.getLogger(__name__)


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
