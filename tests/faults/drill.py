"""One run: a database, nodes, clients, writers; the plan is carried out, all faults are healed, and
what the clients have is compared with the table."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg2

from sse_server.embedded import PORT, EmbeddedPostgres
from tests.faults.checker import TRUTH, Problems, Truth, check, missing
from tests.faults.clients import Client, Refused, living
from tests.faults.links import Link
from tests.faults.nodes import Node
from tests.faults.plan import CLIENT_FAULTS, FAULTS, Operation, Plan
from tests.faults.writers import TERMINATE_FEEDS, TERMINATE_POOL, Writers

# Once all faults are healed: how long nothing may change before that counts as for ever.
DEADLINE_SECONDS = float(os.environ.get("FAULTS_DEADLINE", "90"))
START_SECONDS = 60.0
WRITERS = 24
POLL_SECONDS = 0.05


@dataclass(slots=True)
class Outcome:
    """What became of one plan.

    Attributes:
        done: Operations by kind.
        failed: Of those, the ones that the database or the API refused, faults being what they are.
        rows: Committed.
        deliveries: Notifications received, over all connections.
        repeats: Of those, the ones that a client had already, and dropped by id.
        superseded: Times that a client was told it had opened another stream, by a request of its
            own that it had given up.
        history: What there is to say about the failure.
        remarks: What is worth a look, and no failure.
    """

    plan: Plan
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    failed: collections.Counter[str] = field(default_factory=collections.Counter)
    rows: int = 0
    deliveries: int = 0
    repeats: int = 0
    superseded: int = 0
    clients: int = 0
    connections: int = 0
    seconds: float = 0.0
    problems: Problems = field(default_factory=Problems)
    history: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def faults(self) -> collections.Counter[str]:
        kinds = (*FAULTS, *CLIENT_FAULTS)
        return collections.Counter({kind: n for kind, n in self.done.items() if kind in kinds})

    def figures(self) -> dict[str, Any]:
        """All that can be counted, as plain values."""
        problems = {kind: len(sentences) for kind, sentences in self.problems.found.items()}
        return {
            "seed": self.plan.seed,
            "seconds": round(self.seconds, 1),
            "operations": sum(self.done.values()),
            "refused": sum(self.failed.values()),
            "faults": dict(self.faults),
            "clients": self.clients,
            "connections": self.connections,
            "rows": self.rows,
            "deliveries": self.deliveries,
            "repeats": self.repeats,
            "superseded by nobody": self.superseded,
            "problems": {"missing": 0, "foreign": 0} | problems,
        }

    def __str__(self) -> str:
        return (
            f"seed {self.plan.seed}: {sum(self.done.values())} operations "
            f"({sum(self.failed.values())} refused), {sum(self.faults.values())} faults, "
            f"{self.rows} rows, {self.clients} clients, {self.connections} connections, "
            f"{self.deliveries} deliveries, "
            f"{len(self.problems.found.get('missing', ()))} missing, "
            f"{len(self.problems.found.get('foreign', ()))} foreign, {self.repeats} repeats, "
            f"{self.superseded} superseded by nobody, {self.seconds:.1f} s"
        )


class Drill:
    """Carries out one plan on a database that has the schema and no rows."""

    def __init__(self, plan: Plan, cluster: EmbeddedPostgres, dsn: str, directory: Path) -> None:
        self.plan = plan
        self.outcome = Outcome(plan)
        self.nodes: list[Node] = []
        self.clients: list[Client] = []
        self._cluster = cluster
        self._database_lock = asyncio.Lock()
        self._directory = directory
        self._dsn = dsn
        self._writers = Writers(dsn)
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")
        self._crashes: list[float] = []
        self._has_feed_mode = False
        self._going_on = asyncio.Event()
        self._going_on.set()
        self._died: dict[int, int] = {}

    async def run(self) -> Outcome:
        """Returns: What became of it; nothing it has started runs any more."""
        started = time.monotonic()
        async with self._running():
            try:
                await self._carry_out()
                await self._come_to_rest()
            except TimeoutError as exc:
                self.outcome.problems.add("stuck", str(exc))
            truth = await self._truth()
            self._judge(truth)
        for node in self.nodes:
            for sentence in node.died[self._died.get(node.number, 0) :]:
                self.outcome.problems.add("died", f"node {node.number} at the end: {sentence}")
        self._threads.shutdown()
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    # The scenery

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        plan = self.plan
        parts = urlsplit(self._dsn)
        database = parts.path.removeprefix("/")
        socket_path = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.{PORT}"
        await self._sql(
            self._writers.query, "UPDATE settings SET user_rate_per_minute = %s", plan.rate
        )
        self._has_feed_mode = await self._sql(self._writers.has_feed_mode)
        if self._has_feed_mode:
            await self._sql(
                self._writers.query, "UPDATE settings SET feed_mode = %s", plan.feed_mode
            )
        async with contextlib.AsyncExitStack() as stack:
            for number, settings in enumerate(plan.nodes):
                link = await stack.enter_async_context(Link(small_buffers=True))
                database_link = await stack.enter_async_context(Link(socket_path))
                database_link.delay = plan.delays[number]
                dsn = f"postgresql://postgres@127.0.0.1:{database_link.port}/{database}"
                environment = {"DATABASE_URL": dsn, **settings}
                self.nodes.append(
                    Node(
                        number,
                        self._directory,
                        environment,
                        link=link,
                        database_link=database_link,
                        clock=plan.clocks[number],
                    )
                )
            rng = random.Random(plan.seed)
            self.clients = [
                Client(number, user, device, self.nodes, random.Random(rng.random()))
                for number, (user, device) in enumerate(plan.clients)
            ]
            keepers = [asyncio.create_task(node.run()) for node in self.nodes]
            try:
                async with asyncio.timeout(START_SECONDS):
                    await asyncio.gather(*(node.serving() for node in self.nodes))
                async with living(self.clients):
                    await self._until(
                        lambda: all(client.live for client in self.clients), "all are live"
                    )
                    yield
                self._died = {node.number: len(node.died) for node in self.nodes}
                await asyncio.gather(*(node.stop() for node in self.nodes))
            finally:
                for keeper in keepers:
                    keeper.cancel()
                for result in await asyncio.gather(*keepers, return_exceptions=True):
                    if isinstance(result, Exception):
                        raise result

    async def _sql(self, call: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _until(
        self, predicate: Callable[[], bool | Coroutine[Any, Any, bool]], what: str
    ) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: It does not hold in time.
        """
        began = changed = time.monotonic()
        before: tuple[int, int] | None = None
        while True:
            holds = predicate()
            if holds if isinstance(holds, bool) else await holds:
                return
            # A busy machine is slow; only one that stands still, or goes round in circles, fails.
            now = (
                sum(len(client.had) for client in self.clients),
                sum(client.live for client in self.clients),
            )
            if now != before:
                before, changed = now, time.monotonic()
            if time.monotonic() - changed > DEADLINE_SECONDS:
                raise TimeoutError(f"nothing new for {DEADLINE_SECONDS:.0f} s, and not: {what}")
            if time.monotonic() - began > 3 * DEADLINE_SECONDS:
                raise TimeoutError(f"not within {3 * DEADLINE_SECONDS:.0f} s: {what}")
            await asyncio.sleep(POLL_SECONDS)

    # The plan

    async def _carry_out(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        tasks = []
        for operation in self.plan.operations:
            await asyncio.sleep(max(0.0, began + operation.at - loop.time()))
            await self._going_on.wait()
            if operation.kind == "feed_mode" and not self._has_feed_mode:
                continue
            self.outcome.done[operation.kind] += 1
            tasks.append(asyncio.create_task(self._do(operation)))
        # Each fault heals itself.
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _do(self, operation: Operation) -> None:
        try:
            handler = getattr(self, f"_do_{operation.kind}", None)
            if handler is not None:
                await handler(**operation.arguments)
            else:
                await self._sql(self._writers.do, operation)
        except (psycopg2.Error, Refused):
            self.outcome.failed[operation.kind] += 1

    async def _do_read_by_api(self, client: int, how: str) -> None:
        await self.clients[client].mark_read(how)

    async def _do_preference(self, client: int, event_type: str, enabled: bool, api: bool) -> None:
        if api:
            await self.clients[client].call(
                "PUT", f"/api/preferences/{event_type}", {"enabled": enabled}
            )
            return
        user = self.clients[client].user_id
        arguments = {"user": user, "event_type": event_type, "enabled": enabled}
        await self._sql(self._writers.do, Operation(0.0, "preference", arguments))

    # Faults of clients

    async def _do_cut(self, client: int) -> None:
        self.clients[client].cut()

    async def _do_pause(self, client: int, seconds: float) -> None:
        await self.clients[client].pause(seconds)

    async def _do_switch(self, client: int, node: int) -> None:
        self.clients[client].switch(node)

    async def _do_double(self, client: int, node: int) -> None:
        await self.clients[client].double(node)

    async def _do_sign_out(self, client: int) -> None:
        await self.clients[client].sign_out()

    async def _do_storm(self) -> None:
        for client in self.clients:
            client.cut()

    # Faults of nodes

    async def _do_kill(self, node: int, seconds: float) -> None:
        await self.nodes[node].kill(seconds)

    async def _do_terminate(self, node: int, seconds: float) -> None:
        await self.nodes[node].terminate(seconds)

    async def _do_freeze(self, node: int, seconds: float) -> None:
        await self.nodes[node].freeze(seconds)

    # Faults of the database

    async def _do_end_feeds(self) -> None:
        await self._sql(self._writers.query, TERMINATE_FEEDS)

    async def _do_end_pool(self) -> None:
        await self._sql(self._writers.query, TERMINATE_POOL)

    async def _do_restart(self) -> None:
        async with self._database_lock:
            await self._sql(self._cluster.restart)

    async def _do_crash(self, seconds: float) -> None:
        async with self._database_lock:
            await self._crash(seconds)

    async def _crash(self, seconds: float) -> None:
        self._crashes.append(time.time())
        await self._sql(self._cluster.crash)
        await asyncio.sleep(seconds)
        await self._sql(self._cluster.restart)
        self._crashes.append(time.time())

    async def _do_forget(self, transactions: int) -> None:
        """A crash after which transaction ids are used again that nodes have seen used.

        For that nobody else may commit: it would bring them to the disk.
        """
        user = self.clients[0].user_id
        async with self._database_lock:
            self._going_on.clear()
            try:
                await self._sql(self._writers.roll_back, user, transactions)
                # Until the nodes have looked; if they have not, nothing is tried by this.
                await asyncio.sleep(1.2 * float(self.plan.nodes[0]["SSE_PROBE_SECONDS"]))
                await self._crash(0.0)
                await self._sql(self._writers.burst, user, 2 * transactions)
            finally:
                self._going_on.set()

    # Faults of links

    def _link(self, node: int, side: str) -> Link:
        link = self.nodes[node].link if side == "clients" else self.nodes[node].database_link
        assert isinstance(link, Link)
        return link

    async def _do_link_delay(self, node: int, side: str, seconds: float, delay: float) -> None:
        link = self._link(node, side)
        link.delay += delay
        await asyncio.sleep(seconds)
        link.delay -= delay

    async def _do_link_stall(self, node: int, side: str, seconds: float) -> None:
        link = self._link(node, side)
        link.stall()
        await asyncio.sleep(seconds)
        link.resume()

    async def _do_link_loss(self, node: int, side: str, seconds: float) -> None:
        self._link(node, side).lose()

    async def _do_link_reset(self, node: int, side: str, seconds: float) -> None:
        self._link(node, side).reset()

    async def _do_link_refuse(self, node: int, side: str, seconds: float) -> None:
        link = self._link(node, side)
        link.refusing = True
        link.reset()
        await asyncio.sleep(seconds)
        link.refusing = False

    # The end

    async def _truth(self) -> Truth:
        return Truth(await self._sql(self._writers.query, TRUTH))

    async def _come_to_rest(self) -> None:
        """Wait until every client is live and has what is due; then let each come back once."""
        await self._sql(self._writers.query, "UPDATE settings SET user_rate_per_minute = 0")
        # Something new for everybody: what is live must also be delivering.
        for user in self.plan.devices:
            await self._sql(
                self._writers.query,
                "INSERT INTO notifications (user_id, event_type, message, created_at) "
                "SELECT u, 'new_message', 'the end', now() FROM unnest(%s) AS u",
                [user],
            )

        async def at_rest() -> bool:
            # Asked again each time: a call that was held up may still mark something read.
            truth = await self._truth()
            return all(
                client.live and not client.left_open and not missing(client, truth)
                for client in self.clients
            )

        await self._until(at_rest, "every client is live and has all that is due")
        before = {client: len(client.records) for client in self.clients}
        for client in self.clients:
            client.cut()

        async def back() -> bool:
            truth = await self._truth()
            return all(
                client.live
                and len(client.records) > before[client]
                and client.record is not None
                and client.record.unread_counts[-1] == truth.unread(client.user_id)
                for client in self.clients
            )

        await self._until(back, "every client is back and was told the right count")
        for client in self.clients:
            body = await self._call(client, "/api/notifications/unread")
            unread = (await self._truth()).unread(client.user_id)
            if body["unread_count"] != unread:
                self.outcome.problems.add(
                    "count",
                    f"{client.name}: the API says {body['unread_count']}, the table {unread}",
                )

    async def _call(self, client: Client, path: str) -> Any:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                return await client.call("GET", path)
            except Refused as exc:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{client.name}: GET {path}: {exc}") from exc
            await asyncio.sleep(POLL_SECONDS)

    def _judge(self, truth: Truth) -> None:
        outcome = self.outcome
        found = check(self.clients, self.nodes, truth, crashes=self._crashes)
        for kind, sentences in found.found.items():
            for sentence in sentences:
                outcome.problems.add(kind, sentence)
        outcome.rows = len(truth.rows)
        outcome.clients = len(self.clients)
        for client in self.clients:
            outcome.connections += len(client.records)
            outcome.deliveries += len(client.received)
            outcome.repeats += len(client.received) - len(client.had)
            outcome.superseded += client.superseded
            for record in client.records:
                if any(what == "superseded by nobody" for _, what in record.log):
                    told = client.describe(around=record.opened_at, lines=6)
                    outcome.remarks.append(f"{client.name}: superseded by nobody\n{told}")
        if outcome.problems:
            outcome.history = self._describe(truth)

    def _describe(self, truth: Truth) -> str:
        lines = [str(self.outcome.problems)]
        for client in self.clients:
            lost = sorted(missing(client, truth))
            if (
                lost
                or not client.live
                or any(
                    sentence.startswith(client.name)
                    for sentences in self.outcome.problems.found.values()
                    for sentence in sentences
                )
            ):
                around = truth.rows[lost[0]].committed_at if lost else None
                lines.append(f"{client.name}, live: {client.live}")
                lines.append(client.describe(around=around))
                if around is not None:
                    lines.append(client.describe(lines=4))
        for node in self.nodes:
            with contextlib.suppress(FileNotFoundError):
                log = node.log.read_text(encoding="utf-8", errors="replace").splitlines()
                told = [line for line in log if " stream " not in line or "waits" in line]
                lines.append(f"node {node.number}, {node.starts} starts:")
                lines += [f"  {line[:300]}" for line in told[-40:]]
        return "\n".join(lines)


def run(plan: Plan, cluster: EmbeddedPostgres, dsn: str, directory: Path) -> Outcome:
    """Carry out a plan, from outside of any event loop."""

    async def main() -> Outcome:
        return await Drill(plan, cluster, dsn, directory).run()

    return asyncio.run(main())
