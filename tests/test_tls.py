"""TLS in the process, what is refused without it, and a front end of another site over it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.server
import ipaddress
import json
import os
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from playwright.async_api import Browser
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.config import load
from sse_server.errors import ConfigurationError
from sse_server.sessions import COOKIE
from sse_server.tls import Certificate
from tests.conftest import ServerProcess, ServerProcessFactory, eventually
from tests.sse import EventReader
from tests.test_tokens import AUDIENCE, SECRET, sign


def make_certificate(
    directory: Path, name: str = "server", *, passphrase: bytes | None = None
) -> dict[str, str]:
    """A certificate for 127.0.0.1 that is signed by itself. Returns: the settings for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encryption: KeySerializationEncryption = (
        NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    )
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return {"SSE_TLS_CERT": str(cert_file), "SSE_TLS_KEY": str(key_file)}


async def start(
    server_process: ServerProcessFactory, environment: dict[str, str], *, wait: bool = True
) -> ServerProcess:
    values: dict[str, str | None] = {"SSE_DEMO": "0", **environment}
    return await server_process(wait=wait, **values)


def trusting(settings: dict[str, str]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=settings["SSE_TLS_CERT"])


async def presented(server: ServerProcess, **limits: Any) -> bytes:
    """The certificate that the server shows now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in limits.items():
        setattr(context, name, value)
    host, port = server.url.removeprefix("https://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert isinstance(shown, bytes)
    return shown


async def test_https(server_process: ServerProcessFactory, tmp_path: Path) -> None:
    """Over TLS the cookie is Secure and bound to the host, HSTS is set, and streams work."""
    settings = make_certificate(tmp_path)
    server = await start(server_process, {**settings, "SSE_DEMO": "1"})
    assert server.url.startswith("https://127.0.0.1:")
    connector = aiohttp.TCPConnector(ssl=trusting(settings))
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(
        server.url, connector=connector, cookie_jar=jar, headers={"Origin": server.url}
    ) as browser:
        async with browser.post("/demo/session", json={"user_id": "alice"}) as response:
            assert response.status == 200
            assert "max-age" in response.headers["Strict-Transport-Security"]
            cookie = response.headers["Set-Cookie"]
            assert cookie.startswith(f"__Host-{COOKIE}=")
            assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= set(cookie.split("; "))
        async with browser.get("/api/stream") as stream:
            assert "Strict-Transport-Security" in stream.headers
            await EventReader(stream).next_of("ready")
    server.terminate()
    assert await server.wait() == 0


async def test_old_tls_and_plain_http(server_process: ServerProcessFactory, tmp_path: Path) -> None:
    """TLS below 1.2 and plain HTTP get nothing; a handshake that stops is cut."""
    settings = make_certificate(tmp_path)
    server = await start(server_process, {"SSE_HEADER_TIMEOUT": "1", **settings})
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        await presented(server, minimum_version=version, maximum_version=version)
    old = {
        "minimum_version": ssl.TLSVersion.TLSv1,
        "maximum_version": ssl.TLSVersion.TLSv1_1,
    }
    with pytest.warns(DeprecationWarning, match="TLSv1"), pytest.raises(OSError):
        await presented(server, **old)
    host, port = server.url.removeprefix("https://").split(":")
    for sent in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", b"\x16\x03\x01"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in await reader.read()
        writer.close()
    assert "Traceback" not in server.stderr


async def test_certificate_is_renewed(server_process: ServerProcessFactory, tmp_path: Path) -> None:
    """SIGHUP takes a new certificate for new connections; one that is broken changes nothing."""
    settings = make_certificate(tmp_path)
    server = await start(server_process, settings)
    connector = aiohttp.TCPConnector(ssl=trusting(settings))
    first = await presented(server)
    async with aiohttp.ClientSession(server.url, connector=connector) as browser:
        async with browser.get("/livez") as response:
            assert response.status == 200

        make_certificate(tmp_path)
        assert await presented(server) == first
        os.kill(server.pid, signal.SIGHUP)
        await eventually(lambda: "was read again" in server.stderr)
        second = await presented(server)
        assert second != first

        # The new certificate is there, its key not yet.
        key = (tmp_path / "key.pem").read_bytes()
        make_certificate(tmp_path)
        (tmp_path / "key.pem").write_bytes(key)
        os.kill(server.pid, signal.SIGHUP)
        await eventually(lambda: "stays as it was" in server.stderr)
        assert await presented(server) == second

        # The connection from before has gone on all the time.
        async with browser.get("/livez") as response:
            assert response.status == 200


# What is refused at the start


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Settings whose files cannot be used, by what is wrong with them."""

    def build(fault: str) -> dict[str, str]:
        settings = make_certificate(tmp_path)
        cert, key = Path(settings["SSE_TLS_CERT"]), Path(settings["SSE_TLS_KEY"])
        match fault:
            case "no certificate":
                cert.unlink()
            case "no key":
                key.unlink()
            case "empty":
                cert.write_bytes(b"")
            case "another key":
                good = cert.read_bytes()
                make_certificate(tmp_path)
                cert.write_bytes(good)
            case "passphrase":
                make_certificate(tmp_path, passphrase=b"secret")
            case "swapped":
                settings = {"SSE_TLS_CERT": str(key), "SSE_TLS_KEY": str(cert)}
            case _:
                raise ValueError(fault)
        return settings

    return build


