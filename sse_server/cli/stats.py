"""``sse-server stats``: numbers from the database."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from sse_server.cli.options import json_option
from sse_server.cli.process import on_database
from sse_server.cli.text import duration, printable, size
from sse_server.operator import Day, Operator, Size, Totals
from sse_server.store import Store

# Counting the rows of some days reads the table.
QUERY_SECONDS = 300.0


@click.command("stats")
@click.option(
    "--days",
    type=click.IntRange(0, 3650),
    default=7,
    show_default=True,
    help="Count the rows of so many days, by type; this reads the table. 0 leaves it out.",
)
@json_option
@click.pass_obj
def stats(options: dict[str, Any], days: int, *, as_json: bool) -> None:
    """Show what there is: notifications, sessions, the feeds' mode, sizes.

    \b
    Example:
      sse-server stats --days 1 --json | jq .totals.unread
    """

    async def show(store: Store) -> None:
        operator = Operator(store.database)
        totals = await operator.totals()
        of_days = await operator.days(days) if days else []
        sizes = await operator.sizes()
        if as_json:
            document = {
                "totals": asdict(totals),
                "days": [asdict(day) for day in of_days],
                "sizes": [asdict(one) for one in sizes],
            }
            click.echo(json.dumps(document, indent=2))
        else:
            _print(totals, of_days, sizes)

    on_database({"query_timeout": QUERY_SECONDS, **options}, show, apply_schema=False)


def _print(totals: Totals, days: list[Day], sizes: list[Size]) -> None:
    oldest = totals.oldest_transaction_seconds
    now = "polling" if totals.polling else "notified"
    rows = {
        "unread notifications": f"{totals.unread:,}",
        "all notifications": f"about {totals.notifications:,}, "
        f"kept for {totals.retention_days} days",
        "rate limit": f"{totals.user_rate_per_minute:,} per user and minute"
        if totals.user_rate_per_minute
        else "none",
        "sessions": f"{totals.sessions:,} of {totals.users_with_session:,} users",
        "services": f"{totals.services:,}",
        "feeds": f"{totals.feeds} connected, mode {totals.feed_mode}, {now} now",
        "queue of NOTIFY": f"{totals.queue_usage:.2%} used",
        "oldest transaction": "none" if oldest is None else duration(oldest),
    }
    for name, value in rows.items():
        click.echo(f"{name:<22}{value}")
    if days:
        click.echo("\nday (UTC)   type                        rows      unread")
    for day in days:
        click.echo(
            f"{day.day}  {printable(day.event_type):<20} {day.notifications:>11,} {day.unread:>11,}"
        )
    click.echo()
    for one in sizes:
        name = one.name if one.of is None else f"  {one.name}"
        click.echo(f"{name:<40}{size(one.bytes):>12}")
