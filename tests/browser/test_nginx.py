"""Behind the proxies that are in front of it in the field, with the configuration that is shipped.

``deploy/nginx.conf`` and ``deploy/Caddyfile`` are run as they are, but for addresses and paths.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from playwright.async_api import Page
from psycopg2.extensions import connection as Connection  # noqa: N812
from yarl import URL

from sse_server.services import new_key
from tests.browser.conftest import Desk, DeskFactory, Table, agree, until
from tests.browser.test_outages import BACK, complete, insert_for
from tests.browser.test_outages import OUTAGE as LONG_OUTAGE
from tests.conftest import (
    ROOT,
    ServerProcess,
    ServerProcessFactory,
    eventually,
    require_program,
)
from tests.sse import EventReader
from tests.test_publish import add_service
from tests.test_tls import make_certificate, trusting

MEBIBYTE = 1024 * 1024
TABS = 8
OUTAGE = LONG_OUTAGE / 2

pytestmark = pytest.mark.timeout(120 + 2 * OUTAGE)

# As Debian's own nginx.conf, and where it makes a difference, worse: what the site does not set
# itself, it inherits.
MAIN = """
daemon off;
worker_processes 2;
worker_shutdown_timeout 1s;
pid nginx.pid;
error_log error.log notice;
events { worker_connections 512; }
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    sendfile on;
    tcp_nopush on;
    ssl_protocols TLSv1 TLSv1.1 TLSv1.2 TLSv1.3;
    ssl_prefer_server_ciphers on;
    gzip on;
    gzip_min_length 0;
    gzip_proxied any;
    gzip_types *;
    include site.conf;
}
"""


def replace(text: str, pattern: str, replacement: str) -> str:
    """`re.sub` on whole lines, for something that must be there."""
    changed, count = re.subn(rf"^([ \t]*){pattern}$", rf"\g<1>{replacement}", text, flags=re.M)
    assert count, f"{pattern} is not in the file that is shipped"
    return changed


def answers_all(status: int) -> Callable[[str], str]:
    """A change of the site: this status, and nginx's page of HTML, for everything."""
    return lambda site: replace(site, r"(ssl_certificate_key .*)", rf"\g<2> return {status};")


def holds_back(site: str) -> str:
    """A change of the site: as by an administrator who never met an event stream.

    HTTP/1.0 to the servers is nginx's own default; what comes in chunks it passes on even so.
    """
    site = replace(site, r"proxy_http_version 1\.1;", "proxy_http_version 1.0;")
    site = replace(site, "proxy_buffering off;", "proxy_buffering on;")
    return replace(site, "(proxy_cache off;)", r"\g<2> proxy_ignore_headers X-Accel-Buffering;")


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


