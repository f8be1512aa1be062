"""What operators and their machines ask: alive, ready, metrics."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sse_server.api.notifications import STORE, json_response
from sse_server.errors import DatabaseError
from sse_server.feed import Feed
from sse_server.hub import Hub
from sse_server.metrics import Metrics

FEED = web.AppKey("feed", Feed)
HUB = web.AppKey("hub", Hub)
METRICS = web.AppKey("metrics", Metrics)


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
    metrics = request.app[METRICS]
    hub = request.app[HUB]
    live = sum(stream.live for stream in hub)
    metrics.streams.labels("live").set(live)
    metrics.streams.labels("replaying").set(len(hub) - live)
    return web.Response(
        body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
    )
