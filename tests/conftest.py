"""What the tests share: a real PostgreSQL, the real process, a real browser."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import hypothesis
import psycopg2
import pytest
from aiohttp.test_utils import BaseTestServer, TestClient
from playwright.async_api import Browser, async_playwright
from psycopg2 import sql
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.config import Settings
from sse_server.embedded import EmbeddedPostgres
from tests.documented import documented

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "sse_template"

# A loaded machine is no reason to fail a property.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

T = TypeVar("T")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: tests of a service mostly wait."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The soak, which mostly waits, comes first: the other workers take the rest meanwhile."""
    items.sort(key=lambda item: "soak" not in item.path.parts)


def require_program(name: str, how: str) -> Path:
    """Return the path of an external program; without it, skip the test and say how to get it.

    In CI (``CI=true``) nothing may be missing: there the test fails.
    """
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is not None:
        return Path(path)
    reason = f"{name} is missing: {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


async def eventually(
    predicate: Callable[[], T | Awaitable[T]], timeout: float = 10.0, message: str = ""
) -> T:
    """Wait until `predicate` holds, and return what it returned.

    The only place where tests let time pass. Fails after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = predicate()
        value: T = await result if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(
                message or f"not within {timeout} s: {inspect.getsource(predicate).strip()}"
            )
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Keep the settings and database of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("SSE_", "PG")) or name == "DATABASE_URL":
                patch.delenv(name)
        yield


# PostgreSQL


@pytest.fixture
def public_dir() -> Iterator[Path]:
    """A directory that any account can reach, as the one that root runs PostgreSQL as."""
    with tempfile.TemporaryDirectory(prefix="sse-tests-", ignore_cleanup_errors=True) as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="session")
def cluster() -> Iterator[EmbeddedPostgres]:
    """The cluster of the whole run. A test may restart or crash it, if it ends with it running."""
    with tempfile.TemporaryDirectory(prefix="sse-tests-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(Path(name), options={"fsync": "off", "max_connections": "300"})
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()


def connect(dsn: str) -> Connection:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    return connection


def execute(dsn: str, statement: str | sql.Composable) -> None:
    connection = connect(dsn)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()


@pytest.fixture(scope="session")
def template(cluster: EmbeddedPostgres) -> str:
    """The name of a database with the schema, to clone."""
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {TEMPLATE}")
    execute(cluster.dsn(TEMPLATE), (ROOT / "schema.sql").read_text(encoding="utf-8"))
    execute(cluster.dsn("postgres"), f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")
    return TEMPLATE


_numbers = itertools.count(1)


@pytest.fixture
def dsn(cluster: EmbeddedPostgres, template: str) -> Iterator[str]:
    """A database of the test's own, with the schema applied."""
    name = f"test_{next(_numbers)}"
    execute(cluster.dsn("postgres"), f"CREATE DATABASE {name} TEMPLATE {template}")
    yield cluster.dsn(name)
    execute(cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def db(dsn: str) -> Iterator[Connection]:
    """A connection to the test's database that commits each statement."""
    connection = connect(dsn)
    yield connection
    connection.close()


# The application in this process

SettingsFactory = Callable[..., Settings]
Client = TestClient[Any, Any]


@pytest.fixture
def settings(dsn: str) -> SettingsFactory:
    """Build the settings for the test's database: ``settings(heartbeat_seconds=1)``."""

    def build(**changes: Any) -> Settings:
        values: dict[str, Any] = {"database_url": dsn, "demo": True} | changes
        return Settings(_env_file=None, **values)

    return build


class DocumentedClient(TestClient[Any, Any]):
    """A test client that fails on an answer which the OpenAPI document does not have."""

    def __init__(self, server: BaseTestServer, **arguments: Any) -> None:
        super().__init__(server, middlewares=(documented,), **arguments)


@pytest.fixture
def aiohttp_client_cls() -> type[DocumentedClient]:
    """What ``aiohttp_client`` makes."""
    return DocumentedClient


@pytest.fixture
async def client(
    aiohttp_client: Callable[..., Awaitable[Client]], settings: SettingsFactory
) -> Client:
    """A client of an application with the default settings, not signed in."""
    return await aiohttp_client(create_app(settings()))


# The real process


class ServerProcess:
    """``python -m sse_server``, as an operator runs it.

    Its output is read all the time, so that it never waits for us.
    """

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], cwd: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "sse_server", *arguments],
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self.popen.pid
        self.url = ""
        self._answered = threading.Event()
        self._lines: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._threads = [
            threading.Thread(target=self._read, args=(name, getattr(self.popen, name)), daemon=True)
            for name in self._lines
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._lines[name].append(line)
                if name == "stdout" and (found := re.search(r"listening on (https?://\S+)", line)):
                    self.url = found[1]
                    self._answered.set()
        self._answered.set()

    @property
    def stdout(self) -> str:
        return "".join(self._lines["stdout"])

    @property
    def stderr(self) -> str:
        return "".join(self._lines["stderr"])

    async def started(self, timeout: float = 30.0) -> None:
        """Wait until it listens."""
        await asyncio.to_thread(self._answered.wait, timeout)
        if not self.url:
            self.kill()
            pytest.fail(f"the server does not listen\n{self.stdout}\n{self.stderr}")

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.popen.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.popen.kill()

    async def wait(self, timeout: float = 20.0) -> int:
        """Wait until it has ended and all its output is read; return the exit status."""
        return await asyncio.to_thread(self.wait_blocking, timeout)

    def wait_blocking(self, timeout: float) -> int:
        status = self.popen.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        return status


class ServerProcessFactory(Protocol):
    """Starts a server: ``await server_process("--port", "0", SSE_LOG_LEVEL="DEBUG")``.

    Keyword arguments are environment variables; ``None`` unsets one. With ``wait=False`` it
    returns at once, for servers that are not to start.
    """

    async def __call__(
        self, *arguments: str, wait: bool = True, **environment: str | None
    ) -> ServerProcess: ...


@pytest.fixture
def server_process(dsn: str, tmp_path: Path) -> Iterator[ServerProcessFactory]:
    """Start servers on the test's database; whatever still runs at the end is ended."""
    processes: list[ServerProcess] = []

    async def start(*arguments: str, wait: bool = True, **environment: str | None) -> ServerProcess:
        # PYTHONPATH and another directory: no .env of the checkout must reach it.
        values: dict[str, str | None] = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": dsn,
            "SSE_PORT": "0",
            "SSE_DEMO": "1",
            **environment,
        }
        present = {name: value for name, value in values.items() if value is not None}
        process = ServerProcess(arguments, present, tmp_path)
        processes.append(process)
        if wait:
            await process.started()
        return process

    yield start
    for process in processes:
        if process.popen.poll() is None:
            process.terminate()  # first, so that one with a PostgreSQL of its own stops that
            try:
                process.popen.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait_blocking(15)


# The browser


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium, headless."""
    chromium = require_program("chromium", "install it, for example: apt install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium,
            headless=True,
            args=[
                "--no-sandbox",  # root cannot have one, and the only pages are our own
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        await browser.close()
