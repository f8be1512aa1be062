"""Every query of the service, and the way from rows to notifications."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sse_server.database import Connection, Database, Row, load_queries
from sse_server.errors import ConfigurationError
from sse_server.events import MAX_ID, Content, Notification
from sse_server.sanitize import plain_text, safe_link
from sse_server.snapshot import Snapshot

_HERE = Path(__file__).parent

# Longest that a NOTIFY may take to arrive at the start. It takes milliseconds, or it never comes.
LISTEN_SECONDS = 5.0


def schema_sql() -> str:
    """The text of schema.sql: in the package once installed, else at the top of the checkout."""
    for path in (_HERE / "schema.sql", _HERE.parent / "schema.sql"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ConfigurationError("schema.sql is missing from this installation.")


def schema_version() -> str:
    """What the database remembers of the schema.sql that was applied last."""
    return hashlib.sha256(schema_sql().encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session that is valid now. Times are milliseconds since 1970."""

    id: int
    user_id: str
    data: dict[str, Any]
    created_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to be the one stream of a session, unless a higher number is claimed later.

    Attributes:
        number: `None` is a refusal: the user has as many streams as one may.
        seconds_left: Until the session expires; `None` if refused.
    """

    session_id: int
    user_id: str
    number: int | None
    seconds_left: float | None


@dataclass(slots=True)
class Position:
    """Where a replay stands: what `base` shows has been sent, what `snapshot` shows is due.

    Attributes:
        user_id: Whose rows.
        cursor: The id that the client came with, in the first pass of a stream; the base is then
            that row's horizon.
        base: What has been sent; `None` without a cursor is nothing at all.
        snapshot: That of the running pass; `None` before its first page takes one.
        after_id: Last id of the previous page of the pass.
        counted: Whether the page should come with the count of unread rows.
    """

    user_id: str
    cursor: int | None = None
    base: Snapshot | None = None
    snapshot: Snapshot | None = None
    after_id: int = 0
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a replay.

    Attributes:
        known: False if the cursor was unknown; the rows then are all unread ones.
        snapshot: To be given for the next page of the same pass; the base of the next pass. Not
            the one that was given, if that was another cluster's; the pass is to start over then.
        unread_count: `None` unless asked for.
        full: Whether there may be another page.
    """

    known: bool
    snapshot: Snapshot
    unread_count: int | None
    notifications: list[Notification]
    full: bool


@dataclass(frozen=True, slots=True)
class Newest:
    """The row with the greatest xact that could be seen. `None` instead: there was no row."""

    id: int
    xact: int


@dataclass(frozen=True, slots=True)
class Start:
    """What a feed finds when it starts to listen.

    Attributes:
        snapshot: Every row that it does not show will be announced.
        newest: The row with the greatest xact that it shows.
        same: Whether the row that was asked for is still there.
    """

    snapshot: Snapshot
    newest: Newest | None
    same: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """One page of a sweep: (id, user_id, xact) of each row, oldest transaction first."""

    snapshot: Snapshot
    rows: list[tuple[int, str, int]]
    newest: Newest | None


@dataclass(frozen=True, slots=True)
class Preference:
    event_type: str
    description: str
    enabled: bool
    required: bool

    def as_json(self) -> dict[str, object]:
        return {
            "event_type": self.event_type,
            "description": self.description,
            "enabled": self.enabled,
            "required": self.required,
        }


@dataclass(frozen=True, slots=True)
class Publication:
    """What a service wants to be sent, checked. `idempotency_key` may be `None`."""

    user_ids: Sequence[str]
    event_type: str
    message: str
    link: str | None
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """What publish_as_service() in schema.sql has answered.

    Attributes:
        outcome: ``published``, ``repeated``, ``conflict``, ``unknown_event_type``, ``unknown_key``
            or ``revoked_key``.
        service: Whose key it is; `None` for an unknown one.
        rate_per_minute: Its limit.
        results: ``[user_id, outcome, id]`` for each distinct recipient; the known event types if
            this one is not.
    """

    outcome: str
    service: str | None
    rate_per_minute: int | None
    results: list[Any] | None


