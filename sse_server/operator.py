"""What the command line asks of the database: sending, sessions, statistics, the doctor's facts."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sse_server.database import Database, load_queries
from sse_server.errors import DatabaseError

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Session:
    """A valid session, without its key. Times are milliseconds since 1970."""

    id: int
    user_id: str
    created_ms: int
    expires_ms: int
    streams_opened: int


@dataclass(frozen=True, slots=True)
class Totals:
    """What there is now.

    Attributes:
        notifications: All rows, as the planner estimates them.
        polling: Whether feeds poll at the moment.
        queue_usage: Of the queue of NOTIFY, 0 to 1.
        oldest_transaction_seconds: Of those this role may see; `None` if there is none.
    """

    notifications: int
    unread: int
    sessions: int
    users_with_session: int
    services: int
    feed_mode: str
    polling: bool
    retention_days: int
    user_rate_per_minute: int
    queue_usage: float
    feeds: int
    oldest_transaction_seconds: float | None


@dataclass(frozen=True, slots=True)
class Day:
    """Rows of one type written on one day (UTC, ``2026-11-22``) that still exist."""

    day: str
    event_type: str
    notifications: int
    unread: int


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes on disk of a table (with its indexes) or of one index, which is `of` a table."""

    name: str
    of: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Server:
    """What the doctor asks of PostgreSQL itself.

    Attributes:
        standby: It cannot be written to.
        clock: Its time, in seconds since 1970.
        queue_usage: Of the queue of NOTIFY, 0 to 1.
        connections: Of clients, now.
        allowed: Most for roles without special rights.
        database_limit: Most for this database; `None` is no limit.
        role_limit: Most for this role.
        autovacuum: Whether it runs at all.
        frozen_age: Transactions since the oldest that is not frozen.
        sees_all: Whether this role may see other roles' transactions.
    """

    standby: bool
    clock: float
    queue_usage: float
    connections: int
    allowed: int
    database_limit: int | None
    role_limit: int | None
    autovacuum: bool
    frozen_age: int
    sees_all: bool


