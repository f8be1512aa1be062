"""What an INSERT of one row costs: inserts per second of many concurrent writers.

    python bench/inserts.py [--writers 32] [--seconds 10] [--rounds 3] [--synchronous-commit off]
                            [--only bare,no-notify,auto] [--json FILE]

Each case has a database of its own in one cluster with its real fsync. pgbench inserts single rows,
each in a transaction, by the simple protocol, for users drawn at random. The cases are measured one
after the other, and that is repeated, so that whatever else the machine does meets all of them;
what is shown is the median of the rounds, and the ratio to the case `no-notify` in the same round.

The processor time of PostgreSQL and of the service per insert is shown, too: other work on the
machine disturbs it far less than inserts per second, and where they disagree it is the better
figure for what a row costs. (Waiting for a lock shows in inserts per second only.)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import psycopg2

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sse_server.embedded import EmbeddedPostgres  # noqa: E402
from sse_server.sessions import COOKIE  # noqa: E402
from sse_server.store import schema_sql  # noqa: E402

USERS = 100_000
ROWS_BEFORE = 300_000  # in each table at the beginning: the rate limit looks at a user's last rows
WARM_UP_SECONDS = 3  # not counted; feeds decide every second whether to poll

# What notifications_accept() would be with one of its checks alone, or none.
ACCEPT = """
CREATE OR REPLACE FUNCTION notifications_accept() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    wanted boolean;
    nth    timestamptz;
BEGIN
    {body}
    RETURN NEW;
END
$$
"""
TYPE_CHECK = """
    SELECT true INTO wanted FROM event_types t WHERE t.name = NEW.event_type;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown event type';
    END IF;
"""
PREFERENCE_CHECK = """
    SELECT t.required OR coalesce(p.enabled, t.enabled_by_default) INTO wanted
      FROM event_types t
      LEFT JOIN user_preferences p ON p.user_id = NEW.user_id AND p.event_type = t.name
     WHERE t.name = NEW.event_type;
    IF NOT wanted THEN
        RETURN NULL;
    END IF;
"""
RATE_CHECK = """
    SELECT n.created_at INTO nth
      FROM notifications n
     WHERE n.user_id = NEW.user_id
     ORDER BY n.id DESC
    OFFSET (SELECT user_rate_per_minute FROM settings) - 1
     LIMIT 1;
    IF nth > clock_timestamp() - interval '1 minute' THEN
        RETURN NULL;
    END IF;
"""

NO_TRIGGERS = "ALTER TABLE notifications DISABLE TRIGGER USER"
NO_ANNOUNCING = "ALTER TABLE notifications DISABLE TRIGGER notifications_announce"
NO_CONSTRAINTS = """
ALTER TABLE notifications
    DROP CONSTRAINT notifications_user_id_format, DROP CONSTRAINT notifications_message_length,
    DROP CONSTRAINT notifications_link_length, DROP CONSTRAINT notifications_times_range
