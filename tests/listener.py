"""Collects what the triggers announce, as any client of PostgreSQL could."""

from __future__ import annotations

import itertools
import json
import select
import time
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from tests.conftest import connect

# What a NOTIFY may carry; one byte more, and the writer's transaction fails.
PAYLOAD_BYTES = 7999

_fences = itertools.count(1)


def fetch(connection: Connection, statement: str, *params: object) -> list[tuple[Any, ...]]:
    """Run a statement and return its rows, if it is one that has any."""
    with connection.cursor() as cursor:
        cursor.execute(statement, params or None)
        return cursor.fetchall() if cursor.description is not None else []


class Listener:
    """LISTENs on the channel of the installation that the DSN's search path leads to.

    Args:
        dsn: Of the database.
        schema: Where the installation is, in front of the search path.
    """

    def __init__(self, dsn: str, schema: str = "") -> None:
        self._connection = connect(dsn)
        settings = f"{schema}.settings" if schema else "settings"
        self.channel = fetch(self._connection, f"SELECT channel FROM {settings}")[0][0]
        fetch(self._connection, f'LISTEN "{self.channel}"')

    def close(self) -> None:
        self._connection.close()

    def texts(self) -> list[str]:
        """Every payload that has been committed since the last call, in order.

        Nothing is waited for but the listener's own NOTIFY: the queue is in the order of commits.
        """
        fence = f"fence {next(_fences)}"
        fetch(self._connection, f"NOTIFY \"{self.channel}\", '{fence}'")
        payloads: list[str] = []
        deadline = time.monotonic() + 10
        while True:
            while self._connection.notifies:
                payload = self._connection.notifies.pop(0).payload
                if payload == fence:
                    return payloads
                payloads.append(payload)
            if time.monotonic() > deadline:
                pytest.fail("the listener's own NOTIFY did not come back")
            select.select([self._connection], [], [], 1)
            self._connection.poll()

    def payloads(self) -> list[dict[str, Any]]:
        """`texts()` as the JSON that they must be, after a look at their size."""
        texts = self.texts()
        for text in texts:
            assert len(text.encode()) <= PAYLOAD_BYTES
        return [json.loads(text, parse_constant=_refuse) for text in texts]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """`payloads()`, which must all be of this kind."""
        payloads = self.payloads()
        assert {payload["t"] for payload in payloads} <= {kind}
        return payloads


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