@dataclass(frozen=True, slots=True)
class Transaction:
    """An open transaction; `wrote` if it has a transaction id."""

    pid: int
    role: str
    application: str
    state: str
    seconds: float
    wrote: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared transaction that nobody has finished."""

    gid: str
    role: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Slot:
    """A replication slot that nobody uses, and how many bytes of WAL it keeps."""

    name: str
    kind: str
    wal_bytes: int | None


@dataclass(frozen=True, slots=True)
class Trigger:
    """`state` is that of pg_trigger.tgenabled; `None` if the trigger is missing."""

    table: str
    name: str
    state: str | None


@dataclass(frozen=True, slots=True)
class Table:
    """How autovacuum keeps up with a table; `threshold` is the dead rows at which it begins."""

    name: str
    dead: int
    rows: int
    threshold: float
    vacuumed_seconds: float | None
    autovacuum: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """Rights of a role (or PUBLIC) that publishing does not need."""

    role: str
    table: str
    privileges: str


@dataclass(frozen=True, slots=True)
class Overdue:
    """Rows that retention should have deleted; of those looked at. `oldest_ms` since 1970."""

    rows: int
    retention_days: int
    oldest_ms: int | None


@dataclass(frozen=True, slots=True)
class Listening:
    """What came of LISTEN on one connection and NOTIFY on another.

    Attributes:
        same_backend: Whether two statements of one connection met the same backend, while another
            connection held one in a transaction.
        heard: Whether the notification arrived.
    """

    same_backend: bool
    heard: bool


class Operator:
    """The queries in ``operator.sql``. Every method may raise `DatabaseError`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._q = load_queries(_HERE / "operator.sql")

    # Sending

    async def notify_users(
        self, user_ids: Sequence[str], *, event_type: str, message: str, link: str | None
    ) -> list[tuple[str, str, int | None]]:
        """Returns: (user_id, outcome, id) for each distinct recipient; all in one transaction."""
        rows = await self.database.fetch(
            self._q["notify_users"],
            {
                "user_ids": list(user_ids),
                "event_type": event_type,
                "message": message,
                "link": link,
            },
            # Sent or not, nobody would know: a second try could send twice.
            retry=False,
        )
        return [(row[0], row[1], row[2]) for row in rows]

    # Sessions

    async def sessions(self, user_id: str | None, limit: int) -> list[Session]:
        """Valid ones, the newest first."""
        query = self._q["sessions"]
        rows = await self.database.fetch(query, {"user_id": user_id, "limit": limit})
        return [Session(*row) for row in rows]

    async def end_sessions(
        self, user_ids: Sequence[str], ids: Sequence[int]
    ) -> list[tuple[int, str]]:
        """End all of these users, and these; every node is told. Returns: (id, user_id)."""
        rows = await self.database.fetch(
            self._q["end_sessions"], {"user_ids": list(user_ids), "ids": list(ids)}, retry=False
        )
        return [(row[0], row[1]) for row in rows]

    # Statistics

    async def totals(self) -> Totals:
        rows = await self.database.fetch(self._q["stats_totals"])
        if not rows:
            raise DatabaseError("the table settings has no row")
        return Totals(*rows[0])

    async def days(self, days: int) -> list[Day]:
        """Of the last days, today included."""
        rows = await self.database.fetch(self._q["stats_days"], {"days": days})
        return [Day(*row) for row in rows]

    async def sizes(self) -> list[Size]:
        """Each table, followed by its indexes."""
        return [Size(*row) for row in await self.database.fetch(self._q["stats_sizes"])]

    # The doctor's facts

    async def server(self) -> Server:
        return Server(*await self.database.fetch_one(self._q["doctor_server"]))

    async def transactions(self, seconds: float) -> list[Transaction]:
        """Those that are open for longer and hold rows back, the oldest first."""
        rows = await self.database.fetch(self._q["doctor_transactions"], {"seconds": seconds})
        return [Transaction(*row) for row in rows]

    async def prepared(self, seconds: float) -> list[Prepared]:
        rows = await self.database.fetch(self._q["doctor_prepared"], {"seconds": seconds})
        return [Prepared(*row) for row in rows]

    async def slots(self) -> list[Slot]:
        return [Slot(*row) for row in await self.database.fetch(self._q["doctor_slots"])]

    async def triggers(self) -> list[Trigger]:
        """Those that there should be."""
        return [Trigger(*row) for row in await self.database.fetch(self._q["doctor_triggers"])]

    async def settings_rows(self) -> int:
        """One, or something is wrong."""
        return int((await self.database.fetch_one(self._q["doctor_settings"]))[0])

    async def tables(self) -> list[Table]:
        return [Table(*row) for row in await self.database.fetch(self._q["doctor_tables"])]

    async def grants(self) -> list[Grant]:
        return [Grant(*row) for row in await self.database.fetch(self._q["doctor_grants"])]

    async def overdue(self, limit: int) -> Overdue | None:
        """Among so many rows with the smallest ids."""
        rows = await self.database.fetch(self._q["doctor_retention"], {"limit": limit})
        return Overdue(*rows[0]) if rows else None

    async def listening(self, seconds: float) -> Listening:
        """Try what every feed depends on: LISTEN here, NOTIFY there.

        Through a pooler that gives each transaction another connection, the second statement of a
        client meets another backend as soon as somebody holds the first; and nobody hears.
        """
        channel = f"sse_doctor_{secrets.token_hex(8)}"
        listener = await self.database.connect_to_listen("sse-server doctor")
        try:
            pid = "SELECT pg_backend_pid()"
            before = await listener.fetch(pid)
            await listener.fetch(f'LISTEN "{channel}"')
            other = await self.database.connect("sse-server doctor")
            try:
                await other.fetch("BEGIN")
                await other.fetch("SELECT pg_notify(%s, '')", [channel])
                after = await listener.fetch(pid)
                await other.fetch("COMMIT")
            finally:
                other.close()
            heard = asyncio.create_task(listener.notified(), name="doctor listens")
            await asyncio.wait({heard}, timeout=seconds)
            arrived = heard.done()
        finally:
            listener.close()
        heard.cancel()
        await asyncio.wait({heard})
        if not heard.cancelled():
            heard.exception()
        return Listening(before == after, arrived)
