"""``sse-server schema``: the tables, functions and triggers."""

from __future__ import annotations

from typing import Any

import click

from sse_server.cli.process import misconfigured, on_database
from sse_server.store import Store, schema_sql, schema_version


@click.command("schema")
@click.option("--apply", "applies", is_flag=True, help="Apply it to the database.")
@click.pass_obj
def schema(options: dict[str, Any], *, applies: bool) -> None:
    """Print the schema, or apply it.

    A server applies it by itself when it starts; by hand, its role needs no right to do so.

    \b
    Example:
      sse-server schema | psql "$DATABASE_URL"
    """
    if not applies:
        with misconfigured():
            click.echo(schema_sql(), nl=False)
        return

    async def apply(store: Store) -> None:
        current = await store.applied_schema() == schema_version()
        await store.apply_schema()
        click.echo("The schema was up to date." if current else "The schema is applied.", err=True)

    on_database(options, apply, apply_schema=False)
