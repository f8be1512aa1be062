"""All tabs of a browser are one: one stream, one list, one pop-up."""

from __future__ import annotations

import asyncio

import pytest

from tests.browser.conftest import Desk, DeskFactory, Tab, Table, agree, until
from tests.browser.proxy import HttpProxy
from tests.conftest import ServerProcess, eventually

TABS = 8  # more than the six connections that a browser has for one HTTP/1.1 server


async def leader(tabs: list[Tab]) -> Tab | None:
    leading = [tab for tab in tabs if await tab.leads()]
    assert len(leading) <= 1
    return leading[0] if leading else None


async def eight(desk: Desk) -> None:
    while len(desk.tabs) < TABS:
        await desk.open()
    for tab in desk.tabs:
        await tab.is_status("live")


async def test_eight_tabs(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """Eight tabs need one stream, show the same, and the next one leads when the leader closes."""
    async with HttpProxy(server.url) as proxy:
        await _test_eight_tabs(proxy, await desk(proxy.url, "alice"), alice)


async def _test_eight_tabs(proxy: HttpProxy, desk: Desk, alice: Table) -> None:
    alice.insert_many(3)
    await eight(desk)
    assert proxy.streams == 1
    alice.insert("to all")
    for tab in desk.tabs:
        await agree(tab, alice)

    for _ in range(3):
        first = await leader(desk.tabs)
        assert first is not None
        await desk.close(first)
        meanwhile = alice.insert("while nobody leads")

        async def leads() -> bool:
            new = await leader(desk.tabs)
            return new is not None and await new.status() == "live"

        await until(leads, 15.0, "no other tab takes over")
        alice.insert("to the next leader")
        for tab in desk.tabs:
            await agree(tab, alice)
            told = await tab.told()
            assert meanwhile in told
            assert len(told) == len(set(told))
    await eventually(lambda: proxy.streams == 1)


async def test_frozen_leader(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A frozen tab hands the lead over, and knows all again once it is thawed."""
    desk_ = await desk(server.url, "alice")
    first = desk_.tabs[0]
    second = await desk_.open()
    await second.is_status("live")
    # Headless Chromium does not freeze tabs; this is what it tells one that it freezes.
    await first.page.evaluate("document.dispatchEvent(new Event('freeze'))")
    await until(second.leads, 15.0, "the second tab does not take over")
    await second.is_status("live")
    alice.insert("while one is frozen")
    await agree(second, alice)
    await first.page.evaluate("document.dispatchEvent(new Event('resume'))")
    await agree(first, alice)
    assert not await first.leads()


@pytest.mark.timeout(120)
async def test_hung_leader(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A leader that does nothing any more, without a word, loses the lead to a visible tab."""
    desk_ = await desk(server.url, "alice")
    first = desk_.tabs[0]
    others = [await desk_.open(), await desk_.open()]
    for tab in others:
        await tab.is_status("live")
    hang = asyncio.ensure_future(
        first.page.evaluate("() => { const end = Date.now() + 40000; while (Date.now() < end); }")
    )

    async def answers(tab: Tab) -> bool:
        try:
            return bool(await asyncio.wait_for(tab.page.evaluate("true"), 5))
        except TimeoutError:
            return False

    # Chromium may let two tabs of a site share a process: then the other one hangs as well.
    awake = [tab for tab in others if await answers(tab)]
    assert awake
    second = awake[0]
    await second.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await until(second.leads, 28.0, "the second tab does not take over")
    assert not hang.done()
    alice.insert("while one hangs")
    await agree(second, alice)
    await hang
    await agree(first, alice)
    assert not await first.leads()


async def test_without_locks(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """Where the browser has no Web Locks (plain HTTP by another name), tabs still share one."""
    async with HttpProxy(server.url) as proxy:
        desk_ = await desk(proxy.url)
        await desk_.context.add_init_script("delete Navigator.prototype.locks")
        await desk_.sign_in(await desk_.open(), "alice")
        for _ in range(3):
            await (await desk_.open()).is_status("live")
        assert not await desk_.tabs[0].page.evaluate("'locks' in navigator")
        assert proxy.streams == 1
        first = await leader(desk_.tabs)
        assert first is not None
        await desk_.close(first)
        alice.insert("while nobody leads")
        for tab in desk_.tabs:
            await agree(tab, alice)
        await eventually(lambda: proxy.streams == 1)


async def test_sign_out_everywhere(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """Signing out in one tab signs out all within a second; signing in resumes."""
    async with HttpProxy(server.url) as proxy:
        desk_ = await desk(proxy.url, "alice")
        await desk_.open()
        await desk_.open()
        for tab in desk_.tabs:
            await tab.is_status("live")
        await desk_.tabs[2].page.get_by_role("button", name="Sign out").click()
        for tab in desk_.tabs:
            await tab.is_status("signed-out", 1.0)
            assert (await tab.snapshot())["notifications"] == []
        await eventually(lambda: proxy.streams == 0)
        count = proxy.requests.count("/api/stream")
        await asyncio.sleep(3)  # nothing may happen in this time
        assert proxy.requests.count("/api/stream") == count

        alice.insert("while signed out")
        await desk_.sign_in(desk_.tabs[1], "alice")
        for tab in desk_.tabs:
            await agree(tab, alice)
        await desk_.tabs[0].page.get_by_role("button", name="Sign out").click()
        await desk_.sign_in(desk_.tabs[0], "bob")
        for tab in desk_.tabs:
            await tab.is_status("live")
            snapshot = await tab.snapshot()
            assert snapshot["userId"] == "bob"
            assert snapshot["notifications"] == []


async def test_session_ends_elsewhere(
    server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """A session that the server ends signs all tabs out within a second."""
    desk_ = await desk(server.url, "alice")
    await desk_.open()
    alice.end_sessions()
    for tab in desk_.tabs:
        await tab.is_status("signed-out", 1.5)


async def test_plain_page_beside(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A page of the same session that uses EventSource by itself keeps it; ours polls."""
    async with HttpProxy(server.url) as proxy:
        desk_ = await desk(proxy.url, "alice")
        [tab] = desk_.tabs
        plain = await desk_.context.new_page()
        await plain.goto(proxy.url + "/static/demo.css")
        await plain.evaluate("window.source = new EventSource('/api/stream')")
        await tab.is_status("polling")
        count = proxy.requests.count("/api/stream")
        await asyncio.sleep(4)  # time to chase each other, if they did
        assert proxy.requests.count("/api/stream") == count
        assert await plain.evaluate("window.source.readyState") == 1
        alice.insert("by the next poll")
        await agree(tab, alice, 40)


@pytest.mark.parametrize("visible", [True, False])
async def test_one_popup(
    server: ServerProcess, desk: DeskFactory, alice: Table, *, visible: bool
) -> None:
    """A notification pops up once for all tabs, and not at all while one of them is visible."""
    desk_ = await desk(server.url)
    # Headless tabs are all visible: each says what the test wants.
    await desk_.context.add_init_script(
        "localStorage.setItem('notifications-popups', 'on');"
        "window.hiddenNow = true;"
        "Object.defineProperty(document, 'hidden', { get: () => window.hiddenNow });"
    )
    await desk_.sign_in(await desk_.open(), "alice")
    for _ in range(3):
        await (await desk_.open()).is_status("live")
    if visible:
        await desk_.tabs[1].page.evaluate(
            "hiddenNow = false; document.dispatchEvent(new Event('visibilitychange'))"
        )
    id = alice.insert("<b>Tom</b> & Jerry")
    await asyncio.sleep(1)
    popups = [
        popup
        for tab in desk_.tabs
        for popup in await tab.page.evaluate("popups.map(({ popup, ...rest }) => rest)")
    ]
    if visible:
        assert popups == []
        return
    [popup] = popups
    assert popup["tag"] == str(id)
    assert popup["body"] == "Tom & Jerry"
    # A click marks it read.
    for tab in desk_.tabs:
        await tab.page.evaluate("popups.forEach(({ popup }) => popup.onclick())")
    await eventually(lambda: alice.unread() == [])


async def test_popup_by_service_worker(
    server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """Where pages may not make pop-ups themselves (Chrome on Android), a service worker does."""
    desk_ = await desk(server.url, permissions=["notifications"])
    await desk_.context.add_init_script(
        "window.Notification = class { constructor() { throw new TypeError('Illegal'); }"
        "  static permission = 'granted'; };"
        "localStorage.setItem('notifications-popups', 'on');"
        "Object.defineProperty(document, 'hidden', { get: () => true });"
        # Chromium forgets one that is asked for before it stands on the screen: ask only then.
        "const show = ServiceWorkerRegistration.prototype.showNotification;"
        "ServiceWorkerRegistration.prototype.showNotification = async function (...all) {"
        "  await show.apply(this, all);"
        "  window.shown = true;"
        "};"
    )
    tab = await desk_.open()
    await desk_.sign_in(tab, "alice")
    id = alice.insert("<i>text</i> only")
    script = """async () => {
      const registration = await navigator.serviceWorker.getRegistration("/static/");
      const popups = await registration?.getNotifications() ?? [];
      return popups.map(({ tag, body }) => [tag, body]);
    }"""

    async def shown() -> bool:
        return bool(await tab.page.evaluate("window.shown"))

    await until(shown)
    assert await tab.page.evaluate(script) == [[str(id), "text only"]]
