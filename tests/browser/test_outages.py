"""Whatever happens to the line or the server: all of it arrives, once, in order, without a reload.

``TEST_OUTAGE_SECONDS=60`` makes the outages as long as they may be in the field.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from urllib.parse import urlsplit

import pytest

from sse_server.embedded import EmbeddedPostgres
from tests.browser.conftest import Desk, DeskFactory, Table, agree, start, until
from tests.browser.proxy import HttpProxy, TcpProxy
from tests.conftest import ServerProcess, ServerProcessFactory

OUTAGE = float(os.environ.get("TEST_OUTAGE_SECONDS", "6"))
BACK = 40.0  # backoff of at most 30 s, and some

pytestmark = pytest.mark.timeout(120 + 2 * OUTAGE)


async def insert_for(table: Table, seconds: float) -> list[int]:
    """Insert rows all the time, as backends do that know nothing of the outage."""
    ids = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (id := table.insert(f"at {time.monotonic():.1f}")) is not None:
            ids.append(id)
        await asyncio.sleep(random.uniform(0.1, 0.4))
    return ids


async def complete(desk: Desk, table: Table, ids: list[int], timeout: float = BACK) -> None:
    """Each tab comes to show what the table holds; each id was announced once, in order."""
    for tab in desk.tabs:
        await tab.is_status("live", timeout)
        await agree(tab, table)
        assert sorted(set(await tab.shown()), reverse=True) == await tab.shown()
        told = await tab.told()
        assert told == sorted(set(told))
        assert set(ids) <= set(told)


async def two_tabs(desk: DeskFactory, url: str) -> Desk:
    desk_ = await desk(url, "alice")
    await (await desk_.open()).is_status("live")
    return desk_


async def test_server_killed(
    server: ServerProcess, server_process: ServerProcessFactory, desk: DeskFactory, alice: Table
) -> None:
    """SIGKILL, nothing for a while, and a new server in the same place."""
    alice.no_rate_limit()
    desk_ = await two_tabs(desk, server.url)
    server.kill()
    await server.wait()
    ids = await insert_for(alice, OUTAGE)
    await start(server_process, "--port", str(urlsplit(server.url).port))
    await complete(desk_, alice, [*ids, *await insert_for(alice, 1)])


async def test_postgres_restarted(
    server: ServerProcess, desk: DeskFactory, alice: Table, cluster: EmbeddedPostgres, dsn: str
) -> None:
    """The database restarts under the streams, which stay open."""
    from tests.conftest import connect

    desk_ = await two_tabs(desk, server.url)
    alice.insert("before")
    await asyncio.to_thread(cluster.restart)
    connection = connect(dsn)
    try:
        after = Table(connection, "alice")
        after.no_rate_limit()
        ids = await insert_for(after, 3)
        await complete(desk_, after, ids)
    finally:
        connection.close()


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_error_pages(
    server: ServerProcess, desk: DeskFactory, alice: Table, status: int
) -> None:
    """A proxy answers with its own HTML pages for a while: nobody is signed out by that."""
    alice.no_rate_limit()
    async with HttpProxy(server.url) as proxy:
        desk_ = await two_tabs(desk, proxy.url)
        proxy.status = status
        proxy.cut()
        ids = await insert_for(alice, OUTAGE)
        for tab in desk_.tabs:
            assert await tab.status() in ("connecting", "offline")
        proxy.status = 0
        await complete(desk_, alice, [*ids, *await insert_for(alice, 1)])


async def test_dead_line(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """Nothing passes any more, and nobody says so: the watchdog notices."""
    alice.no_rate_limit()
    async with TcpProxy(server.url) as proxy:
        desk_ = await two_tabs(desk, proxy.url)
        proxy.dead = True
        ids = await insert_for(alice, OUTAGE)
        for tab in desk_.tabs:
            assert await tab.status() != "live"
        proxy.dead = False
        await complete(desk_, alice, [*ids, *await insert_for(alice, 1)])


async def test_rolling_restart(
    server: ServerProcess, server_process: ServerProcessFactory, desk: DeskFactory, alice: Table
) -> None:
    """Servers are replaced one after the other behind a proxy, under load."""
    alice.no_rate_limit()
    async with HttpProxy(server.url) as proxy:
        desk_ = await two_tabs(desk, proxy.url)
        load = asyncio.ensure_future(insert_for(alice, 8))
        for _ in range(2):
            new = await start(server_process)
            proxy.target = new.url
            server.terminate()
            assert await server.wait() == 0
            server = new
            await desk_.tabs[0].is_status("live", BACK)
        ids = await load
        await complete(desk_, alice, ids)


async def test_buffering_proxy(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A proxy that keeps the stream to itself: the page polls within 45 s and says so."""
    async with HttpProxy(server.url) as proxy:
        proxy.buffers = True
        desk_ = await desk(proxy.url)
        tab = await desk_.open()
        form = tab.page.locator("#sign-in")
        started = time.monotonic()
        await form.get_by_role("button", name="alice").click()
        await tab.is_status("polling", 45)
        assert time.monotonic() - started < 45
        inbox = tab.page.locator("#inbox")
        await inbox.get_by_text("the live connection is blocked").wait_for(timeout=5000)
        alice.insert("by the next poll")
        await agree(tab, alice, 40)
        proxy.buffers = False
        await tab.is_status("live", BACK)
        alice.insert("by the stream")
        await agree(tab, alice)


async def test_online_again(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """The browser says that it is online again: the stream is back at once, not after a backoff."""
    async with HttpProxy(server.url) as proxy:
        desk_ = await desk(proxy.url, "alice")
        [tab] = desk_.tabs
        proxy.status = 502
        proxy.cut()
        await tab.is_status("offline", 30)
        await asyncio.sleep(OUTAGE)
        alice.insert("while offline")
        proxy.status = 0
        await tab.page.evaluate("window.dispatchEvent(new Event('online'))")
        await agree(tab, alice, 3)
        await tab.is_status("live", 3)


async def test_long_pages_by_polling(
    server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """More than a page, written by one transaction, arrives by polling, each announced once."""
    alice.no_rate_limit()
    async with HttpProxy(server.url) as proxy:
        proxy.buffers = True
        desk_ = await desk(proxy.url)
        tab = await desk_.open()
        await tab.page.locator("#sign-in").get_by_role("button", name="alice").click()
        await tab.is_status("polling", 45)
        alice.insert("a cursor")
        ids = alice.insert_many(1300)

        async def told() -> bool:
            return set(ids) <= set(await tab.told())

        await until(told, 50)
        told_ids = await tab.told()
        assert told_ids == sorted(set(told_ids))
        assert (await tab.snapshot())["unreadCount"] == 1301
