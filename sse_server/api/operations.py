"""What operators and their machines ask: alive, ready, metrics."""

from __future__ import annotations

import asyncio

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from sse_server.api.notifications import STORE, json_response
from sse_server.database import Database
from sse_server.errors import DatabaseError
from sse_server.events import Closing
from sse_server.feed import Feed
from sse_server.hub import Hub
from sse_server.metrics import Metrics, Totals

FEED = web.AppKey("feed", Feed)
HUB = web.AppKey("hub", Hub)
METRICS = web.AppKey("metrics", Metrics)

# How often a worker tells its siblings what it can only look up: whoever is asked answers for all.
# Looking at 50,000 streams takes some milliseconds.
GAUGE_SECONDS = 2.0


class Gauges:
    """What is not counted when it happens, but looked up."""

    def __init__(self, metrics: Metrics, hub: Hub, feed: Feed, database: Database) -> None:
        self._metrics = metrics
        self._hub = hub
        self._feed = feed
        self._database = database
        # What has not happened yet is 0 and not unknown: else the first would be no increase.
        for reason in Closing:
            metrics.closed.labels(reason.value)
            if reason is not Closing.GONE:
                metrics.turned_away.labels(reason.value)
        for outcome in ("created", "suppressed", "rate_limited"):
            metrics.publish_recipients.labels(outcome)
        for outcome in ("published", "repeated"):
            metrics.publish_requests.labels(outcome)
        for what in ("notifications", "audit", "sessions", "publications"):
            metrics.retention_deleted.labels(what)

    def set(self) -> None:
        """Look now."""
        metrics = self._metrics
        live = lagging = 0
        for stream in self._hub:
            if stream.live:
                live += 1
            elif stream.lagging:
                lagging += 1
        metrics.streams.labels("live").set(live)
        metrics.streams.labels("lagging").set(lagging)
        metrics.streams.labels("replaying").set(len(self._hub) - live - lagging)
        metrics.pool.set(self._database.in_use)
        metrics.pool_waiting.set(self._database.waiting)
        metrics.pool_size.set(self._database.size)
        metrics.feed_heard_at.set(self._feed.heard_at)
        metrics.ready.set(self._feed.connected and not self._hub.draining)

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            self.set()
            await asyncio.sleep(GAUGE_SECONDS)

    async def exposition(self) -> bytes:
        """The metrics in the text format."""
        self.set()
        if self._metrics.shared:
            return await asyncio.to_thread(self._metrics.exposition)
        return self._metrics.exposition()

    async def totals(self) -> Totals:
        """The metrics as values."""
        self.set()
        if self._metrics.shared:
            return await asyncio.to_thread(self._metrics.totals)
        return self._metrics.totals()


GAUGES = web.AppKey("gauges", Gauges)


async def livez(request: web.Request) -> web.Response:
    """GET /livez: the process answers; restarting it would help nobody."""
    return json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """GET /readyz: able to serve, with what is missing if not."""
    checks = {"feed": request.app[FEED].connected, "draining": not request.app[HUB].draining}
    try:
        await request.app[STORE].ping()
        checks["database"] = True
    except DatabaseError:
        checks["database"] = False
    ready = all(checks.values())
    failed = [name for name, passed in checks.items() if not passed]
    return json_response(
        {"status": "ok" if ready else "unavailable", "failed": failed},
        status=200 if ready else 503,
    )


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics"""
    return web.Response(
        body=await request.app[GAUGES].exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )
