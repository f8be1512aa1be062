"""The backends: SQL on connections of their own, straight to the database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812

from tests.faults.plan import Operation

# Marks the rows that no NOTIFY announces.
UNANNOUNCED = "unannounced: "

INSERT = "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)"

# A statement must end before the run's deadline, whatever holds it up.
OPTIONS = "-c statement_timeout=30000 -c client_min_messages=error"

_OF_OURS = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
TERMINATE_FEEDS = f"SELECT pg_terminate_backend(pid) {_OF_OURS} AND application_name ~ 'feed'"
TERMINATE_POOL = (
    f"SELECT pg_terminate_backend(pid) {_OF_OURS} AND application_name LIKE 'sse-server%%' "
    "AND application_name !~ 'feed'"
)


class Writers:
    """Does the operations that are SQL. Every method may be called from any thread.

    Raises:
        psycopg2.Error: From every method; while the database is away, that is what is expected.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._lock = threading.Lock()
        self._written = 0
        self._operations: dict[str, Callable[[Connection, dict[str, Any]], None]] = {
            "insert": self._insert,
            "transaction": self._transaction,
            "late_commit": self._late_commit,
            "bulk": self._bulk,
            "notify_users": self._notify_users,
            "unannounced": self._unannounced,
            "read": self._read,
            "preference": self._preference,
            "feed_mode": self._feed_mode,
        }

    def connect(self) -> Connection:
        return psycopg2.connect(self._dsn, options=OPTIONS, connect_timeout=20)

    def do(self, operation: Operation) -> None:
        connection = self.connect()
        try:
            self._operations[operation.kind](connection, operation.arguments)
        finally:
            connection.close()

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        connection = self.connect()
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description is not None else []
        finally:
            connection.close()

    def _message(self, user: str, size: int) -> str:
        """Different for each row, so that a mix-up shows; nothing in it is sanitised away."""
        with self._lock:
            self._written += 1
            number = self._written
        return f"{number} for {user} ".ljust(size, "é")[: max(size, 30)].rstrip()

    def _rows(self, rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [
            (row["user"], row["event_type"], self._message(row["user"], row["size"]))
            for row in rows
        ]

    def _insert(self, connection: Connection, arguments: dict[str, Any]) -> None:
        with connection, connection.cursor() as cursor:
            cursor.executemany(INSERT, self._rows(arguments["rows"]))

    def _transaction(self, connection: Connection, arguments: dict[str, Any]) -> None:
        connection.set_session(isolation_level=arguments["isolation"])
        with connection.cursor() as cursor:
            for number, row in enumerate(self._rows(arguments["rows"])):
                savepoint = arguments["savepoints"]
                if savepoint:
                    cursor.execute("SAVEPOINT here")
                cursor.execute(INSERT, row)
                if savepoint and number % 2:
                    cursor.execute("ROLLBACK TO SAVEPOINT here")
                time.sleep(arguments["pause"])  # what a backend does between its statements
        self._end(connection, arguments)

    def _late_commit(self, connection: Connection, arguments: dict[str, Any]) -> None:
        connection.set_session(isolation_level=arguments["isolation"])
        with connection.cursor() as cursor:
            cursor.executemany(INSERT, self._rows(arguments["rows"]))
        time.sleep(arguments["seconds"])
        self._end(connection, arguments)

    @staticmethod
    def _end(connection: Connection, arguments: dict[str, Any]) -> None:
        if arguments["commit"]:
            connection.commit()
        else:
            connection.rollback()

    def _bulk(self, connection: Connection, arguments: dict[str, Any]) -> None:
        # One content for all of them: that is what is announced together.
        message = self._message("everybody", arguments["size"])
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO notifications (user_id, event_type, message) "
                "SELECT u, %s, %s FROM unnest(%s) AS u, generate_series(1, %s)",
                (arguments["event_type"], message, arguments["users"], arguments["each"]),
            )

    def _notify_users(self, connection: Connection, arguments: dict[str, Any]) -> None:
        message = self._message("everybody", arguments["size"])
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT * FROM notify_users(%s, %s, %s)",
                (arguments["users"], arguments["event_type"], message),
            )

    def _unannounced(self, connection: Connection, arguments: dict[str, Any]) -> None:
        """As logical replication writes, or a restore: without triggers."""
        with connection, connection.cursor() as cursor:
            cursor.execute("SET LOCAL session_replication_role = replica")
            for user, event_type, message in self._rows(arguments["rows"]):
                cursor.execute(INSERT, (user, event_type, UNANNOUNCED + message[:1900]))

    def roll_back(self, user: str, count: int) -> None:
        """Use up some transaction ids of which no trace may be left after a crash."""
        connection = self.connect()
        try:
            for _ in range(count):
                with connection.cursor() as cursor:
                    cursor.execute(INSERT, (user, "new_message", "never"))
                connection.rollback()
        finally:
            connection.close()

    def burst(self, user: str, count: int) -> None:
        """So many rows, each committed by itself."""
        connection = self.connect()
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for _ in range(count):
                    cursor.execute(INSERT, (user, "new_message", self._message(user, 30)))
        finally:
            connection.close()

    def _read(self, connection: Connection, arguments: dict[str, Any]) -> None:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "UPDATE notifications SET read_at = clock_timestamp() WHERE id IN ("
                "SELECT id FROM notifications WHERE user_id = %s AND read_at IS NULL "
                "ORDER BY random() LIMIT %s)",
                (arguments["user"], arguments["most"]),
            )

    def _preference(self, connection: Connection, arguments: dict[str, Any]) -> None:
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO user_preferences (user_id, event_type, enabled) VALUES (%s, %s, %s) "
                "ON CONFLICT (user_id, event_type) DO UPDATE SET enabled = excluded.enabled",
                (arguments["user"], arguments["event_type"], arguments["enabled"]),
            )

    def _feed_mode(self, connection: Connection, arguments: dict[str, Any]) -> None:
        with connection, connection.cursor() as cursor:
            cursor.execute("UPDATE settings SET feed_mode = %s", (arguments["mode"],))

    def has_feed_mode(self) -> bool:
        """Whether the schema knows modes of the feed."""
        return bool(
            self.query(
                "SELECT 1 FROM pg_attribute WHERE attrelid = 'settings'::regclass "
                "AND attname = 'feed_mode' AND NOT attisdropped"
            )
        )