"""


@dataclass(frozen=True)
class Case:
    """One kind of table to insert into.

    Attributes:
        text: What it is, for the reader.
        setup: SQL that makes it from the schema.
        mode: Of the feed (`settings.feed_mode`), with the service running; `None`: without it.
    """

    text: str
    setup: str = ""
    mode: str | None = None


CASES = {
    "bare": Case(
        "a table with an id and the three columns, nothing else",
        "DROP TABLE notifications CASCADE; CREATE TABLE notifications ("
        "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id text NOT NULL, "
        "event_type text NOT NULL, message text NOT NULL)",
    ),
    "table": Case("the table: defaults, CHECKs, indexes, no trigger", NO_TRIGGERS),
    "no-checks": Case("the table without its CHECKs", f"{NO_TRIGGERS};{NO_CONSTRAINTS}"),
    "no-xact-index": Case(
        "the table without the index on xact", f"{NO_TRIGGERS}; DROP INDEX notifications_xact_idx"
    ),
    "no-unread-index": Case(
        "the table without the index of unread rows",
        f"{NO_TRIGGERS}; DROP INDEX notifications_unread_idx",
    ),
    "no-user-index": Case(
        "the table without the index of a user's rows",
        f"{NO_TRIGGERS}; DROP INDEX notifications_user_id_idx",
    ),
    "empty-trigger": Case(
        "and a trigger per row that does nothing", f"{NO_ANNOUNCING};{ACCEPT.format(body='')}"
    ),
    "type": Case(
        "and one that checks the event type", f"{NO_ANNOUNCING};{ACCEPT.format(body=TYPE_CHECK)}"
    ),
    "preference": Case(
        "and one that checks type and preference",
        f"{NO_ANNOUNCING};{ACCEPT.format(body=PREFERENCE_CHECK)}",
    ),
    "rate": Case(
        "and one that checks the rate limit", f"{NO_ANNOUNCING};{ACCEPT.format(body=RATE_CHECK)}"
    ),
    "no-notify": Case("the schema with its NOTIFY removed: all checks", NO_ANNOUNCING),
    "silent": Case(
        "the schema, told to be silent for good; nobody polls",
        "UPDATE settings SET polling_until = 'infinity'",
    ),
    "nobody": Case("the schema, always notifying; nobody listens", ""),
    "notify": Case("always notifying, the service running", "", "notify"),
    "poll": Case("always polling, the service running", "", "poll"),
    "auto": Case("by itself, the service running", "", "auto"),
}


def execute(dsn: str, *statements: str) -> None:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
    connection.close()


def prepare(postgres: EmbeddedPostgres, name: str, case: Case) -> str:
    """Make the database of a case. Returns: its DSN."""
    database = "bench_" + name.replace("-", "_")
    execute(postgres.dsn("postgres"), f"CREATE DATABASE {database}")
    dsn = postgres.dsn(database)
    execute(
        dsn,
        schema_sql(),
        f"{case.setup};" if case.setup else "SELECT 1",
        "SET session_replication_role = replica;"
        "INSERT INTO notifications (user_id, event_type, message) "
        f"SELECT 'user-' || 1 + floor(random() * {USERS})::int, 'new_message', repeat('x', 100) "
        f"FROM generate_series(1, {ROWS_BEFORE})",
        "INSERT INTO user_preferences "
        f"SELECT 'user-' || n, 'system_alert', false FROM generate_series(1, {USERS}, 10) AS n",
        "VACUUM (ANALYZE)",
    )
    if case.mode is not None:
        execute(dsn, f"UPDATE settings SET feed_mode = '{case.mode}'")
    return dsn


@dataclass(frozen=True)
class Figures:
    """One measurement. Processor times are microseconds per insert."""

    rate: float
    postgres_us: float
    service_us: float
    received: int


class Postgres(EmbeddedPostgres):
    """A cluster that knows how much processor time it has taken."""

    def processes(self) -> set[int]:
        assert self._process is not None
        return {child.pid for child in psutil.Process(self._process.pid).children()}

    def cpu_seconds(self, only: set[int] | None = None) -> float:
        """So far; once no process but `only` is left, if given: what ended is counted late."""
        assert self._process is not None
        deadline = time.monotonic() + 5
        while only is not None and self.processes() - only and time.monotonic() < deadline:
            time.sleep(0.02)
        return cpu_seconds(self._process.pid)


def cpu_seconds(pid: int) -> float:
    """Of a process and of its children, those that have ended included."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


class Streams(threading.Thread):
    """Open streams of as many users, which are read and counted."""

    def __init__(self, pid: int, port: int, keys: list[str]) -> None:
        super().__init__(daemon=True)
        self.pid = pid  # of the server
        self.ready = threading.Event()
        self.notifications = 0
        self._waiting = len(keys)
        self._selector = selectors.DefaultSelector()
        for key in keys:
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(
                f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                f"Accept: text/event-stream\r\nCookie: {COOKIE}={key}\r\n\r\n".encode()
            )
            self._selector.register(stream, selectors.EVENT_READ)

    def run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65536)
                if not data:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
                    continue
                self.notifications += data.count(b"event: notification")
                self._waiting -= data.count(b"event: ready")
                if self._waiting <= 0:
                    self.ready.set()


@contextlib.contextmanager
def service(dsn: str, count: int) -> Iterator[Streams]:
    """The server on this database, with streams of `count` users."""
    keys = [secrets.token_urlsafe(32) for _ in range(count)]
    connection = psycopg2.connect(dsn)
    with connection, connection.cursor() as cursor:
        for number, key in enumerate(keys):
            cursor.execute(
                "INSERT INTO sessions (key_hash, user_id, expires_at) "
                "VALUES (%s, %s, now() + interval '1 hour')",
                (hashlib.sha256(key.encode()).digest(), f"user-{number + 1}"),
            )
    connection.close()
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("SSE_")}
    environment |= {"DATABASE_URL": dsn, "PYTHONPATH": str(ROOT), "SSE_LOG_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-m", "sse_server", "--port", "0"],
            env=environment,
            cwd=directory,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            port = next(
                (
                    int(found[1])
                    for line in process.stdout
                    if (found := re.search(r"listening on http://\S+:(\d+)", line))
                ),
                None,
            )
            if port is None:
                sys.exit("the server does not start")
            streams = Streams(process.pid, port, keys)
            streams.start()
            if not streams.ready.wait(30):
                sys.exit("the streams do not open")
            yield streams
        finally:
            process.terminate()
            process.wait(30)


