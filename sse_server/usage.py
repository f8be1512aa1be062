"""Limits that hold for all processes together: each tells the others what its callers have used.

Over the channel of the feeds, so that nothing is written and no call waits for it. What a process
does not know yet it cannot refuse: a caller who spreads a burst over several processes within a few
hundredths of a second gets more than the limit once, and then has to wait all the longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from sse_server.errors import DatabaseError
from sse_server.limits import Limits
from sse_server.store import Store

logger = logging.getLogger(__name__)

# Limits
MOST_KEYS = 5000  # told of at once, of one limit: those who used most
PAYLOAD_BYTES = 7500  # PostgreSQL takes 7,999

# Timeouts
SHARE_SECONDS = 0.5
LEAST_SECONDS = 0.02  # between two, however urgent it is

Used = tuple[str, int, float]  # key, how many, rate


class Usage:
    """Payloads are ``{"t": "usage", "n": process, "l": limit, "u": [Used, ...]}``."""

    KIND = "usage"

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        # NOTIFY brings to a process what it has said itself.
        self._process = secrets.token_hex(4)

    async def run(self) -> None:
        """Tell, for ever: twice a second, sooner if a limit is used up quickly."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SHARE_SECONDS):
                    await self._limits.urgent.wait()
            self._limits.urgent.clear()
            await self.share()
            await asyncio.sleep(LEAST_SECONDS)

    async def share(self) -> None:
        """Tell of everything that is untold."""
        payloads = [
            payload
            for name, limit in self._limits.by_name.items()
            for payload in self._payloads(name, limit.untold())
        ]
        if not payloads:
            return
        try:
            await self._store.share_usage(payloads)
        except DatabaseError as exc:
            # It is forgotten. Without the database the others let nobody in either.
            logger.info("limits: the other processes could not be told: %s", exc)

    async def heard(self, message: dict[str, Any]) -> None:
        """Count what another process tells of."""
        limit = self._limits.by_name.get(message["l"])  # a newer version may have others
        if limit is None or message["n"] == self._process:
            return
        for key, count, rate in message["u"]:
            await limit.heard(key, count, rate)

    def _payloads(self, name: str, used: list[Used]) -> Iterator[str]:
        if len(used) > MOST_KEYS:
            used = heapq.nlargest(MOST_KEYS, used, key=lambda entry: entry[1])
        head = f'{{"t":"{self.KIND}","n":"{self._process}","l":"{name}","u":['
        for entries in _parts(used):
            yield f"{head}{','.join(entries)}]}}"


def _parts(used: Iterable[Used]) -> Iterator[list[str]]:
    """JSON of the entries, in parts that each fit into a payload."""
    part: list[str] = []
    size = 0
    for entry in used:
        text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        length = len(text.encode()) + 1
        if part and size + length > PAYLOAD_BYTES:
            yield part
            part, size = [], 0
        part.append(text)
        size += length
    if part:
        yield part
