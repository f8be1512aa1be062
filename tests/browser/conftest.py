"""Browsers with tabs, and what stands in the table to compare them with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page
from psycopg2.extensions import connection as Connection  # noqa: N812

from tests.conftest import ServerProcess, ServerProcessFactory, eventually

# One pane of the demo page: the second one would be a second browser to the server.
PAGE = "/?pane"

# Runs before any script of the page: counts what each tab is told, and takes the pop-ups.
RECORDER = """
(() => {
  window.told = [];
  window.popups = [];
  class Popup {
    static permission = "granted";
    static requestPermission() { return Promise.resolve("granted"); }
    constructor(title, options) { window.popups.push({ title, ...options, popup: this }); }
    close() {}
  }
  window.Notification = Popup;
})()
"""
LISTEN = """async () => {
  const { sharedClient } = await import("/static/shared.js");
  window.client = sharedClient();
  window.client.addEventListener("notification", ({ detail }) => window.told.push(detail.id));
}"""


async def until(
    condition: Callable[[], Awaitable[bool]], timeout: float = 10.0, message: str = ""
) -> None:
    """`eventually` for a coroutine function."""
    predicate: Callable[[], bool | Awaitable[bool]] = condition
    await eventually(predicate, timeout, message or "the condition does not become true")


@dataclass
class Tab:
    """A tab with the demo page."""

    page: Page
    errors: list[str] = field(default_factory=list)

    async def snapshot(self) -> dict[str, Any]:
        """The client's snapshot."""
        text = await self.page.evaluate("JSON.stringify(window.client.getSnapshot())")
        snapshot: dict[str, Any] = json.loads(text)
        return snapshot

    async def ids(self) -> list[int]:
        return [row["id"] for row in (await self.snapshot())["notifications"]]

    async def told(self) -> list[int]:
        """Ids that were announced to this page, in order."""
        ids: list[int] = await self.page.evaluate("window.told")
        return ids

    async def status(self) -> str:
        return str((await self.snapshot())["status"])

    async def leads(self) -> bool:
        return bool((await self.snapshot())["leader"])

    async def is_status(self, status: str, timeout: float = 10.0) -> None:
        """Wait for a status."""

        async def reached() -> bool:
            return await self.status() == status

        await until(reached, timeout, f"the client does not become {status}")

    async def shown(self) -> list[int]:
        """The ids in the list on the page, from the top."""
        items = self.page.locator("#inbox .item")
        ids: list[int] = await items.evaluate_all("nodes => nodes.map(n => Number(n.dataset.id))")
        return ids

    async def badge(self) -> str:
        badge = self.page.locator("#bell .badge")
        return (await badge.text_content() or "") if await badge.is_visible() else "0"


class Desk:
    """A browser of its own: its tabs share cookies, locks and channels."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.tabs: list[Tab] = []

    async def open(self) -> Tab:
        """Open a tab."""
        page = await self.context.new_page()
        tab = Tab(page)
        page.on("pageerror", lambda error: tab.errors.append(str(error)))
        await page.goto(self.url + PAGE)
        await page.evaluate(LISTEN)
        self.tabs.append(tab)
        return tab

    async def sign_in(self, tab: Tab, user: str) -> None:
        """Sign in with the page's form, and wait for the stream."""
        await tab.page.locator("#sign-in").get_by_label("Another user").fill(user)
        await tab.page.locator("#sign-in").get_by_role("button", name="Sign in").click()
        await tab.is_status("live")

    async def close(self, tab: Tab) -> None:
        self.tabs.remove(tab)
        await tab.page.close()


async def start(server_process: ServerProcessFactory, *arguments: str) -> ServerProcess:
    """Start a server that notices a dead line within seconds, and calls nobody too quick."""
    return await server_process(*arguments, SSE_HEARTBEAT_SECONDS="1", SSE_API_CALLS_PER_MINUTE="0")


DeskFactory = Callable[..., Awaitable[Desk]]


@pytest.fixture
async def server(server_process: ServerProcessFactory) -> ServerProcess:
    """A server with the settings of these tests."""
    return await start(server_process)


@pytest.fixture
async def desk(browser: Browser) -> AsyncIterator[DeskFactory]:
    """Open a browser: ``await desk(url)``, signed in with ``await desk(url, "alice")``."""
    desks: list[Desk] = []

    async def build(url: str, user: str | None = None, **options: Any) -> Desk:
        context = await browser.new_context(**options)
        await context.add_init_script(RECORDER)
        made = Desk(context, url)
        desks.append(made)
        if user is not None:
            await made.sign_in(await made.open(), user)
        return made

    yield build
    for made in desks:
        faults = [error for tab in made.tabs for error in tab.errors]
        await made.context.close()
        assert not faults, faults


class Table:
    """What the database knows of one user."""

    def __init__(self, connection: Connection, user: str) -> None:
        self._connection = connection
        self.user = user

    def insert(self, message: str = "hello", event_type: str = "new_message") -> int | None:
        """Insert a row as a backend does; `None` if the user does not want it."""
        rows = self._query(
            "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)"
            " RETURNING id",
            (self.user, event_type, message),
        )
        return int(rows[0][0]) if rows else None

    def insert_many(self, count: int) -> list[int]:
        rows = self._query(
            "INSERT INTO notifications (user_id, event_type, message)"
            " SELECT %s, 'new_message', 'number ' || n FROM generate_series(1, %s) AS n"
            " RETURNING id",
            (self.user, count),
        )
        return [int(row[0]) for row in rows]

    def insert_with_link(self, message: str, link: str) -> None:
        self._query(
            "INSERT INTO notifications (user_id, event_type, message, link)"
            " VALUES (%s, 'new_message', %s, %s) RETURNING id",
            (self.user, message, link),
        )

    def end_sessions(self) -> None:
        self._query("DELETE FROM sessions RETURNING 1", ())

    def no_rate_limit(self) -> None:
        self._query("UPDATE settings SET user_rate_per_minute = 0 RETURNING 1", ())

    def ids(self) -> list[int]:
        """All, newest first."""
        rows = self._query(
            "SELECT id FROM notifications WHERE user_id = %s ORDER BY id DESC", (self.user,)
        )
        return [int(row[0]) for row in rows]

    def unread(self) -> list[int]:
        """Those not read, newest first."""
        rows = self._query(
            "SELECT id FROM notifications WHERE user_id = %s AND read_at IS NULL ORDER BY id DESC",
            (self.user,),
        )
        return [int(row[0]) for row in rows]

    def _query(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()


@pytest.fixture
def alice(db: Connection) -> Table:
    return Table(db, "alice")


def shown_count(unread: int) -> str:
    return str(unread) if unread < 100 else "99+"


async def agree(tab: Tab, table: Table, timeout: float = 10.0) -> None:
    """Wait until the tab's list and count are what the table says, and so is what it shows."""

    async def agreed() -> bool:
        snapshot = await tab.snapshot()
        rows = snapshot["notifications"]
        return (
            [row["id"] for row in rows] == table.ids()
            and [row["id"] for row in rows if row["read_at"] is None] == table.unread()
            and snapshot["unreadCount"] == len(table.unread())
            and await tab.shown() == table.ids()
            and await tab.badge() == shown_count(len(table.unread()))
        )

    await until(agreed, timeout, f"the page and the table differ: {table.unread()}")
