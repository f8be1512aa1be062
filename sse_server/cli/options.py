"""The settings as options of the command line, and what several commands have in common."""

from __future__ import annotations

from typing import Any, TypeVar

import click

from sse_server.config import Settings, variable

C = TypeVar("C", bound=Any)

json_option = click.option("--json", "as_json", is_flag=True, help="As JSON.")


def settings_options(command: C) -> C:
    """Give a command an option for each setting, of the same name."""
    for name, field in reversed(Settings.model_fields.items()):
        flag = "--" + name.replace("_", "-")
        text = f"{field.description}  [{variable(name)}]"
        if field.annotation is bool:
            decorate = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        else:
            decorate = click.option(flag, name, default=None, metavar="VALUE", help=text)
        command = decorate(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were on the command line."""
    return {name: value for name, value in options.items() if value is not None}