def pgbench(
    postgres: EmbeddedPostgres, dsn: str, arguments: argparse.Namespace, seconds: int
) -> float:
    """Returns: inserts per second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(
            f"\\set user random(1, {USERS})\n"
            "INSERT INTO notifications (user_id, event_type, message) "
            f"VALUES ('user-' || :user, 'new_message', '{'x' * 100}');\n"
        )
        script.flush()
        result = subprocess.run(
            [
                postgres.psql.with_name("pgbench"),
                "--no-vacuum",
                f"--client={arguments.writers}",
                "--jobs=2",
                f"--time={seconds}",
                f"--protocol={arguments.protocol}",
                f"--file={script.name}",
                dsn,
            ],
            env=os.environ | {"PGOPTIONS": f"-csynchronous_commit={arguments.synchronous_commit}"},
            capture_output=True,
            text=True,
        )
    found = re.search(r"^tps = ([0-9.]+)", result.stdout, re.MULTILINE)
    if result.returncode or found is None:
        sys.exit(f"pgbench: {result.stdout}{result.stderr}")
    return float(found[1])


def measure(postgres: Postgres, dsn: str, case: Case, arguments: argparse.Namespace) -> Figures:
    execute(dsn, "CHECKPOINT")
    with contextlib.ExitStack() as stack:
        streams = None
        if case.mode is not None:
            streams = stack.enter_context(service(dsn, arguments.streams))
        before = postgres.processes()
        pgbench(postgres, dsn, arguments, WARM_UP_SECONDS)
        received = streams.notifications if streams else 0
        service_seconds = cpu_seconds(streams.pid) if streams else 0.0
        postgres_seconds = postgres.cpu_seconds(before)
        rate = pgbench(postgres, dsn, arguments, arguments.seconds)
        inserts = rate * arguments.seconds
        return Figures(
            rate,
            (postgres.cpu_seconds(before) - postgres_seconds) / inserts * 1e6,
            (cpu_seconds(streams.pid) - service_seconds) / inserts * 1e6 if streams else 0.0,
            streams.notifications - received if streams else 0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--writers", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=100, help="where the service runs")
    parser.add_argument("--synchronous-commit", choices=["on", "off"], default="on")
    parser.add_argument("--protocol", choices=["simple", "prepared"], default="simple")
    parser.add_argument("--only", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")

    measured: dict[str, list[Figures]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)  # root runs PostgreSQL as another account
        postgres = Postgres(
            Path(directory) / "data",
            # As many as a server of two cores has; no vacuum or checkpoint in the middle.
            options={
                "shared_buffers": "512MB",
                "max_wal_size": "8GB",
                "autovacuum": "off",
                "max_connections": "200",
            },
        )
        try:
            postgres.start()
            dsns = {name: prepare(postgres, name, CASES[name]) for name in names}
            for number in range(arguments.rounds):
                for name in names:
                    figures = measure(postgres, dsns[name], CASES[name], arguments)
                    measured[name].append(figures)
                    print(
                        f"round {number + 1}  {name:16} {figures.rate:8,.0f} inserts/s"
                        f"  {figures.postgres_us:5.0f} + {figures.service_us:3.0f} us"
                        f"  (load {os.getloadavg()[0]:.1f})",
                        file=sys.stderr,
                    )
        finally:
            postgres.stop()

    print(
        f"\n{arguments.writers} writers, {arguments.rounds} x {arguments.seconds} s, "
        f"synchronous_commit {arguments.synchronous_commit}, protocol {arguments.protocol}, "
        f"{arguments.streams} streams where the service runs\n"
        "(us: processor time of PostgreSQL + of the service per insert)\n"
    )
    for name in names:
        rounds = measured[name]
        line = (
            f"{name:16} {statistics.median(f.rate for f in rounds):8,.0f} inserts/s"
            f"  {statistics.median(f.postgres_us for f in rounds):5.0f}"
            f" + {statistics.median(f.service_us for f in rounds):3.0f} us"
        )
        for base in ("no-notify", "notify"):
            if base in measured:
                ratio = statistics.median(
                    ours.rate / theirs.rate
                    for ours, theirs in zip(rounds, measured[base], strict=True)
                )
                line += f"  {ratio:5.2f} x {base}"
        print(f"{line}   {CASES[name].text}")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(
                {
                    name: {"text": CASES[name].text, "rounds": [asdict(f) for f in measured[name]]}
                    for name in names
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
