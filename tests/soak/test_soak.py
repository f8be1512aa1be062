"""Hours of coming and going leave nothing behind: ``make soak``, 30 minutes by default."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil
import psycopg2
import pytest

from sse_server.embedded import EmbeddedPostgres
from tests.conftest import ROOT, connect, eventually, execute
from tests.faults.clients import Client, Refused
from tests.faults.links import Direct
from tests.faults.nodes import Node
from tests.faults.writers import TERMINATE_FEEDS, TERMINATE_POOL

# Three minutes are worth having in CI, thirty before a release.
SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
# The first round fills caches and the allocator's pools; what is held after it is the baseline.
WARM_UP_SECONDS = max(30.0, 0.1 * SECONDS)
# Rate limits remember who has called for two minutes.
RETURN_SECONDS = 240.0

USERS = 25
CLIENTS = 60
POOL_SIZE = 4
# Few enough that the first round has seen them all: contents are cached.
MESSAGES = 300

# What may remain above the baseline
MORE_TASKS = 2
MORE_DESCRIPTORS = 4
MORE_OBJECTS = 0.03
MORE_MEMORY = 0.10
MORE_MEMORY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds: sizes are bytes."""

    streams: int
    tasks: int
    threads: int
    objects: int
    descriptors: int
    resident: int

    def within(self, baseline: Held) -> bool:
        """Whether this is as little as at the baseline, as far as that can be told."""
        return (
            self.streams == 0
            and self.tasks <= baseline.tasks + MORE_TASKS
            and self.threads <= baseline.threads
            and self.objects <= baseline.objects * (1 + MORE_OBJECTS)
            and self.descriptors <= baseline.descriptors + MORE_DESCRIPTORS
            and self.resident <= baseline.resident * (1 + MORE_MEMORY) + MORE_MEMORY_BYTES
        )

    def __str__(self) -> str:
        values = asdict(self) | {"resident": f"{self.resident / 2**20:.1f} MiB"}
        return ", ".join(f"{name} {value}" for name, value in values.items())