@dataclass(frozen=True, slots=True)
class Service:
    """A publisher. Times are milliseconds since 1970; `revoked_ms` is `None` for a valid one."""

    name: str
    rate_per_minute: int
    created_ms: int
    revoked_ms: int | None


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One row for the table ``audit_log``. `detail` is JSON."""

    actor: str
    action: str
    user_id: str | None
    event_type: str | None
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True)
class Walked:
    """One page of a walk along a table's primary key.

    Attributes:
        mine: False if another process is at it.
        rows: How many rows were looked at.
        last_id: Of them; `None` if there was none.
        old: How many of them were old enough to go.
        deleted: How many did; the others are locked by somebody.
    """

    mine: bool
    rows: int
    last_id: int | None
    old: int
    deleted: int


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line of the audit trail. Times are milliseconds since 1970."""

    at_ms: int
    actor: str
    action: str
    user_id: str | None
    event_type: str | None
    notification_id: int | None
    outcome: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExplainedRow:
    """A notification without its text. Times are milliseconds since 1970."""

    user_id: str
    event_type: str
    actor: str
    created_ms: int
    read_ms: int | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The audit record of a notification that was not written."""

    at_ms: int
    actor: str
    user_id: str | None
    event_type: str | None
    outcome: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Explained:
    """What the database knows of an id.

    Attributes:
        state: ``committed``; ``suppressed`` or ``rate_limited`` by the audit trail; ``deleted`` if
            all rows there are came later; ``not_committed`` if only some did; ``not_given_out``.
    """

    state: str
    row: ExplainedRow | None
    refused: Refusal | None


class Store:
    """The queries, over a pool. Every method may raise `DatabaseError` or its subclass
    `DatabaseUnavailable`."""

    def __init__(self, database: Database, *, link_hosts: frozenset[str] = frozenset()) -> None:
        self.database = database
        self._q = load_queries(_HERE / "queries.sql")
        self._link_hosts = link_hosts
        # A message to many recipients, or replayed by many of them, is sanitised and encoded once.
        self.content = functools.lru_cache(maxsize=4096)(self._content)

    def _content(self, event_type: str, message: str, link: str | None) -> Content:
        return Content.of(event_type, plain_text(message), safe_link(link, self._link_hosts))

    def _on(self, connection: Connection | None) -> Callable[..., Awaitable[list[Row]]]:
        return self.database.fetch if connection is None else connection.fetch

    # Schema

    async def apply_schema(self) -> None:
        """Bring the schema up to date, unless this very version has been applied before.

        Several processes may do so at once.
        """
        version = schema_version()
        if await self.applied_schema() == version:
            # Without a single lock: a rolling restart must not wait for anybody's transaction.
            return
        head, commit, _ = schema_sql().rpartition("COMMIT;")
        await self.database.execute_script(
            f"{head}COMMENT ON TABLE settings IS '{version}';\n{commit}"
        )

    async def applied_schema(self) -> str | None:
        """The version that was applied last; `None` if there is no schema."""
        version = (await self.database.fetch_one(self._q["schema_version"]))[0]
        return None if version is None else str(version)

    async def ping(self) -> None:
        """Raise unless the database answers."""
        await self.database.fetch("SELECT 1")

    # Sessions

    async def session_by_key(self, key_hash: bytes) -> SessionRow | None:
        rows = await self.database.fetch(self._q["session_by_key"], {"key_hash": key_hash})
        return SessionRow(*rows[0]) if rows else None

    async def insert_session(
        self,
        key_hash: bytes,
        user_id: str,
        data: Mapping[str, Any],
        seconds: float,
        *,
        old_key_hash: bytes | None = None,
        token_hash: bytes | None = None,
        token_expires: float | None = None,
    ) -> SessionRow | None:
        """Start a session, end another, and use up a token: all of it, or nothing.

        Args:
            key_hash: Of a fresh random key.
            user_id: Whose it is.
            data: What else the session holds.
            seconds: How long it lasts.
            old_key_hash: Of the session that this one replaces, if any.
            token_hash: By which the token is known again, if there is one.
            token_expires: When it expires, in seconds since 1970.

        Returns: The session; `None` if the token has been used before.
        """
        rows = await self.database.fetch(
            self._q["insert_session"],
            {
                "key_hash": key_hash,
                "user_id": user_id,
                "data": json.dumps(data),
                "seconds": seconds,
                "old_key_hash": old_key_hash,
                "token_hash": token_hash,
                "token_expires": token_expires,
            },
        )
        if not rows:
            # Used, or by ourselves: the statement is run again when its answer was lost on the way.
            return await self.session_by_key(key_hash)
        return SessionRow(*rows[0])

    async def update_session(self, key_hash: bytes, user_id: str, data: Mapping[str, Any]) -> None:
        await self.database.fetch(
            self._q["update_session"],
            {"key_hash": key_hash, "user_id": user_id, "data": json.dumps(data)},
        )

    async def delete_session(self, key_hash: bytes) -> None:
        await self.database.fetch(self._q["delete_session"], {"key_hash": key_hash})

    async def claim_streams(
        self, key_hashes: Sequence[bytes], *, most: int, seconds: float
    ) -> list[Claim | None]:
        """Make each session's next stream the one that counts; the others are told by NOTIFY.

        Args:
            key_hashes: Of the sessions, in the order in which they asked.
            most: Streams that a user may have, on all nodes together.
            seconds: The longest that a stream lasts.

        Returns: One for each key, in order; `None` where there is no valid session.
        """
        counts: dict[bytes, int] = {}
        for key_hash in key_hashes:
            counts[key_hash] = counts.get(key_hash, 0) + 1
        rows = await self.database.fetch(
            self._q["claim_streams"],
            {
                "key_hashes": list(counts),
                "counts": list(counts.values()),
                "most": most,
                "seconds": seconds,
            },
        )
        found = {bytes(row[0]): row for row in rows}
        claims: list[Claim | None] = []
        for key_hash in key_hashes:
            row = found.get(key_hash)
            if row is None:
                claims.append(None)
                continue
            counts[key_hash] -= 1
            number = None if row[3] is None else row[3] - counts[key_hash]
            claims.append(Claim(row[1], row[2], number, row[4]))
        return claims

    async def release_streams(self, ended: Sequence[tuple[int, int]]) -> None:
        """Streams that have ended, as (session, number), are no more their users' open ones."""
        ids, numbers = zip(*ended, strict=True)
        await self.database.fetch(
            self._q["release_streams"], {"ids": list(ids), "numbers": list(numbers)}
        )

    async def check_sessions(
        self, ids: Sequence[int], *, connection: Connection | None = None
    ) -> dict[int, tuple[float, int]]:
        """Returns: seconds left and newest stream of those that are still valid."""
        rows = await self._on(connection)(self._q["check_sessions"], {"ids": list(ids)})
        return {row[0]: (row[1], row[2]) for row in rows}

    async def delete_expired_sessions(self) -> int:
        """Delete a batch of expired sessions, and of used tokens that have expired as well.

        Returns: How many, of that of which there were more; 0 when there are no more.
        """
        return int((await self.database.fetch_one(self._q["delete_expired_sessions"]))[0])

    # Replay

    async def replay(self, positions: Sequence[Position], limit: int) -> list[Page]:
        """One page for each position, all in one query."""
        rows = await self.database.fetch(
            self._q["replay"],
            {
                "n": list(range(len(positions))),
                "user_ids": [p.user_id for p in positions],
                "cursors": [p.cursor for p in positions],
                "bases": [p.base and p.base.text for p in positions],
                "snapshots": [p.snapshot and p.snapshot.text for p in positions],
                "after_ids": [p.after_id for p in positions],
                "counted": [p.counted for p in positions],
                "limit": limit,
            },
        )
        grouped: list[list[Row]] = [[] for _ in positions]
        for row in rows:
            grouped[row[0]].append(row)
        pages = []
        for position, group in zip(positions, grouped, strict=True):
            _, known, snapshot, unread_count, first_id, *_, newest_xact = group[0]
            notifications = (
                []
                if first_id is None
                else [
                    Notification(
                        row[4],
                        position.user_id,
                        self.content(row[5], row[6], row[7]),
                        row[8],
                        row[9],
                    )
                    for row in group
                ]
            )
            pages.append(
                Page(
                    known,
                    position.snapshot
                    if position.snapshot is not None and position.snapshot.text == snapshot
                    else Snapshot(snapshot).lasting(newest_xact),
                    unread_count,
                    notifications,
                    len(notifications) >= limit,
                )
            )
        return pages

    async def unread_counts(
        self, user_ids: Collection[str], *, connection: Connection | None = None
    ) -> dict[str, int]:
        rows = await self._on(connection)(self._q["unread_counts"], {"user_ids": list(user_ids)})
        return {row[0]: row[1] for row in rows}

    # Feed (on the feed's own connection)

    async def check_listen(self, connection: Connection) -> None:
        """Try whether what the pool notifies arrives at this connection.

        Behind a pooler in transaction mode LISTEN succeeds and nothing ever comes: it is executed
        on a server connection that is somebody else's a moment later. So this is found out by
        trying: on a channel that nobody else knows, notified by another connection, since one that
        notifies itself may be given its own words by chance.

        Raises:
            ConfigurationError: It does not, or the connection leads to another database.
            DatabaseError, DatabaseUnavailable: As connecting does.
        """
        channel = f"sse_trial_{secrets.token_hex(8)}"
        [(there,)] = await connection.fetch(self._q["channel"])
        await connection.fetch(f'LISTEN "{channel}"')
        here, _ = await self.database.fetch_one(self._q["notify"], {"channel": channel})
        if here != there:
            raise ConfigurationError(
                "SSE_LISTEN_DATABASE_URL leads to another database than DATABASE_URL: both must "
                "lead to the same one, and to the same schema in it."
            )
        try:
            # Nothing may be asked meanwhile: for that moment a pooler would pass on what has come.
            await asyncio.wait_for(connection.notified(), LISTEN_SECONDS)
        except TimeoutError:
            raise ConfigurationError(
                "NOTIFY does not arrive over DATABASE_URL, as through PgBouncer in transaction "
                "mode: set SSE_LISTEN_DATABASE_URL to a URL that leads straight to PostgreSQL."
                if self.database.listens_as_the_pool
                else "NOTIFY does not arrive over SSE_LISTEN_DATABASE_URL, as through PgBouncer in "
                "transaction mode: it must lead straight to PostgreSQL."
            ) from None
        await connection.fetch(f'UNLISTEN "{channel}"')

    async def feed_start(self, connection: Connection, newest: Newest | None = None) -> Start:
        """LISTEN, and set back rows that were restored from another cluster.

        Args:
            connection: The feed's own.
            newest: A row to look for, the newest that was seen over an earlier connection.
        """
        query = self._q["feed_start"]
        looked_for = {"id": newest and newest.id, "xact": newest and newest.xact}
        channel = (await connection.fetch(query, looked_for))[0][0]
        await connection.fetch(f'LISTEN "{channel}"')
        # Looked at again: what commits from LISTEN on is announced.
        _, _, snapshot, id, xact, same = (await connection.fetch(query, looked_for))[0]
        found = None if id is None else Newest(id, xact)
        return Start(Snapshot(snapshot).lasting(xact or 0), found, same)

    async def feed_mode(self, connection: Connection) -> tuple[str, bool, int]:
        """Returns: ``settings.feed_mode``, whether feeds are to poll now, and how many transactions
        wait to notify."""
        row = (await connection.fetch(self._q["feed_mode"]))[0]
        return row[0], row[1], row[2]

    async def feed_poll(self, connection: Connection, seconds: float) -> None:
        """For so long from now, let triggers be silent and all feeds poll."""
        await connection.fetch(self._q["feed_poll"], {"seconds": seconds})

    async def feed_notify(self, connection: Connection) -> None:
        """Let triggers notify again."""
        await connection.fetch(self._q["feed_notify"])

    async def feed_sweep(
        self,
        connection: Connection,
        *,
        base: Snapshot,
        snapshot: Snapshot | None,
        after: tuple[int, int],
        limit: int,
    ) -> Sweep:
        """One page of the rows of all users that `base` does not show, after (xact, id)."""
        rows = await connection.fetch(
            self._q["feed_sweep"],
            {
                "base": base.text,
                "snapshot": snapshot and snapshot.text,
                "after_xact": str(after[0]),
                "after_id": after[1],
                "limit": limit,
            },
        )
        found = [(row[1], row[2], row[3]) for row in rows if row[1] is not None]
        newest = None if rows[0][4] is None else Newest(rows[0][4], rows[0][5])
        return Sweep(snapshot or Snapshot(rows[0][0]), found, newest)

    async def notifications_by_id(
        self, ids: Iterable[int], *, connection: Connection | None = None
    ) -> list[Notification]:
        """Those that exist, in the order of `ids`."""
        rows = await self._on(connection)(self._q["notifications_by_id"], {"ids": list(ids)})
        return [
            Notification(row[0], row[1], self.content(row[2], row[3], row[4]), row[5], row[6])
            for row in rows
        ]

    # Reading

    async def history(
        self,
        user_id: str,
        *,
        limit: int,
        before: int | None = None,
        event_type: str | None = None,
        only_unread: bool = False,
    ) -> tuple[list[Notification], int]:
        """Newest first, with the number of all unread rows; both of the same moment."""
        rows = await self.database.fetch(
            self._q["history"],
            {
                "user_id": user_id,
                "before": before,
                "event_type": event_type,
                "only_unread": only_unread,
                "limit": limit,
            },
        )
        notifications = [
            Notification(
                row[1], user_id, self.content(row[2], row[3], row[4]), row[5], row[6], row[7]
            )
            for row in rows
            if row[1] is not None
        ]
        return notifications, rows[0][0]

    async def mark_read(
        self, user_id: str, *, ids: Sequence[int] | None = None, up_to: int = MAX_ID
    ) -> tuple[int, int]:
        """Mark some notifications of the user read, or all up to an id.

        Returns: How many were not read before, and how many are unread now.
        """
        if ids is not None:
            row = await self.database.fetch_one(
                self._q["mark_read_ids"], {"user_id": user_id, "ids": list(ids)}
            )
        else:
            row = await self.database.fetch_one(
                self._q["mark_read_up_to"], {"user_id": user_id, "up_to": up_to}
            )
        return row[0], row[1]

    # Preferences

    async def preferences(self, user_id: str) -> list[Preference]:
        rows = await self.database.fetch(self._q["preferences"], {"user_id": user_id})
        return [Preference(*row) for row in rows]

    async def set_preferences(
        self, user_id: str, enabled: Mapping[str, bool]
    ) -> tuple[list[Preference], bool]:
        """Switch event types on or off: all of these, or none.

        Returns: All preferences as they would be now, and whether it was done; it was not if one
            of the types does not exist, or is required and was to be switched off.
        """
        rows = await self.database.fetch(
            self._q["set_preferences"],
            {
                "user_id": user_id,
                "event_types": list(enabled),
                "enabled": list(enabled.values()),
            },
        )
        return [Preference(*row[:4]) for row in rows], bool(rows) and rows[0][4]

    async def explicit_preferences(
        self, user_ids: Collection[str], *, connection: Connection | None = None
    ) -> dict[str, dict[str, bool]]:
        """What these users have ever switched on or off."""
        rows = await self._on(connection)(
            self._q["explicit_preferences"], {"user_ids": list(user_ids)}
        )
        return {row[0]: row[1] for row in rows}

    # Limits

    async def share_usage(self, payloads: Sequence[str]) -> None:
        """Tell all feeds, each payload by one NOTIFY."""
        await self.database.fetch(self._q["share_usage"], {"payloads": list(payloads)}, retry=False)

    # Publishing

    async def publish(
        self,
        *,
        source: str,
        user_ids: Sequence[str],
        event_type: str,
        message: str,
        link: str | None,
    ) -> list[tuple[str, str, int | None]]:
        """Returns: (user_id, outcome, id) for each distinct recipient."""
        rows = await self.database.fetch(
            self._q["publish"],
            {
                "source": source,
                "user_ids": list(user_ids),
                "event_type": event_type,
                "message": message,
                "link": link,
            },
            retry=False,
        )
        return [(row[0], row[1], row[2]) for row in rows]

    async def publish_as_service(
        self, key_hash: bytes, publication: Publication, body_hash: bytes
    ) -> Published:
        """Authenticate, look up what was answered before, and send, in one round trip."""
        row = await self.database.fetch_one(
            self._q["publish_as_service"],
            {
                "key_hash": key_hash,
                "user_ids": list(publication.user_ids),
                "event_type": publication.event_type,
                "message": publication.message,
                "link": publication.link,
                "idempotency_key": publication.idempotency_key,
                "body_hash": body_hash,
            },
            # With a key a second try cannot send twice.
            retry=publication.idempotency_key is not None,
        )
        return Published(*row)

    # Services

    async def add_service(self, name: str, key_hash: bytes, rate_per_minute: int) -> bool:
        """Returns: False if there is one of this name that is not revoked."""
        rows = await self.database.fetch(
            self._q["add_service"],
            {"name": name, "key_hash": key_hash, "rate_per_minute": rate_per_minute},
            retry=False,
        )
        return bool(rows)

    async def role_exists(self, name: str) -> bool:
        """Whether the database has a role of this name."""
        return bool((await self.database.fetch_one(self._q["role_exists"], {"name": name}))[0])

    async def revoke_service(self, name: str) -> bool:
        """Returns: False if there is no such service, or it is revoked already."""
        return bool(await self.database.fetch(self._q["revoke_service"], {"name": name}))

    async def services(self) -> list[Service]:
        """All of them, by name."""
        return [Service(*row) for row in await self.database.fetch(self._q["services"])]

    # Audit

    async def insert_audit(self, rows: Sequence[AuditRow]) -> None:
        await self.database.fetch(
            self._q["insert_audit"],
            {
                "actors": [row.actor for row in rows],
                "actions": [row.action for row in rows],
                "user_ids": [row.user_id for row in rows],
                "event_types": [row.event_type for row in rows],
                "outcomes": [row.outcome for row in rows],
                "details": [row.detail for row in rows],
            },
            retry=False,
        )

    # Operator

    async def recent_audit(self, limit: int) -> list[AuditLine]:
        """The newest lines of the audit trail, newest first."""
        rows = await self.database.fetch(self._q["recent_audit"], {"limit": limit})
        return [AuditLine(*row) for row in rows]

    async def explain(self, id: int) -> Explained:
        """What became of a notification."""
        row = await self.database.fetch_one(self._q["explain"], {"id": id})
        smallest, last = row[11:]
        if row[0] is not None:
            return Explained("committed", ExplainedRow(*row[:5]), None)
        if row[5] is not None:
            return Explained(row[9], None, Refusal(*row[5:11]))
        if last is None or id > last:
            return Explained("not_given_out", None, None)
        gone = smallest is None or id < smallest
        return Explained("deleted" if gone else "not_committed", None, None)

    # Retention

    async def delete_old(self, what: str, *, after: int, limit: int) -> Walked:
        """One page of the walk along ``notifications`` or ``audit`` (`what`)."""
        row = await self.database.fetch_one(
            self._q[f"delete_old_{what}"], {"after": after, "limit": limit}, retry=False
        )
        return Walked(*row)

    async def delete_old_publications(self, limit: int) -> int:
        """Returns: how many answers to idempotency keys were older than 24 hours, and are gone."""
        return len(await self.database.fetch(self._q["delete_old_publications"], {"limit": limit}))