@pytest.mark.parametrize(
    "fault, named",
    [
        ("no certificate", "SSE_TLS_CERT: "),
        ("no key", "SSE_TLS_KEY: "),
        ("empty", "no certificate"),
        ("another key", "KEY_VALUES_MISMATCH"),
        ("passphrase", "passphrase"),
        ("swapped", "no certificate"),
    ],
)
def test_certificates_that_are_refused(
    fault: str, named: str, files: Callable[[str], dict[str, str]]
) -> None:
    """What is no certificate with its key is refused, and the settings are named."""
    settings = files(fault)
    with pytest.raises(ConfigurationError, match="SSE_TLS_") as caught:
        Certificate(Path(settings["SSE_TLS_CERT"]), Path(settings["SSE_TLS_KEY"]))
    assert named in str(caught.value)


def test_half_a_certificate() -> None:
    """A certificate without a key, or a key alone, is a mistake."""
    for options in ({"tls_cert": "a"}, {"tls_key": "a"}):
        with pytest.raises(ConfigurationError, match="SSE_TLS_CERT and SSE_TLS_KEY"):
            load(**options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "push.example"])
def test_no_plain_http_for_others(host: str) -> None:
    """On an address that others reach, TLS or a declared proxy is required."""
    with pytest.raises(ConfigurationError) as caught:
        load(host=host)
    for name in (host, "SSE_TLS_CERT", "SSE_TLS_KEY", "SSE_TRUSTED_PROXIES"):
        assert name in str(caught.value)
    load(host=host, trusted_proxies="10.0.0.0/8")
    load(host=host, tls_cert="a", tls_key="b")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_plain_http_for_this_machine(host: str) -> None:
    """Nobody can listen in on a loopback address."""
    assert load(host=host).loopback


async def test_starts_that_are_refused(
    server_process: ServerProcessFactory, files: Callable[[str], dict[str, str]]
) -> None:
    """Misconfigured is one sentence and exit status 2, before a socket; and never a secret."""
    cases: list[tuple[dict[str, str], str]] = [
        ({"SSE_HOST": "0.0.0.0"}, "SSE_TRUSTED_PROXIES"),
        ({"SSE_JWT_SECRET": "x" * 31, "SSE_JWT_AUDIENCE": "a"}, "32 bytes"),
        ({"SSE_JWT_SECRET": SECRET}, "SSE_JWT_AUDIENCE"),
        ({"SSE_JWT_JWKS_FILE": "/missing/keys", "SSE_JWT_AUDIENCE": "a"}, "SSE_JWT_JWKS_FILE"),
        ({"SSE_ALLOWED_ORIGINS": "*"}, "SSE_ALLOWED_ORIGINS"),
        (files("passphrase"), "passphrase"),
    ]
    servers = [await start(server_process, environment, wait=False) for environment, _ in cases]
    for server, (_, named) in zip(servers, cases, strict=True):
        assert await server.wait(timeout=50) == 2
        assert named in server.stderr
        assert len(server.stderr.strip().splitlines()) == 1
        assert "listening" not in server.stdout
        assert "x" * 31 not in server.stderr
        assert SECRET not in server.stderr


