"""The composition root: builds and wires the parts, starts and stops them; the route table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from aiohttp import web
from aiohttp_session import session_middleware

from sse_server import spans
from sse_server.api import (
    notifications,
    openapi,
    operations,
    ops,
    preferences,
    publish,
    session,
)
from sse_server.audit import AUDIT, Audit
from sse_server.config import Settings
from sse_server.database import Database
from sse_server.errors import ConfigurationError, TooManyRequests
from sse_server.feed import Feed
from sse_server.hub import TICKS_PER_SECOND, Hub
from sse_server.limits import LIMITS, Limits, limited
from sse_server.metrics import Metrics
from sse_server.middleware import (
    Headers,
    Observer,
    errors,
    loopback_host,
    same_site,
    timely_bodies,
    trusted_proxies,
)
from sse_server.retention import Retention
from sse_server.services import SERVICES, Services
from sse_server.sessions import STORAGE, PostgresStorage
from sse_server.store import Store
from sse_server.stream import STREAMS, Streams, stream
from sse_server.tasks import Supervisor
from sse_server.tokens import Verifier
from sse_server.usage import Usage

logger = logging.getLogger(__name__)

SETTINGS = web.AppKey("settings", Settings)
SUPERVISOR = web.AppKey("supervisor", Supervisor)
USAGE = web.AppKey("usage", Usage)

# Limits
BODY_BYTES = 64 * 1024


def static_dir() -> Path:
    """Where the page is: in the package once installed, else at the top of the checkout."""
    here = Path(__file__).parent
    for path in (here / "static", here.parent / "static"):
        if path.is_dir():
            return path
    raise ConfigurationError("static/ is missing from this installation.")


def _store(settings: Settings) -> Store:
    if settings.database_url is None:
        raise ConfigurationError("DATABASE_URL is not set.")
    listen = settings.listen_database_url
    database = Database(
        settings.database_url.get_secret_value(),
        size=settings.pool_size,
        connect_timeout=settings.connect_timeout,
        query_timeout=settings.query_timeout,
        listen_dsn=None if listen is None else listen.get_secret_value(),
    )
    return Store(database, link_hosts=settings.link_hosts)


async def prepare(settings: Settings) -> None:
    """Find out what could keep the application from starting, and apply the schema.

    For the process that starts others: what is wrong is said once, before there are any.

    Raises:
        ConfigurationError: As `create_app()`, or the database cannot be used like this.
        DatabaseError, DatabaseUnavailable: The database cannot be used.
    """
    static_dir()
    Verifier.of(settings)
    store = _store(settings)
    try:
        await store.apply_schema()
        connection = await store.database.connect_to_listen("sse-server feed")
        try:
            await store.check_listen(connection)
        finally:
            connection.close()
    finally:
        await store.database.close()


def create_app(settings: Settings) -> web.Application:
    """Build the application. Nothing connects before it is started.

    Raises:
        ConfigurationError: There is no database to use, or a key cannot be used.
    """
    spans.enable()
    metrics = Metrics()
    store = _store(settings)
    hub = Hub(
        metrics,
        max_streams=settings.max_streams,
        streams_per_user=settings.streams_per_user,
        streams_per_address=settings.streams_per_address,
        buffer_memory=settings.buffer_memory_bytes,
        buffer_bytes=settings.stream_buffer_bytes,
        heartbeat_seconds=settings.heartbeat_seconds,
        max_seconds=settings.stream_max_seconds,
    )
    storage = PostgresStorage(
        store,
        seconds=settings.session_seconds,
        streams_per_user=settings.streams_per_user,
        stream_seconds=settings.stream_max_seconds,
        cross_site=bool(settings.allowed_origins),
    )
    observer = Observer(metrics, settings.trusted_proxies)
    app = web.Application(
        middlewares=[
            observer.middleware,
            trusted_proxies(settings.trusted_proxies),
            errors,
            *([loopback_host] if settings.demo else []),
            same_site(settings.allowed_origins),
            timely_bodies(settings.body_timeout),
            session_middleware(storage),
            limited,
        ],
        client_max_size=BODY_BYTES,
    )
    audit = Audit(store)
    limits = Limits(
        api_calls=settings.api_calls_per_minute,
        anonymous_calls=settings.anonymous_calls_per_minute,
        sign_ins=settings.sign_ins_per_minute,
        refused=partial(_over_limit, audit),
        metrics=metrics,
    )
    app[AUDIT] = audit
    app[LIMITS] = limits
    app[SERVICES] = Services(store, limits, audit, link_hosts=settings.link_hosts)
    app[openapi.DOCUMENT] = openapi.document(
        demo=settings.demo, operator=settings.operator_key is not None
    )
    app[SETTINGS] = settings
    app[SUPERVISOR] = Supervisor()
    app[notifications.STORE] = store
    feed = app[operations.FEED] = Feed(store, hub, metrics, probe_seconds=settings.probe_seconds)
    usage = app[USAGE] = Usage(store, limits)
    feed.listen(usage.KIND, usage.heard)
    app[operations.GAUGES] = operations.Gauges(metrics, hub, feed, store.database)
    app[operations.HUB] = hub
    app[operations.METRICS] = metrics
    app[STORAGE] = storage
    verifier = Verifier.of(settings)
    if verifier is not None:
        app[session.VERIFIER] = verifier
    app[STREAMS] = Streams(
        hub,
        store,
        metrics,
        page_rows=settings.replay_page_rows,
        slow_seconds=settings.slow_seconds,
        send_timeout=settings.send_timeout,
    )
    if settings.operator_key is not None:
        app[ops.OPERATORS] = ops.Operators(settings.operator_key.get_secret_value())
    app.on_response_prepare.append(observer.prepared)
    app.on_response_prepare.append(Headers(settings.allowed_origins, framed_page=settings.demo))
    app.cleanup_ctx.append(_running)
    # Not in cleanup_ctx: aiohttp waits for the handlers before it comes to that, and streams do
    # not end by themselves.
    app.on_shutdown.append(_drain)
    _add_routes(app, demo=settings.demo, operators=settings.operator_key is not None)
    return app


def _add_routes(app: web.Application, *, demo: bool, operators: bool) -> None:
    app.add_routes(
        [
            web.get("/api/stream", stream, allow_head=False),
            web.get("/api/notifications", notifications.history, allow_head=False),
            web.get("/api/notifications/unread", notifications.unread, allow_head=False),
            web.post("/api/notifications/read", notifications.mark_read),
            web.post("/api/notifications/{id}/read", notifications.mark_one_read),
            web.get("/api/preferences", preferences.get, allow_head=False),
            web.patch("/api/preferences", preferences.patch),
            web.put("/api/preferences/{event_type}", preferences.put),
            web.post("/api/session", session.create),
            web.get("/api/session", session.get, allow_head=False),
            web.delete("/api/session", session.delete),
            web.post("/api/publish", publish.publish),
            web.get("/api/openapi.json", openapi.get, allow_head=False),
            web.get("/api/docs", _docs, allow_head=False),
            web.get("/livez", operations.livez),
            web.get("/readyz", operations.readyz),
            web.get("/metrics", operations.metrics),
            web.get("/", _page),
            web.static("/static", static_dir()),
        ]
    )
    if operators:
        app.add_routes(
            [
                web.get("/ops", _operators_page),
                web.post("/ops/api/session", ops.sign_in),
                web.delete("/ops/api/session", ops.sign_out),
                web.get("/ops/api/state", ops.state, allow_head=False),
                web.get("/ops/api/audit", ops.recent_audit, allow_head=False),
                web.get("/ops/api/notifications/{id}", ops.explain, allow_head=False),
            ]
        )
    if demo:
        app.add_routes(
            [
                web.post("/demo/session", session.demo_sign_in),
                web.post("/demo/publish", session.demo_publish),
            ]
        )


async def _page(request: web.Request) -> web.StreamResponse:
    """GET /: the demo inbox."""
    return web.FileResponse(static_dir() / "index.html", headers={"Cache-Control": "no-cache"})


async def _docs(request: web.Request) -> web.StreamResponse:
    """GET /api/docs: the OpenAPI document, to be read."""
    return web.FileResponse(static_dir() / "openapi.html", headers={"Cache-Control": "no-cache"})


async def _operators_page(request: web.Request) -> web.StreamResponse:
    """GET /ops: the operators' page; what it shows needs the key."""
    return web.FileResponse(static_dir() / "ops.html", headers={"Cache-Control": "no-cache"})


async def _running(app: web.Application) -> AsyncIterator[None]:
    store = app[notifications.STORE]
    supervisor = app[SUPERVISOR]
    try:
        await store.apply_schema()
        await app[operations.FEED].open()
    except BaseException:
        await store.database.close()
        raise
    supervisor.start("feed", app[operations.FEED].run())
    supervisor.start("clock", _clock(app[operations.HUB]))
    supervisor.start("limits", app[LIMITS].run())
    supervisor.start("usage", app[USAGE].run())
    supervisor.start("retention", Retention(store, app[operations.METRICS]).run())
    supervisor.start("gauges", app[operations.GAUGES].run())
    yield
    await supervisor.stop()
    await app[AUDIT].close()
    await app[STREAMS].close()
    await app[STORAGE].close()
    await store.database.close()


async def _drain(app: web.Application) -> None:
    await app[STREAMS].drain(app[SETTINGS].drain_seconds)


async def _clock(hub: Hub) -> None:
    while True:
        await asyncio.sleep(1 / TICKS_PER_SECOND)
        hub.tick()


def _over_limit(audit: Audit, limit: str, key: str, count: int) -> None:
    audit.note(
        "limit", actor=key, outcome=TooManyRequests.slug, detail={"limit": limit, "count": count}
    )
