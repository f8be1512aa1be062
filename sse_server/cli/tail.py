"""``sse-server tail``: follows a user's stream in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import click

from sse_server.cli.process import EXIT_FAILED, fail, misconfigured
from sse_server.cli.text import printable
from sse_server.client import (
    Change,
    Event,
    Follower,
    Service,
    is_loopback,
    parse_url,
    problem_of,
    trust,
)
from sse_server.config import Settings, load
from sse_server.errors import ConfigurationError
from sse_server.tokens import sign


@click.command("tail")
@click.argument("user", required=False)
@click.option("--url", metavar="URL", help="Of the service; by default the one on this machine.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="A sign-in token of your backend's, for one use; - is the standard input.",
)
@click.option("--cafile", type=click.Path(path_type=Path), help="Authorities (PEM) to trust.")
@click.option("--after", metavar="ID", default="", help="Begin after this notification.")
@click.option("--count", type=click.IntRange(1), help="End after so many notifications.")
@click.option("--json", "as_json", is_flag=True, help="Every event as JSON, one a line.")
@click.pass_obj
def tail(
    options: dict[str, Any],
    user: str | None,
    url: str | None,
    token_file: Path | None,
    cafile: Path | None,
    after: str,
    count: int | None,
    *,
    as_json: bool,
) -> None:
    """Follow the stream of USER until Ctrl-C, over restarts and lost lines.

    Signs in with a token that it signs (SSE_JWT_SECRET), with one from a file, or, on this machine,
    by the demo's sign-in; signs out at the end. Notifications go to the standard output, each once;
    how the stream stands goes to the standard error. Exit status 1 if it cannot sign in, or the
    session ends.

    \b
    Example:
      sse-server tail alice --json | jq -r .data.message
    """
    with misconfigured():
        settings = load(**options)
        at = parse_url(url or default_url(settings))
        token = _token(settings, user, token_file)
        if token is None and (user is None or not is_loopback(at)):
            raise ConfigurationError(
                "Signing in needs SSE_JWT_SECRET and a user, or a token in --token-file; the "
                "demo's sign-in is for a user on this machine."
            )
        service_of = trust(cafile)

    async def follow() -> int:
        service = Service(at, tls=service_of)
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            response = await service.sign_in(token=token, user_id=user)
            if response.status != 200:
                fail(f"Not signed in: {await problem_of(response)}")
            return await _show(Follower(service, cursor=after), count, as_json=as_json)
        except asyncio.CancelledError:
            return 0  # asked to end
        except aiohttp.ClientError as exc:
            fail(f"{at} does not answer: {exc}")
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await service.close()

    sys.exit(asyncio.run(follow()))


def default_url(settings: Settings) -> str:
    """Of the server that has these settings, on this machine."""
    host = settings.host if settings.loopback else "127.0.0.1"
    scheme = "http" if settings.tls_cert is None else "https"
    if settings.port == 0:
        raise ConfigurationError("The server takes a free port (SSE_PORT=0): name it with --url.")
    return (
        f"{scheme}://[{host}]:{settings.port}"
        if ":" in host
        else (f"{scheme}://{host}:{settings.port}")
    )


def _token(settings: Settings, user: str | None, file: Path | None) -> str | None:
    if file is not None:
        return read_token(file)
    if user is not None and settings.jwt_secret is not None:
        return sign(settings, user)
    return None


def read_token(file: Path) -> str:
    """The token in a file; ``-`` is the standard input.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{file} cannot be read.") from exc
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigurationError(f"{file} holds no token.")
    return token


async def _show(follower: Follower, count: int | None, *, as_json: bool) -> int:
    """Print what comes. Returns: the exit status."""
    shown = 0
    async with contextlib.aclosing(follower.follow()) as items:
        async for item in items:
            if isinstance(item, Change):
                detail = f": {printable(item.detail)}" if item.detail else ""
                click.echo(f"-- {item.state}{detail}", err=True)
                if item.state == "ended":
                    return EXIT_FAILED
                continue
            if as_json:
                line = {"event": item.name, "id": item.id or None, "data": item.json}
                # In ASCII: nothing in it that a terminal would obey.
                click.echo(json.dumps(line))
            elif item.name == "notification":
                click.echo(_line(item))
            if item.name == "notification":
                shown += 1
                if shown == count:
                    return 0
    return EXIT_FAILED


def _line(event: Event) -> str:
    data = event.json or {}
    parts = [data.get(name) for name in ("created_at", "event_type", "message", "link")]
    created_at, event_type, message, link = (printable(str(part or "")) for part in parts)
    return f"{created_at}  {event_type:<14}  {message}" + (f"  {link}" if link else "")
