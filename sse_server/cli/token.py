"""``sse-server token``: sign in as a user, for trials."""

from __future__ import annotations

from typing import Any

import click

from sse_server.cli.process import misconfigured
from sse_server.config import load
from sse_server.tokens import LIFETIME_SECONDS, sign


@click.command("token")
@click.argument("user")
@click.option(
    "--seconds",
    type=click.IntRange(1, LIFETIME_SECONDS),
    default=300,
    show_default=True,
    help="How long it can be used.",
)
@click.pass_obj
def token(options: dict[str, Any], user: str, seconds: int) -> None:
    """Print a token that signs USER in, once.

    Signed with SSE_JWT_SECRET, as the application's backend does it. Whoever has it is USER to the
    service: it is for trials.

    \b
    Example:
      sse-server token alice > token.txt
    """
    with misconfigured():
        text = sign(load(**options), user, seconds=seconds)
    click.echo(text)
