"""``sse-server doctor`` finds each of its faults when it is planted, and nothing where all is
well."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from psycopg2.extensions import connection as Connection  # noqa: N812
from psycopg2.extensions import parse_dsn

from sse_server.client import Service, parse_url, trust
from sse_server.database import Database
from sse_server.doctor import inside, outside
from sse_server.doctor.faults import FAULTS, Report
from sse_server.embedded import EmbeddedPostgres
from sse_server.operator import Operator
from sse_server.store import Store
from tests.browser.test_nginx import Nginx, holds_back, replace
from tests.commands import Run, runner, serving
from tests.conftest import (
    ServerProcess,
    ServerProcessFactory,
    connect,
    eventually,
    execute,
    require_program,
)
from tests.streaming import insert, query, sign_in

# Not a finding in most of the tests: their certificates live for an hour.
NO_DAYS = outside.Limits(certificate_days=0, first_event=2.0)


def expect(report: Report, *faults: str) -> None:
    """These faults were found, and no other."""
    assert {finding.fault for finding in report.findings} == set(faults), report.as_json()


async def examine(
    url: str,
    *,
    sign_in: outside.SignIn | None = outside.SignIn(user_id="doctor"),  # noqa: B008
    cafile: Path | None = None,
    limits: outside.Limits = NO_DAYS,
) -> Report:
    report = Report()
    tls = trust(cafile)
    service = Service(parse_url(url), tls=tls)
    try:
        await outside.examine_service(service, report, sign_in=sign_in, tls=tls, limits=limits)
    finally:
        await service.close()
    return report


@pytest.fixture
def run(dsn: str, tmp_path: Path) -> Run:
    """Run a command on the test's database."""
    return runner(dsn, tmp_path)


# Through the real nginx


class Changed(Nginx):
    """nginx with the site that is shipped, changed before it starts.

    A reload would leave the old workers their connections for a second, and then cut them.
    """

    change: Callable[[str], str]

    def configure(self, *servers: str, change: Callable[[str], str] | None = None) -> None:
        super().configure(*servers, change=change or self.change)


@pytest.fixture
def nginx(public_dir: Path) -> Iterator[Changed]:
    """Not yet started: see `behind()`."""
    proxy = Changed(public_dir)
    yield proxy
    proxy.stop()


async def behind(
    nginx: Changed,
    server_process: ServerProcessFactory,
    change: Callable[[str], str] = lambda site: site,
    **environment: str | None,
) -> ServerProcess:
    """A server behind nginx with a site that was changed."""
    values: dict[str, str | None] = {
        "SSE_TRUSTED_PROXIES": "127.0.0.1",
        "SSE_HEARTBEAT_SECONDS": "1",
        **environment,
    }
    server = await server_process(wait=True, **values)
    nginx.change = change
    await nginx.start(server.url)
    return server


def cafile(nginx: Changed) -> Path:
    return Path(nginx._certificate["SSE_TLS_CERT"])


async def test_healthy(
    nginx: Changed, server_process: ServerProcessFactory, run: Run, db: Connection
) -> None:
    """Of what is deployed as the documentation says it finds nothing, and leaves nothing behind."""
    await behind(nginx, server_process)
    result = await run(
        "doctor", nginx.url, "--cafile", cafile(nginx), "--certificate-days", "0", "--json"
    )
    assert (result.json["findings"], result.status) == ([], 0), result.stderr
    passed = {check["check"] for check in result.json["passed"]}
    assert {"HTTP/2", "buffering", "compression", "heartbeat", "caching", "clock"} <= passed
    assert {"triggers", "schema", "LISTEN and NOTIFY", "autovacuum", "retention"} <= passed
    assert [entry["check"] for entry in result.json["skipped"]] == ["/readyz"]
    assert query(db, "SELECT count(*) FROM sessions") == [(0,)]


