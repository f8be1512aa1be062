"""What is counted is what happened, also over several processes; and what is drawn is counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_client import multiprocess
from prometheus_client.parser import text_string_to_metric_families
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.embedded import EmbeddedPostgres
from sse_server.metrics import Metrics
from sse_server.retention import Retention
from tests.conftest import (
    ROOT,
    Client,
    ServerProcess,
    ServerProcessFactory,
    SettingsFactory,
    eventually,
    execute,
    require_program,
)
from tests.streaming import Clients, Node, insert, query, running, sign_in, without_rate_limit
from tests.test_publish import add_service, send

DASHBOARD = ROOT / "deploy" / "grafana.json"
ALERTS = ROOT / "deploy" / "alerts.yml"

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parsed(text: str) -> Samples:
    """Values by name and labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        # A family without a sample is known by its head.
        found.setdefault(family.name + ("_total" if family.type == "counter" else ""), {})
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def scrape(url: str) -> Samples:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/metrics", headers={"Connection": "close"}) as response,
    ):
        assert response.status == 200
        assert response.content_type == "text/plain"
        return parsed(await response.text())


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get(name, {}).get(tuple(sorted(labels.items())), 0.0)


async def until(condition: Callable[[], Awaitable[bool]], timeout: float = 10.0) -> None:
    """`eventually` for a coroutine function."""
    predicate: Callable[[], bool | Awaitable[bool]] = condition
    await eventually(predicate, timeout)


@pytest.fixture
async def node(settings: SettingsFactory, db: Connection) -> AsyncIterator[Node]:
    without_rate_limit(db)
    async with running(settings(stream_buffer_bytes=4096)) as node:
        yield node


async def scraped(node: Node) -> Samples:
    return await scrape(f"http://127.0.0.1:{node.port}")


# Streams


async def test_the_life_of_a_stream(node: Node, db: Connection) -> None:
    """Opened, replayed, live, delivered, closed by reason: each is counted once."""
    insert(db, "alice", "one", "two")
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    before = await scraped(node)
    insert(db, "alice", "three")
    await eventually(lambda: len(stream.ids) == 3)
    during = await scraped(node)
    assert value(during, "sse_streams", state="live") == 1
    assert value(during, "sse_streams", state="replaying") == 0
    assert value(during, "sse_streams_opened_total") == 1
    assert value(during, "sse_replays_total") == 1
    assert value(during, "sse_replayed_notifications_total") == 2
    assert value(before, "sse_deliveries_total") == 0
    assert value(during, "sse_deliveries_total") == 1
    assert value(during, "sse_created_to_written_seconds_count") == 1
    assert 0 <= value(during, "sse_created_to_written_seconds_sum") < 10
    query(db, "DELETE FROM sessions")
    await eventually(lambda: stream.reason == "session_ended")
    await eventually(lambda: not len(node.hub))
    after = await scraped(node)
    assert value(after, "sse_streams", state="live") == 0
    assert value(after, "sse_streams_closed_total", reason="session_ended") == 1
    assert sum(after["sse_streams_closed_total"].values()) == 1


async def test_a_slow_client_is_lagging(node: Node, db: Connection) -> None:
    """Between the moment that a client is too slow and the end of its replay, its stream lags."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key, receive_buffer=4096)
    stream.pause()

    async def lags() -> bool:
        insert(db, "alice", *["x" * 2000] * 50)
        return value(await scraped(node), "sse_streams", state="lagging") == 1

    await until(lags, 30)
    samples = await scraped(node)
    assert value(samples, "sse_streams", state="live") == 0
    assert value(samples, "sse_streams", state="replaying") == 0
    assert value(samples, "sse_streams_lagged_total") >= 1
    stream.resume()

    async def caught_up() -> bool:
        return value(await scraped(node), "sse_streams", state="live") == 1

    await until(caught_up, 30)


async def test_who_is_turned_away(settings: SettingsFactory, db: Connection) -> None:
    """A stream over the user's limit counts under its reason, and not as opened."""
    first, second = sign_in(db, "alice", "alice")
    async with running(settings(streams_per_user=1)) as node:
        await node.open_live(first)
        await node.open(second)
        samples = await scraped(node)
    assert value(samples, "sse_streams_turned_away_total", reason="limit") == 1
    assert value(samples, "sse_streams_opened_total") == 1


# The feed and the database


