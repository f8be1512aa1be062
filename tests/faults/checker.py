"""What each client got, against what the table says it should have."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.faults.clients import Client, Record
from tests.faults.nodes import Node
from tests.faults.writers import UNANNOUNCED

TRUTH = """
    SELECT id, user_id, message, xact::text::bigint, horizon::text::bigint, read_at IS NOT NULL,
           extract(epoch FROM coalesce(pg_xact_commit_timestamp(xact::text::bigint::text::xid),
                                       created_at))::float8
      FROM notifications
"""

# A transaction is visible a little later than the time that its commit bears.
COMMIT_SLACK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """One committed notification. `committed_at` is seconds since 1970."""

    id: int
    user_id: str
    message: str
    xact: int
    horizon: int
    read: bool
    committed_at: float

    @property
    def announced(self) -> bool:
        return not self.message.startswith(UNANNOUNCED)

    def __str__(self) -> str:
        return (
            f"id {self.id} xact {self.xact} horizon {self.horizon} "
            f"committed {self.committed_at % 1000:.3f}{' read' if self.read else ''}"
            f"{'' if self.announced else ' unannounced'}"
        )


class Truth:
    """The table at the end."""

    def __init__(self, rows: Iterable[tuple[object, ...]]) -> None:
        self.rows: dict[int, Row] = {}
        self.of_user: dict[str, list[Row]] = collections.defaultdict(list)
        for values in rows:
            row = Row(*values)  # type: ignore[arg-type]
            self.rows[row.id] = row
            self.of_user[row.user_id].append(row)

    def due(self, user_id: str) -> set[int]:
        """What every client of the user must have: its rows that are still unread.

        One that has been marked read may have been so before it could be sent, and then is not.
        """
        return {row.id for row in self.of_user[user_id] if not row.read}

    def unread(self, user_id: str) -> int:
        return len(self.due(user_id))


@dataclass(slots=True)
class Problems:
    """What is wrong, by kind: sentences."""

    found: dict[str, list[str]] = field(default_factory=lambda: collections.defaultdict(list))

    def add(self, kind: str, sentence: str) -> None:
        self.found[kind].append(sentence)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        lines = []
        for kind, sentences in self.found.items():
            lines.append(f"{kind}: {len(sentences)}")
            lines += [f"  {sentence}" for sentence in sentences[:20]]
        return "\n".join(lines)


def missing(client: Client, truth: Truth) -> set[int]:
    """What the client should have and has not.

    A row that was written with the triggers switched off is found by a sweep. If one that was
    written after it is announced before that, and the client's connection breaks in between, it
    comes back with a cursor that covers the first: that much is not promised for such rows.
    """
    lost = truth.due(client.user_id) - client.had
    if not lost:
        return lost
    covered = max((truth.rows[id].horizon for id in client.had if id in truth.rows), default=0)
    return {id for id in lost if truth.rows[id].announced or truth.rows[id].xact >= covered}


def check(
    clients: Sequence[Client],
    nodes: Sequence[Node],
    truth: Truth,
    *,
    crashes: Sequence[float],
) -> Problems:
    """All that must hold at the end.

    Args:
        crashes: When the database crashed; transaction ids may have been used again then, and a
            node that sees that replays everything.
    """
    problems = Problems()
    for client in clients:
        for id in sorted(missing(client, truth)):
            problems.add("missing", f"{client.name}: {truth.rows[id]}")
        for sentence in _uncovered(client, truth):
            problems.add("uncovered", sentence)
        for sentence in client.foreign:
            problems.add("foreign", f"{client.name}: {sentence}")
        for id, message in client.messages.items():
            row = truth.rows.get(id)
            if row is None:
                problems.add("foreign", f"{client.name}: {id} was never committed")
            elif row.user_id != client.user_id:
                problems.add("foreign", f"{client.name}: {id} is {row.user_id}'s")
            elif row.message != message:
                problems.add("foreign", f"{client.name}: {id} says {message!r}")
        for record in client.records:
            for sentence in _disorder(record, truth):
                problems.add("order", f"{client.name}: {sentence}")
            crashed = any(
                record.opened_at <= at <= (record.closed_at or at) + 0.001 for at in crashes
            )
            if not crashed:
                for sentence in _repeats(record):
                    problems.add("repeated", f"{client.name}: {sentence}")
        for record in client.left_open:
            problems.add(
                "not superseded",
                f"{client.name}: connection {record.number} to node {record.node} is still open",
            )
        if client.sign_ins > 1 + client.sign_outs:
            problems.add(
                "signed out",
                f"{client.name}: {client.sign_ins} sign-ins, {client.sign_outs} sign-outs",
            )
    for node in nodes:
        for sentence in node.died:
            problems.add("died", f"node {node.number}: {sentence}")
        for sentence in node.alarms():
            problems.add("alarms", f"node {node.number}: {sentence}")
    return problems


def _uncovered(client: Client, truth: Truth) -> list[str]:
    """Rows that were received before one that they cover.

    Whoever comes back with such a row's id would never be sent the other one, whether or not the
    connection really broke at that moment.
    """
    due = truth.due(client.user_id)
    oldest_first = iter(sorted((truth.rows[id].xact, id) for id in due if truth.rows[id].announced))
    had: set[int] = set()
    oldest = next(oldest_first, None)
    found = []
    for id in client.received:
        had.add(id)
        while oldest is not None and oldest[1] in had:
            oldest = next(oldest_first, None)
        row = truth.rows.get(id)
        if row is not None and oldest is not None and oldest[0] < row.horizon:
            found.append(f"{client.name}: {row}, before {truth.rows[oldest[1]]}")
    return found


def _disorder(record: Record, truth: Truth) -> list[str]:
    """Ids that came too late in a replay, though they were committed before it began."""
    found = []
    greatest = 0
    for id in record.ids[: record.ready_at]:
        row = truth.rows.get(id)
        if (
            row is not None
            and id < greatest
            and row.committed_at < record.opened_at - COMMIT_SLACK_SECONDS
        ):
            found.append(f"connection {record.number}: {row}, after {greatest}")
        greatest = max(greatest, id)
    return found


def _repeats(record: Record) -> list[str]:
    counts = collections.Counter(record.ids)
    return [
        f"connection {record.number} to node {record.node}: {id} came {count} times"
        for id, count in counts.items()
        if count > 1
    ]
