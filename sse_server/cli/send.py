"""``sse-server send``: notifications from a terminal or a script."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import click

from sse_server.cli.process import EXIT_FAILED, fail, misconfigured, on_database
from sse_server.cli.text import printable
from sse_server.client import Service, parse_url, problem_of, trust
from sse_server.config import load
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.operator import Operator
from sse_server.sanitize import safe_link
from sse_server.store import Store

# Recipients of one transaction, or of one request
BATCH = 1_000

# A request that cannot be answered now is repeated; with its key it is carried out once.
TRIES = 5
WAIT_SECONDS = 1.0
WAIT_MOST = 60.0

# Recipients that are named one by one in a summary
NAMED = 20

Result = tuple[str, str, int | None]
Send = Callable[[Sequence[str]], Awaitable[list[Result]]]


class _Refused(Exception):
    """One sentence: why a batch was not sent."""


@click.command("send")
@click.argument("users", metavar="[USER]...", nargs=-1)
@click.option("--type", "event_type", required=True, help="An event type: new_message, …")
@click.option("--message", "-m", required=True, help="Plain text, at most 2,000 characters.")
@click.option("--link", help="A path of the application, or an https: URL of an allowed host.")
@click.option(
    "--to",
    "file",
    type=click.File(encoding="utf-8"),
    help="More recipients from a file, one a line; - is the standard input.",
)
@click.option(
    "--url",
    metavar="URL",
    help="Send through the service at URL, with the service key in SSE_KEY, and not in SQL.",
)
@click.option("--cafile", type=click.Path(path_type=Path), help="Authorities (PEM) to trust.")
@click.option("--json", "as_json", is_flag=True, help="The outcome of each recipient, as JSON.")
@click.pass_obj
def send(
    options: dict[str, Any],
    users: Sequence[str],
    event_type: str,
    message: str,
    link: str | None,
    file: TextIO | None,
    url: str | None,
    cafile: Path | None,
    *,
    as_json: bool,
) -> None:
    """Send a notification to each USER.

    Exit status 0 if it was created for everybody, or suppressed by what the user prefers; 1 if it
    was not, for instance over a limit. Recipients go in batches of 1,000: what was sent before a
    failure stays sent, and the summary says how many that are.

    \b
    Example:
      sse-server send alice bob --type system_alert -m "Maintenance at 22:00"
    """
    recipients = list(dict.fromkeys([*users, *_lines(file)]))
    if not recipients:
        raise click.UsageError("Name a user, or a file of users with --to.")
    for text in (*recipients, event_type, message, link or ""):
        if "\0" in text or any(0xD800 <= ord(char) < 0xE000 for char in text):
            raise click.UsageError(
                "Neither users nor texts may hold a NUL, or be other than UTF-8."
            )
    results: list[Result] = []
    try:
        if url is not None:
            with misconfigured():
                asyncio.run(
                    _over_http(url, cafile, (event_type, message, link), recipients, results)
                )
        else:
            with misconfigured():
                _check_link(link, load(**options).link_hosts)

            async def in_sql(store: Store) -> None:
                operator = Operator(store.database)

                async def batch(user_ids: Sequence[str]) -> list[Result]:
                    try:
                        return await operator.notify_users(
                            user_ids, event_type=event_type, message=message, link=link
                        )
                    except DatabaseError as exc:
                        raise _Refused(str(exc)) from exc

                await _in_batches(batch, recipients, results)

            on_database(options, in_sql)
    except (_Refused, aiohttp.ClientError, OSError) as exc:
        _report(results, len(recipients), as_json=as_json, error=str(exc) or type(exc).__name__)
        fail(f"{printable(str(exc)) or type(exc).__name__}")
    _report(results, len(recipients), as_json=as_json)
    if any(outcome not in ("created", "suppressed") for _, outcome, _ in results):
        sys.exit(EXIT_FAILED)


def _lines(file: TextIO | None) -> Iterator[str]:
    if file is None:
        return
    try:
        yield from filter(None, (line.strip() for line in file))
    except UnicodeDecodeError as exc:
        raise click.UsageError("The file of recipients is not UTF-8.") from exc


def _check_link(link: str | None, hosts: frozenset[str]) -> None:
    if link is not None and safe_link(link, hosts) is None:
        # A stream would leave it out.
        raise ConfigurationError(
            "--link must be a path of the application or an https: URL of a host in SSE_LINK_HOSTS."
        )


async def _in_batches(send: Send, recipients: Sequence[str], results: list[Result]) -> None:
    batches = [recipients[at : at + BATCH] for at in range(0, len(recipients), BATCH)]
    # click draws none where nobody watches.
    with contextlib.ExitStack() as stack:
        bar = None
        if len(batches) > 1 and sys.stderr.isatty():
            bar = stack.enter_context(
                click.progressbar(length=len(recipients), label="Sending", file=sys.stderr)
            )
        for batch in batches:
            results += await send(batch)
            if bar is not None:
                bar.update(len(batch))


async def _over_http(
    url: str,
    cafile: Path | None,
    content: tuple[str, str, str | None],
    recipients: Sequence[str],
    results: list[Result],
) -> None:
    key = os.environ.get("SSE_KEY", "")
    if not key:
        # Never an option: the command line is everybody's to read.
        raise ConfigurationError("--url needs the key of a service in the environment: SSE_KEY.")
    if not key.isascii() or not key.isprintable():
        raise ConfigurationError("SSE_KEY is no key of a service.")
    service = Service(parse_url(url), tls=trust(cafile))
    event_type, message, link = content
    run = secrets.token_hex(16)

    async def batch(user_ids: Sequence[str]) -> list[Result]:
        # The same batch under the same key, however often it is asked for: it is sent once.
        digest = hashlib.sha256("\n".join(user_ids).encode("utf-8", "surrogateescape")).hexdigest()
        body = {
            "recipients": list(user_ids),
            "event_type": event_type,
            "message": message,
            "idempotency_key": f"{run}-{digest[:16]}",
            **({} if link is None else {"link": link}),
        }
        for left in reversed(range(TRIES)):
            wait = WAIT_SECONDS
            try:
                async with service.http.post(
                    service.path("api/publish"),
                    json=body,
                    headers={"Authorization": f"Bearer {key}"},
                    allow_redirects=False,
                ) as response:
                    if response.status == 200:
                        answer = await response.json()
                        return [(r["user_id"], r["outcome"], r["id"]) for r in answer["results"]]
                    said = await problem_of(response)
                    if response.status not in (429, 502, 503, 504) or not left:
                        raise _Refused(said)
                    with contextlib.suppress(ValueError):
                        wait = float(response.headers.get("Retry-After", wait))
            except (aiohttp.ClientConnectionError, TimeoutError):
                if not left:
                    raise
            await asyncio.sleep(min(wait, WAIT_MOST))
        raise AssertionError

    try:
        await _in_batches(batch, recipients, results)
    finally:
        await service.close()


def _report(results: list[Result], asked: int, *, as_json: bool, error: str | None = None) -> None:
    counts = Counter(outcome for _, outcome, _ in results)
    summary = {name: counts[name] for name in ("created", "suppressed", "rate_limited")}
    unsent = asked - len(results)
    if as_json:
        click.echo(
            json.dumps(
                {
                    **summary,
                    "not_sent": unsent,
                    **({} if error is None else {"error": error}),
                    "results": [
                        {"user_id": user_id, "outcome": outcome, "id": id}
                        for user_id, outcome, id in results
                    ],
                },
                indent=2,
            )
        )
        return
    others = [(user_id, outcome) for user_id, outcome, _ in results if outcome != "created"]
    for user_id, outcome in others[:NAMED]:
        click.echo(f"{outcome:<13} {printable(user_id)}")
    if len(others) > NAMED:
        click.echo(f"… and {len(others) - NAMED} more (--json names all)")
    text = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary.items())
    click.echo(text + (f", {unsent} not sent" if unsent else ""))