class Proxy:
    """A program that listens for HTTPS at `url`, and with nginx for HTTP at `plain_url`.

    Attributes:
        serving: What it logs when it does.
    """

    serving: str

    def __init__(self, directory: Path, command: list[str]) -> None:
        self._directory = directory
        self._command = command
        self._popen: subprocess.Popen[bytes] | None = None
        self._certificate = make_certificate(directory)
        self.tls: ssl.SSLContext = trusting(self._certificate)
        self.ports = (0, 0)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.ports[0]}"

    @property
    def plain_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @property
    def log(self) -> str:
        path = self._directory / "error.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def write(self, name: str, text: str) -> None:
        (self._directory / name).write_text(text, encoding="utf-8")

    def configure(self, *servers: str) -> None:
        raise NotImplementedError

    async def start(self, *servers: str) -> None:
        """Start it in front of these servers, on ports that are free."""
        for _ in range(5):
            self.ports = free_ports()
            self.configure(*servers)
            popen = self._popen = self._spawn()
            await eventually(self._started, 30, "the proxy does not start")
            if popen.poll() is None:
                return
            if "address already in use" not in self.log.lower():
                break
        pytest.fail(f"the proxy does not start\n{self.log}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        with (self._directory / "error.log").open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._directory,
                env={**os.environ, "HOME": str(self._directory)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _started(self) -> bool:
        """Whether it serves, or has ended."""
        assert self._popen is not None
        return self._popen.poll() is not None or self.serving in self.log

    def signal(self, number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    def stop(self) -> None:
        if self._popen is not None and self._popen.poll() is None:
            self._popen.terminate()
            try:
                self._popen.wait(15)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait(15)


class Nginx(Proxy):
    """The real nginx with ``deploy/nginx.conf``."""

    serving = "start worker process "

    def __init__(self, directory: Path) -> None:
        path = require_program("nginx", "apt-get install nginx-light")
        super().__init__(
            directory,
            [str(path), "-p", f"{directory}/", "-e", f"{directory}/error.log", "-c", "nginx.conf"],
        )
        self.write("nginx.conf", MAIN)
        self._servers: tuple[str, ...] = ()

    def configure(self, *servers: str, change: Callable[[str], str] = lambda site: site) -> None:
        self._servers = servers
        site = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
        https, http = self.ports
        site = replace(site, r"listen \[::\]:\d+.*;", "")  # not every machine has IPv6
        site = replace(site, r"listen 443 (.*;)", rf"listen 127.0.0.1:{https} \g<2>")
        site = replace(site, "listen 80;", f"listen 127.0.0.1:{http};")
        site = replace(
            site,
            r"server 127\.0\.0\.1:8080 (.*;)",
            " ".join(rf"server {urlsplit(server).netloc} \g<2>" for server in servers),
        )
        for name, file in (
            ("ssl_certificate    ", self._certificate["SSE_TLS_CERT"]),
            ("ssl_certificate_key", self._certificate["SSE_TLS_KEY"]),
        ):
            site = replace(site, f"{name} .*;", f"{name} {file};")
        self.write("site.conf", change(site))

    async def reload(self, change: Callable[[str], str] = lambda site: site) -> None:
        """Take up a changed configuration, as ``systemctl reload nginx`` does."""
        self.configure(*self._servers, change=change)
        workers = self.log.count(self.serving)
        self.signal(signal.SIGHUP)
        await eventually(
            lambda: self.log.count(self.serving) > workers or "[emerg]" in self.log, 30
        )
        assert "[emerg]" not in self.log, self.log


class Caddy(Proxy):
    """The real Caddy with ``deploy/Caddyfile``."""

    serving = "serving initial configuration"

    def __init__(self, directory: Path) -> None:
        path = shutil.which("caddy")
        if path is None:
            pytest.skip("caddy is missing: apt-get install caddy")
        super().__init__(directory, [path, "run", "--config", f"{directory}/Caddyfile"])
        self._path = path

    def validate(self, file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._path, "validate", "--config", file],
            env={**os.environ, "HOME": str(self._directory)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def configure(self, *servers: str) -> None:
        site = (ROOT / "deploy" / "Caddyfile").read_text(encoding="utf-8")
        cert, key = self._certificate["SSE_TLS_CERT"], self._certificate["SSE_TLS_KEY"]
        # No port for a redirect, none for administration.
        site = replace(site, "(grace_period .*)", r"\g<2>\n auto_https off\n admin off")
        site = replace(
            site, r"{\$SSE_SITE:push\.example\.com} {", f"{self.url} {{\n tls {cert} {key}"
        )
        site = replace(
            site,
            r"reverse_proxy {\$SSE_UPSTREAMS:127\.0\.0\.1:8080} {",
            f"reverse_proxy {' '.join(urlsplit(server).netloc for server in servers)} {{",
        )
        self.write("Caddyfile", site)


@pytest.fixture
def nginx(public_dir: Path) -> Iterator[Nginx]:
    """Not yet started: ``await nginx.start(server.url)``."""
    proxy = Nginx(public_dir)
    yield proxy
    proxy.stop()


@pytest.fixture
def caddy(public_dir: Path) -> Iterator[Caddy]:
    """Not yet started: ``await caddy.start(server.url)``."""
    proxy = Caddy(public_dir)
    yield proxy
    proxy.stop()


async def serve(
    server_process: ServerProcessFactory, *arguments: str, **environment: str
) -> ServerProcess:
    """Start a server as the documentation says, for a proxy on this machine."""
    values: dict[str, str | None] = {
        "SSE_TRUSTED_PROXIES": "127.0.0.1",
        "SSE_API_CALLS_PER_MINUTE": "0",
        **environment,
    }
    return await server_process(*arguments, wait=True, **values)


async def again(server_process: ServerProcessFactory, server: ServerProcess) -> ServerProcess:
    """Start another server in the place of one that has ended."""
    return await serve(
        server_process, "--port", str(urlsplit(server.url).port), SSE_HEARTBEAT_SECONDS="1"
    )


@pytest.fixture
async def server(server_process: ServerProcessFactory) -> ServerProcess:
    """A server whose streams notice a dead line within seconds."""
    return await serve(server_process, SSE_HEARTBEAT_SECONDS="1")


@pytest.fixture
async def visitors() -> AsyncIterator[Callable[..., aiohttp.ClientSession]]:
    """Make a client that trusts the certificate: ``visitors(nginx, "127.0.0.2")``."""
    made: list[aiohttp.ClientSession] = []

    def build(proxy: Proxy, address: str = "127.0.0.1") -> aiohttp.ClientSession:
        visitor = aiohttp.ClientSession(
            proxy.url,
            connector=aiohttp.TCPConnector(ssl=proxy.tls, local_addr=(address, 0)),
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            timeout=aiohttp.ClientTimeout(total=60),
        )
        made.append(visitor)
        return visitor

    yield build
    for visitor in made:
        await visitor.close()


Visitors = Callable[..., aiohttp.ClientSession]


async def ask(
    visitor: aiohttp.ClientSession, method: str, url: str | URL, **rest: Any
) -> aiohttp.ClientResponse:
    """Send a request and read the whole answer."""
    async with visitor.request(method, url, **rest) as answer:
        await answer.read()
    return answer


def hang_up(answer: aiohttp.ClientResponse) -> None:
    """Leave in the middle. Not close(): over TLS that is a word at first, and the line stays."""
    assert answer.connection is not None
    assert answer.connection.transport is not None
    answer.connection.transport.abort()


async def open_streams(server: ServerProcess) -> int:
    """How many the server itself has."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as answer:
        return sum(
            int(float(line.split()[-1]))
            for line in (await answer.text()).splitlines()
            if line.startswith("sse_streams{")
        )


async def visit(desk: DeskFactory, proxy: Proxy, user: str | None = "alice") -> Desk:
    return await desk(proxy.url, user, ignore_https_errors=True)


async def protocols(page: Page) -> set[str]:
    """What the page and all that it loaded came by; what came from the cache came by nothing."""
    found: list[str] = await page.evaluate(
        """[...performance.getEntriesByType("navigation"),
            ...performance.getEntriesByType("resource")].map((entry) => entry.nextHopProtocol)"""
    )
    return set(found) - {""}


async def latency(desk: Desk, table: Table) -> float:
    """Seconds from the INSERT until every tab has been told."""
    started = time.monotonic()
    id = table.insert()

    async def told() -> bool:
        return all([id in await tab.told() for tab in desk.tabs])

    await until(told, 20, "the row does not arrive")
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def upstream(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that does with each connection what `answer` does, and hangs up."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(serve_one(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# What passes


async def test_live(
    nginx: Nginx, server_process: ServerProcessFactory, desk: DeskFactory, alice: Table
) -> None:
    """Over TLS and HTTP/2, in eight tabs: a row arrives at once, without a ping to push it out."""
    server = await serve(server_process, SSE_HEARTBEAT_SECONDS="60")
    await nginx.start(server.url)
    desk_ = await visit(desk, nginx)
    [tab] = desk_.tabs
    # The quickest of some: a busy machine is slow at times, a buffer is always.
    assert min([await latency(desk_, alice) for _ in range(5)]) < 1.0
    assert await protocols(tab.page) == {"h2"}
    [cookie] = await desk_.context.cookies()
    assert cookie["name"].startswith("__Host-")
    assert cookie["secure"]
    assert cookie["httpOnly"]

    while len(desk_.tabs) < TABS:
        await desk_.open()
    for tab in desk_.tabs:
        await tab.is_status("live", 20)
    assert min([await latency(desk_, alice) for _ in range(5)]) < 1.0
    for tab in desk_.tabs:
        await agree(tab, alice)
    assert await open_streams(server) == 1

    # A POST with the page's origin, through the form of the page and the inbox.
    await desk_.tabs[0].page.locator("#bell").click()
    await desk_.tabs[0].page.get_by_role("button", name="Mark all").first.click()
    await eventually(lambda: alice.unread() == [])
    for tab in desk_.tabs:
        await agree(tab, alice)


async def test_streams_are_not_compressed_or_held(
    nginx: Nginx, server_process: ServerProcessFactory, visitors: Visitors, alice: Table
) -> None:
    """A client that takes gzip gets a plain stream at once; scripts are compressed, answers not."""
    server = await serve(server_process, SSE_HEARTBEAT_SECONDS="60")
    await nginx.start(server.url)
    visitor = visitors(nginx)
    await ask(visitor, "POST", "/demo/session", json={"user_id": "alice"})
    async with visitor.get("/api/stream", headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        assert "Content-Encoding" not in answer.headers
        reader = EventReader(answer)
        await reader.next_of("ready", timeout=20)
        id = alice.insert()
        event = await reader.next_of("notification", timeout=20)
        assert event.json["id"] == id
        hang_up(answer)

    async with visitor.get("/static/client.js") as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert "class NotificationClient" in await answer.text()
    async with visitor.get("/api/session") as answer:
        assert "Content-Encoding" not in answer.headers


async def _none_open(server: ServerProcess) -> bool:
    return await open_streams(server) == 0


async def leave(proxy: Proxy, visitors: Visitors) -> None:
    """Open a stream, which must come as it is sent; leave, which must close the line onwards."""
    left = asyncio.Event()

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n17\r\nevent: ready\ndata: {}\n\n\r\n"
        )
        await reader.read()
        left.set()

    async with upstream(stream) as url:
        await proxy.start(url)
        answer = await visitors(proxy).get("/api/stream")
        await EventReader(answer).next_of("ready", timeout=20)
        hang_up(answer)
        await asyncio.wait_for(left.wait(), 20)


async def test_leaving(nginx: Nginx, visitors: Visitors) -> None:
    """A client that goes takes its stream with it, without waiting for the next event."""
    await leave(nginx, visitors)


async def test_origins(nginx: Nginx, server: ServerProcess, visitors: Visitors) -> None:
    """What this site's pages send passes the origin check, what others send does not."""
    await nginx.start(server.url)
    visitor = visitors(nginx)
    for origin, status in (
        (nginx.url, 200),
        (nginx.url.replace("https", "http"), 403),
        ("https://127.0.0.1", 403),
        ("https://evil.example", 403),
    ):
        answer = await ask(
            visitor, "POST", "/demo/session", json={"user_id": "alice"}, headers={"Origin": origin}
        )
        assert answer.status == status, origin
        if status == 200:
            assert answer.headers["Set-Cookie"].startswith("__Host-")
            assert "; Secure" in answer.headers["Set-Cookie"]
            assert answer.headers["Strict-Transport-Security"]


async def test_what_clients_say_about_themselves(
    nginx: Nginx,
    server_process: ServerProcessFactory,
    visitors: Visitors,
    db: Connection,
) -> None:
    """Limits and audit go by the address that nginx sees, whatever the client's headers say."""
    server = await serve(server_process, SSE_SIGN_INS_PER_MINUTE="4")
    await nginx.start(server.url)
    body = {"recipients": ["ada"], "event_type": "new_message", "message": "hello"}

    async def guess(visitor: aiohttp.ClientSession, number: int) -> int:
        answer = await ask(
            visitor,
            "POST",
            "/api/publish",
            json=body,
            headers={
                "Authorization": f"Bearer {new_key()}",
                "X-Forwarded-For": f"203.0.113.{number}",
                "X-Real-IP": f"203.0.113.{number}",
                "Forwarded": f"for=203.0.113.{number};proto=http",
                "X-Forwarded-Proto": "http",
            },
        )
        assert answer.headers["Strict-Transport-Security"]
        return answer.status

    # From the proxy's own address, which the service trusts, and from another.
    for address in ("127.0.0.1", "127.0.0.2"):
        visitor = visitors(nginx, address)
        statuses = [await guess(visitor, number) for number in range(1, 7)]
        assert statuses == 4 * [401] + 2 * [429]

    answer = await ask(visitors(nginx), "POST", "/demo/session", json={"user_id": "ada"})
    assert answer.status == 200
    audited = "\n".join(line for line in server.stderr.splitlines() if '"action"' in line)
    assert "address:127.0.0.1" in audited
    assert "address:127.0.0.2" in audited
    assert "203.0.113." not in server.stderr
    with db.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM audit_log WHERE audit_log::text LIKE '%203.0.113.%'")
        assert cursor.fetchall() == [(0,)]


async def test_sizes_and_closed_doors(
    nginx: Nginx, server: ServerProcess, visitors: Visitors, db: Connection
) -> None:
    """As large as the service allows and no larger; nothing for operators; no plain HTTP."""
    await nginx.start(server.url)
    visitor = visitors(nginx)
    headers = {"Authorization": f"Bearer {add_service(db)}", "Content-Type": "application/json"}
    body = {"recipients": ["ada"], "event_type": "new_message", "message": "hello"}
    largest = json.dumps(body).encode().ljust(MEBIBYTE)
    answer = await ask(visitor, "POST", "/api/publish", data=BytesIO(largest), headers=headers)
    assert answer.status == 200, await answer.text()
    answer = await ask(
        visitor, "POST", "/api/publish", data=BytesIO(largest + b" "), headers=headers
    )
    assert answer.status == 413
    assert answer.content_type == "text/html"  # nginx's, before the service sees any of it
    # Elsewhere the service says so itself.
    answer = await ask(visitor, "POST", "/demo/session", data=BytesIO(largest), headers=headers)
    assert answer.status == 413
    assert answer.content_type == "application/problem+json"

    for path in ("/metrics", "/livez", "/readyz", "/%6detrics", "//metrics"):
        answer = await ask(visitor, "GET", URL(nginx.url + path, encoded=True))
        assert answer.status == 404, path
    answer = await ask(visitor, "GET", "/")
    assert answer.headers["Server"] == "nginx"  # no version
    answer = await ask(visitor, "GET", f"{nginx.plain_url}/api/stream?x=1", allow_redirects=False)
    assert answer.status == 308
    assert answer.headers["Location"] == "https://push.example.com/api/stream?x=1"


@pytest.mark.parametrize("method, asked", [("POST", 1), ("PATCH", 1), ("GET", 2)])
async def test_what_is_not_sent_twice(
    nginx: Nginx, visitors: Visitors, method: str, asked: int
) -> None:
    """A call that may have been carried out is not repeated at the next process; a GET is."""
    requests: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))

    async with upstream(refuse) as one, upstream(refuse) as other:
        await nginx.start(one, other)
        answer = await ask(visitors(nginx), method, "/api/preferences", json={})
        assert answer.status == 502
        assert len(requests) == asked


# What goes wrong


async def test_no_server(
    nginx: Nginx,
    server: ServerProcess,
    server_process: ServerProcessFactory,
    desk: DeskFactory,
    alice: Table,
) -> None:
    """The only process dies: 502 from nginx, until there is another."""
    alice.no_rate_limit()
    await nginx.start(server.url)
    desk_ = await visit(desk, nginx)
    await (await desk_.open()).is_status("live", 20)
    server.kill()
    await server.wait()
    ids = await insert_for(alice, OUTAGE)
    for tab in desk_.tabs:
        assert await tab.status() in ("connecting", "offline")
    await again(server_process, server)
    await complete(desk_, alice, [*ids, *await insert_for(alice, 1)])


@pytest.mark.parametrize("status", [503, 504])
async def test_error_pages(
    nginx: Nginx,
    server: ServerProcess,
    desk: DeskFactory,
    visitors: Visitors,
    alice: Table,
    status: int,
) -> None:
    """nginx answers all with a page of HTML for a while: all arrives, and nobody is signed out."""
    alice.no_rate_limit()
    await nginx.start(server.url)
    desk_ = await visit(desk, nginx)
    await (await desk_.open()).is_status("live", 20)
    await nginx.reload(answers_all(status))

    visitor = visitors(nginx)

    async def refused() -> bool:
        answer = await ask(visitor, "GET", "/api/session")
        return (answer.status, answer.content_type) == (status, "text/html")

    await until(refused, 20)
    # The workers of before the reload have ended, and with them the stream.
    await until(lambda: _none_open(server), 30)
    ids = await insert_for(alice, OUTAGE)
    for tab in desk_.tabs:
        assert await tab.status() in ("connecting", "offline")
    await nginx.reload()
    await complete(desk_, alice, [*ids, *await insert_for(alice, 1)])


async def test_buffering(
    nginx: Nginx, server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """nginx keeps the stream to itself: the page polls within 45 s and says so."""
    await nginx.start(server.url)
    await nginx.reload(holds_back)
    desk_ = await visit(desk, nginx, None)
    tab = await desk_.open()
    started = time.monotonic()
    await tab.page.locator("#sign-in").get_by_role("button", name="alice").click()
    await tab.is_status("polling", 45)
    assert time.monotonic() - started < 45
    await tab.page.locator("#inbox").get_by_text("the live connection is blocked").wait_for()
    ids = [id for _ in range(3) if (id := alice.insert()) is not None]
    await nginx.reload()
    await complete(desk_, alice, ids)
    assert await latency(desk_, alice) < 10


async def test_rolling_restart(
    nginx: Nginx, server_process: ServerProcessFactory, desk: DeskFactory, alice: Table
) -> None:
    """Two processes are replaced one after the other, under load: nothing is lost."""
    alice.no_rate_limit()
    servers = [await serve(server_process, SSE_HEARTBEAT_SECONDS="1") for _ in range(2)]
    await nginx.start(*(server.url for server in servers))
    desk_ = await visit(desk, nginx)
    await (await desk_.open()).is_status("live", 20)
    stopping = asyncio.Event()

    async def load() -> list[int]:
        ids = []
        while not stopping.is_set():
            ids += await insert_for(alice, 0.5)
        return ids

    inserting = asyncio.ensure_future(load())
    try:
        for number, server in enumerate(servers):
            server.terminate()
            assert await server.wait(30) == 0
            servers[number] = await again(server_process, server)
            await desk_.tabs[0].is_status("live", BACK)
    finally:
        stopping.set()
        ids = await inserting
    await complete(desk_, alice, ids)
    assert sum([await open_streams(server) for server in servers]) == 1


# Caddy


async def test_caddy(
    caddy: Caddy,
    server_process: ServerProcessFactory,
    desk: DeskFactory,
    visitors: Visitors,
    alice: Table,
) -> None:
    """The shipped Caddyfile is valid, and a row arrives at once."""
    done = caddy.validate(ROOT / "deploy" / "Caddyfile")
    assert done.returncode == 0, done.stderr
    server = await serve(server_process, SSE_HEARTBEAT_SECONDS="60")
    await caddy.start(server.url)
    desk_ = await visit(desk, caddy)
    [tab] = desk_.tabs
    assert min([await latency(desk_, alice) for _ in range(5)]) < 1.0
    assert await protocols(tab.page) <= {"h2", "h3"}
    [cookie] = await desk_.context.cookies()
    assert cookie["name"].startswith("__Host-")
    visitor = visitors(caddy)
    for path in ("/metrics", "/livez", "/readyz", "/%6detrics", "//metrics"):
        answer = await ask(visitor, "GET", URL(caddy.url + path, encoded=True))
        assert answer.status == 404, path
    answer = await ask(
        visitor,
        "POST",
        "/demo/session",
        json={"user_id": "alice"},
        headers={"Origin": caddy.url, "X-Forwarded-For": "203.0.113.1"},
    )
    assert answer.status == 200
    assert "203.0.113." not in server.stderr


async def test_leaving_through_caddy(caddy: Caddy, visitors: Visitors) -> None:
    """A client that goes takes its stream with it, without waiting for the next event."""
    await leave(caddy, visitors)
