"""Connections to PostgreSQL: a small pool, and the one that listens.

The only module that knows aiopg and psycopg2. It turns their failures into `DatabaseError` and
`DatabaseUnavailable`, and corrects three things that aiopg leaves to its users:

* a ``statement_timeout`` arrives as `CancelledError`, which would end the caller's task;
* a connection that is lost while its descriptor is 1,024 or more is never reported (``select()`` in
  aiopg's error path refuses the descriptor), and the event loop then spins on it;
* aiopg's own pool connects while it holds the lock that every release needs, so that one host which
  does not answer stops everybody. Ours connects outside of any lock.

Nothing here outlives a statement, so that the pool may go through a pooler in transaction mode
(PgBouncer), which gives each transaction to whatever server connection is free. Only what listens
has to lead straight to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import aiopg
import psycopg2
import psycopg2.extensions

from sse_server.errors import ConfigurationError, DatabaseError, DatabaseUnavailable

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]
Params = Mapping[str, object] | Sequence[object] | None

READ_ONLY = "25006"

# The server gives up a statement too, this much later than we do: one that it cancels while we wait
# for it goes through the event loop's exception handler, by aiopg, and into the log.
SERVER_GRACE_SECONDS = 0.5

# For this transaction, and unless the operator has set a limit for the role or the database.
_LIMIT = (
    "SELECT set_config('statement_timeout', CASE current_setting('statement_timeout') "
    "WHEN '0' THEN '{}' ELSE current_setting('statement_timeout') END, true); "
)

# SQLSTATE classes and codes that say "not now" rather than "not like this".
_UNAVAILABLE = ("08", "53", "57P", "58", "25006", "55P03", "57014", "40")


def load_queries(path: Path) -> dict[str, str]:
    """Read a file of SQL in which each statement follows a line ``-- name: …``."""
    queries: dict[str, str] = {}
    name = ""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("-- name: "):
            name = line.removeprefix("-- name: ").strip()
            queries[name] = ""
        elif name:
            queries[name] += line
    return {key: text.strip().rstrip(";") for key, text in queries.items()}


class _Connection(aiopg.Connection):
    """An aiopg connection that notices its loss whatever its descriptor is."""

    @staticmethod
    def _ready(weak_self: weakref.ref[Any]) -> None:
        try:
            aiopg.Connection._ready(weak_self)
        except ValueError:
            # select() in aiopg's error path: "filedescriptor out of range in select()". Only a
            # failed poll leads there, so the connection is lost.
            lost = True
        else:
            lost = False
        self = weak_self()
        if self is not None and (lost or self._conn.closed):
            # Also takes the reader off the loop, before the descriptor's number is given to
            # another socket, and fails the query or the notifies.get() that is waiting.
            self._close()

    def _close(self) -> None:
        super()._close()
        # Closing again, or late, must not take a reader off the loop that is another socket's: the
        # descriptor's number may have been given to one by now.
        self._fileno = None


def _translate(exc: psycopg2.Error) -> DatabaseError:
    sqlstate = exc.pgcode
    # The first line only: DETAIL may quote the row, and with it a message.
    text = str(exc).strip().splitlines()
    message = text[0] if text else type(exc).__name__
    if exc.diag.message_primary:
        message = exc.diag.message_primary
        if exc.diag.message_hint:
            message += f" ({exc.diag.message_hint})"
    if (
        sqlstate is None and isinstance(exc, psycopg2.OperationalError | psycopg2.InterfaceError)
    ) or (sqlstate is not None and sqlstate.startswith(_UNAVAILABLE)):
        return DatabaseUnavailable(message, sqlstate)
    return DatabaseError(message, sqlstate)


def _hosts(dsn: str, setting: str) -> list[dict[str, str]]:
    """Each host of a multi-host DSN as parameters of its own.

    libpq would go through them itself, but changes its descriptor on the way, which aiopg does not
    follow.
    """
    params = psycopg2.extensions.parse_dsn(dsn)
    hosts = params.get("host", "").split(",")
    ports = params.get("port", "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    addresses = params.get("hostaddr", "").split(",")
    if len(addresses) == 1:
        addresses *= len(hosts)
    if any("@" in host[1:] for host in hosts) or not all(p.isdecimal() for p in ports if p):
        # libpq ends the password at its first @ or /, takes the rest for a host or a port, and
        # quotes that in its error.
        raise ConfigurationError(
            f"{setting} is not a valid PostgreSQL URL or DSN: its host or port cannot be right "
            "(a password in a URL must be percent-encoded)."
        )
    candidates = []
    for host, port, address in zip(hosts, ports, addresses, strict=False):
        candidate = dict(params)
        for key, value in (("host", host), ("port", port), ("hostaddr", address)):
            if value:
                candidate[key] = value
            else:
                candidate.pop(key, None)
        candidates.append(candidate)
    return candidates


class Connection:
    """One connection, in autocommit mode, for one task at a time."""

    def __init__(
        self, raw: aiopg.Connection, query_timeout: float, *, server_timeout: bool = True
    ) -> None:
        # The event loop knows an aiopg connection by a weak reference only; this is the strong one.
        self._raw = raw
        self._query_timeout = query_timeout
        # Sent with each statement, as one message and so in one transaction: a SET for the session
        # would stay, behind a pooler, on a server connection that others use too, and a pooler
        # refuses it as a parameter of the connection.
        milliseconds = int((query_timeout + SERVER_GRACE_SECONDS) * 1000)
        self._prefix = _LIMIT.format(milliseconds) if server_timeout else ""

    @property
    def closed(self) -> bool:
        return bool(self._raw.closed)

    @property
    def idle(self) -> bool:
        """Whether no statement is running and no transaction is open."""
        status = self._raw.raw.get_transaction_status()
        return bool(status == psycopg2.extensions.TRANSACTION_STATUS_IDLE)

    def fileno(self) -> int:
        return int(self._raw.raw.fileno())

    async def fetch(self, query: str, params: Params = None) -> list[Row]:
        """Run one statement and return its rows.

        The server gives it up soon after we do. Cancelling closes the connection: what the
        statement did is then unknown.

        Raises:
            DatabaseUnavailable: The connection was lost, or the query took too long.
            DatabaseError: The database refused the statement.
        """
        try:
            async with asyncio.timeout(self._query_timeout):
                async with await self._raw.cursor() as cursor:
                    await cursor.execute(self._prefix + query, params)
                    return list(await cursor.fetchall()) if cursor.description is not None else []
        except TimeoutError as exc:
            self.close()
            raise DatabaseUnavailable(
                f"the database did not answer within {self._query_timeout} s"
            ) from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self.close()
                raise
            # aiopg raises this for a query that the server has cancelled (statement_timeout).
            raise DatabaseUnavailable("the database cancelled the query", "57014") from exc
        except psycopg2.Error as exc:
            if self.closed:
                raise DatabaseUnavailable("the connection to the database was lost") from exc
            if exc.pgcode == READ_ONLY:
                # A primary no more: the next connection may find the one that is.
                self.close()
            raise _translate(exc) from exc

    def close(self) -> None:
        self._raw._close()

    # LISTEN

    async def notified(self) -> str:
        """Wait for the next payload. Cancelling may lose one: keep the task, or sweep.

        Raises:
            DatabaseUnavailable: The connection was lost.
        """
        try:
            notify = await self._raw.notifies.get()
        except psycopg2.Error as exc:
            raise DatabaseUnavailable("the LISTEN connection was lost") from exc
        return str(notify.payload)

    def notified_nowait(self) -> str | None:
        """The next payload if one is here already."""
        if self._raw.notifies.empty():
            return None
        return str(self._raw.notifies.get_nowait().payload)


async def connect(
    dsn: str,
    *,
    connect_timeout: float,
    query_timeout: float,
    application_name: str,
    server_timeout: bool = True,
    setting: str = "DATABASE_URL",
) -> Connection:
    """Connect to the first host of the DSN that lets us in (and is writable, if asked for).

    Args:
        dsn: libpq URL or DSN, of several hosts if need be.
        connect_timeout: For each host, seconds.
        query_timeout: For each statement, seconds.
        application_name: For ``pg_stat_activity``.
        server_timeout: Whether the server is told about `query_timeout` as well.
        setting: Where the DSN comes from, for the error.

    Raises:
        DatabaseUnavailable: None did; the reason is that of the last one tried.
        ConfigurationError: The DSN cannot be parsed.
    """
    try:
        candidates = _hosts(dsn, setting)
    except psycopg2.ProgrammingError:
        # psycopg2's own message would quote the DSN, which may hold a password.
        raise ConfigurationError(f"{setting} is not a valid PostgreSQL URL or DSN.") from None
    failure: DatabaseUnavailable | None = None
    for candidate in candidates:
        writable = candidate.pop("target_session_attrs", "any") in ("read-write", "primary")
        candidate.setdefault("application_name", application_name)
        # A dead peer must show within seconds, also on an idle LISTEN connection.
        for key, value in (
            ("keepalives_idle", "10"),
            ("keepalives_interval", "5"),
            ("keepalives_count", "3"),
        ):
            candidate.setdefault(key, value)
        try:
            return await _connect_one(
                candidate,
                connect_timeout,
                query_timeout,
                writable=writable,
                server_timeout=server_timeout,
            )
        except DatabaseUnavailable as exc:
            failure = exc
    assert failure is not None
    raise failure


async def _connect_one(
    params: dict[str, str],
    connect_timeout: float,
    query_timeout: float,
    *,
    writable: bool,
    server_timeout: bool,
) -> Connection:
    raw: _Connection | None = None
    try:
        async with asyncio.timeout(connect_timeout):
            # A timeout longer than ours, which close the connection and say so.
            raw = _Connection(
                None, 10 * query_timeout, enable_hstore=False, **cast(dict[str, Any], params)
            )
            connection = Connection(await raw, query_timeout, server_timeout=server_timeout)
            if writable and (await connection.fetch("SHOW transaction_read_only"))[0][0] == "on":
                raise DatabaseUnavailable("the database host is read-only")  # noqa: TRY301
            return connection
    except BaseException as exc:
        if raw is not None:
            raw._close()
        if isinstance(exc, TimeoutError):
            raise DatabaseUnavailable(
                f"the database did not accept a connection within {connect_timeout} s"
            ) from exc
        if isinstance(exc, psycopg2.Error):
            text = str(exc).strip().splitlines()
            raise DatabaseUnavailable(
                text[0] if text else "connecting to the database failed"
            ) from exc
        raise


class Database:
    """A pool of connections, made when they are needed, reused in last-in-first-out order."""

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        connect_timeout: float,
        query_timeout: float,
        application_name: str = "sse-server",
        listen_dsn: str | None = None,
    ) -> None:
        """
        Args:
            dsn: Of the pool.
            size: Most connections in it.
            connect_timeout: For each host, seconds.
            query_timeout: For each statement, seconds.
            application_name: For ``pg_stat_activity``.
            listen_dsn: For what listens, if that takes another way than the pool.
        """
        self._dsn = dsn
        self._listen_dsn = listen_dsn
        self._size = size
        self._connect_timeout = connect_timeout
        self._query_timeout = query_timeout
        self._application_name = application_name
        self._idle: list[Connection] = []
        self._places = asyncio.Semaphore(size)
        self._in_use = 0
        self._waiting = 0
        self._closed = False

    @property
    def in_use(self) -> int:
        """Connections that are running something now."""
        return self._in_use

    @property
    def listens_as_the_pool(self) -> bool:
        """Whether what listens takes the same way as the pool."""
        return self._listen_dsn is None

    @property
    def size(self) -> int:
        """Most connections of the pool."""
        return self._size

    @property
    def waiting(self) -> int:
        """Queries that wait for a connection."""
        return self._waiting

    async def connect(self, application_name: str | None = None) -> Connection:
        """A connection outside of the pool, which the caller closes."""
        return await connect(
            self._dsn,
            connect_timeout=self._connect_timeout,
            query_timeout=self._query_timeout,
            application_name=application_name or self._application_name,
        )

    async def connect_to_listen(self, application_name: str) -> Connection:
        """A connection outside of the pool and past any pooler, which the caller closes."""
        if self._listen_dsn is None:
            return await self.connect(application_name)
        return await connect(
            self._listen_dsn,
            connect_timeout=self._connect_timeout,
            query_timeout=self._query_timeout,
            application_name=application_name,
            setting="SSE_LISTEN_DATABASE_URL",
        )

    @contextlib.asynccontextmanager
    async def _acquire(self, *, fresh: bool = False) -> AsyncIterator[Connection]:
        self._waiting += 1
        try:
            async with asyncio.timeout(self._query_timeout):
                await self._places.acquire()
        except TimeoutError as exc:
            raise DatabaseUnavailable("all database connections are busy") from exc
        finally:
            self._waiting -= 1
        self._in_use += 1
        try:
            connection: Connection | None = None
            while fresh and self._idle:
                # Most likely lost as well; kept beside the fresh one, they would let the pool
                # outgrow its size.
                self._idle.pop().close()
            while self._idle:
                candidate = self._idle.pop()
                if not candidate.closed:
                    connection = candidate
                    break
            if connection is None:
                connection = await self.connect()
            try:
                yield connection
            except BaseException:
                # After a refusal the connection is good; after anything else nobody knows.
                if not connection.closed and not connection.idle:
                    connection.close()
                raise
            finally:
                if not connection.closed:
                    if self._closed:
                        connection.close()
                    else:
                        self._idle.append(connection)
        finally:
            self._in_use -= 1
            self._places.release()

    async def fetch(self, query: str, params: Params = None, *, retry: bool = True) -> list[Row]:
        """Run one statement, in a transaction of its own, on any connection.

        Args:
            query: SQL with psycopg2 placeholders.
            params: Their values.
            retry: Whether the statement may be run again if the connection proves to have been
                lost; after a restart of the database that is the case for every pooled one.

        Raises:
            DatabaseUnavailable: No connection, or none that answered in time.
            DatabaseError: The database refused the statement.
        """
        return await self._run(lambda connection: connection.fetch(query, params), retry=retry)

    async def _run(
        self, work: Callable[[Connection], Awaitable[list[Row]]], *, retry: bool
    ) -> list[Row]:
        used: Connection | None = None
        try:
            async with self._acquire() as connection:
                used = connection
                return await work(connection)
        except DatabaseUnavailable as exc:
            lost = used is not None and used.closed and not isinstance(exc.__cause__, TimeoutError)
            if not (retry and lost):
                raise
        async with self._acquire(fresh=True) as connection:
            return await work(connection)

    async def fetch_one(self, query: str, params: Params = None, *, retry: bool = True) -> Row:
        """`fetch()` for a statement that always returns one row."""
        return (await self.fetch(query, params, retry=retry))[0]

    async def execute_script(self, script: str) -> None:
        """Run several statements as they are, on a connection of their own, without a time limit.

        Raises:
            DatabaseError, DatabaseUnavailable: As `fetch()`.
        """
        connection = await connect(
            self._dsn,
            connect_timeout=self._connect_timeout,
            query_timeout=3600.0,
            application_name=self._application_name,
            # It may begin transactions of its own.
            server_timeout=False,
        )
        try:
            await connection.fetch(script)
        finally:
            connection.close()

    async def close(self) -> None:
        """Close what is idle now, and the rest when it comes back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