async def test_the_feed_says_how_it_is(node: Node) -> None:
    """Connected, its mode, and when it last was sure to have everything."""
    samples = await scraped(node)
    assert value(samples, "sse_feed_connected") == 1
    assert value(samples, "sse_ready") == 1
    assert value(samples, "sse_feed_polling") == 0
    swept = value(samples, "sse_feed_swept_timestamp_seconds")

    async def swept_again() -> bool:
        samples = await scraped(node)
        at = value(samples, "sse_feed_swept_timestamp_seconds")
        assert value(samples, "sse_feed_heard_timestamp_seconds") >= at
        return at > swept

    await until(swept_again)


@contextlib.contextmanager
def without_connections(cluster: EmbeddedPostgres, db: Connection) -> Iterator[None]:
    """The test's database lets nobody in."""
    allow = f"ALTER DATABASE {db.info.dbname} ALLOW_CONNECTIONS"
    execute(cluster.dsn("postgres"), f"{allow} false")
    try:
        yield
    finally:
        execute(cluster.dsn("postgres"), f"{allow} true")


async def test_a_lost_feed_is_seen(node: Node, db: Connection, cluster: EmbeddedPostgres) -> None:
    """While the feed has no connection, the process is not ready; the loss is counted."""
    assert node.feed.connection is not None
    with without_connections(cluster, db):
        node.feed.connection.close()

        async def lost() -> bool:
            samples = await scraped(node)
            return (
                value(samples, "sse_feed_reconnects_total") == 1
                and value(samples, "sse_feed_connected") == 0
                and value(samples, "sse_ready") == 0
            )

        await until(lost)

    async def back() -> bool:
        samples = await scraped(node)
        return value(samples, "sse_feed_connected") == 1 and value(samples, "sse_ready") == 1

    await until(back)


async def test_queries_that_wait_for_the_pool(settings: SettingsFactory, db: Connection) -> None:
    """In use, waiting, size: a pool that is too small shows."""
    query(db, "SELECT pg_advisory_lock(1)")
    async with running(settings(pool_size=1)) as node:
        database = node.store.database
        tasks = [
            asyncio.create_task(database.fetch("SELECT pg_advisory_lock_shared(1)"))
            for _ in range(3)
        ]

        async def seen() -> bool:
            samples = await scraped(node)
            assert value(samples, "sse_pool_size") == 1
            return (
                value(samples, "sse_pool_connections") == 1
                and value(samples, "sse_pool_waiting") == 2
            )

        await until(seen)
        query(db, "SELECT pg_advisory_unlock(1)")
        await asyncio.gather(*tasks)
        samples = await scraped(node)
        assert value(samples, "sse_pool_waiting") == 0


# Requests


async def test_requests_by_route_and_status(client: Client) -> None:
    """A route is its template, and everything that is no route is one label."""
    for id in (1, 2, 3):
        await client.post(f"/api/notifications/{id}/read", json={})
    for name in ("a", "b"):
        await client.get(f"/nowhere/{name}")
        await client.request("OPTIONS", f"/nowhere/{name}")
    samples = parsed(await (await client.get("/metrics")).text())
    assert samples["sse_http_requests_total"] == {
        (("route", "/api/notifications/{id}/read"), ("status", "4xx")): 3,
        (("route", "other"), ("status", "4xx")): 4,
    }
    assert value(samples, "sse_http_request_seconds_count", route="other") == 4


async def test_a_stream_is_counted_when_it_is_answered(node: Node, db: Connection) -> None:
    """The request of a stream counts with its head, not hours later."""
    [key] = sign_in(db, "alice")
    await node.open_live(key)
    samples = await scraped(node)
    assert value(samples, "sse_http_requests_total", route="/api/stream", status="2xx") == 1


async def test_refusals_by_limit(settings: SettingsFactory, aiohttp_client: Any) -> None:
    """Each request over a limit counts at once, under the name of the limit."""
    client = await aiohttp_client(create_app(settings(anonymous_calls_per_minute=1)))
    for _ in range(4):
        await client.get("/api/session")
    samples = parsed(await (await client.get("/metrics")).text())
    assert value(samples, "sse_limiter_refusals_total", limit="anonymous_calls") == 3
    assert value(samples, "sse_limiter_refusals_total", limit="api_calls") == 0


