"""The operators' page in a real browser: signing in, the plots, and the way of a notification."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page
from psycopg2.extensions import connection as Connection  # noqa: N812

from tests.browser.conftest import until
from tests.conftest import ServerProcess, ServerProcessFactory, eventually
from tests.streaming import Clients, insert, query, sign_in, without_rate_limit

KEY = "an operator key of more than 32 characters"
TEXT = "confidential-93ac"


@pytest.fixture
async def server(server_process: ServerProcessFactory, db: Connection) -> ServerProcess:
    without_rate_limit(db)
    return await server_process(SSE_OPERATOR_KEY=KEY)


@pytest.fixture
async def page(browser: Browser, server: ServerProcess) -> AsyncIterator[Page]:
    """The page, not signed in; it must neither fail nor log anything by itself."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    page = await context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: (
            # What Chromium says of answers that a test wants.
            None
            if "401" in message.text or "INTERNET_DISCONNECTED" in message.text
            else faults.append(f"{message.type}: {message.text}")
        ),
    )
    await page.goto(f"{server.url}/ops")
    await page.wait_for_selector("#gate:not([hidden])")
    yield page
    await context.close()
    assert not faults


async def enter(page: Page, key: str = KEY) -> None:
    """Sign in as somebody without a mouse does."""
    await page.get_by_label("Operator key").press_sequentially(key)
    await page.keyboard.press("Enter")


async def test_the_key_opens_the_page_and_stays_out_of_sight(page: Page) -> None:
    """A wrong key is told, the right one opens; it is in no URL, and no script can read it."""
    assert await page.evaluate("document.activeElement.id") == "key"
    await enter(page, "wrong")
    await page.get_by_text("This is not the operator key.").wait_for()
    assert await page.is_hidden("#board")
    await enter(page)  # over what is selected
    await page.wait_for_selector("#board:not([hidden])")
    await page.get_by_text("serving, version").wait_for()
    assert page.url.endswith("/ops")
    assert await page.evaluate("document.cookie") == ""
    assert await page.evaluate("localStorage.length + sessionStorage.length") == 0
    assert await page.input_value("#key") == ""
    await page.reload()
    await page.wait_for_selector("#board:not([hidden])")
    await page.get_by_role("button", name="Sign out").press("Enter")
    await page.wait_for_selector("#gate:not([hidden])")
    await page.reload()
    await page.wait_for_selector("#gate:not([hidden])")


async def test_it_shows_what_goes_on(page: Page, server: ServerProcess, db: Connection) -> None:
    """Streams, deliveries, why streams ended, the trail: within seconds, and never a text."""
    await enter(page)
    async with Clients() as clients:
        keys = sign_in(db, *(f"user-{number}" for number in range(20)))
        streams = await clients.open_many(int(server.url.rpartition(":")[2]), keys)

        async def drawn() -> bool:
            insert(db, "user-1", TEXT)
            figure = page.get_by_role("img", name="Deliveries")
            return (
                await page.get_by_role("img", name="Streams: now live 20").count() == 1
                and await page.get_by_role("img", name="p50 –").count() == 0
                and await figure.locator("polyline").count() > 0
            )

        await until(drawn, 20)
        query(db, "DELETE FROM sessions")
        await eventually(lambda: all(stream.closed for stream in streams))
        await page.locator("#closed", has_text="session_ended").wait_for()
    await page.locator("#audit tr", has_text="user-1").first.wait_for()
    assert TEXT not in await page.content()


async def test_the_way_of_a_notification(page: Page, server: ServerProcess, db: Connection) -> None:
    """Written live, read, suppressed, unknown: told step by step, from the keyboard."""
    await enter(page)
    await page.wait_for_selector("#board:not([hidden])")
    query(db, "INSERT INTO user_preferences VALUES ('bob', 'new_message', false)")
    async with Clients() as clients:
        streams = await clients.open_many(
            int(server.url.rpartition(":")[2]), sign_in(db, "alice", "alice")
        )
        [id] = insert(db, "alice", TEXT)
        insert(db, "bob", TEXT)
        await eventually(lambda: all(stream.ids for stream in streams))
        query(db, "UPDATE notifications SET read_at = clock_timestamp()")

        async def way(id: int) -> str:
            await page.fill("#id", str(id))
            async with page.expect_response(f"**/ops/api/notifications/{id}"):
                await page.press("#id", "Enter")
            await page.wait_for_selector("#way li")
            return " ".join(await page.locator("#way li").all_text_contents())

        told = await way(id)
        for words in ("Committed", "alice", "Matched", "To 2 streams", "Read"):
            assert words in told
        await until(lambda: _says(page, way, id + 1, "bob has switched new_message off"))
        await until(lambda: _says(page, way, 999, "Never written"))
        assert TEXT not in await page.content()


async def _says(page: Page, way: object, id: int, words: str) -> bool:
    assert callable(way)
    return words in await way(id)


async def test_a_lost_server_is_told_and_found_again(
    page: Page, server_process: ServerProcessFactory, server: ServerProcess
) -> None:
    """While the server is away the page says so, and goes on when it is back; the cookie holds."""
    await enter(page)
    await page.get_by_text("serving, version").wait_for()
    await page.context.set_offline(True)
    await page.get_by_text("the server does not answer").wait_for()
    await page.context.set_offline(False)
    await page.get_by_text("serving, version").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_accessible(page: Page, db: Connection, scheme: str) -> None:
    """axe finds nothing to complain about: names, contrast, order; in both colour schemes."""
    insert(db, "alice", TEXT)
    await page.emulate_media(color_scheme="light" if scheme == "light" else "dark")
    for state in ("#gate", "#board"):
        if state == "#board":
            await enter(page)
            await page.wait_for_selector("#audit tr")
        results = await Axe().run(page)
        assert results.violations_count == 0, results.generate_report()


async def test_it_fits_its_window(page: Page, db: Connection) -> None:
    """Nothing runs out of it at the side, on a phone neither."""
    await enter(page)
    insert(db, "alice" * 40, TEXT)
    await page.wait_for_selector("#audit tr")
    for width in (1280, 390):
        await page.set_viewport_size({"width": width, "height": 800})
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
