"""What a user sees and does: the inbox, its count, its links, with keyboard and screen reader."""

from __future__ import annotations

import asyncio
import gzip
import importlib.resources
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from tests.browser.conftest import DeskFactory, Tab, Table, agree, until
from tests.conftest import ROOT, ServerProcess, eventually

STATIC = ROOT / "static"


def inbox(page: Page) -> Locator:
    return page.locator("#inbox")


def test_size() -> None:
    """The client is at most 6 KB on the wire."""
    assert len(gzip.compress((STATIC / "client.js").read_bytes(), 9)) <= 6 * 1024


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.*")), ids=lambda path: path.name)
def test_no_markup_from_text(path: Path) -> None:
    """No script turns text into markup or code, and no page has inline script or style."""
    text = path.read_text(encoding="utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert forbidden not in text
    if path.suffix == ".html":
        assert "<script>" not in text
        assert "<style" not in text
        assert " style=" not in text
        assert " on" + "click=" not in text


async def test_messages_are_text(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A message is shown as text; a link that is none is not made one."""
    [tab] = (await desk(server.url, "alice")).tabs
    alice.insert("Tom & Jerry, 3 < 4")
    await agree(tab, alice)
    await expect(inbox(tab.page).locator(".message").first).to_have_text("Tom & Jerry, 3 < 4")
    # Past the server, as if it were not to be trusted.
    await tab.page.evaluate(
        """() => {
          const rows = ["javascript:alert(1)", " JaVaScRiPt:alert(1)", "data:text/html,x",
            "vbscript:x", "/orders/1", "https://app.example/x", null];
          window.before = client.getSnapshot().notifications.length;
          const made = rows.map((link, n) => ({ id: 1e6 + n, event_type: "new_message",
            message: "<img src=x onerror=alert(1)>", link,
            created_at: new Date().toISOString(), read_at: null }));
          const original = client.getSnapshot;
          const snapshot = { ...original(), notifications: made.reverse() };
          const fake = Object.assign(new EventTarget(), {
            subscribe: () => () => {}, getSnapshot: () => snapshot });
          document.querySelector("#inbox").client = fake;
        }"""
    )
    links = (
        await inbox(tab.page)
        .locator(".item a")
        .evaluate_all("nodes => nodes.map(node => node.getAttribute('href'))")
    )
    assert sorted(links) == ["/orders/1", "https://app.example/x"]
    assert await inbox(tab.page).locator(".message img").count() == 0


async def test_read_on_another_device(
    server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """What is read on one device is read on the other within 200 ms."""
    [phone] = (await desk(server.url, "alice")).tabs
    [laptop] = (await desk(server.url, "alice")).tabs
    alice.insert_many(9)
    await agree(phone, alice)
    await agree(laptop, alice)
    script = """() => new Promise((resolve) => {
      const before = client.getSnapshot().unreadCount;
      const stop = client.subscribe(() => {
        if (client.getSnapshot().unreadCount < before) { stop(); resolve(Date.now()); }
      });
    })"""
    times = []
    for _ in range(8):
        seen = asyncio.ensure_future(laptop.page.evaluate(script))
        await laptop.page.evaluate("1")  # the listener stands
        mark = inbox(phone.page).locator(".item.unread button").first
        clicked = await mark.evaluate("node => { const at = Date.now(); node.click(); return at; }")
        times.append(await seen - clicked)
        await agree(laptop, alice)
    assert sorted(times)[len(times) // 2] < 200, times
    await inbox(phone.page).get_by_role("button", name="Mark all read").click()
    await agree(laptop, alice)
    assert alice.unread() == []


async def test_older_and_filters(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """Older ones are loaded page by page; the count covers those that are not; filters filter."""
    alice.no_rate_limit()
    alice.insert_many(130)
    for _ in range(3):
        alice.insert("status", "status_change")
    desk_ = await desk(server.url, "alice")
    [tab] = desk_.tabs
    other = await desk_.open()
    page = tab.page

    async def shows(count: int) -> bool:
        return len(await tab.shown()) == count

    await until(lambda: shows(50))
    assert (await tab.snapshot())["unreadCount"] == 133
    for count in (100, 133):
        await inbox(page).get_by_role("button", name="Load older").click()
        await until(partial(shows, count))
    await agree(tab, alice)
    await agree(other, alice)
    await expect(inbox(page).get_by_role("button", name="Load older")).to_be_hidden()

    await inbox(page).get_by_label("Type").select_option("status_change")
    await until(lambda: shows(3))
    await inbox(page).locator(".item button").first.click()
    await inbox(page).get_by_role("button", name="Unread").click()
    await until(lambda: shows(2))
    await inbox(page).get_by_role("button", name="Mark all read").click()
    await until(lambda: shows(0))
    await inbox(page).get_by_role("button", name="All", exact=True).click()
    await inbox(page).get_by_label("Type").select_option("")
    await agree(tab, alice)
    assert alice.unread() == []


async def test_preferences(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A switch takes effect at once, and is switched on the user's other devices."""
    [phone] = (await desk(server.url, "alice")).tabs
    [laptop] = (await desk(server.url, "alice")).tabs
    for tab in (phone, laptop):
        await inbox(tab.page).get_by_role("button", name="Settings").click()
    name = "Status change"
    await inbox(phone.page).get_by_role("switch", name=name).click()
    await expect(inbox(laptop.page).get_by_role("switch", name=name)).not_to_be_checked()
    await eventually(lambda: alice.insert("unwanted", "status_change") is None)
    await inbox(laptop.page).get_by_role("switch", name=name).click()
    await expect(inbox(phone.page).get_by_role("switch", name=name)).to_be_checked()
    await eventually(lambda: alice.insert("wanted", "status_change") is not None)
    await agree(phone, alice)


async def test_failed_change_is_taken_back(
    server: ServerProcess, desk: DeskFactory, alice: Table
) -> None:
    """A change that the server refuses is shown as failed and not as done."""
    desk_ = await desk(server.url, "alice")
    [tab] = desk_.tabs
    alice.insert()
    await agree(tab, alice)
    await tab.page.route("**/api/notifications/read", lambda route: route.fulfill(status=503))
    await inbox(tab.page).locator(".item button").first.click()
    await expect(inbox(tab.page).get_by_role("alert")).to_contain_text("did not work")
    await agree(tab, alice)
    assert len(alice.unread()) == 1


async def test_keyboard(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """All can be done with the keyboard, and the focus is never lost."""
    [tab] = (await desk(server.url, "alice")).tabs
    page = tab.page
    alice.insert_many(3)
    await agree(tab, alice)
    bell = page.locator("#bell")
    focused = """() => {
      let node = document.activeElement;
      while (node.shadowRoot?.activeElement) node = node.shadowRoot.activeElement;
      return node.getAttribute("aria-label") ?? node.textContent;
    }"""
    await bell.get_by_role("button", name="Notifications, 3 unread").focus()
    await page.keyboard.press("Enter")
    await expect(bell.get_by_role("dialog")).to_be_visible()
    assert await page.evaluate(focused) == "Notifications"
    for _ in range(20):
        await page.keyboard.press("Tab")
        if "Mark as read" in await page.evaluate(focused):
            break

    def remain(count: int) -> bool:
        return len(alice.unread()) == count

    for left in (2, 1, 0):
        await page.keyboard.press("Enter")
        await eventually(partial(remain, left))
        await agree(tab, alice)
        assert await page.evaluate("document.activeElement.id") == "bell"
    await page.keyboard.press("Escape")
    await expect(bell.get_by_role("dialog")).to_be_hidden()
    assert await page.evaluate(focused) == "Notifications"


async def test_announced(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """A screen reader hears what arrives, politely; several at once are one sentence."""
    [tab] = (await desk(server.url, "alice")).tabs
    live = inbox(tab.page).locator("[aria-live=polite]")
    alice.insert("one")
    await expect(live).to_have_text("New notification: one")
    alice.insert_many(5)
    await expect(live).to_have_text("5 new notifications")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_accessible(
    server: ServerProcess, desk: DeskFactory, alice: Table, scheme: str
) -> None:
    """axe-core finds nothing: signed out, empty, with rows, with all that can be opened open."""
    axe = (
        importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
    )
    desk_ = await desk(server.url, color_scheme=scheme)
    tab = await desk_.open()

    async def check(state: str) -> None:
        # Not as a script element: the page's policy forbids that.
        if not await tab.page.evaluate("'axe' in window"):
            await tab.page.evaluate(axe)
        # What has just come is faded in.
        await tab.page.evaluate(
            "Promise.all([document, ...[...document.querySelectorAll('notification-inbox')]"
            ".map(n => n.shadowRoot)].flatMap(r => r.getAnimations().map(a => a.finished)))"
        )
        result: dict[str, Any] = await tab.page.evaluate("axe.run()")
        assert not result["violations"], f"{state}: " + json.dumps(
            [
                [v["id"], [(n["target"], n.get("failureSummary")) for n in v["nodes"]]]
                for v in result["violations"]
            ],
            indent=1,
        )

    await tab.is_status("signed-out")
    await check("signed out")
    await desk_.sign_in(tab, "alice")
    await check("empty")
    alice.insert_many(3)
    alice.insert("A status", "status_change")
    await agree(tab, alice)
    await inbox(tab.page).get_by_role("button", name="Settings").click()
    await inbox(tab.page).locator(".item button").first.click()
    await tab.page.locator("#bell").get_by_role("button").first.click()
    await tab.page.locator("#bell").get_by_role("button", name="Settings").click()
    await agree(tab, alice)
    await check("all open")


async def test_right_to_left(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """In a page that reads from right to left, the inbox does too, with strings of its own."""
    [tab] = (await desk(server.url, "alice")).tabs
    alice.insert("שלום")
    await agree(tab, alice)
    await tab.page.evaluate(
        "document.documentElement.dir = 'rtl';"
        "document.querySelector('#inbox').strings = { title: 'התראות' }"
    )
    await expect(inbox(tab.page).get_by_role("heading")).to_have_text("התראות")
    dot = await inbox(tab.page).locator(".dot").first.bounding_box()
    message = await inbox(tab.page).locator(".text").first.bounding_box()
    assert dot is not None
    assert message is not None
    assert dot["x"] > message["x"]


@pytest.mark.timeout(300)
async def test_random_operations(server: ServerProcess, desk: DeskFactory, alice: Table) -> None:
    """After any thousand operations the badge is a recount and the list is the table."""
    seed = random.randrange(10**9)
    print("seed", seed)
    choose = random.Random(seed)
    alice.no_rate_limit()
    desks = [await desk(server.url, "alice"), await desk(server.url, "alice")]

    async def do(operation: str, tab: Tab) -> None:
        desk_ = next(one for one in desks if tab in one.tabs)
        rows = (await tab.snapshot())["notifications"]
        if operation == "insert":
            alice.insert(str(choose.random()), choose.choice(["new_message", "status_change"]))
        elif operation == "insert several":
            alice.insert_many(choose.randrange(2, 6))
        elif operation == "read" and rows:
            id = choose.choice(rows)["id"]
            await tab.page.evaluate("id => void client.markRead(id).catch(() => {})", id)
        elif operation == "read here":
            await tab.page.evaluate(
                "document.querySelector('#inbox').shadowRoot"
                ".querySelector('.item.unread button')?.click()"
            )
        elif operation == "read all":
            await tab.page.evaluate("() => void client.markRead('all').catch(() => {})")
        elif operation == "mute":
            await tab.page.evaluate(
                "on => void client.setPreference('status_change', on).catch(() => {})",
                choose.random() < 0.5,
            )
        elif operation == "reconnect":
            await tab.page.evaluate("window.dispatchEvent(new Event('online'))")
        elif operation == "open" and len(desk_.tabs) < 3:
            await desk_.open()
        elif operation == "close" and len(desk_.tabs) > 1:
            await desk_.close(tab)

    operations = {
        "insert": 40,
        "insert several": 5,
        "read": 20,
        "read here": 20,
        "read all": 1,
        "mute": 4,
        "reconnect": 6,
        "open": 2,
        "close": 2,
    }
    started = time.monotonic()
    for _ in range(1000):
        [operation] = choose.choices(list(operations), list(operations.values()))
        await do(operation, choose.choice(choose.choice(desks).tabs))
        if choose.random() < 0.3:
            await asyncio.sleep(choose.random() * 0.02)
    print(f"1000 operations in {time.monotonic() - started:.1f} s, {len(alice.ids())} rows")
    for desk_ in desks:
        for tab in desk_.tabs:
            # Not all of a long list is kept.
            await tab.page.evaluate(
                "() => { const more = () => void (client.getSnapshot().hasMore &&"
                "  client.loadOlder()); client.subscribe(more); more(); }"
            )
            await agree(tab, alice, 20)