async def test_publish_outcomes(client: Client, db: Connection) -> None:
    """Requests by outcome, recipients by theirs; a repetition sends, and counts, nothing."""
    key = add_service(db)
    query(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    for _ in range(2):
        await send(client, key, recipients=["ada", "bob", "off"], idempotency_key="k")
    await send(client, None)
    await send(client, key, event_type="no_such")
    samples = parsed(await (await client.get("/metrics")).text())
    assert value(samples, "sse_publish_recipients_total", outcome="created") == 2
    assert value(samples, "sse_publish_recipients_total", outcome="suppressed") == 1
    assert value(samples, "sse_publish_requests_total", outcome="published") == 1
    assert value(samples, "sse_publish_requests_total", outcome="repeated") == 1
    assert value(samples, "sse_publish_requests_total", outcome="invalid-key") == 1
    assert value(samples, "sse_publish_requests_total", outcome="invalid-body") == 1


async def test_retention(node: Node, db: Connection) -> None:
    """What was deleted, when the clean-up last ended, and how long it took."""
    insert(db, "alice", "old", "older")
    query(db, "UPDATE notifications SET created_at = created_at - interval '31 days'")
    metrics = Metrics()
    await Retention(node.store, metrics, pause_seconds=0).delete_old()
    samples = parsed(metrics.exposition().decode())
    assert value(samples, "sse_retention_deleted_total", what="notifications") == 2
    [(at,)] = query(db, "SELECT extract(epoch FROM clock_timestamp())::float8")
    ran = value(samples, "sse_retention_run_timestamp_seconds", what="notifications")
    assert at - 60 < ran < at + 60
    assert value(samples, "sse_retention_duration_seconds", what="notifications") > 0


async def test_a_clean_up_that_another_process_does_is_not_counted(
    node: Node, db: Connection
) -> None:
    """Who has not had its turn has not run."""
    query(db, "SELECT pg_advisory_lock(7095164721844)")
    metrics = Metrics()
    await Retention(node.store, metrics).delete_old()
    assert parsed(metrics.exposition().decode())["sse_retention_run_timestamp_seconds"] == {}


async def test_users_make_no_series(node: Node, db: Connection) -> None:
    """More users, sessions and notifications do not make more series."""

    async def series() -> set[tuple[str, Any]]:
        samples = await scraped(node)
        return {(name, labels) for name, found in samples.items() for labels in found}

    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    insert(db, "alice")
    await eventually(lambda: stream.ids)
    await scraped(node)
    before = await series()
    users = [f"user-{number}" for number in range(20)]
    streams = [await node.open_live(key) for key in sign_in(db, *users)]
    for user in users:
        insert(db, user)
    await eventually(lambda: all(stream.ids for stream in streams))
    assert await series() == before


# Several processes


@pytest.fixture
async def workers(server_process: ServerProcessFactory, tmp_path: Path) -> list[ServerProcess]:
    """Two processes that share a directory, as the workers of one service do."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    return [await server_process(PROMETHEUS_MULTIPROC_DIR=str(directory)) for _ in range(2)]


async def test_workers_answer_for_each_other(
    workers: list[ServerProcess], db: Connection, tmp_path: Path
) -> None:
    """Whichever worker is asked: sums of what was counted, and of what is; the worst of the rest.

    What a worker had open ends with it, what it had counted stays.
    """
    one, other = workers
    keys = sign_in(db, "alice", "bob", "carol")
    ports = [int(worker.url.rpartition(":")[2]) for worker in (one, one, other)]
    async with Clients() as clients:
        streams = [await clients.open(port, key) for port, key in zip(ports, keys, strict=True)]
        await eventually(lambda: all(stream.ready for stream in streams))
        for user in ("alice", "bob", "carol"):
            insert(db, user)
        await eventually(lambda: all(stream.ids for stream in streams))

        async def agreed(worker: ServerProcess) -> bool:
            # What is only looked up, a sibling tells every other second.
            samples = await scrape(worker.url)
            return (
                value(samples, "sse_streams", state="live") == 3
                and value(samples, "sse_streams_opened_total") == 3
                and value(samples, "sse_deliveries_total") == 3
                and value(samples, "sse_created_to_written_seconds_count") == 3
                and value(samples, "sse_workers") == 2
                and value(samples, "sse_feed_connected") == 1
                and value(samples, "sse_pool_size") == 16
            )

        await until(lambda: agreed(one))
        await until(lambda: agreed(other))
        bounds = [
            dict(labels)["le"]
            for labels in (await scrape(one.url))["sse_created_to_written_seconds_bucket"]
        ]
        assert len(bounds) == len(set(bounds)) == 15
        one.kill()
        await one.wait()
        # As the process that started it does.
        multiprocess.mark_process_dead(one.pid, str(tmp_path / "metrics"))  # type: ignore[no-untyped-call]
        samples = await scrape(other.url)
    assert value(samples, "sse_streams", state="live") == 1
    assert value(samples, "sse_workers") == 1
    assert value(samples, "sse_streams_opened_total") == 3


async def test_a_service_with_workers_answers_as_one(
    server_process: ServerProcessFactory, db: Connection
) -> None:
    """With ``--workers 2`` both are in what is scraped from their one address, however often."""
    process = await server_process("--workers", "2")
    keys = sign_in(db, *(f"user-{number}" for number in range(8)))
    async with Clients() as clients:
        streams = await clients.open_many(int(process.url.rpartition(":")[2]), keys)

        async def whole() -> bool:
            samples = await scrape(process.url)
            return (
                value(samples, "sse_workers") == 2
                and value(samples, "sse_streams", state="live") == 8
                and value(samples, "sse_streams_opened_total") == 8
                and value(samples, "sse_feed_connected") == 1
                and value(samples, "sse_pool_size") == 16
            )

        await until(whole)
        for _ in range(5):  # each is a connection of its own, to whichever worker
            assert await whole()
        for number in range(8):
            insert(db, f"user-{number}")
        await eventually(lambda: all(stream.ids for stream in streams))
        assert value(await scrape(process.url), "sse_deliveries_total") == 8


async def test_a_worker_without_a_feed_shows(
    workers: list[ServerProcess], db: Connection, cluster: EmbeddedPostgres
) -> None:
    """One worker of two that has lost its feed is what all of them report."""
    _, other = workers
    feeds = "SELECT pid FROM pg_stat_activity WHERE application_name = 'sse-server feed'"
    assert len(query(db, feeds)) == 2

    async def connected() -> float:
        return value(await scrape(other.url), "sse_feed_connected")

    assert await connected() == 1
    with without_connections(cluster, db):
        query(db, f"SELECT pg_terminate_backend(pid) FROM ({feeds} LIMIT 1) AS feed")

        async def lost() -> bool:
            return await connected() == 0

        await until(lost)

    async def back() -> bool:
        return await connected() == 1

    await until(back, 30)


# What deploy/ names


def promql(value: object, where: str) -> list[str]:
    """All expressions in a dashboard or in rules: the members of that name."""
    if isinstance(value, dict):
        own = [value[where]] if isinstance(value.get(where), str) else []
        return own + [text for item in value.values() for text in promql(item, where)]
    if isinstance(value, list):
        return [text for item in value for text in promql(item, where)]
    return []


EXPRESSIONS = [
    pytest.param(text, id=f"{path.name}-{number}")
    for path, text_of in ((DASHBOARD, json.loads), (ALERTS, yaml.safe_load))
    for number, text in enumerate(promql(text_of(path.read_text(encoding="utf-8")), "expr"))
]


@pytest.fixture
async def exercised(node: Node, db: Connection) -> Samples:
    """The metrics of a server on which some of everything has happened."""
    [key] = sign_in(db, "alice")
    stream = await node.open_live(key)
    insert(db, "alice")
    await eventually(lambda: stream.ids)
    await Retention(node.store, node.metrics, pause_seconds=0).delete_old()
    await scraped(node)
    return await scraped(node)


async def test_all_that_is_drawn_and_alerted_on_exists(exercised: Samples) -> None:
    """Every metric, label and value of a label in an expression is one that a server has."""
    assert len(EXPRESSIONS) > 40
    unknown = set()
    for parameter in EXPRESSIONS:
        [text] = parameter.values
        assert isinstance(text, str)
        names = set(re.findall(r"\bsse_\w+", text))
        assert names or text.startswith("up{"), text
        for name in names:
            if name not in exercised:
                unknown.add(name)
                continue
            labels = {label for found in exercised[name] for label, _ in found}
            for selector in re.findall(rf"\b{name}{{([^}}]*)}}", text):
                for label, told in re.findall(r'(\w+)=~?"([^"]*)"', selector):
                    if label not in {"instance", *labels}:
                        unknown.add(f"{name}: {label}")
                    values = {dict(found).get(label) for found in exercised[name]}
                    if label != "instance" and label != "status" and told not in values:
                        unknown.add(f"{name}: {label}={told}")
    assert not unknown


def test_every_metric_is_documented() -> None:
    """The table in docs/observability.md has every metric there is, and no other."""
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    there = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Metrics().registry.collect()
    }
    assert set(re.findall(r"^\| `(sse_\w+)` \|", text, re.MULTILINE)) == there


def test_the_dashboard_is_one() -> None:
    """Panels have titles, ids of their own and places that do not overlap."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        assert place["x"] + place["w"] <= 24
        places |= cells


def test_the_rules_are_rules() -> None:
    """Every alert says how bad it is, what happens and where to look."""
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["for"]


def test_prometheus_takes_the_rules() -> None:
    """promtool finds no fault in the rules."""
    promtool = require_program("promtool", "install it, for example: apt install prometheus")
    done = subprocess.run(
        [promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