async def test_found_on_the_command_line(
    nginx: Changed, server_process: ServerProcessFactory, run: Run
) -> None:
    """A finding says what, why and what to change, and the exit status is 1."""
    await behind(nginx, server_process)
    result = await run("doctor", nginx.url, "--cafile", cafile(nginx), "--wait", "1")
    assert result.status == 1
    assert "[certificate-expires]" in result.stdout
    assert "why:    From then on browsers refuse" in result.stdout
    assert "change: Renew it" in result.stdout
    assert result.stdout.endswith("\n1 finding.\n")


async def test_buffering(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A proxy that holds the stream back is found, though the stream never ends."""
    await behind(nginx, server_process, holds_back)
    started = time.monotonic()
    report = await examine(nginx.url, cafile=cafile(nginx))
    expect(report, "stream-buffered")
    assert time.monotonic() - started < 30


async def test_idle_timeout(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A proxy that waits for less than the heartbeat is found, and for how long it waits."""

    def impatient(site: str) -> str:
        return replace(site, "proxy_read_timeout 330s;", "proxy_read_timeout 2s;")

    await behind(nginx, server_process, impatient, SSE_HEARTBEAT_SECONDS="30")
    limits = outside.Limits(certificate_days=0, wait=10)
    report = await examine(nginx.url, cafile=cafile(nginx), limits=limits)
    expect(report, "stream-cut")
    [finding] = report.findings
    silence = float(finding.what.split("after ")[1].split(" s")[0])
    assert 1.5 < silence < 5
    assert "heartbeat is 30 s" in finding.what


async def test_compression(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A proxy that compresses the stream is found."""
    await behind(
        nginx, server_process, lambda site: replace(site, "gzip off;", "gzip on; gzip_types *;")
    )
    report = await examine(nginx.url, cafile=cafile(nginx))
    expect(report, "stream-compressed")
    assert "gzip" in report.findings[0].what


async def test_http_1(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A proxy without HTTP/2 is found."""
    await behind(
        nginx, server_process, lambda site: replace(site, r"(listen .* ssl) http2;", r"\g<2>;")
    )
    expect(await examine(nginx.url, cafile=cafile(nginx)), "no-http2")


async def test_forwarded_headers(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A proxy that does not say what the browser asked for is found, by both of its effects."""
    await behind(
        nginx,
        server_process,
        lambda site: replace(site, r"proxy_set_header X-Forwarded-Proto .*;", ""),
    )
    report = await examine(nginx.url, cafile=cafile(nginx))
    expect(report, "proxy-hides-host", "cookie-not-secure")


async def test_nobody_behind_the_proxy(
    nginx: Changed, server_process: ServerProcessFactory
) -> None:
    """A proxy's own page is not taken for the service."""
    server = await behind(nginx, server_process)
    server.kill()
    await server.wait()
    expect(await examine(nginx.url, cafile=cafile(nginx)), "not-the-service")


async def test_untrusted_certificate(nginx: Changed, server_process: ServerProcessFactory) -> None:
    """A certificate that nobody trusts is found, and no token is sent over it."""
    await behind(nginx, server_process)
    expect(await examine(nginx.url), "certificate-invalid")


async def test_nobody_there() -> None:
    """A port that nobody listens on is a finding, and no crash."""
    expect(await examine("http://127.0.0.1:1"), "unreachable")
    expect(await examine("https://127.0.0.1:1"), "unreachable")


async def test_database_away(
    server_process: ServerProcessFactory, cluster: EmbeddedPostgres, dsn: str
) -> None:
    """A server without its database is found by what it says of itself."""
    server = await server_process(SSE_PROBE_SECONDS="0.2")
    name = parse_dsn(dsn)["dbname"]
    elsewhere = cluster.dsn("postgres")
    execute(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    try:
        execute(
            elsewhere,
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        )
        await eventually(lambda: "streams stay open" in server.stderr)
        report = await examine(server.url)
    finally:
        execute(elsewhere, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    expect(report, "not-ready", "stream-refused")
    assert "feed" in report.findings[0].what


# Through a stub that does what no proxy of ours can be made to do


class Stub:
    """A service that is well but for what a test changes."""

    def __init__(self) -> None:
        self.cookie = "sse_session=x; Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
        self.cache = "no-cache"
        self.skew = 0.0
        self.heartbeat = 0.5
        self.batch = 1  # so many pings at once
        self.silent = False
        self.status = 200
        self.metrics = 404
        self.date = True

    def now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.skew)

    async def session(self, request: web.Request) -> web.Response:
        return web.json_response({}, headers={"Set-Cookie": self.cookie})

    async def ready(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "failed": []}, headers=self.dated())

    def dated(self) -> dict[str, str]:
        return {"Date": format_datetime(self.now(), usegmt=True)} if self.date else {}

    async def stream(self, request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Cache-Control": self.cache}
        response = web.StreamResponse(status=self.status, headers=headers)
        await response.prepare(request)
        ready = f'{{"unread_count":0,"heartbeat_seconds":{self.heartbeat}}}'
        await response.write(f"retry: 1000\n\nevent: ready\ndata: {ready}\n\n".encode())
        while not self.silent:
            pings = b""
            for _ in range(self.batch):
                await asyncio.sleep(self.heartbeat)
                time_ = self.now().isoformat()
                pings += f'event: ping\ndata: {{"time":"{time_}"}}\n\n'.encode()
            await response.write(pings)
        await asyncio.Event().wait()
        return response

    async def answer(self, request: web.Request) -> web.Response:
        return web.Response(status=self.metrics)

    async def examined(self, host: str = "127.0.0.1", **limits: float) -> Report:
        app = web.Application()
        app.add_routes(
            [
                web.get("/readyz", self.ready),
                web.get("/metrics", self.answer),
                web.get("/api/session", self.session),
                web.delete("/api/session", self.session),
                web.post("/demo/session", self.session),
                web.get("/api/stream", self.stream),
            ]
        )
        async with serving(app, host) as url:
            return await examine(url, limits=outside.Limits(**limits))


async def test_the_stub_is_well() -> None:
    """What the following tests change is nothing to begin with."""
    expect(await Stub().examined())


@pytest.mark.parametrize("skew", [-40.0, 40.0])
async def test_clock_skew(skew: float) -> None:
    """A service whose clock differs is found, by its Date and by its heartbeats."""
    stub = Stub()
    stub.skew = skew
    report = await stub.examined()
    expect(report, "clock-skew")
    assert len(report.findings) == 2
    assert "behind" in report.findings[1].what if skew < 0 else "ahead" in report.findings[1].what
    expect(await stub.examined(skew=60))


@pytest.mark.parametrize(
    "cookie, faults",
    [
        ("sse_session=x; Path=/; SameSite=Lax", ["cookie-not-httponly"]),
        ("sse_session=x; Path=/; HttpOnly", ["cookie-samesite"]),
        ("sse_session=x; HttpOnly; SameSite=None", ["cookie-samesite"]),
        ("sse_session=x", ["cookie-not-httponly", "cookie-samesite"]),
        ("__Host-sse_session=x; HttpOnly; SameSite=None; Secure; Partitioned", []),
        ("other=x; HttpOnly; SameSite=Lax", ["not-the-service"]),
    ],
)
async def test_cookies(cookie: str, faults: list[str]) -> None:
    """A cookie whose flags were lost on the way is found."""
    stub = Stub()
    stub.cookie = cookie
    expect(await stub.examined(), *faults)


async def test_cacheable() -> None:
    """A stream that a cache may keep is found."""
    stub = Stub()
    stub.cache = "public, max-age=60"
    expect(await stub.examined(), "stream-cacheable")


async def test_heartbeats_in_batches() -> None:
    """A proxy that passes the first event on and gathers the others is found."""
    stub = Stub()
    stub.batch = 4
    expect(await stub.examined(wait=2.5), "stream-buffered")


async def test_heartbeats_missing() -> None:
    """A stream that stays open and falls silent is found."""
    stub = Stub()
    stub.silent = True
    expect(await stub.examined(wait=4.0), "heartbeat-late")


async def test_refused() -> None:
    """A stream that is answered with an error is found."""
    stub = Stub()
    stub.status = 502
    expect(await stub.examined(), "stream-refused")


async def test_plain_http_and_open_metrics() -> None:
    """Plain HTTP on an address that is not loopback is found, as are metrics for everybody."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        host = probe.getsockname()[0]
    stub = Stub()
    stub.metrics = 200
    expect(await stub.examined(host), "plain-http", "operator-endpoints-public")


async def test_signing_in(
    server_process: ServerProcessFactory, run: Run, db: Connection, tmp_path: Path
) -> None:
    """A cookie file will do instead of a sign-in; its session is not ended."""
    server = await server_process(SSE_HEARTBEAT_SECONDS="1")
    [key] = sign_in(db, "alice")
    file = tmp_path / "cookies.txt"
    for text in (
        f"sse_session={key}\n",
        f"# Netscape\n#HttpOnly_127.0.0.1\tFALSE\t/\tFALSE\t0\tsse_session\t{key}\n",
    ):
        file.write_text(text)
        result = await run("doctor", server.url, "--cookie-file", file, "--json")
        assert result.json["findings"] == []
        assert result.status == 0
    assert query(db, "SELECT user_id FROM sessions") == [("alice",)]
    file.write_text("nothing of use\n")
    result = await run("doctor", server.url, "--cookie-file", file)
    assert (result.status, "holds no cookie" in result.stderr) == (2, True)


# From the database


async def examine_inside(
    dsn: str,
    *,
    limits: inside.Limits | None = None,
    connections: int = 10,
    listen_dsn: str | None = None,
) -> Report:
    report = Report()
    database = Database(dsn, size=1, connect_timeout=5, query_timeout=10, listen_dsn=listen_dsn)
    try:
        await inside.examine_database(
            Store(database), report, limits=limits or inside.Limits(), connections=connections
        )
    finally:
        await database.close()
    return report


async def stamped(dsn: str) -> None:
    """Leave the schema as a server does."""
    database = Database(dsn, size=1, connect_timeout=5, query_timeout=10)
    await Store(database).apply_schema()
    await database.close()


@pytest.fixture
async def applied(dsn: str) -> str:
    """The test's database after a server has been started on it."""
    await stamped(dsn)
    return dsn


async def test_healthy_database(applied: str) -> None:
    """A database that a server has set up is well."""
    expect(await examine_inside(applied))


async def test_triggers_are_all_known(db: Connection) -> None:
    """The doctor looks for each trigger that schema.sql makes."""
    database = Database(db.dsn, size=1, connect_timeout=5, query_timeout=10)
    known = {(t.table, t.name) for t in await Operator(database).triggers()}
    await database.close()
    assert known == set(
        query(
            db,
            "SELECT tgrelid::regclass::text, tgname::text FROM pg_trigger WHERE NOT tgisinternal",
        )
    )


@pytest.mark.parametrize(
    "statement, faults",
    [
        ("DROP TRIGGER notifications_announce ON notifications", ["trigger-missing"]),
        ("ALTER TABLE sessions DISABLE TRIGGER ALL", ["trigger-disabled"]),
        ("ALTER TABLE notifications ENABLE REPLICA TRIGGER notifications_accept",
         ["trigger-disabled"]),
        ("ALTER TABLE notifications ENABLE ALWAYS TRIGGER notifications_accept", []),
        ("COMMENT ON TABLE settings IS 'an older one'", ["schema-differs"]),
        ("DROP TABLE settings", ["schema-missing"]),
        ("DELETE FROM settings", ["settings-missing"]),
        ("ALTER TABLE notifications SET (autovacuum_enabled = off)", ["autovacuum-off"]),
        ("GRANT SELECT ON settings TO PUBLIC", ["role-with-rights"]),
        ("GRANT INSERT ON notifications TO PUBLIC", ["role-with-rights"]),
        ("GRANT INSERT (user_id, event_type, message, link) ON notifications TO PUBLIC", []),
        ("GRANT SELECT ON audit_trail TO PUBLIC", []),
        ("UPDATE settings SET retention_days = 1", []),
    ],
)  # fmt: skip
async def test_what_was_changed_in_the_database(
    applied: str, statement: str, faults: list[str]
) -> None:
    """What somebody has changed or left out is found; what may be so is not."""
    execute(applied, statement)
    expect(await examine_inside(applied), *faults)


async def test_retention_behind(applied: str, db: Connection) -> None:
    """Rows that should have been deleted a day ago are found."""
    insert(db, "alice", "old", "new")
    query(db, "UPDATE notifications SET created_at = now() - interval '32 days' "
              "WHERE message = 'old'")  # fmt: skip
    report = await examine_inside(applied)
    expect(report, "retention-behind")
    assert report.findings[0].what.startswith("1 of")


async def test_dead_rows(applied: str, db: Connection) -> None:
    """A table with far more dead rows than autovacuum should leave is found."""
    query(db, "ALTER TABLE audit_log SET (autovacuum_enabled = off)")
    query(
        db,
        "INSERT INTO audit_log (actor, action, outcome) "
        "SELECT 'role:x', 'x', 'ok' FROM generate_series(1, 500)",
    )
    query(db, "DELETE FROM audit_log")

    # What a backend has counted it tells when it ends.
    db.close()
    with contextlib.closing(connect(applied)) as other:
        counted = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'audit_log'"
        await eventually(lambda: query(other, counted) == [(500,)])
    report = await examine_inside(applied, limits=inside.Limits(dead_rows=10))
    expect(report, "dead-rows", "autovacuum-off")


@pytest.mark.parametrize("writes", [True, False])
async def test_long_transactions(applied: str, writes: bool) -> None:
    """A transaction that is open for long is found, and whether it has written."""
    other = connect(applied)
    other.autocommit = False
    try:
        with other.cursor() as cursor:
            if writes:
                cursor.execute("SELECT pg_current_xact_id()")
            else:
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        report = await examine_inside(applied, limits=inside.Limits(transaction_seconds=0))
        expect(report, "long-transaction")
        assert f"Process {other.info.backend_pid} of postgres" in report.findings[0].what
        assert ("has written" in report.findings[0].what) == writes
        expect(await examine_inside(applied))
    finally:
        other.close()


async def test_too_few_connections(applied: str) -> None:
    """A server that may want more connections than it is allowed is found beforehand."""
    expect(await examine_inside(applied, connections=1000), "connections")
    expect(await examine_inside(applied, limits=inside.Limits(connections=0)), "connections")


async def test_limits_of_the_cluster(
    applied: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue of NOTIFY that fills, ids that run out and a clock that differs are found."""
    query(db, "LISTEN somebody")
    query(db, "BEGIN")  # it reads nothing while it is in a transaction
    other = connect(applied)
    try:
        for _ in range(20):
            query(other, "SELECT pg_notify('somebody', repeat(n::text || ' ', 1000)) "
                         "FROM generate_series(1, 100) n")  # fmt: skip
        limits = inside.Limits(queue_usage=1e-6, frozen_age=-1)
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 30)
        report = await examine_inside(applied, limits=limits)
        expect(report, "notify-queue", "wraparound", "database-clock-skew")
    finally:
        other.close()
        query(db, "COMMIT")


async def test_database_unreachable() -> None:
    """A database that does not answer is a finding, and no crash."""
    expect(await examine_inside("postgresql://127.0.0.1:1/x"), "database-unreachable")


@pytest.fixture
def own_cluster() -> Iterator[EmbeddedPostgres]:
    """A cluster whose settings a test may change."""
    with tempfile.TemporaryDirectory(prefix="sse-tests-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(
            Path(name),
            options={"fsync": "off", "max_prepared_transactions": "2", "wal_level": "replica"},
        )
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()


async def test_faults_of_the_cluster(own_cluster: EmbeddedPostgres) -> None:
    """Abandoned slots, prepared transactions, autovacuum that is off and a standby are found."""
    dsn = own_cluster.dsn("sse")
    await stamped(dsn)
    expect(await examine_inside(dsn))
    execute(dsn, "SELECT pg_create_physical_replication_slot('abandoned', true)")
    prepared = connect(dsn)
    query(prepared, "BEGIN")
    query(prepared, "SELECT pg_current_xact_id()")
    query(prepared, "PREPARE TRANSACTION 'forgotten'")
    prepared.close()
    execute(dsn, "ALTER SYSTEM SET autovacuum = off")
    execute(dsn, "SELECT pg_reload_conf()")

    with connect(dsn) as other:
        await eventually(lambda: query(other, "SHOW autovacuum") == [("off",)])
    other.close()
    report = await examine_inside(dsn, limits=inside.Limits(transaction_seconds=0))
    expect(report, "replication-slot", "prepared-transaction", "autovacuum-off")
    execute(dsn, "ROLLBACK PREPARED 'forgotten'")
    execute(dsn, "ALTER SYSTEM RESET autovacuum")

    # The standby of a primary that is nowhere: it recovers for ever.
    signal = own_cluster._cluster / "standby.signal"
    signal.touch()
    shutil.chown(signal, own_cluster._cluster.owner())
    own_cluster.restart()
    expect(await examine_inside(dsn), "database-read-only", "notify-lost", "replication-slot")


# A pooler


PGBOUNCER = """
[databases]
* = host={host} port={port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
logfile = {directory}/pgbouncer.log
pidfile = {directory}/pgbouncer.pid
"""


@pytest.fixture
def pgbouncer(public_dir: Path, dsn: str) -> Iterator[Callable[[str], Awaitable[str]]]:
    """Start one in a mode: returns the DSN of the test's database through it."""
    path = require_program("pgbouncer", "apt-get install pgbouncer")
    started: list[subprocess.Popen[bytes]] = []

    async def start(mode: str) -> str:
        parameters = parse_dsn(dsn)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        config = public_dir / "pgbouncer.ini"
        config.write_text(
            PGBOUNCER.format(
                host=parameters["host"],
                port=parameters["port"],
                listen=port,
                mode=mode,
                directory=public_dir,
            )
        )
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            # It refuses to run as root; and the cluster's socket is for its owner alone.
            owner = pwd.getpwnam(Path(parameters["host"]).owner())  # noqa: ASYNC240
            os.chown(public_dir, owner.pw_uid, owner.pw_gid)
            account = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        started.append(
            subprocess.Popen(  # noqa: ASYNC220
                [path, config], cwd=public_dir, stderr=subprocess.DEVNULL, **account
            )
        )

        def accepts() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        await eventually(accepts)
        return f"postgresql://postgres@127.0.0.1:{port}/{parameters['dbname']}"

    yield start
    for process in started:
        process.terminate()
        process.wait(15)


async def test_pooler_in_transaction_mode(
    applied: str, pgbouncer: Callable[[str], Awaitable[str]]
) -> None:
    """PgBouncer in transaction mode is found by what it does to LISTEN, unless that leads past."""
    pooled = await pgbouncer("transaction")
    expect(await examine_inside(pooled), "transaction-pooler")
    expect(await examine_inside(pooled, listen_dsn=applied))


async def test_pooler_in_session_mode(
    applied: str, pgbouncer: Callable[[str], Awaitable[str]]
) -> None:
    """PgBouncer in session mode does no harm, and nothing is found."""
    expect(await examine_inside(await pgbouncer("session")))


async def test_pooler_in_statement_mode(
    applied: str, pgbouncer: Callable[[str], Awaitable[str]]
) -> None:
    """PgBouncer in statement mode, which refuses what it would have to be tried with, is found."""
    expect(await examine_inside(await pgbouncer("statement")), "notify-lost")


def test_every_fault_is_planted() -> None:
    """There is no fault that none of these tests names."""
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in FAULTS if f'"{name}"' not in here and f"[{name}]" not in here] == []
