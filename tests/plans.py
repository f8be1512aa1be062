"""A database as full as one likes, and every query of the service with parameters to run it on it.

tests/test_plans.py looks at the plans on a small one; bench/queries.py measures on 10 million rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.store import schema_sql
from tests.listener import fetch

FIRST_XACT = 100  # of the rows: long past in any cluster
ROWS_PER_XACT = 10


@dataclass(frozen=True, slots=True)
class Size:
    """How full. The other tables get a row for every fifth user."""

    rows: int
    users: int

    @property
    def last_xact(self) -> int:
        return FIRST_XACT + self.rows // ROWS_PER_XACT


def load(db: Connection, size: Size) -> None:
    """Fill an empty database: a few users with very many rows, most with a few; 90 % are read.

    As fast as it goes: without triggers, and with the indexes built at the end.
    """
    rows, users = size.rows, size.users
    for statement in (
        schema_sql(),
        # Transaction ids that rows can have had.
        f"DO $$ BEGIN FOR i IN 1..{rows // ROWS_PER_XACT} LOOP "
        "PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$",
        "DROP INDEX notifications_user_id_idx, notifications_unread_idx, notifications_xact_idx",
        "SET session_replication_role = replica",
        # A user's share falls with the 2/3rd power of the rank: of 10 million rows and a million
        # users the first has 100,000, the sixth 11,000, and half of them fewer than six.
        f"""
        INSERT INTO notifications
               (user_id, event_type, message, created_at, read_at, source, xact, horizon)
        SELECT 'user-' || floor({users} * power(random(), 3))::int,
               (ARRAY['new_message', 'status_change', 'system_alert'])[1 + n % 3],
               repeat('x', 40 + floor(random() * 160)::int), at,
               CASE WHEN random() < 0.9 THEN at + interval '1 hour' END,
               'billing', x::text::xid8, (x - floor(random() * 5)::bigint)::text::xid8
          FROM (SELECT n, date_trunc('milliseconds',
                                     now() - interval '31 days' * (1 - n::float8 / {rows})) AS at,
                       {FIRST_XACT} + n / {ROWS_PER_XACT} AS x
                  FROM generate_series(1, {rows}) AS n) AS w""",
        schema_sql(),
        f"""
        INSERT INTO user_preferences
        SELECT 'user-' || n, e, n % 3 = 0
          FROM generate_series(0, {users - 1}, 5) AS n,
               unnest(ARRAY['new_message', 'system_alert']) AS e""",
        f"""
        INSERT INTO sessions (key_hash, user_id, expires_at)
        SELECT sha256(n::text::bytea), 'user-' || n, now() + make_interval(secs => 3600 + n)
          FROM generate_series(0, {users - 1}, 5) AS n""",
        f"""
        INSERT INTO used_tokens
        SELECT sha256(n::text::bytea), now() + make_interval(secs => 3600 + n)
          FROM generate_series(1, {users} / 5) AS n""",
        f"""
        INSERT INTO publications (service, idempotency_key, body_hash, results, created_at)
        SELECT 'shop', n, sha256(''), '[]', now() - make_interval(secs => n * 85000.0 / {users})
          FROM generate_series(1, {users} / 5) AS n""",
        f"""
        INSERT INTO audit_log (at, actor, action, user_id, outcome)
        SELECT now() - make_interval(secs => {users} / 5 - n), 'user:' || n, 'x', 'user-' || n, 'ok'
          FROM generate_series(1, {users} / 5) AS n""",
        "INSERT INTO services (name, key_hash) SELECT 'service-' || n, sha256(n::text::bytea) "
        "FROM generate_series(1, 20) AS n",
        "SET session_replication_role = DEFAULT",
        "VACUUM (ANALYZE)",
    ):
        fetch(db, statement)


@dataclass(frozen=True, slots=True)
class Case:
    """A query and how it should go.

    Attributes:
        name: In queries.sql.
        variant: What is special about the parameters.
        params: Of the query.
        indexes: Every index of a large table that the plan uses.
        blocks: At most so many pages of 8 KB are touched, whatever the size of the tables: a plan
            can use an index and yet walk all of it.
    """

    name: str
    variant: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    indexes: frozenset[str] = frozenset()
    blocks: int = 0

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def cases(db: Connection, size: Size) -> Iterator[Case]:
    """Every query of the service, some in several ways."""
    typical = f"user-{size.users // 50 // 15 * 15}"  # with some tens of rows, and preferences
    heavy = "user-3"  # of 10 million rows it has 14,000, of which 1,400 are unread
    cursor = {
        user_id: fetch(
            db,
            "SELECT id FROM notifications WHERE user_id = %s ORDER BY id DESC OFFSET 3 LIMIT 1",
            user_id,
        )[0][0]
        for user_id in (typical, heavy)
    }
    last = size.last_xact
    base = f"{last - 60}:{last - 50}:{last - 60},{last - 55}"

    def case(
        name: str, indexes: str = "", blocks: int = 20, variant: str = "", /, **params: Any
    ) -> Case:
        return Case(name, variant, params, frozenset(indexes.split()), blocks)

    def replay(variant: str, users: list[str], blocks: int, **columns: Any) -> Case:
        count = len(users)
        params = {
            "n": list(range(count)),
            "user_ids": users,
            "cursors": [None] * count,
            "bases": [None] * count,
            "snapshots": [None] * count,
            "after_ids": [0] * count,
            "counted": [True] * count,
            "limit": 500,
        } | columns
        indexes = "notifications_unread_idx notifications_xact_idx notifications_pkey"
        return case("replay", indexes, blocks, variant, **params)

    yield case("schema_version", blocks=60)

    yield case("session_by_key", "sessions_key_hash_key", key_hash=_hash("0"))
    yield case(
        "insert_session",
        "sessions_key_hash_key",
        60,
        key_hash=_hash("new"),
        user_id=typical,
        data="{}",
        seconds=600,
        old_key_hash=_hash("0"),
        token_hash=_hash("token"),
        token_expires=4e9,
    )
    yield case(
        "update_session",
        "sessions_key_hash_key",
        30,
        key_hash=_hash("0"),
        user_id="user-0",
        data="{}",
    )
    yield case("delete_session", "sessions_key_hash_key", 30, key_hash=_hash("0"))
    yield case(
        "claim_streams",
        "sessions_key_hash_key sessions_pkey sessions_user_id_idx",
        60,
        key_hashes=[_hash("0")],
        counts=[1],
        most=20,
        seconds=3600,
    )
    yield case("release_streams", "sessions_pkey", 60, ids=[1, 2], numbers=[0, 1])
    yield case("check_sessions", "sessions_pkey", ids=[1, 2, 3])
    yield case(
        "delete_expired_sessions",
        "sessions_expires_at_idx sessions_pkey used_tokens_expires_at_idx used_tokens_pkey",
    )

    yield replay("new", [typical], 40)
    yield replay("resumed", [typical], 40, cursors=[cursor[typical]])
    yield replay("again", [typical], 40, bases=[base])
    # As many rows as there are on a page, and a count of all.
    yield replay("heavy", [heavy], 1500)
    yield replay("heavy resumed", [heavy], 150, cursors=[cursor[heavy]])
    yield replay("heavy again", [heavy], 150, bases=[base])
    yield replay("100 streams", [f"user-{size.users // 50 + n}" for n in range(100)], 40 * 100)
    yield case("unread_counts", "notifications_unread_idx", user_ids=[typical])
    yield case("unread_counts", "notifications_unread_idx", 120, "heavy", user_ids=[heavy])

    yield case("feed_start", "notifications_xact_idx", 30, id=size.rows, xact=last)
    yield case("channel")
    yield case("notify", channel="nobody")
    yield case("feed_mode")
    yield case("feed_poll", seconds=3.0)
    yield case("feed_notify")
    sweep = {"snapshot": None, "base": base, "after_xact": "0", "after_id": 0, "limit": 5000}
    yield case("feed_sweep", "notifications_xact_idx", 40, **sweep)
    yield case(
        "feed_sweep",
        "notifications_xact_idx",
        20,
        "nothing new",
        **sweep | {"base": f"{last + 1}:{last + 1}:"},
    )
    yield case(
        "feed_sweep",
        "notifications_xact_idx",
        40,
        "second page",
        **sweep | {"after_xact": str(last - 40), "after_id": size.rows - 400},
    )
    yield case("notifications_by_id", "notifications_pkey", ids=[1, size.rows // 2, size.rows])

    history = {
        "user_id": typical,
        "before": None,
        "event_type": None,
        "only_unread": False,
        "limit": 20,
    }
    both = "notifications_user_id_idx notifications_unread_idx"
    unread = "notifications_unread_idx"
    yield case("history", both, 60, **history)
    yield case("history", both, 150, "heavy", **history | {"user_id": heavy})
    yield case(
        "history",
        both,
        150,
        "heavy before",
        **history | {"user_id": heavy, "before": size.rows // 2},
    )
    yield case(
        "history",
        both,
        250,
        "heavy type",
        **history | {"user_id": heavy, "event_type": "new_message"},
    )
    yield case(
        "history", unread, 150, "heavy unread", **history | {"user_id": heavy, "only_unread": True}
    )
    yield case(
        "mark_read_ids",
        "notifications_unread_idx notifications_pkey",
        60,
        user_id=typical,
        ids=[cursor[typical]],
    )
    yield case(
        "mark_read_up_to",
        "notifications_unread_idx notifications_pkey",
        150,
        user_id=typical,
        up_to=cursor[typical],
    )

    yield case("share_usage", payloads=['{"t":"usage","n":"plans","l":"users","u":[]}'])

    yield case("preferences", "user_preferences_pkey", user_id=typical)
    yield case(
        "set_preferences",
        "user_preferences_pkey",
        60,
        user_id=typical,
        event_types=["new_message"],
        enabled=[False],
    )
    yield case("explicit_preferences", "user_preferences_pkey", user_ids=[typical, "nobody"])

    # What these do is in functions and triggers: the plan shows the pages only.
    yield case(
        "publish",
        "",
        300,
        source="billing",
        user_ids=[typical],
        event_type="new_message",
        message="hello",
        link=None,
    )
    yield case(
        "publish_as_service",
        "",
        400,
        key_hash=_hash("1"),
        user_ids=[typical],
        event_type="new_message",
        message="hello",
        link=None,
        idempotency_key="new",
        body_hash=_hash("body"),
    )

    yield case("add_service", "", 40, name="new", key_hash=_hash("new"), rate_per_minute=600)
    yield case("role_exists", name="postgres")
    yield case("revoke_service", "", 40, name="service-1")
    yield case("services")
    yield case(
        "insert_audit",
        "",
        60,
        actors=["user:1"],
        actions=["x"],
        user_ids=["user-1"],
        event_types=[None],
        outcomes=["ok"],
        details=["{}"],
    )

    yield case("recent_audit", "notifications_pkey audit_log_pkey", 60, limit=50)
    yield case("explain", "notifications_pkey audit_log_notification_id_idx", 60, id=size.rows // 2)

    yield case("delete_old_notifications", "notifications_pkey", 20_000, after=0, limit=1000)
    yield case(
        "delete_old_notifications",
        "notifications_pkey",
        200,
        "young",
        after=size.rows - 100,
        limit=1000,
    )
    yield case("delete_old_audit", "audit_log_pkey", 200, after=0, limit=1000)
    yield case(
        "delete_old_publications",
        "publications_created_at_idx",
        limit=1000,
    )
