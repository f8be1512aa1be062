"""Housekeeping: what has had its time is deleted, in small steps that nobody notices.

Each step is a transaction of its own, and there is a pause after it: a step that deletes 500
rows takes some milliseconds, and an INSERT never waits for it (a DELETE locks only the rows that it
deletes). A database that is away is no reason to stop; what is left is deleted later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial

from sse_server.errors import DatabaseError
from sse_server.metrics import Metrics
from sse_server.store import Store

logger = logging.getLogger(__name__)

# Rows in one step, and the pause after it in seconds.
BATCH_ROWS = 500
PAUSE_SECONDS = 0.1

# How often, in seconds, each ± 10 %, so that the nodes of a cluster do not all come at once.
EXPIRED_SECONDS = 60.0
OLD_SECONDS = 3600.0

# created_at follows id closely, but for rows that were restored or written by a clock that was
# wrong. So a walk goes on for some pages in which nothing is old.
YOUNG_PAGES = 10


class Retention:
    """Deletes sessions and tokens that have expired, answers to idempotency keys after 24 hours,
    notifications and audit records after ``settings.retention_days``. One per process."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics | None = None,
        *,
        batch_rows: int = BATCH_ROWS,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        self._store = store
        self._metrics = metrics or Metrics()
        self._batch_rows = batch_rows
        self._pause_seconds = pause_seconds

    async def run(self) -> None:
        """Clean up, for ever."""
        # A process that lives for less than an hour does its share too.
        old_due = time.monotonic() + random.uniform(0, OLD_SECONDS / 6)
        while True:
            await asyncio.sleep(EXPIRED_SECONDS * random.uniform(0.9, 1.1))
            await self.delete_expired()
            if time.monotonic() >= old_due:
                old_due = time.monotonic() + OLD_SECONDS * random.uniform(0.9, 1.1)
                await self.delete_old()

    async def delete_expired(self) -> None:
        """What has an end of its own: sessions, tokens, answers to idempotency keys."""
        store = self._store
        await self._attempt(
            "expired sessions", "sessions", partial(self._repeated, store.delete_expired_sessions)
        )
        await self._attempt(
            "idempotency keys",
            "publications",
            partial(self._repeated, partial(store.delete_old_publications, self._batch_rows)),
        )

    async def delete_old(self) -> None:
        """What is older than ``settings.retention_days``: notifications and audit records."""
        await self._attempt(
            "old notifications", "notifications", partial(self._walk, "notifications")
        )
        await self._attempt("old audit records", "audit", partial(self._walk, "audit"))

    async def _attempt(
        self, name: str, what: str, work: Callable[[], Awaitable[int | None]]
    ) -> None:
        started = time.monotonic()
        try:
            deleted = await work()
        except DatabaseError as exc:
            logger.warning("%s are left for later: %s", name, exc)
            return
        if deleted is None:  # the other process will count it
            return
        metrics = self._metrics
        metrics.retention_deleted.labels(what).inc(deleted)
        metrics.retention_run_at.labels(what).set_to_current_time()
        metrics.retention_seconds.labels(what).set(time.monotonic() - started)
        if deleted:
            logger.info("%s: %d deleted", name, deleted)

    async def _walk(self, what: str) -> int | None:
        """Delete what is old, from the smallest id on, until nothing is.

        Returns: How many; `None` if another process is at it and there was nothing to do here.
        """
        after = deleted = young = 0
        while young < YOUNG_PAGES:
            page = await self._store.delete_old(what, after=after, limit=self._batch_rows)
            deleted += page.deleted
            if page.last_id is None:  # the end, or another process is at it
                return deleted if page.mine or deleted else None
            after = page.last_id
            young = 0 if page.old else young + 1
            await asyncio.sleep(self._pause_seconds)
        return deleted

    async def _repeated(self, step: Callable[[], Awaitable[int]]) -> int:
        """Repeat a step until it finds nothing more."""
        deleted = 0
        while count := await step():
            deleted += count
            await asyncio.sleep(self._pause_seconds)
        return deleted
