"""The command ``sse-server``: the settings as options, and the commands, a module each."""

from __future__ import annotations

import sys
from typing import Any

import click

from sse_server import __version__
from sse_server.cli.serve import serve
from sse_server.cli.service import service
from sse_server.config import Settings


def _options(command: Any) -> Any:
    """A command-line option for each setting, of the same name."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = "--" + name.replace("_", "-")
        variable = "DATABASE_URL" if name == "database_url" else f"SSE_{name.upper()}"
        text = f"{field.description}  [{variable}]"
        if field.annotation is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(
                command
            )
        else:
            command = click.option(flag, name, default=None, metavar="VALUE", help=text)(command)
    return command


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sse-server")
@_options
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Push notifications from PostgreSQL to browsers over Server-Sent Events.

    Without DATABASE_URL it runs a PostgreSQL of its own and lets you sign in as anybody, on this
    machine only.
    """
    context.obj = {name: value for name, value in options.items() if value is not None}
    if context.invoked_subcommand is None:
        sys.exit(serve(context.obj))


main.add_command(service)
