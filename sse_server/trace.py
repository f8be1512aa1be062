"""What was dispatched here lately, so that an operator can be told the way of one notification.

Ids and counts only, in rings of a fixed length. Writing is all that has to be cheap: it is once for
each notification, in the fan-out. Whoever asks looks through all of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# Notifications that met streams, and writes of replays: about 1 MB each when full.
PUBLISHED = 8192
REPLAYED = 16_384


@dataclass(frozen=True, slots=True)
class Seen:
    """What happened to one notification in this process.

    Attributes:
        at: When the feed brought it to streams of its user, in seconds since 1970; `None` if only
            replays had it.
        written: Streams that it was written to live.
        waiting: Streams that were replaying, or became slow: they were to find it in the table.
        replayed: Streams that found it there.
    """

    at: float | None
    written: int
    waiting: int
    replayed: int


class Trace:
    """The notifications that passed lately.

    Attributes:
        replayed: To be called with the id of a notification that a replay writes to a stream.
    """

    __slots__ = ("_published", "_replayed", "replayed")

    def __init__(self, published: int = PUBLISHED, replayed: int = REPLAYED) -> None:
        self._published: deque[tuple[int, int, int, float]] = deque(maxlen=published)
        self._replayed: deque[int] = deque(maxlen=replayed)
        self.replayed: Callable[[int], None] = self._replayed.append

    def published(self, id: int, written: int, waiting: int) -> None:
        """A notification met the streams of its user."""
        self._published.append((id, written, waiting, time.time()))

    def find(self, id: int) -> Seen | None:
        """What is known of it; `None` if it was not here, or too long ago."""
        met = [entry for entry in self._published if entry[0] == id]
        replayed = self._replayed.count(id)
        if not met and not replayed:
            return None
        return Seen(
            met[0][3] if met else None,
            sum(entry[1] for entry in met),
            sum(entry[2] for entry in met),
            replayed,
        )
