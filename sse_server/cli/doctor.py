"""``sse-server doctor``: what is wrong with a service that is deployed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from sse_server.cli.options import json_option
from sse_server.cli.process import EXIT_FAILED, misconfigured
from sse_server.cli.tail import read_token
from sse_server.cli.text import printable
from sse_server.client import Service, is_loopback, parse_url, read_cookie, trust
from sse_server.config import Settings, load
from sse_server.database import Database
from sse_server.doctor import inside, outside
from sse_server.doctor.faults import FAULTS, Report
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError
from sse_server.store import Store
from sse_server.tokens import sign

# Who the doctor signs in as if nobody says.
USER = "sse-server-doctor"

# A process's connections beside its pool: the one that listens, and one to come back with.
BESIDE_POOL = 2


@click.command("doctor")
@click.argument("url", required=False)
@click.option("--user", default=USER, show_default=True, help="Whom to sign in as.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="A sign-in token of your backend's, for one use; - is the standard input.",
)
@click.option(
    "--cookie-file",
    type=click.Path(path_type=Path),
    help="A session's cookie, as NAME=VALUE or as curl -c writes it. Its own stream is superseded.",
)
@click.option("--cafile", type=click.Path(path_type=Path), help="Authorities (PEM) to trust.")
@click.option(
    "--wait",
    type=click.FloatRange(0.5, 7200),
    help="Hold the stream for so many seconds; by default for two heartbeats.",
)
@click.option(
    "--certificate-days",
    type=click.FloatRange(0),
    default=14,
    show_default=True,
    help="How long a certificate should be valid yet.",
)
@click.option(
    "--skew",
    type=click.FloatRange(0),
    default=2,
    show_default=True,
    help="Seconds by which clocks may differ.",
)
@click.option(
    "--long-transaction",
    type=click.FloatRange(0),
    default=300,
    show_default=True,
    help="Seconds that a transaction may be open.",
)
@json_option
@click.pass_obj
def doctor(
    options: dict[str, Any],
    url: str | None,
    user: str,
    token_file: Path | None,
    cookie_file: Path | None,
    cafile: Path | None,
    wait: float | None,
    certificate_days: float,
    skew: float,
    long_transaction: float,
    *,
    as_json: bool,
) -> None:
    """Look for what is wrong with the service at URL, and with its database.

    From outside, as a browser: buffering, compression, idle timeouts of proxies, HTTP/2, TLS,
    cookies, clocks. From the database, with DATABASE_URL: poolers, triggers, schema, the queue of
    NOTIFY, long transactions, autovacuum and more. Without URL, only the database.

    Signs in with a token that it signs (SSE_JWT_SECRET), with one from a file, with a cookie, or,
    on this machine, by the demo's sign-in. Exit status 1 if it found anything.

    \b
    Example:
      sse-server doctor https://push.example.com
    """
    report = Report()
    with misconfigured():
        settings = load(**options)
        dsn = _dsn(settings)
        if url is None and dsn is None:
            raise ConfigurationError("Name the URL of a service, or set DATABASE_URL.")
        if url is not None:
            at, tls = parse_url(url), trust(cafile)
            sign_in = _sign_in(settings, user, token_file, cookie_file, loopback=is_loopback(at))

            async def look_outside() -> None:
                service = Service(at, tls=tls)
                try:
                    await outside.examine_service(
                        service,
                        report,
                        sign_in=sign_in,
                        tls=tls,
                        limits=outside.Limits(
                            wait=wait, skew=skew, certificate_days=certificate_days
                        ),
                        said=_said,
                    )
                finally:
                    await service.close()

            asyncio.run(look_outside())
        if dsn is not None:
            limits = inside.Limits(transaction_seconds=long_transaction, skew_seconds=skew)
            asyncio.run(_look_inside(settings, dsn, report, limits))
        else:
            report.skip("database", "DATABASE_URL is not set")
    _print(report, as_json=as_json)
    sys.exit(EXIT_FAILED if report.findings else 0)


def _dsn(settings: Settings) -> str | None:
    """Of the database, if there is one to look at. None is started for this."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    with contextlib.suppress(ConfigurationError):
        return EmbeddedPostgres(settings.data_dir or default_data_dir()).attach()
    return None


def _sign_in(
    settings: Settings,
    user: str,
    token_file: Path | None,
    cookie_file: Path | None,
    *,
    loopback: bool,
) -> outside.SignIn | None:
    if cookie_file is not None:
        try:
            return outside.SignIn(cookie=read_cookie(cookie_file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigurationError(f"{cookie_file} cannot be read.") from exc
    if token_file is not None:
        return outside.SignIn(token=read_token(token_file))
    if settings.jwt_secret is not None:
        return outside.SignIn(token=sign(settings, user))
    return outside.SignIn(user_id=user) if loopback else None


def _said(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"waiting for {what} …", err=True)


async def _look_inside(settings: Settings, dsn: str, report: Report, limits: inside.Limits) -> None:
    listen = settings.listen_database_url
    database = Database(
        dsn,
        listen_dsn=None if listen is None else listen.get_secret_value(),
        size=1,
        connect_timeout=settings.connect_timeout,
        query_timeout=settings.query_timeout,
        application_name="sse-server doctor",
    )
    try:
        await inside.examine_database(
            Store(database),
            report,
            limits=limits,
            connections=settings.workers * (settings.pool_size + BESIDE_POOL),
        )
    finally:
        await database.close()


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    for check, detail in report.passed:
        click.echo(f"ok       {printable(check)}" + (f": {printable(detail)}" if detail else ""))
    for check, reason in report.skipped:
        click.echo(f"skipped  {printable(check)}: {printable(reason)}")
    for finding in report.findings:
        fault = FAULTS[finding.fault]
        click.echo(f"\n{fault.severity.value:<8} {fault.title}  [{finding.fault}]")
        click.echo(f"         {printable(finding.what)}")
        click.echo(f"         why:    {fault.why}")
        click.echo(f"         change: {fault.change}")
    count = len(report.findings)
    click.echo(f"\n{count or 'No'} finding{'' if count == 1 else 's'}.")
