"""What all commands have in common: exit statuses, logging, the database."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import click

from sse_server import audit, logs
from sse_server.config import Settings, load
from sse_server.database import Database
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.store import Store

# Exit statuses
EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2


def fail(message: str) -> NoReturn:
    """Say what has failed, and end with exit status 1."""
    click.echo(f"sse-server: {message}", err=True)
    sys.exit(EXIT_FAILED)


@contextlib.contextmanager
def misconfigured() -> Iterator[None]:
    """Settings or a database that cannot be used are one sentence and exit status 2."""
    try:
        yield
    except ConfigurationError as exc:
        click.echo(f"sse-server: {exc}", err=True)
        sys.exit(EXIT_MISCONFIGURED)
    except DatabaseError as exc:
        click.echo(f"sse-server: The database cannot be used: {exc}.", err=True)
        sys.exit(EXIT_MISCONFIGURED)


def on_database(
    options: dict[str, Any],
    work: Callable[[Store], Awaitable[None]],
    *,
    apply_schema: bool = True,
) -> None:
    """Do something with the database that the server uses, whether it is running or not.

    Args:
        options: Settings from the command line.
        work: What to do.
        apply_schema: Before that; not for what only looks.
    """
    postgres: EmbeddedPostgres | None = None
    try:
        with misconfigured():
            settings = load(**options)
            logs.configure(logging.WARNING, "text")
            audit.logger.setLevel(logging.INFO)
            if settings.database_url is not None:
                dsn = settings.database_url.get_secret_value()
            else:
                postgres = EmbeddedPostgres(settings.data_dir or default_data_dir())
                dsn = postgres.attach() or postgres.start()
            asyncio.run(_with_store(settings, dsn, work, apply_schema=apply_schema))
    finally:
        if postgres is not None:
            postgres.stop()


async def _with_store(
    settings: Settings,
    dsn: str,
    work: Callable[[Store], Awaitable[None]],
    *,
    apply_schema: bool,
) -> None:
    database = Database(
        dsn,
        size=1,
        connect_timeout=settings.connect_timeout,
        query_timeout=settings.query_timeout,
    )
    try:
        store = Store(database, link_hosts=settings.link_hosts)
        if apply_schema:
            await store.apply_schema()
        await work(store)
    finally:
        await database.close()
