"""Every command and snippet of README.md and docs/ is executed, or checked where it cannot be.

The blocks of a page are run from top to bottom, on a database of its own that has the schema.
What happens to one follows from its language:

=================  ===============================================================================
``sql``            executed, and committed
``sh``, ``bash``   executed by ``bash -euo pipefail`` in a copy of the checkout (of links);
                   ``.venv/bin`` is in the PATH. `PLACEHOLDERS` replaces addresses; a server on the
                   page's database answers at ``http://127.0.0.1:8080``. ``$SSE_KEY`` is a key.
``console``        the lines after ``$ `` likewise
``python``         executed, all of a page in one namespace; ``user_id`` and ``SECRET`` are there
``js``             executed as a module in a page of the service, with ``token`` and ``url``
``html``           loaded as a page of the service: no error, and all that it loads is there
``json``, ``yaml``, ``toml``, ``ini``    parsed
``nginx``, ``jsx`` must be a file or an excerpt (below)
``text``           not looked at. So is ``mermaid``, which the strict build draws
=================  ===============================================================================

A fence with ``title="shop.py"`` is a file. A page with files has a test that runs them: `FILES`.

HTML comments right before a block change that:

``<!-- not run: REASON -->``   not executed; counted, and no more than `NOT_RUN` of them. The syntax
                               of shell commands and the names of settings in them are checked.
``<!-- as: COMMAND -->``       executed instead of the block
``<!-- until: TEXT -->``       left running from when it has printed this, to the end of the page
``<!-- prints: TEXT -->``      its output must contain this
``<!-- from: PATH -->``        an excerpt of a file of the repository, which has tests of its own
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import dataclasses
import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psycopg2
import pytest
import yaml
from playwright.async_api import Browser, Page, Request, Response, Route

from sse_server.config import Settings
from sse_server.embedded import EmbeddedPostgres
from tests.browser.test_nginx import Nginx, free_ports
from tests.conftest import (
    ROOT,
    TEMPLATE,
    ServerProcess,
    ServerProcessFactory,
    connect,
    eventually,
    execute,
    require_program,
)
from tests.streaming import query

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

# Blocks that nobody here can run. More of them need a reason better than "it is work".
NOT_RUN = 13

SHELL = ("sh", "bash", "console")
DATA = ("json", "yaml", "toml", "ini")
SCRIPTED = ("sql", "python", *SHELL)
UNCHECKED = ("text", "mermaid")
LANGUAGES = {*SCRIPTED, *DATA, *UNCHECKED, "js", "html", "nginx", "jsx"}
MARKERS = {"not run", "as", "until", "prints", "from"}

SECRET = "a-secret-of-an-application-that-is-long-enough"
AUDIENCE = "notifications"
JWT: dict[str, str | None] = {"SSE_JWT_SECRET": SECRET, "SSE_JWT_AUDIENCE": AUDIENCE}

# What a page needs to be there that is not its subject.
PREPARED = {"README.md": "CREATE SCHEMA notifications"}

pytestmark = pytest.mark.timeout(120)


# Reading the pages


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    language: str
    title: str | None
    code: str
    markers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not {"not run", "from"} & set(self.markers) and self.title is None


_FENCE = re.compile(
    r"(?P<markers>(?:^[ ]*<!--.*?-->\n)*)^(?P<indent>[ ]*)```(?P<info>[^\n`]*)\n"
    r"(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        markers = {}
        for comment in re.findall(r"<!--\s*(.*?)\s*-->", match["markers"]):
            name, colon, value = comment.partition(":")
            if colon:
                markers[name.strip()] = value.strip()
        found.append(
            Block(
                page=path.relative_to(ROOT).as_posix(),
                line=text.count("\n", 0, match.start("info")) + 1,
                language=language,
                title=title[1] if title else None,
                code=textwrap.dedent(match["code"]),
                markers=markers,
            )
        )
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def chosen(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def pages_with(*languages: str) -> list[str]:
    return sorted({block.page for block in chosen(*languages) if block.runs})


def files_of(*pages: str) -> dict[str, str]:
    """The files that are on these pages, by name."""
    return {block.title: block.code for block in BLOCKS if block.page in pages and block.title}


def test_every_block_is_known() -> None:
    """Every block has a language that is checked, and markers that mean something."""
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: {block.language or 'no language'}"
        assert set(block.markers) <= MARKERS, f"{block}: {block.markers}"
        if block.language in ("nginx", "jsx"):
            assert block.title or "from" in block.markers, f"{block}: a file or an excerpt"
    files = {block.page for block in BLOCKS if block.title}
    assert files <= set(FILES), f"no test runs the files of {files - set(FILES)}"


def test_few_blocks_are_not_run() -> None:
    """Blocks that are not run are few, and each says why."""
    left_out = [block for block in BLOCKS if "not run" in block.markers]
    for block in left_out:
        print(f"{block}: {block.markers['not run']}")
        assert len(block.markers["not run"]) > 10, f"{block}: why?"
    assert len(left_out) <= NOT_RUN, [str(block) for block in left_out]


@pytest.mark.parametrize("block", chosen(*DATA), ids=str)
def test_data(block: Block) -> None:
    """Data can be parsed."""
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "yaml":
        list(yaml.safe_load_all(block.code))
    elif block.language == "toml":
        tomllib.loads(block.code)
    else:
        parser = configparser.RawConfigParser(strict=False, interpolation=None)
        parser.read_string(block.code)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "from" in block.markers], ids=str)
def test_excerpt(block: Block) -> None:
    """An excerpt is what stands in the file, which has tests of its own."""
    whole = (ROOT / block.markers["from"]).read_text(encoding="utf-8")
    assert textwrap.dedent(block.code).strip() in "\n".join(
        [whole, *(_dedented(whole, block.code))]
    )


def _dedented(whole: str, excerpt: str) -> Iterator[str]:
    """The lines of the file from where the excerpt begins, without their indentation."""
    first = excerpt.strip().splitlines()[0].strip()
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        if line.strip() == first:
            yield textwrap.dedent("\n".join(lines[number : number + len(excerpt.splitlines())]))


def test_settings_exist() -> None:
    """Every setting that a page names is one."""
    known = {f"SSE_{name.upper()}" for name in Settings.model_fields}
    # Variables of the pages' own, of the page about the client, and of deploy/Caddyfile.
    known |= {"SSE_KEY", "SSE_SERVER", "SSE_SITE", "SSE_UPSTREAMS"}
    for path in PAGES:
        named = set(re.findall(r"\bSSE_[A-Z_]+[A-Z]\b", path.read_text(encoding="utf-8")))
        assert named <= known, f"{path.name}: {named - known}"


def test_readme_links() -> None:
    """What README.md links to is there; the strict build looks after the other pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert targets
    assert not missing


