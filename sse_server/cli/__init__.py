"""The command ``sse-server``: the settings as options, and the commands, a module each."""

from __future__ import annotations

import sys
from typing import Any

import click

from sse_server import __version__
from sse_server.cli.doctor import doctor
from sse_server.cli.options import given, settings_options
from sse_server.cli.schema import schema
from sse_server.cli.send import send
from sse_server.cli.serve import serve
from sse_server.cli.service import service
from sse_server.cli.sessions import sessions
from sse_server.cli.settings import settings
from sse_server.cli.stats import stats
from sse_server.cli.tail import tail
from sse_server.cli.token import token


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sse-server")
@settings_options
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Push notifications from PostgreSQL to browsers over Server-Sent Events.

    Without a command it serves. Without DATABASE_URL it runs a PostgreSQL of its own and lets you
    sign in as anybody, on this machine only.

    The options below are the settings; each is an environment variable, too. Exit status 0: done;
    1: it failed, or found something wrong; 2: misconfigured, or called wrongly.

    \b
    Example:
      sse-server --port 9000
    """
    context.obj = given(options)
    if context.invoked_subcommand is None:
        sys.exit(serve(context.obj))


@main.command("serve")
@settings_options
@click.pass_obj
def _serve(before: dict[str, Any], /, **options: Any) -> None:
    """Serve, until SIGTERM or Ctrl-C. The same as no command at all.

    \b
    Example:
      sse-server serve --port 9000
    """
    sys.exit(serve({**before, **given(options)}))


for command in (doctor, schema, send, service, sessions, settings, stats, tail, token):
    main.add_command(command)
