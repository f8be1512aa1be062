"""``sse-server sessions``: who is signed in, and signing somebody out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from sse_server import audit
from sse_server.cli.options import json_option
from sse_server.cli.process import fail, on_database
from sse_server.cli.text import printable
from sse_server.events import timestamp
from sse_server.operator import Operator
from sse_server.store import Store


@click.group()
def sessions() -> None:
    """Who is signed in; sign somebody out."""


@sessions.command("list")
@click.argument("user", required=False)
@click.option(
    "--limit",
    type=click.IntRange(1, 100_000),
    default=100,
    show_default=True,
    help="Most sessions to show, the newest first.",
)
@json_option
@click.pass_obj
def sessions_list(options: dict[str, Any], user: str | None, limit: int, *, as_json: bool) -> None:
    """Show the valid sessions, of all users or of USER. Their keys are stored nowhere.

    \b
    Example:
      sse-server sessions list alice
    """

    async def show(store: Store) -> None:
        found = await Operator(store.database).sessions(user, limit)
        if as_json:
            rows = [
                {
                    "id": session.id,
                    "user_id": session.user_id,
                    "created_at": timestamp(session.created_ms),
                    "expires_at": timestamp(session.expires_ms),
                    "streams_opened": session.streams_opened,
                }
                for session in found
            ]
            click.echo(json.dumps(rows, indent=2))
            return
        for session in found:
            click.echo(
                f"{session.id:>8}  {printable(session.user_id):<24} "
                f"since {timestamp(session.created_ms)}  until {timestamp(session.expires_ms)}  "
                f"{session.streams_opened} streams opened"
            )

    on_database(options, show, apply_schema=False)


@sessions.command("end")
@click.argument("users", metavar="[USER]...", nargs=-1)
@click.option("--id", "ids", multiple=True, type=int, help="End this session alone; repeatable.")
@click.pass_obj
def sessions_end(options: dict[str, Any], users: Sequence[str], ids: Sequence[int]) -> None:
    """Sign users out everywhere. Within a second their streams end, on every node.

    Exit status 1 if there was no session to end.

    \b
    Example:
      sse-server sessions end mallory
    """
    if not users and not ids:
        raise click.UsageError("Name a user, or a session with --id.")
    ended: list[tuple[int, str]] = []

    async def end(store: Store) -> None:
        ended.extend(await Operator(store.database).end_sessions(users, ids))

    on_database(options, end, apply_schema=False)
    for id, user_id in ended:
        audit.line(
            {
                "action": "end_session",
                "actor": "operator",
                "outcome": "ok",
                "user_id": user_id,
                "session": id,
            }
        )
    if not ended:
        fail("There is no such session.")
    click.echo(f"{len(ended)} ended.", err=True)
