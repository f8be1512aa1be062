"""The service and its peers: how each is installed, started, published to, and ended.

All hold N streams and take an event of about 250 bytes. Streams are of two kinds: those of
*everybody*, who all get the same event, and those of *user-N*, each of whom gets their own. In the
service the first are N sessions of one user, the second sessions of N users; in the peers they are
channels. What a peer is made of lies in ``peers/NAME/``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812

from bench.load import compile_c
from bench.machine import BenchError
from sse_server.embedded import EmbeddedPostgres
from sse_server.sessions import COOKIE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / "peers"

EVERYBODY = "everybody"

# Makes the event about 250 bytes long on the wire, its chunk included.
FILLER = "Your order has been sent and will be with you on Thursday, between nine and noon. "

# Timeouts
INSTALL_SECONDS = 300.0
START_SECONDS = 30.0
STOP_SECONDS = 20.0

Kind = Literal["all", "own"]


def user(number: int) -> str:
    return f"user-{number}"


def message(sequence: int) -> str:
    """The text of an event, with the mark that the load generator looks for at its end."""
    return f"{FILLER}@{sequence}.{time.monotonic_ns()}@"


# The database


class Database:
    """One PostgreSQL for all contenders that need one, each time with a new database.

    Its fsync is real, as an operator's would be.
    """

    def __init__(self, directory: Path) -> None:
        self._data = directory / "postgres"
        self._postgres = EmbeddedPostgres(
            self._data,
            options={"shared_buffers": "512MB", "max_wal_size": "4GB", "max_connections": "100"},
        )
        self._number = 0

    def start(self) -> None:
        self._postgres.start()

    def stop(self) -> None:
        self._postgres.stop()

    @property
    def pid(self) -> int:
        lines = (self._data / "pgdata" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        return int(lines[0])

    def new(self, schema: Path) -> str:
        """Make a database with this schema, without the limit per user; return its DSN."""
        self._number += 1
        name = f"bench_{self._number}"
        with connection(self._postgres.dsn("postgres")) as db, db.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        dsn = self._postgres.dsn(name)
        with connection(dsn) as db, db.cursor() as cursor:
            cursor.execute(schema.read_text(encoding="utf-8"))
            cursor.execute("UPDATE settings SET user_rate_per_minute = 0")
        return dsn

    def drop(self, dsn: str) -> None:
        name = re.sub(r"^.*/([^?]+)\?.*$", r"\1", dsn)
        with connection(self._postgres.dsn("postgres")) as db, db.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def connection(dsn: str) -> Iterator[Connection]:
    """A connection that commits each statement."""
    db = psycopg2.connect(dsn)
    db.autocommit = True
    try:
        yield db
    finally:
        db.close()


# Publishers


class Publisher(ABC):
    """Publishes over one connection; does not wait for the event to arrive."""

    @abstractmethod
    def everybody(self, text: str) -> None: ...

    @abstractmethod
    def user(self, number: int, text: str) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class HttpPublisher(Publisher):
    """POSTs, pipelined over one connection: the answers are read but not waited for."""

    def __init__(self, port: int) -> None:
        self._host = f"127.0.0.1:{port}"
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _post(self, path: str, text: str) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                if not self._socket.recv(65536, socket.MSG_DONTWAIT):
                    raise BenchError("The server has closed the connection that publishes.")
        data = {
            "id": 1000000,
            "created_at": "2026-01-01T00:00:00.000Z",
            "event_type": "new_message",
            "message": text,
            "link": None,
        }
        body = json.dumps(data, separators=(",", ":")).encode()
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    def everybody(self, text: str) -> None:
        self._post("/all", text)

    def user(self, number: int, text: str) -> None:
        self._post(f"/own/{user(number)}", text)

    def close(self) -> None:
        self._socket.close()


class SqlPublisher(Publisher):
    """INSERTs, each a transaction.

    Args:
        durable: Whether a commit waits for the disk; if not, one connection commits more often.
    """

    def __init__(self, dsn: str, *, durable: bool) -> None:
        self._db = psycopg2.connect(dsn)
        self._db.autocommit = True
        self._cursor = self._db.cursor()
        self._cursor.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")

    def everybody(self, text: str) -> None:
        self.insert(EVERYBODY, text)

    def user(self, number: int, text: str) -> None:
        self.insert(user(number), text)

    def insert(self, user_id: str, text: str) -> None:
        self._cursor.execute(
            "INSERT INTO notifications (user_id, event_type, message) "
            "VALUES (%s, 'new_message', %s)",
            (user_id, text),
        )

    def insert_many(self, users: int, text: str) -> None:
        """One statement for that many users."""
        self._cursor.execute(
            "INSERT INTO notifications (user_id, event_type, message) "
            "SELECT 'user-' || n, 'new_message', %s FROM generate_series(0, %s) AS n",
            (text, users - 1),
        )

    def commit_one(self, user_id: str, text: str) -> int:
        """Insert in a transaction of two steps; return when COMMIT was sent (ns)."""
        self._cursor.execute("BEGIN")
        self.insert(user_id, text)
        sent = time.monotonic_ns()
        self._cursor.execute("COMMIT")
        return sent

    def commit_many(self, users: int, text: str) -> int:
        """`insert_many`, likewise."""
        self._cursor.execute("BEGIN")
        self.insert_many(users, text)
        sent = time.monotonic_ns()
        self._cursor.execute("COMMIT")
        return sent

    def execute(self, statement: str) -> None:
        self._cursor.execute(statement)

    def close(self) -> None:
        self._db.close()


# Contenders


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(command: Sequence[str | Path], cwd: Path, what: str) -> None:
    """Run one step of an installation.

    Raises:
        BenchError: It failed, or took too long.
    """
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{what}: {error}.") from error
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines() or ["no output"]
        raise BenchError(f"{what}: {lines[-1].strip()}")


class Running:
    """A server that has been started. A context manager: leaving it ends the process.

    Attributes:
        pid: The root of its processes.
        port: On 127.0.0.1.
        dsn: Of its database, if it has one.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        directory: Path,
        *,
        port: int,
        dsn: str | None,
    ) -> None:
        self.port = port
        self.dsn = dsn
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we end it
            )
        self.pid = self._process.pid

    def wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            if self._process.poll() is not None:
                raise BenchError(f"it ended at once: {self.said()}")
            if time.monotonic() > deadline:
                raise BenchError(f"it does not listen: {self.said()}")
            time.sleep(0.02)

    def said(self) -> str:
        """The last line of its output."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a word"

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it, kindly first."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


@dataclass
class Contender(ABC):
    """One server.

    Attributes:
        name: On the command line and in the JSON.
        title: In the report.
        ready: After what a stream counts as open; see `Load`.
        has_database: Whether it can be told of events by PostgreSQL.
        sql: Whether it is told of all events that way.
    """

    name: str
    title: str
    ready: str = "head"
    has_database: bool = False
    sql: bool = False

    @abstractmethod
    def install(self, peers: Path) -> None:
        """Make all that is needed below `peers`, unless it is there.

        Raises:
            BenchError: It cannot be had here, and why.
        """

    @abstractmethod
    def command(self, port: int, directory: Path) -> Sequence[str | Path]: ...

    def environment(self, dsn: str | None) -> dict[str, str]:
        """Without what belongs to other settings of the service or of libpq."""
        return {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SSE_", "PG", "BENCH_")) and name != "DATABASE_URL"
        }

    def heads(self, kind: Kind, streams: int, port: int, dsn: str | None) -> list[str]:
        """The request of each stream, without the empty line."""
        return [
            f"GET {'/all' if kind == 'all' else f'/own/{user(number)}'} HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{port}\r\nAccept: text/event-stream"
            for number in range(streams)
        ]

    def publisher(self, server: Running) -> Publisher:
        return HttpPublisher(server.port)

    @property
    def schema(self) -> Path:
        return ROOT / "schema.sql"

    @contextlib.contextmanager
    def running(self, work: Path, database: Database | None) -> Iterator[Running]:
        """Start it, and end it.

        Raises:
            BenchError: It does not start.
        """
        dsn = None
        if self.has_database and database is not None:
            dsn = database.new(self.schema)
        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as name:
            port = free_port()
            directory = Path(name)
            server = Running(
                self.command(port, directory),
                self.environment(dsn),
                directory,
                port=port,
                dsn=dsn,
            )
            try:
                server.wait_until_it_listens()
                yield server
            finally:
                server.stop()
                if dsn is not None and database is not None:
                    database.drop(dsn)


@dataclass
class Service(Contender):
    """The service itself, as an operator runs it, but for the three limits that so many
    streams would meet, of one user and in all, and with a line in its log only for warnings.

    Attributes:
        checkout: Where its source is.
        settings: ``SSE_…`` for a trial.
    """

    ready: str = "event: ready"
    has_database: bool = True
    sql: bool = True
    checkout: Path = ROOT
    settings: Mapping[str, str] = field(default_factory=dict)

    def install(self, peers: Path) -> None:
        """It is there: it runs in the environment of the bench."""

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return [sys.executable, "-m", "sse_server", "--port", str(port)]

    def environment(self, dsn: str | None) -> dict[str, str]:
        assert dsn is not None
        return {
            **super().environment(dsn),
            "PYTHONPATH": str(self.checkout),
            "DATABASE_URL": dsn,
            # As the peers: no line per stream.
            "SSE_LOG_LEVEL": "WARNING",
            # All streams of everybody are one user's.
            "SSE_STREAMS_PER_USER": "1000000",
            "SSE_MAX_STREAMS": "1000000",
            "SSE_API_CALLS_PER_MINUTE": "0",
            **self.settings,
        }

    @property
    def schema(self) -> Path:
        return self.checkout / "schema.sql"

    def heads(self, kind: Kind, streams: int, port: int, dsn: str | None) -> list[str]:
        assert dsn is not None
        keys = [secrets.token_urlsafe(32) for _ in range(streams)]
        with connection(dsn) as db, db.cursor() as cursor:
            cursor.execute(
                "INSERT INTO sessions (key_hash, user_id, expires_at) "
                "SELECT h, u, clock_timestamp() + interval '1 day' "
                "FROM unnest(%s::bytea[], %s) AS s (h, u)",
                (
                    [hashlib.sha256(key.encode()).digest() for key in keys],
                    [EVERYBODY if kind == "all" else user(n) for n in range(streams)],
                ),
            )
            cursor.execute("ANALYZE sessions")
        return [
            f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Accept: text/event-stream\r\nCookie: {COOKIE}={key}"
            for key in keys
        ]

    def publisher(self, server: Running) -> Publisher:
        assert server.dsn is not None
        return SqlPublisher(server.dsn, durable=False)


@dataclass
class Told(Contender):
    """A peer that can also LISTEN to the same NOTIFY as the service, where a scenario inserts."""

    has_database: bool = True

    def environment(self, dsn: str | None) -> dict[str, str]:
        assert dsn is not None
        with connection(dsn) as db, db.cursor() as cursor:
            cursor.execute("SELECT channel FROM settings")
            row = cursor.fetchone()
        assert row is not None
        return {**super().environment(dsn), "BENCH_DSN": dsn, "BENCH_CHANNEL": row[0]}


def venv_python(peers: Path) -> Path:
    """The interpreter of the Python peers' own venv, with the versions that are pinned."""
    venv = peers / "venv"
    python = venv / "bin" / "python"
    pins = PEERS / "requirements.txt"
    done = venv / "installed"
    if done.exists() and done.stat().st_mtime >= pins.stat().st_mtime:
        return python
    run([sys.executable, "-m", "venv", "--clear", venv], HERE, "No venv can be made")
    run(
        [
            *(python, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("install", "--requirement", pins),
        ],
        HERE,
        "pip does not install its packages",
    )
    done.touch()
    return python


@dataclass
class SseStarlette(Told):
    _python: Path = Path()

    def install(self, peers: Path) -> None:
        self._python = venv_python(peers)

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return [self._python, PEERS / "sse-starlette" / "server.py", str(port)]


@dataclass
class AiohttpSse(Contender):
    _python: Path = Path()

    def install(self, peers: Path) -> None:
        self._python = venv_python(peers)

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return [self._python, PEERS / "aiohttp-sse" / "server.py", str(port)]


@dataclass
class BetterSse(Told):
    _directory: Path = Path()

    def install(self, peers: Path) -> None:
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                raise BenchError(f"{program} is missing: install Node 20 or later.")
        source = PEERS / "better-sse"
        self._directory = peers / "better-sse"
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = "package-lock.json"
        done = self._directory / "node_modules" / ".installed"
        fresh = done.exists() and done.stat().st_mtime >= (source / lock).stat().st_mtime
        # Node looks for packages beside the program, which is why that is copied.
        for name in ("server.js", "package.json", lock):
            shutil.copyfile(source / name, self._directory / name)
        if not fresh:
            run(
                ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
                self._directory,
                "npm does not install its packages",
            )
            done.touch()

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return ["node", self._directory / "server.js", str(port)]


@dataclass
class Go(Contender):
    _program: Path = Path()

    def install(self, peers: Path) -> None:
        if shutil.which("go") is None:
            raise BenchError("go is missing: install it, for example with apt install golang-go.")
        self._program = peers / "go-hub"
        source = PEERS / "go"
        newest = max(path.stat().st_mtime for path in source.iterdir())
        if not self._program.exists() or self._program.stat().st_mtime < newest:
            peers.mkdir(parents=True, exist_ok=True)
            run(["go", "build", "-o", self._program, "."], source, "go does not build it")

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return [self._program, str(port)]


@dataclass
class CLimit(Contender):
    _program: Path = Path()

    def install(self, peers: Path) -> None:
        self._program = compile_c(PEERS / "c" / "server.c", peers / "c-limit")

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        return [self._program, str(port)]


@dataclass
class Nchan(Contender):
    files: int = 1024
    _nginx: str = ""
    _module: Path = Path()

    def install(self, peers: Path) -> None:
        nginx = shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
        if nginx is None:
            raise BenchError("nginx is missing: install it, for example with apt install nginx.")
        self._nginx = nginx
        name = Path("usr/lib/nginx/modules/ngx_nchan_module.so")
        unpacked = peers / "nchan"
        if (Path("/") / name).exists():
            self._module = Path("/") / name
        elif not (unpacked / name).exists():
            self._unpack(unpacked)
        if not self._module.is_absolute():
            self._module = unpacked / name
        with tempfile.TemporaryDirectory() as directory:
            command = [*self.command(free_port(), Path(directory)), "-t"]
            run(command, HERE, "nginx does not take the module nchan")

    @staticmethod
    def _unpack(directory: Path) -> None:
        """From Debian's package, without installing it: that would switch it on everywhere."""
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise BenchError(
                "nginx has no module nchan here, and this is no Debian to get it from."
            )
        directory.mkdir(parents=True, exist_ok=True)
        what = "apt does not have libnginx-mod-nchan"
        run(["apt-get", "download", "libnginx-mod-nchan"], directory, what)
        for package in directory.glob("libnginx-mod-nchan_*.deb"):
            run(["dpkg-deb", "-x", package, directory], directory, what)

    def command(self, port: int, directory: Path) -> Sequence[str | Path]:
        text = (PEERS / "nchan" / "nginx.conf").read_text(encoding="utf-8")
        values = {
            "MODULE": str(self._module),
            "PORT": str(port),
            "FILES": str(self.files),
            "DIRECTORY": str(directory),
            # Its worker would change to another account, which cannot reach the directory.
            "USER": "user root;" if os.geteuid() == 0 else "",
        }
        text = re.sub("@([A-Z]+)@", lambda found: values.get(found[1], found[0]), text)
        configuration = directory / "nginx.conf"
        configuration.write_text(text, encoding="utf-8")
        return [self._nginx, "-p", directory, "-c", configuration, "-e", "stderr"]


def contenders(
    *, files: int, settings: Mapping[str, str], baseline: Path | None
) -> dict[str, Contender]:
    """All there are, by name, in the order of the report.

    Args:
        files: As many open files as a process may have.
        settings: Of the service, for a trial.
        baseline: Another checkout of the service, to compare with.
    """
    known: list[Contender] = [Service("service", "sse-server (the service)", settings=settings)]
    if baseline is not None:
        known.append(Service("baseline", f"sse-server in {baseline.name}", checkout=baseline))
    known += [
        CLimit("c", "C + epoll (the limit)"),
        Nchan("nchan", "nginx + nchan", files=files),
        Go("go", "Go net/http hub"),
        BetterSse("better-sse", "Node + better-sse"),
        AiohttpSse("aiohttp-sse", "aiohttp + aiohttp-sse, queues"),
        SseStarlette("sse-starlette", "sse-starlette + uvicorn + asyncpg"),
    ]
    return {contender.name: contender for contender in known}