@pytest.mark.parametrize("block", chosen("sh", "bash"), ids=str)
def test_shell_syntax(block: Block) -> None:
    """Shell commands can be parsed, also those that are not run."""
    done = subprocess.run(
        ["bash", "-n"], input=block.code, capture_output=True, text=True, timeout=10, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Running them


class Running:
    """A page that is being run: its database, its directory, its processes."""

    def __init__(
        self, page: str, dsn: str, directory: Path, server_process: ServerProcessFactory
    ) -> None:
        self.page = page
        self.dsn = dsn
        self.database: str | None = dsn
        self.directory = directory
        self.url: str | None = None
        self._server_process = server_process
        self._processes: list[subprocess.Popen[str]] = []
        self._connection = connect(dsn)
        for path in ROOT.iterdir():
            if path.name not in (".git", "build", "jar"):
                (directory / path.name).symlink_to(path)
        if not (directory / ".venv").exists():
            (directory / ".venv").symlink_to(sys.prefix)
        if page in PREPARED:
            execute(dsn, PREPARED[page])

    def close(self) -> None:
        self._connection.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdout is not None:
                process.stdout.close()

    @property
    def _environment(self) -> dict[str, str]:
        environment = {
            **os.environ,
            "SSE_JWT_SECRET": SECRET,
            "SSE_JWT_AUDIENCE": AUDIENCE,
            "PATH": os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ["PATH"])),
            "SSE_PORT": "0",
            "SSE_DATA_DIR": str(self.directory / "data"),
        }
        if self.database is not None:
            environment["DATABASE_URL"] = self.database
        return environment

    async def sql(self, block: Block) -> None:
        await asyncio.to_thread(query, self._connection, block.code.replace("%", "%%"))

    async def shell(self, block: Block) -> None:
        code = block.markers.get("as", block.code)
        if block.language == "console":
            lines = [line[2:] for line in code.splitlines() if line.startswith("$ ")]
            assert lines, f"{block}: no line begins with '$ '"
            code = "\n".join(lines)
        if "until" in block.markers or "as" in block.markers:
            await self._start(block, code)
        else:
            output = await self._finish(block, await self._replaced(code))
            assert block.markers.get("prints", "") in output, f"{block}\n{output}"

    async def _replaced(self, code: str) -> str:
        """With the addresses that hold here."""
        if re.search(PLACEHOLDERS, code):
            if self.url is None:
                server = await self._server_process(wait=True, **JWT)
                self.url = server.url
            code = re.sub(PLACEHOLDERS, self.url, code)
        if "$SSE_KEY" in code:
            arguments = [sys.executable, "-m", "sse_server", "service", "add", "docs"]
            done = await asyncio.to_thread(
                subprocess.run,
                arguments,
                env=self._environment,
                cwd=self.directory,
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
            code = f"SSE_KEY={done.stdout.strip()}\n{code}"
        return code

    async def _finish(self, block: Block, code: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-euo", "pipefail", "-c", code],
            env=self._environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        return done.stdout

    async def _start(self, block: Block, code: str) -> None:
        own = f"{self.dsn}&" if "?" in self.dsn else f"{self.dsn}?"
        code = re.sub(r"postgresql://user:password@host/\w+\?", lambda _: own, code)
        code = code.replace("--port 8080", "--port 0")
        named = re.search(r"DATABASE_URL='([^']+)'", code)
        self.database = named[1] if named else None
        process = self._spawn(code)
        assert process.stdout is not None
        awaited = block.markers.get("until", "listening on")
        output: list[str] = []
        told = threading.Event()

        def read(stream: Any) -> None:
            with contextlib.suppress(ValueError):  # closed
                for line in stream:
                    output.append(line)
                    if awaited in line:
                        told.set()
            told.set()

        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        await asyncio.to_thread(told.wait, 60)
        assert any(awaited in line for line in output), f"{block}\n{''.join(output)}"
        if found := re.search(r"listening on (https?://\S+)", "".join(output)):
            self.url = found[1]

    def _spawn(self, code: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", code],
            env=self._environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    async def python(self, blocks: list[Block]) -> None:
        prelude = f"user_id, SECRET = 'alice', {SECRET!r}\n"
        await self._finish_python(prelude + "\n".join(block.code for block in blocks))

    async def _finish_python(self, code: str) -> None:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", code],
            env=self._environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{self.page}\n{done.stderr}"


PLACEHOLDERS = r"http://127\.0\.0\.1:8080|https://notify\.example\b|https://push\.example\.com"


@pytest.fixture
def roles(cluster: EmbeddedPostgres) -> Iterator[None]:
    """Roles are the cluster's: those that a page makes go with it."""
    statement = "SELECT rolname FROM pg_roles"
    connection = connect(cluster.dsn("postgres"))
    before = set(query(connection, statement))
    yield
    for (name,) in set(query(connection, statement)) - before:
        execute(cluster.dsn("postgres"), f'DROP ROLE "{name}"')
    connection.close()


@pytest.fixture
def dsn(cluster: EmbeddedPostgres, template: str, roles: None) -> Iterator[str]:
    """As in conftest.py, but gone before the roles are."""
    assert template == TEMPLATE
    execute(cluster.dsn("postgres"), f"CREATE DATABASE documented TEMPLATE {template}")
    yield cluster.dsn("documented")
    execute(cluster.dsn("postgres"), "DROP DATABASE documented WITH (FORCE)")


@pytest.mark.parametrize("page", pages_with(*SCRIPTED))
async def test_page(
    page: str, dsn: str, public_dir: Path, server_process: ServerProcessFactory
) -> None:
    """What a page tells its reader to enter works, in that order."""
    directory = public_dir / "checkout"
    directory.mkdir()
    directory.chmod(0o755)
    running = Running(page, dsn, directory, server_process)
    try:
        for block in [block for block in chosen(*SCRIPTED) if block.page == page and block.runs]:
            try:
                if block.language == "sql":
                    await running.sql(block)
                elif block.language in SHELL:
                    await running.shell(block)
            except psycopg2.Error as exc:
                raise AssertionError(f"{block}: {exc}") from exc
        await running.python(
            [block for block in chosen("python") if block.page == page and block.runs]
        )
    finally:
        running.close()


# In the browser


@contextlib.asynccontextmanager
async def watched(browser: Browser) -> AsyncIterator[tuple[Page, list[str]]]:
    """A page, and what goes wrong in it."""
    faults: list[str] = []
    context = await browser.new_context()
    page = await context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))

    def answered(response: Response) -> None:
        # Nobody is signed in yet, in some. A token that is refused is another matter.
        asked = response.status == 401 and response.request.method == "GET"
        if response.status >= 400 and not asked:
            faults.append(f"{response.status} {response.url}")

    page.on("response", answered)
    yield page, faults
    await context.close()


def token() -> str:
    """As docs/security.md makes one; the page's own code does."""
    [block] = [block for block in chosen("python") if block.page == "docs/security.md"]
    namespace: dict[str, Any] = {"user_id": "alice", "SECRET": SECRET}
    exec(compile(block.code, str(block), "exec"), namespace)
    return str(namespace["token"])


async def test_scripts(browser: Browser, server_process: ServerProcessFactory) -> None:
    """JavaScript and HTML do in a browser what they say, without an error."""
    server = await server_process(wait=True, **JWT)
    blocks = [block for block in chosen("js", "html") if block.runs]
    assert blocks
    async with watched(browser) as (page, faults):
        served = {"html": "", "js": ""}

        async def answer(route: Route, request: Request) -> None:
            kind = "js" if request.url.endswith(".js") else "html"
            content_type = {"js": "text/javascript", "html": "text/html"}[kind]
            await route.fulfill(body=served[kind], content_type=content_type)

        await page.route(f"{server.url}/documented.*", answer)
        for block in blocks:
            if block.language == "js":
                values = f"var token = {token()!r}, url = {server.url!r};"
                served["js"] = f"{block.code}\nwindow.done = true;"
                served["html"] = (
                    f"<script>{values}</script><script type=module src=/documented.js></script>"
                )
            else:
                served["html"] = f"<!doctype html><body>{block.code}<script>done = true</script>"
            await page.goto(f"{server.url}/documented.html")
            try:
                await page.wait_for_function("window.done === true", timeout=15_000)
            except Exception as exc:
                raise AssertionError(f"{block}: {faults}") from exc
            assert not faults, f"{block}: {faults}"


# The files of the how-tos

OUT_OF_STOCK = "Something we do not have"

FASTAPI = """
import json
from fastapi.testclient import TestClient
import shop

client = TestClient(shop.app)
assert client.get("/").status_code == 200
assert client.post("/orders", json={"item": "A lamp"}).status_code == 401
client.headers["X-User"] = "alice"
assert client.post("/orders", json={"item": "A lamp"}).status_code == 201
assert client.post("/orders", json={"item": "@"}).status_code == 409
print(json.dumps(client.get("/notification-token").json()))
"""

DJANGO = """
import json, os
import django
from django.conf import settings
import psycopg2.extensions

dsn = psycopg2.extensions.parse_dsn(os.environ["DATABASE_URL"])
settings.configure(
    SECRET_KEY="x" * 50, ALLOWED_HOSTS=["*"], ROOT_URLCONF="shop.urls", STATIC_URL="static/",
    LOGIN_URL="/sign-in", SSE_JWT_SECRET=os.environ["SSE_JWT_SECRET"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes",
                    "django.contrib.sessions", "django.contrib.staticfiles", "shop"],
    MIDDLEWARE=["django.contrib.sessions.middleware.SessionMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": dsn["dbname"],
                           "HOST": dsn["host"], "PORT": dsn["port"], "USER": dsn["user"]}},
)
django.setup()
from django.core.management import call_command
from django.test import Client

call_command("migrate", run_syncdb=True, verbosity=0)
from django.contrib.auth.models import User

client = Client()
assert client.post("/orders", {"item": "A lamp"}).status_code == 302  # to the sign-in
client.force_login(User.objects.create(pk=7, username="alice"))
assert b"notification-inbox" in client.get("/").content
assert client.post("/orders", {"item": "A lamp"})["Location"] == "/"
assert client.post("/orders", {"item": "@"}).status_code == 409
from shop.models import Order
assert Order.objects.count() == 1
print(json.dumps(client.get("/notification-token").json()))
"""

SQLALCHEMY = """
import json, os
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from notifications import notify, notify_many
from tokens import notification_token

engine = create_engine(os.environ["SQLALCHEMY_URL"])
with Session(engine) as session, session.begin():
    notify(session, "alice", "status_change", "We have your order: A lamp", "/orders/1")
with Session(engine) as session:
    notify(session, "alice", "status_change", "We have your order: @")
    session.rollback()
with Session(engine) as session, session.begin():
    [[user, outcome, id]] = notify_many(session, ["bob"], "status_change", "Hello")
    assert (user, outcome) == ("bob", "created")
    assert id > 0
print(json.dumps({"token": notification_token("alice", os.environ["SSE_JWT_SECRET"])}))
"""

# By page, what uses its files; `None` if a test of its own does.
FILES: dict[str, str | None] = {
    "docs/how-to/django.md": DJANGO,
    "docs/how-to/fastapi.md": FASTAPI,
    "docs/how-to/flask.md": None,
    "docs/how-to/page.md": None,
    "docs/how-to/sqlalchemy.md": SQLALCHEMY,
}


@pytest.fixture
async def shop(
    dsn: str, server_process: ServerProcessFactory
) -> tuple[ServerProcess, dict[str, str]]:
    """The service with its tables in the schema push, and the application's environment."""
    execute(dsn, "DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE SCHEMA push")
    [created] = [
        statement
        for block in chosen("sql")
        if block.page == "docs/how-to/sql.md"
        for statement in re.findall(r"CREATE TABLE orders [^;]+;", block.code)
    ]
    execute(dsn, created)
    server = await server_process(
        wait=True,
        DATABASE_URL=f"{dsn}&options=-csearch_path%3Dpush",
        SSE_TRUSTED_PROXIES="127.0.0.1",
        SSE_DEMO=None,
        **JWT,
    )
    environment = {
        **os.environ,
        "SSE_JWT_SECRET": SECRET,
        "DATABASE_URL": dsn,
        "SQLALCHEMY_URL": dsn.replace("postgresql:", "postgresql+psycopg2:", 1),
        "SECRET_KEY": "the application's own",
        "PYTHONWARNINGS": "ignore",
    }
    return server, environment


def write(directory: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")


def sent(dsn: str) -> list[tuple[Any, ...]]:
    connection = connect(dsn)
    try:
        return query(
            connection,
            "SELECT user_id, message FROM push.notifications WHERE user_id <> 'bob' ORDER BY id",
        )
    finally:
        connection.close()


@pytest.mark.parametrize("page", [page for page, driver in FILES.items() if driver])
async def test_application(
    page: str, shop: tuple[ServerProcess, dict[str, str]], dsn: str, tmp_path: Path
) -> None:
    """The notification commits with the order or not at all, and the token signs its user in."""
    server, environment = shop
    write(tmp_path, files_of(page))
    driver = (FILES[page] or "").replace("@", OUT_OF_STOCK)
    if page == "docs/how-to/django.md":
        execute(dsn, "DROP TABLE orders")
        (tmp_path / "shop" / "__init__.py").touch()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", driver],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    user = "7" if page == "docs/how-to/django.md" else "alice"
    assert sent(dsn) == [(user, "We have your order: A lamp")]
    signed = json.loads(done.stdout)["token"]
    async with (
        aiohttp.ClientSession(server.url) as session,
        session.post("/api/session", headers={"Authorization": f"Bearer {signed}"}) as answer,
    ):
        assert answer.status == 200, await answer.text()
        assert (await answer.json())["user_id"] == user


def run_flask(port: int, environment: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "shop", "run", "--port", str(port)],
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class ShopSite(Nginx):
    """The real nginx with the location of docs/how-to/page.md, in front of an application."""

    location: str
    application: str

    def configure(self, *servers: str, **_: Any) -> None:
        [service] = servers
        location = self.location.replace("http://127.0.0.1:8080", service)
        self.write(
            "site.conf",
            f"server {{ listen 127.0.0.1:{self.ports[1]}; {location}"
            f" location / {{ proxy_pass {self.application};"
            " proxy_set_header Host $http_host; } }",
        )


async def test_flask_application(
    shop: tuple[ServerProcess, dict[str, str]], dsn: str, public_dir: Path, browser: Browser
) -> None:
    """Page, proxy and Flask together: an order placed in the browser arrives in its inbox."""
    server, environment = shop
    files = files_of("docs/how-to/flask.md", "docs/how-to/page.md")
    write(public_dir, files)
    port = free_ports()[0]
    application = run_flask(port, environment, public_dir)
    nginx = ShopSite(public_dir)
    nginx.location = files["notifications.conf"]
    nginx.application = f"http://127.0.0.1:{port}"
    try:
        await nginx.start(server.url)
        url = nginx.plain_url

        async def answers() -> bool:
            async with aiohttp.ClientSession(url) as session, session.get("/") as answer:
                return answer.status == 200

        for _ in range(3000):
            if await answers():
                break
            await asyncio.sleep(0.01)
        async with watched(browser) as (page, faults):
            await page.goto(url)
            await page.evaluate(
                "fetch('/sign-in', {method: 'POST', body: new URLSearchParams({user: 'alice'})})"
            )
            await page.reload()
            await page.get_by_role("button", name="Order a lamp").click()
            await page.wait_for_function(
                """async () => {
                  const { sharedClient } = await import("/notifications/static/shared.js");
                  const now = sharedClient("/notifications/api").getSnapshot();
                  return now.status === "live" &&
                    now.notifications[0]?.message === "We have your order: A lamp";
                }""",
                timeout=20_000,
            )
            bell = page.get_by_role("button", name="Notifications, 1 unread")
            await bell.wait_for(timeout=10_000)
            assert not faults, faults
            status = await page.evaluate(
                "fetch('/orders', {method: 'POST', body: new URLSearchParams({item: "
                f"'{OUT_OF_STOCK}'}})}}).then((answer) => answer.status)"
            )
            assert status == 409
        assert sent(dsn) == [("alice", "We have your order: A lamp")]
        async with aiohttp.ClientSession(url) as session:
            for path in ("livez", "readyz", "metrics"):
                async with session.get(f"/notifications/{path}") as answer:
                    assert answer.status == 404
    finally:
        nginx.stop()
        application.terminate()
        application.wait(15)


# The site


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the site is, built as ``make docs`` does."""
    require_program("npm", "install Node.js 20 or newer")
    directory = tmp_path_factory.mktemp("site")
    # Not --quiet: it hides the warnings from --strict as well.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


async def test_site(site: str, browser: Browser) -> None:
    """The strict build has no warning; the pages draw their diagrams and load nothing elsewhere."""
    async with watched(browser) as (page, faults):
        elsewhere: list[str] = []

        async def only_here(route: Route, request: Request) -> None:
            if urlsplit(request.url).netloc == urlsplit(site).netloc or request.url[:5] == "blob:":
                await route.continue_()
            else:
                elsewhere.append(request.url)
                await route.abort()

        await page.route("**/*", only_here)
        for name in ("index", "architecture", "guarantees", "how-to/page"):
            await page.goto(f"{site}/{name}.html")
            diagrams = page.locator("div.mermaid")  # drawn ones; until then it is pre.mermaid
            expected = sum(
                block.language == "mermaid" and block.page == f"docs/{name}.md" for block in BLOCKS
            )
            await eventually(_counts(diagrams, expected), 20)
            for number in range(expected):
                box = await diagrams.nth(number).bounding_box()
                assert box is not None
                assert box["height"] > 60
        assert await page.locator("nav .md-nav__link", has_text="Tutorial").count()
        assert not elsewhere
        assert not faults
        if shown := os.environ.get("DOCS_SCREENSHOT"):
            await page.set_viewport_size({"width": 1280, "height": 900})
            await page.goto(f"{site}/index.html")
            await eventually(_counts(page.locator("div.mermaid"), 1), 20)
            await page.screenshot(path=shown)


def _counts(locator: Any, expected: int) -> Any:
    async def reached() -> bool:
        return int(await locator.count()) == expected

    return reached
