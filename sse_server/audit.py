"""The audit trail: who did what, to whom, when, and what came of it.

Two places, each for what it is good at:

* The logger ``sse_server.audit`` has one line of JSON for each event, on the node where it
  happened. Notifications that are inserted by SQL happen on no node; they are in the database
  alone.
* The view ``audit_trail`` in the database has everything: the notifications themselves (who wrote
  which to whom, and when) and the table ``audit_log`` for all the rest.

Never the text of a message, never a key, a token or a cookie.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from aiohttp import web

from sse_server.errors import DatabaseError
from sse_server.logs import JSON_MESSAGE
from sse_server.store import AuditRow, Store
from sse_server.tasks import Batcher

logger = logging.getLogger(__name__)

# Rows in one statement, and rows that may wait for the database: while it is away, or under a
# flood, there are lines only.
BATCH_ROWS = 500
MOST_WAITING = 10_000

# Lines between which other tasks have their turn.
_LINES_AT_ONCE = 200

# What others say about themselves may be as long as they like; the trail is not.
_MOST_CHARACTERS = 255


def _clean(value: object) -> object:
    """`value` as JSON that PostgreSQL can store: no NUL, no lone surrogate, nothing endless."""
    if isinstance(value, str):
        text = value[:_MOST_CHARACTERS].replace("\0", "\ufffd")
        return text.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {str(_clean(str(key))): _clean(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_clean(item) for item in value]
    return _clean(str(value))


def line(members: dict[str, object]) -> None:
    """Write one line to the log; members that are `None` are left out."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    present = {name: value for name, value in members.items() if value is not None}
    # In ASCII: nothing in a user's id may look like a line or a terminal's control sequence.
    logger.info("%s", json.dumps({"at": at, **present}), extra={JSON_MESSAGE: "audit"})


class Audit:
    """Writes the audit trail of one process."""

    def __init__(self, store: Store) -> None:
        self._rows: Batcher[AuditRow, None] = Batcher(
            "audit", self._insert, size=BATCH_ROWS, concurrency=1
        )
        self._store = store
        self._waiting: set[asyncio.Future[None]] = set()

    async def record(
        self,
        action: str,
        *,
        actor: str,
        outcome: str,
        user_id: str | None = None,
        event_type: str | None = None,
        **detail: object,
    ) -> None:
        """Write one line and one row; returns when the row is stored.

        Never fails: what is audited goes on if the database is away, and the line is written first.
        Those that come together are one INSERT.

        Args:
            action: What was tried: ``sign_in``, ``sign_out``, ``publish``, …
            actor: Who did it: ``service:NAME``, ``role:NAME``, ``user:ID``, ``address:IP``.
            outcome: ``ok``, or the slug of the refusal.
            user_id: To whom, or about whom.
            event_type: Of the notification.
            detail: What else is worth knowing; JSON values.
        """
        future = self._note(action, actor, outcome, user_id, event_type, detail)
        if future is not None:
            await asyncio.wait({future})

    def note(
        self,
        action: str,
        *,
        actor: str,
        outcome: str,
        user_id: str | None = None,
        event_type: str | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> None:
        """`record()` without waiting for the row."""
        self._note(action, actor, outcome, user_id, event_type, detail or {})

    def _note(
        self,
        action: str,
        actor: str,
        outcome: str,
        user_id: str | None,
        event_type: str | None,
        detail: Mapping[str, object],
    ) -> asyncio.Future[None] | None:
        def text(value: str) -> str:
            return str(_clean(value))

        row = AuditRow(
            text(actor),
            text(action),
            None if user_id is None else text(user_id),
            None if event_type is None else text(event_type),
            text(outcome),
            json.dumps(_clean(detail)),
        )
        line(
            {
                "action": row.action,
                "actor": row.actor,
                "user_id": row.user_id,
                "event_type": row.event_type,
                "outcome": row.outcome,
                **json.loads(row.detail),
            }
        )
        if len(self._waiting) >= MOST_WAITING:
            return None
        future = self._rows.ask(row)
        self._waiting.add(future)
        future.add_done_callback(self._written)
        return future

    def _written(self, future: asyncio.Future[None]) -> None:
        self._waiting.discard(future)
        if not future.cancelled():
            future.exception()  # _insert() has told; here it only counts as seen

    async def _insert(self, rows: list[AuditRow]) -> Sequence[None]:
        try:
            await self._store.insert_audit(rows)
        except DatabaseError as exc:
            logger.warning("%d audit records are in the log only: %s", len(rows), exc)
        return [None] * len(rows)

    async def sent(
        self, actor: str, event_type: str, results: Iterable[tuple[str, str, int | None]]
    ) -> None:
        """Write a line for each (user_id, outcome, id); their rows are in the database already."""
        if not logger.isEnabledFor(logging.INFO):
            return
        for number, (user_id, outcome, id) in enumerate(results, 1):
            line(
                {
                    "action": "send",
                    "actor": actor,
                    "user_id": user_id,
                    "event_type": event_type,
                    "notification_id": id,
                    "outcome": outcome,
                }
            )
            if number % _LINES_AT_ONCE == 0:
                await asyncio.sleep(0)

    async def close(self) -> None:
        """Let the database have what waits, if it answers soon, and stop."""
        if self._waiting:
            await asyncio.wait(set(self._waiting), timeout=2.0)
        await self._rows.close()


AUDIT = web.AppKey("audit", Audit)
