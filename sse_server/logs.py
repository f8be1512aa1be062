"""How the process logs: lines for people on a terminal, one JSON object per line for machines.

Both have what a line says; JSON has besides, as members of their own, what was given as ``extra``.
Every line that is logged while a request is answered bears the request's id. Neither ever has a
cookie, a key, a DSN or the text of a message: that is up to those who log.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"

Format = Literal["auto", "text", "json"]

# Of the request that is being answered. A task that a request starts inherits it.
REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)

# A record whose message is JSON already bears the name under which that goes into the line.
JSON_MESSAGE = "json_message"

# What every record has; the rest was given as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """For people. The id of the request comes last."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        text = super().formatMessage(record)
        request_id = REQUEST_ID.get()
        return text if request_id is None else f"{text} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """For machines: ``at``, ``level``, ``logger``, ``message``, ``request_id``, what was given as
    ``extra``, and ``exception`` with the traceback. In ASCII, so that nothing in a line can look
    like another line or a terminal's control sequence."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
        }
        given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        name = given.pop(JSON_MESSAGE, None)
        if name is None:
            line["message"] = record.getMessage()
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        # The members above are not to be overwritten.
        line = {**given, **line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        text = json.dumps(line, default=str)
        # Not read and written again: a publication for thousands has as many of these lines.
        return text if name is None else f'{text[:-1]}, "{name}": {record.getMessage()}}}'


def configure(level: str | int, log_format: Format = "auto", stream: TextIO | None = None) -> None:
    """Let everything be logged to one stream; to be called once, by the entry point.

    Args:
        level: From which on.
        log_format: ``auto`` is text on a terminal and JSON elsewhere.
        stream: standard error if not given.
    """
    stream = sys.stderr if stream is None else stream
    if log_format == "auto":
        log_format = "text" if stream.isatty() else "json"
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler])
