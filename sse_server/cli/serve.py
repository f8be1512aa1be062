"""``sse-server serve``: the process that serves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import resource
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from aiohttp import web

from sse_server import logs
from sse_server.cli.process import EXIT_FAILED, EXIT_MISCONFIGURED
from sse_server.config import Settings, load
from sse_server.connections import Limits, Site, reserve
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.tls import Certificate

if TYPE_CHECKING:
    from sse_server.workers import Worker

logger = logging.getLogger(__name__)

# Allocations until the young are looked at; of those, until the middle-aged; until all.
GC_THRESHOLDS = (20_000, 20, 20)

# Timeouts
# A worker that cannot start, the database being away, tries again.
RESTART_FIRST = 0.5
RESTART_MOST = 15.0
BEAT_SECONDS = 1.0


def serve(options: dict[str, Any]) -> int:
    """Run the server until it is told to stop. Returns: the exit status."""
    postgres: EmbeddedPostgres | None = None
    try:
        settings = load(**options)
        logs.configure(settings.log_level, settings.log_format)
        _raise_file_limit()
        # Until the event loop takes over: what has been started must be stopped.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if settings.database_url is None:
            postgres = EmbeddedPostgres(settings.data_dir or default_data_dir())
            dsn = postgres.start()
            demo = {"demo": True} if settings.loopback else {}
            settings = load(**{**options, **demo, "database_url": dsn})
        if settings.workers > 1:
            return _serve_with_workers(settings, postgres)
        return asyncio.run(_serve_alone(settings, postgres))
    except (ConfigurationError, DatabaseError) as exc:
        return _misconfigured(exc)
    finally:
        if postgres is not None:
            postgres.stop()


def _misconfigured(exc: ConfigurationError | DatabaseError) -> int:
    sentence = f"The database cannot be used: {exc}." if isinstance(exc, DatabaseError) else exc
    click.echo(f"sse-server: {sentence}", err=True)
    return EXIT_MISCONFIGURED


def _raise_file_limit() -> None:
    """Allow as many open files as this process may: each stream is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # "Unlimited" is more than some kernels grant.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve_alone(settings: Settings, postgres: EmbeddedPostgres | None) -> int:
    stop = _stop_signals()

    def ready(address: tuple[Any, ...]) -> None:
        _announce(address, settings, postgres)

    return await _serve(settings, settings.port, stop, ready)


def _serve_with_workers(settings: Settings, postgres: EmbeddedPostgres | None) -> int:
    # Imported late: without workers there is no need for it.
    from sse_server import workers

    with workers.metrics_directory():
        # Imported late: it imports prometheus_client. Here and not in the workers, which then share
        # the memory.
        from sse_server.app import prepare

        certificate = _certificate(settings)
        asyncio.run(prepare(settings))
        try:
            reserved = reserve(settings.host, settings.port)
        except OSError as exc:
            raise _cannot_listen(settings, exc) from exc
        address = reserved[0].getsockname()

        def work(worker: Worker) -> int:
            if postgres is not None:
                postgres.forget()
            try:
                return asyncio.run(_work(settings, address[1], worker))
            except (ConfigurationError, DatabaseError) as exc:
                return _misconfigured(exc)

        try:
            return workers.run(
                workers.Plan(
                    count=settings.workers,
                    work=work,
                    ready=lambda: _announce(address, settings, postgres),
                    # For the streams, then for whatever else is under way; see _serve().
                    stop_seconds=2 * settings.drain_seconds + 5,
                    reloads=certificate is not None,
                )
            )
        finally:
            for sock in reserved:
                sock.close()


async def _work(settings: Settings, port: int, worker: Worker) -> int:
    """What a worker does: as `_serve_alone()`, but it does not give up."""
    stop = _stop_signals()
    worker.take_signals()
    beating = asyncio.create_task(_beat(worker, stop), name="heartbeat")
    try:
        pause, most = worker.delay, RESTART_FIRST
        while not await _stopped(stop, pause):
            try:
                return await _serve(settings, port, stop, lambda _: worker.ready(), reuse_port=True)
            except (ConfigurationError, DatabaseError) as exc:
                if worker.first:
                    raise
                # Full jitter: all workers lost the same database.
                pause, most = random.uniform(most / 2, most), min(2 * most, RESTART_MOST)
                logger.warning("a worker cannot start: %s; next try in %.1f s", exc, pause)
        return 0
    finally:
        beating.cancel()


async def _stopped(stop: asyncio.Event, seconds: float) -> bool:
    """Wait, but no longer than for the end. Returns: Whether that has come."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()


async def _beat(worker: Worker, stop: asyncio.Event) -> None:
    """Tell the master that we live, and stop when it does not."""
    while worker.beat():  # noqa: ASYNC110  # another process sets nothing here
        await asyncio.sleep(BEAT_SECONDS)
    logger.critical("the main process has gone, stopping")
    stop.set()


def _stop_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def _certificate(settings: Settings) -> Certificate | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificate(settings.tls_cert, settings.tls_key)


def _cannot_listen(settings: Settings, exc: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"Cannot listen on {settings.host}:{settings.port}: {exc.strerror or exc}."
    )


async def _serve(
    settings: Settings,
    port: int,
    stop: asyncio.Event,
    ready: Callable[[tuple[Any, ...]], None],
    *,
    reuse_port: bool = False,
) -> int:
    """Serve until told to stop.

    Args:
        settings: All but the port.
        port: Where to listen.
        stop: Set by whoever wants it to end.
        ready: Called with the address once it listens.
        reuse_port: Whether other processes listen there too.

    Returns: The exit status.
    """
    # Imported late: it imports prometheus_client, for which a master prepares a directory first.
    from sse_server.app import SUPERVISOR, create_app
    from sse_server.stream import STREAMS

    certificate = _certificate(settings)
    app = create_app(settings)
    # What a connection may do is said by Site.
    runner = web.AppRunner(app, shutdown_timeout=settings.drain_seconds)
    if certificate is not None:
        # Without one, SIGHUP keeps its meaning: the terminal has gone.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, certificate)
    try:
        await runner.setup()
        site = Site(
            runner,
            settings.host,
            port,
            limits=Limits.of(settings),
            ssl_context=None if certificate is None else certificate.context,
            reuse_port=reuse_port,
            busy=lambda: app[STREAMS].busy,
        )
        try:
            await site.start()
        except OSError as exc:
            raise _cannot_listen(settings, exc) from exc
        _tune_garbage_collection()
        ready(runner.addresses[0])
        failed = asyncio.create_task(app[SUPERVISOR].failed.wait(), name="failed")
        stopped = asyncio.create_task(stop.wait(), name="stopped")
        await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (failed, stopped):
            task.cancel()
        logger.info("stopping")
    finally:
        await runner.cleanup()
    return EXIT_FAILED if app[SUPERVISOR].failed.is_set() else 0


def _tune_garbage_collection() -> None:
    """Spare the collector what is there for good, and what streams are made of.

    Nearly all that lives here lives as long as a stream and is freed by its reference count. With
    Python's defaults half of the time of a reconnect storm went into looking for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


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


def _announce(
    address: tuple[Any, ...], settings: Settings, postgres: EmbeddedPostgres | None
) -> None:
    host, port = address[:2]
    scheme = "http" if settings.tls_cert is None else "https"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
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
