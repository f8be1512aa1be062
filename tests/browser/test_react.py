"""The React example: built by Vite, used in a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.async_api import Browser, Request, Route, expect

from tests.browser.conftest import Table
from tests.browser.proxy import HttpProxy
from tests.conftest import ROOT, ServerProcess, eventually, require_program

EXAMPLE = ROOT / "examples" / "react"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built example. It is built in a copy: a checkout may not be written to."""
    npm = str(require_program("npm", "install Node.js 20 or newer"))
    work = tmp_path_factory.mktemp("react")
    example = work / "examples" / "react"
    shutil.copytree(EXAMPLE, example, ignore=shutil.ignore_patterns("node_modules", "dist"))
    shutil.copytree(ROOT / "static", work / "static")
    for command in ([npm, "ci", "--no-audit", "--no-fund"], [npm, "run", "build"]):
        done = subprocess.run(
            command,
            cwd=example,
            env={**os.environ, "CI": "true"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return example / "dist"


@pytest.mark.timeout(300)
async def test_example(built: Path, server: ServerProcess, browser: Browser, alice: Table) -> None:
    """The hook and the component show the same, live, through one stream, without a warning."""
    async with HttpProxy(server.url) as proxy:
        context = await browser.new_context()
        page = await context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: (
                faults.append(message.text)
                if message.type in ("error", "warning") and "401" not in message.text
                else None
            ),
        )

        async def page_or_asset(route: Route, request: Request) -> None:
            path = request.url.removeprefix(proxy.url).partition("?")[0]
            await route.fulfill(path=built / (path.lstrip("/") or "index.html"))

        await page.route(proxy.url + "/", page_or_asset)
        await page.route(proxy.url + "/assets/*", page_or_asset)
        await page.goto(proxy.url + "/")
        await page.get_by_role("button", name="Sign in").click()
        heading = page.get_by_role("heading", level=1)
        await expect(heading).to_have_text("0 unread")
        alice.insert_many(2)
        await expect(heading).to_have_text("2 unread")
        assert proxy.streams == 1
        await page.get_by_role("button", name="Read", exact=True).first.click()
        await expect(heading).to_have_text("1 unread")
        await page.get_by_role("button", name="Notifications, 1 unread").click()
        dialog = page.get_by_role("dialog", name="What’s new")
        await expect(dialog.get_by_role("listitem")).to_have_count(2)
        await dialog.get_by_role("button", name="Mark all read").click()
        await expect(heading).to_have_text("0 unread")
        await eventually(lambda: alice.unread() == [])

        alice.insert_with_link("see order 7", "/orders/7")
        await dialog.get_by_role("link", name="see order 7").click()
        await expect(page.get_by_text("Page: /orders/7")).to_be_visible()
        assert page.url == proxy.url + "/"
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        await eventually(lambda: proxy.streams == 0)
        assert not faults
        await context.close()
