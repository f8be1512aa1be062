"""The page of the documentation on the command line, from the commands' own help texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from sse_server.cli import main
from sse_server.config import Settings

_HEAD = """# The command line

<!-- Written by `python -m sse_server.cli.reference`; a test compares. -->

`sse-server` serves; its commands do the rest. `python run.py` is the same from a checkout. What
needs the database goes by `DATABASE_URL`, or to the PostgreSQL that a server runs by itself.

**Settings** are options of `sse-server` (before the command) and of `sse-server serve`, and
environment variables: [settings.md](settings.md). Secrets belong into the environment or into
files: service keys are read from `SSE_KEY`, tokens from files, and none is ever an argument.

**Exit status.** 0: done. 1: it failed, or found something wrong. 2: misconfigured, or called
wrongly; then nothing was done. One sentence on the standard error says why.

**For scripts.** Results go to the standard output, all else to the standard error. `--json` is
there wherever a script would read.

**Completion.** For bash; zsh and fish have `zsh_source` and `fish_source`:

```sh
eval "$(_SSE_SERVER_COMPLETE=bash_source sse-server)"      # in ~/.bashrc
```

"""


def _without_settings(command: click.Command) -> click.Command:
    """The command, its settings left out: those have a page of their own."""
    names = set(Settings.model_fields)
    params = [param for param in command.params if param.name not in names]
    if len(params) == len(command.params):
        return command
    if isinstance(command, click.Group):
        return click.Group(
            command.name, commands=command.commands, params=params, help=command.help
        )
    return click.Command(command.name, params=params, help=command.help)


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    shown = _without_settings(command)
    context = click.Context(
        shown, info_name=path, max_content_width=96, terminal_width=96, help_option_names=["--help"]
    )
    yield path, shown.get_help(context)
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], f"{path} {name}")


def markdown() -> str:
    """The whole page."""
    parts = [
        f"## {path}\n\n```text\n{text.rstrip()}\n```\n"
        for path, text in _commands(main, "sse-server")
    ]
    return _HEAD + "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(markdown())