@pytest.fixture
def database() -> Iterator[str]:
    """A cluster of its own: connections are ended in it."""
    with tempfile.TemporaryDirectory(prefix="sse-soak-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(Path(name), options={"fsync": "off"})
        postgres.start()
        try:
            dsn = postgres.dsn("sse")
            execute(dsn, (ROOT / "schema.sql").read_text(encoding="utf-8"))
            execute(dsn, "UPDATE settings SET user_rate_per_minute = 0")
            yield dsn
        finally:
            postgres.stop()


class Observed:
    """A node, and what it holds."""

    def __init__(self, dsn: str, directory: Path) -> None:
        self._report = directory / "report"
        self._report.touch()
        environment = {
            "DATABASE_URL": dsn,
            "SOAK_REPORT": str(self._report),
            "SSE_POOL_SIZE": str(POOL_SIZE),
            "SSE_HEARTBEAT_SECONDS": "2",
            "SSE_STREAM_MAX_SECONDS": "20",
            "SSE_STREAM_BUFFER_BYTES": "8192",
            "SSE_SLOW_SECONDS": "3",
            "SSE_KEEPALIVE_TIMEOUT": "5",
        }
        self.node = Node(0, directory, environment, link=Direct(), module="tests.soak.observed")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        keeper = asyncio.create_task(self.node.run())
        try:
            async with asyncio.timeout(60):
                await self.node.serving()
            yield
            await self.node.stop()
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def held(self) -> Held:
        pid = self.node.pids[-1]
        size = self._report.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        await eventually(
            lambda: (
                self._report.stat().st_size > size and self._report.read_bytes().endswith(b"\n")
            ),
            60,
        )
        told = json.loads(self._report.read_text(encoding="utf-8").splitlines()[-1])
        process = psutil.Process(pid)
        return Held(
            streams=await self._streams(),
            tasks=told["tasks"],
            threads=told["threads"],
            objects=told["objects"],
            descriptors=process.num_fds(),
            resident=process.memory_info().rss,
        )

    async def _streams(self) -> int:
        url = f"http://127.0.0.1:{self.node.link.port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            text = await response.text()
        values = [line for line in text.splitlines() if line.startswith("sse_streams{")]
        return int(sum(float(line.rpartition(" ")[2]) for line in values))


class Traffic:
    """Clients that come, use what there is, and go in every way there is; backends that write."""

    def __init__(self, node: Node, dsn: str, seed: int) -> None:
        self._node = node
        self._dsn = dsn
        self._rng = random.Random(seed)
        self.clients = 0
        self.received = 0
        self.written = 0

    async def run(self, seconds: float) -> None:
        """Go on for so long, and leave nobody behind."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(2) as threads:
            await asyncio.gather(
                *(self._seat(number, until) for number in range(CLIENTS)),
                asyncio.get_running_loop().run_in_executor(threads, self._write, until),
                asyncio.get_running_loop().run_in_executor(threads, self._break, until),
            )

    async def _seat(self, number: int, until: float) -> None:
        """One client after the other."""
        while (left := until - time.monotonic()) > 0:
            rng = random.Random(self._rng.random())
            client = Client(number, f"user-{rng.randrange(USERS)}", 0, [self._node], rng)
            self.clients += 1
            life = asyncio.create_task(client.run())
            try:
                await self._live(client, rng, min(left, rng.uniform(0.5, 12.0)))
            finally:
                life.cancel()
                await asyncio.gather(life, return_exceptions=True)
            self.received += len(client.received)

    async def _live(self, client: Client, rng: random.Random, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, rng.expovariate(1.0)))
            with contextlib.suppress(Refused):
                await self._act(client, rng)

    async def _act(self, client: Client, rng: random.Random) -> None:
        what = rng.choice(("nothing", "cut", "double", "pause", "read", "api", "sign_out", "bad"))
        if what == "cut":
            client.cut()
        elif what == "double":
            await client.double(0)
        elif what == "pause":
            await client.pause(rng.uniform(0.1, 5.0))
        elif what == "read":
            await client.mark_read(rng.choice(("one", "ids", "up_to")))
        elif what == "api":
            await client.call("GET", rng.choice(("/api/notifications", "/api/preferences")))
        elif what == "sign_out" and rng.random() < 0.3:
            await client.sign_out()
        elif what == "bad":
            await self._misbehave(rng)

    async def _misbehave(self, rng: random.Random) -> None:
        """Requests that nobody should make, or that are never finished."""
        request = rng.choice(
            (
                b"",
                b"GET /api/stream HTTP/1.1\r\nHost: x",
                b"GET /api/stream HTTP/1.1\r\nHost: x\r\n\r\n",
                b"POST /api/notifications/read HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
                b"\x16\x03\x01 no HTTP at all\r\n\r\n",
            )
        )
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._node.link.port)
            try:
                writer.write(request)
                async with asyncio.timeout(rng.uniform(0.0, 1.0)):
                    await reader.read(1000)
            finally:
                writer.transport.abort()

    def _write(self, until: float) -> None:
        rng = random.Random(1)
        connection = connect(self._dsn)
        try:
            with connection.cursor() as cursor:
                while time.monotonic() < until:
                    users = [f"user-{rng.randrange(USERS)}" for _ in range(rng.randint(1, 5))]
                    message = f"message {rng.randrange(MESSAGES)} "
                    cursor.execute(
                        "SELECT count(*) FROM notify_users(%s, 'new_message', %s)",
                        (users, message.ljust(rng.choice((20, 20, 200, 1500)), "x")),
                    )
                    self.written += len(set(users))
                    # The history must not grow for ever: what is replayed is what is held.
                    cursor.execute(
                        "DELETE FROM notifications WHERE id < (SELECT max(id) FROM notifications)"
                        " - 3000"
                    )
                    time.sleep(rng.expovariate(1 / 0.04))
        finally:
            connection.close()

    def _break(self, until: float) -> None:
        """End the service's connections to the database now and then."""
        rng = random.Random(2)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, rng.uniform(2.0, 8.0)))
            with contextlib.suppress(psycopg2.Error):
                execute(self._dsn, rng.choice((TERMINATE_FEEDS, TERMINATE_POOL)).replace("%%", "%"))


@pytest.mark.skipif(not SECONDS, reason="takes minutes: `make soak`, or set SOAK_SECONDS")
@pytest.mark.timeout(2 * SECONDS + WARM_UP_SECONDS + 3 * RETURN_SECONDS + 300)
async def test_nothing_is_left_behind(database: str, tmp_path: Path) -> None:
    """Descriptors, tasks, objects and memory return to where they were."""
    observed = Observed(database, tmp_path)
    async with observed.running():
        traffic = Traffic(observed.node, database, seed=1)
        await traffic.run(WARM_UP_SECONDS)
        baseline = await settled(observed)
        print(f"\nbaseline: {baseline}")
        began = time.monotonic()
        while (left := SECONDS - (time.monotonic() - began)) > 0:
            await traffic.run(min(left, 60.0))
            print(f"{time.monotonic() - began:6.0f} s: {await observed.held()}", flush=True)
        held = await observed.held()
        deadline = time.monotonic() + RETURN_SECONDS
        while not held.within(baseline):
            if time.monotonic() > deadline:
                pytest.fail(f"baseline: {baseline}\n     now: {held}")
            await asyncio.sleep(1)
            held = await observed.held()
        print(
            f"     end: {held}\n"
            f"{traffic.clients} clients, {traffic.written} rows, {traffic.received} deliveries"
        )
    assert observed.node.died == []
    assert observed.node.alarms() == []


async def settled(observed: Observed) -> Held:
    """What is held once all streams have gone and nothing changes any more."""
    before = await observed.held()
    deadline = time.monotonic() + RETURN_SECONDS
    while True:
        await asyncio.sleep(2)
        held = await observed.held()
        still = held.tasks == before.tasks and held.descriptors == before.descriptors
        if held.streams == 0 and still:
            return held
        if time.monotonic() > deadline:
            pytest.fail(f"does not settle: {before}, {held}")
        before = held