# A front end elsewhere


@pytest.fixture
def front_end(tmp_path: Path) -> Iterator[str]:
    """The origin of another site: an empty page at every path."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>front end</title>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # To a browser, localhost and 127.0.0.1 are two sites.
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


SIGN_IN = """async ([url, token]) => {
  try {
    const response = await fetch(url + "/api/session", {
      method: "POST", credentials: "include", headers: {Authorization: "Bearer " + token},
    });
    return [response.status, (await response.json()).user_id];
  } catch (error) {
    return [0, String(error)];
  }
}"""

OPEN = """(url) => new Promise((resolve) => {
  window.heard = [];
  const source = new EventSource(url + "/api/stream", {withCredentials: true});
  source.addEventListener("ready", () => resolve("ready"));
  source.addEventListener("notification", (event) => heard.push(JSON.parse(event.data).message));
  source.addEventListener("closing", (event) => heard.push(event.data));
  source.onerror = () => source.readyState === 2 && resolve("refused");
})"""

CHANGE = """async (url) => {
  const options = {method: "POST", credentials: "include", body: '{"all": true}'};
  try {
    const response = await fetch(url + "/api/notifications/read", {
      ...options, headers: {"Content-Type": "application/json"},
    });
    return (await response.json()).unread_count;
  } catch {
    // What a browser sends without asking first.
    await fetch(url + "/api/notifications/read", {...options, mode: "no-cors"}).catch(() => 0);
    return "refused";
  }
}"""


async def test_front_end_of_another_site(
    server_process: ServerProcessFactory,
    tmp_path: Path,
    front_end: str,
    browser: Browser,
    db: Connection,
) -> None:
    """In a real browser, an allowed origin signs in, streams and marks read; others do nothing."""
    server = await start(
        server_process,
        {
            **make_certificate(tmp_path),
            "SSE_JWT_SECRET": SECRET,
            "SSE_JWT_AUDIENCE": AUDIENCE,
            "SSE_ALLOWED_ORIGINS": f"https://app.example,{front_end}",
        },
    )
    context = await browser.new_context(ignore_https_errors=True)
    page = await context.new_page()
    await page.goto(front_end)
    assert await page.evaluate(SIGN_IN, [server.url, sign(sub="alice")]) == [200, "alice"]
    # Partitioned: browsers that block the cookies of other sites take it all the same.
    [cookie] = await context.cookies()
    assert (cookie["name"], cookie["sameSite"]) == (f"__Host-{COOKIE}", "None")
    assert cookie["secure"]
    assert cookie["httpOnly"]
    assert await page.evaluate(OPEN, server.url) == "ready"

    def insert(message: str) -> None:
        with db.cursor() as cursor:
            cursor.execute(
                "INSERT INTO notifications (user_id, event_type, message) "
                "VALUES ('alice', 'new_message', %s)",
                [message],
            )

    insert("first")
    await page.wait_for_function("heard.length === 1")
    assert await page.evaluate(CHANGE, server.url) == 0

    # Another site, in the same browser, with the same cookie.
    insert("second")
    await page.wait_for_function("heard.length === 2")
    other = await context.new_page()
    await other.goto(front_end.replace("localhost", "127.0.0.1"))
    assert (await other.evaluate(SIGN_IN, [server.url, sign(sub="mallory")]))[0] == 0
    assert await other.evaluate(OPEN, server.url) == "refused"
    assert await other.evaluate(CHANGE, server.url) == "refused"
    await other.evaluate("(url) => {new Image().src = url + '/api/stream'}", server.url)
    # A link on that site's page.
    await other.evaluate("(url) => {location.href = url + '/api/stream'}", server.url)
    await other.wait_for_url(f"{server.url}/api/stream")
    assert json.loads(await other.inner_text("pre"))["status"] == 403
    insert("third")
    await page.wait_for_function("heard.length === 3")
    assert await page.evaluate("heard") == ["first", "second", "third"]
    with db.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM notifications WHERE read_at IS NULL")
        assert cursor.fetchone() == (2,)
        cursor.execute("SELECT user_id FROM sessions")
        assert cursor.fetchall() == [("alice",)]
    await context.close()
