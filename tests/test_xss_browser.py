"""A real browser gets no element, no script and no request out of a sanitised message."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.async_api import Browser, Dialog, Page, Route
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.database import Database
from sse_server.sanitize import plain_text, safe_link
from sse_server.store import Store
from tests.conftest import Client
from tests.xss_vectors import (
    ESCAPED,
    EVENT_HANDLERS,
    MAKE_ELEMENTS,
    SVG,
    VECTORS,
)

SITE = "https://app.example/"
SENTINEL = f"{SITE}sentinel"

#: Markup before and behind the text. Raw text elements that close with an end tag are among them.
CONTEXTS = (
    ("<p>", "</p>"),
    ("<div>", "</div><b>x</b>"),
    ("<div>before ", " behind</div><b title='>'>x</b>"),
    ("<div>before", "behind src=x onerror=alert(1)></div><b>x</b>"),
    ("<span>", "<!-- x --></span><img alt=''>"),
    ("", "<b>x</b>"),
    ("<ul><li>", "<li>x</ul>"),
    ("<table><tr><td>", "<td>x</table>"),
    ("<table>", "<tr><td>x</table>"),
    ("<select><option>", "<option>x</select>"),
    ("<svg><text>", "</text></svg>"),
    ("<svg><desc>", "</desc></svg><b>x</b>"),
    ("<math><mi>", "</mi></math>"),
    ("<math><annotation-xml encoding='text/html'>", "</annotation-xml></math>"),
    ("<template><p>", "</p></template>"),
    ("<noscript>", "</noscript><b>x</b>"),
    ("<title>", "</title><b>x</b>"),
    ("<textarea>", "</textarea><b>x</b>"),
    ("<xmp>", "</xmp><b>x</b>"),
    ("<noembed>", "</noembed><b>x</b>"),
)

SCRIPT = """
window.fired = 0;
window.alert = () => { window.fired += 1; };

function shape(root) {
  const found = [];
  for (const node of root.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) continue;
    found.push([
      node.nodeType, node.nodeName,
      [...(node.attributes ?? [])].map(a => `${a.name}=${a.value}`),
      shape(node), node.content instanceof Object ? shape(node.content) : [],
    ]);
  }
  return found;
}

function pasted(container, html) {
  container.innerHTML = html;
  return JSON.stringify(shape(container));
}

// What differs from a page that shows a harmless word instead, by text and context.
window.paste = (texts, contexts, live) => {
  const page = live ? document : document.implementation.createHTMLDocument("");
  const faults = [];
  const container = () => page.body.appendChild(page.createElement("div"));
  for (const [before, behind] of contexts) {
    const expected = pasted(container(), before + "word" + behind);
    for (const text of texts) {
      if (pasted(container(), before + text + behind) !== expected)
        faults.push([text, `${before}…${behind}`]);
    }
  }
  return faults;
};

// The same for text that is decoded and pasted again, and serialised and parsed again.
window.pasteAgain = (texts) => {
  const faults = [];
  for (const text of texts) {
    const first = document.body.appendChild(document.createElement("p"));
    first.innerHTML = text;
    if (!text.includes("&") && first.textContent !== text) faults.push([text, "is not shown"]);
    for (let round = 0; round < 3; round += 1) {
      const again = document.body.appendChild(document.createElement("p"));
      if (pasted(again, round % 2 ? first.innerHTML : first.textContent) !== "[]")
        faults.push([text, "pasted again"]);
      first.innerHTML = again.textContent;
    }
  }
  return faults;
};

// Resolves once an error handler that was attached after all others has run.
window.settled = (url) => new Promise(resolve => {
  const image = document.body.appendChild(document.createElement("img"));
  image.onerror = () => requestAnimationFrame(() => setTimeout(resolve));
  image.src = url;
});
"""


@dataclass
class Sandbox:
    """A page with nothing on it and no network, and what happened in it."""

    page: Page
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    async def open(self) -> None:
        """Start over, with an empty page."""
        await self.page.goto(SITE)
        await self.page.evaluate(SCRIPT)
        self.dialogs.clear()
        self.requests.clear()

    async def paste(
        self,
        texts: Sequence[str],
        contexts: Sequence[tuple[str, str]] = CONTEXTS,
        *,
        live: bool = True,
    ) -> list[list[str]]:
        """Paste each text in each context.

        Returns: text and context of those that changed the page's structure.
        """
        faults: list[list[str]] = await self.page.evaluate(
            "([texts, contexts, live]) => paste(texts, contexts, live)",
            [list(texts), [list(context) for context in contexts], live],
        )
        return faults

    async def happened(self) -> list[str]:
        """Wait for what was pasted to load, fail or fire; return what it did."""
        await self.page.evaluate("url => settled(url)", SENTINEL)
        fired = await self.page.evaluate("window.fired")
        foreign = [url for url in self.requests if url != SENTINEL]
        return [*self.dialogs, *foreign, *["alert"] * fired]


@pytest.fixture
async def sandbox(browser: Browser) -> AsyncIterator[Sandbox]:
    page = await browser.new_page()
    sandbox = Sandbox(page)

    async def dismiss(dialog: Dialog) -> None:
        sandbox.dialogs.append(dialog.message)
        await dialog.dismiss()

    async def answer(route: Route) -> None:
        if route.request.url == SITE:
            await route.fulfill(body="<!DOCTYPE html><title>Inbox</title>")
        else:
            sandbox.requests.append(route.request.url)
            await route.abort()

    page.on("dialog", dismiss)
    await page.route("**/*", answer)
    await sandbox.open()
    yield sandbox
    await page.close()


async def assert_harmless(sandbox: Sandbox, texts: Sequence[str]) -> None:
    assert await sandbox.paste(texts) == []
    assert await sandbox.page.evaluate("texts => pasteAgain(texts)", list(texts)) == []
    assert await sandbox.happened() == []


def insert(db: Connection, user_id: str, messages: Sequence[str]) -> None:
    with db.cursor() as cursor:
        cursor.execute("UPDATE settings SET user_rate_per_minute = 0")
        for message in messages:
            cursor.execute(
                "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)",
                (user_id, "new_message", message),
            )


# That the tests below can fail


async def test_the_vectors_make_elements(sandbox: Sandbox) -> None:
    """Without the sanitiser each vector adds something to a page."""
    assert len(set(VECTORS)) == len(VECTORS) >= 150
    faults = await sandbox.paste(MAKE_ELEMENTS, live=False)
    assert set(MAKE_ELEMENTS) - {text for text, _ in faults} == set()


async def test_the_vectors_run_scripts(sandbox: Sandbox) -> None:
    """Without the sanitiser many of them run a script or load something, and that is noticed."""
    context = CONTEXTS[:2]
    harmful = []
    for vector in (*EVENT_HANDLERS, *SVG):
        await sandbox.open()
        await sandbox.paste([vector], context)
        if await sandbox.happened():
            harmful.append(vector)
    assert len(harmful) > 50, harmful


async def test_escaped_vectors_make_elements_once_decoded(sandbox: Sandbox) -> None:
    """Decoding alone is what the escaped vectors wait for."""
    changed = await sandbox.page.evaluate("texts => pasteAgain(texts)", list(ESCAPED))
    assert len({text for text, _ in changed}) > len(ESCAPED) / 2


# Messages


async def test_sanitised_vectors_are_text(sandbox: Sandbox) -> None:
    """No known vector leaves more than text in any place between tags."""
    await assert_harmless(sandbox, [plain_text(vector) for vector in VECTORS])


async def test_pieces_of_vectors_are_text(sandbox: Sandbox) -> None:
    """Neither do their pieces, put together at random."""
    chance = random.Random(20240229)
    pieces = [piece for vector in VECTORS for piece in (vector[: len(vector) // 2], vector[-9:])]
    pieces += [*"<<<>>&;#/!?='\" \na", "&lt", "&lt;", "&#60;", "&amp;", "<!--", "-->", "</"]
    texts = [
        plain_text("".join(chance.choices(pieces, k=chance.randint(1, 8)))[:2_000])
        for _ in range(500)
    ]
    await assert_harmless(sandbox, texts)


async def test_messages_side_by_side_are_text(sandbox: Sandbox) -> None:
    """Two messages that a page pastes with nothing between them make no tag together."""
    halves = [
        (vector[:cut], vector[cut:])
        for vector in VECTORS[::3]
        for cut in range(1, min(9, len(vector)))
    ]
    texts = [plain_text(first) + plain_text(second) for first, second in halves]
    assert await sandbox.paste(texts, CONTEXTS[:2]) == []
    assert await sandbox.happened() == []


async def test_vectors_through_the_database(sandbox: Sandbox, db: Connection, dsn: str) -> None:
    """A vector that any role inserts is text when the service has read it."""
    insert(db, "mallory", VECTORS)
    database = Database(dsn, size=1, connect_timeout=5, query_timeout=5)
    try:
        rows, _ = await Store(database).history("mallory", before=None, limit=len(VECTORS) + 1)
    finally:
        await database.close()
    assert len(rows) == len(VECTORS)
    await assert_harmless(sandbox, [row.content.message for row in rows])


async def test_vectors_through_the_service(
    sandbox: Sandbox, db: Connection, client: Client
) -> None:
    """A vector that any role inserts is text when a signed-in user receives it."""
    insert(db, "mallory", VECTORS)
    async with client.post("/demo/session", json={"user_id": "mallory"}) as response:
        assert response.ok
    messages: list[str] = []
    after = 0
    while True:
        path = f"/api/notifications/unread?after={after}" if after else "/api/notifications/unread"
        async with client.get(path) as response:
            assert response.status == 200
            body = await response.text()
            assert not {"<", ">", "&"} & set(body)
            rows = [row for row in (await response.json())["notifications"] if row["id"] > after]
        if not rows:
            break
        messages += [row["message"] for row in rows]
        after = rows[-1]["id"]
    assert len(messages) == len(VECTORS)
    await assert_harmless(sandbox, messages)


# Links


def link_candidates() -> list[str]:
    chance = random.Random(20240229)
    pieces = [
        *(
            "/",
            "/",
            "//",
            "\\",
            ":",
            "@",
            ".",
            "..",
            "?",
            "#",
            "%",
            "&",
            ";",
            "\t",
            "\n",
            " ",
            "\0",
        ),
        *(
            "https:",
            "https://",
            "http://",
            "HTTPS://",
            "javascript:",
            "data:",
            "blob:",
            "//",
            "ws:",
        ),
        *("app.example", "evil.example", "cdn.example:8443", "app.example:443", "user", "x", "%2f"),
        *(
            "%5c",
            "%2e",
            "%00",
            "&#47;",
            "&sol;",
            "。",
            "／",
            "\u2044",
            "\u00ad",
            "[::1]",
            "alert(1)",
        ),
    ]
    starts = ("", "", "/", "/", "https://", "https://app.example", "https://cdn.example:8443")
    candidates = [
        chance.choice(starts) + "".join(chance.choices(pieces, k=chance.randint(0, 6)))
        for _ in range(40_000)
    ]
    return list(dict.fromkeys(candidates))


async def test_links_stay_where_they_should(sandbox: Sandbox) -> None:
    """Where a browser goes with a link that passes is the application or an allowed host."""
    hosts = frozenset({"app.example", "cdn.example:8443"})
    origins = {"https://app.example", "https://cdn.example:8443"}
    candidates = link_candidates()

    async def resolved(links: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await sandbox.page.evaluate(
            """([links, site]) => links.map(link => {
              try {
                const url = new URL(link, site);
                // As a page would make one: parsed from markup, and taken from the property.
                const anchor = document.createElement("a");
                anchor.setAttribute("href", link);
                return {origin: url.origin, anchor: anchor.origin, path: url.pathname,
                        user: url.username,
                        again: link[0] === "/" ? new URL(url.pathname, site).origin : null};
              } catch { return null; }
            })""",
            [links, SITE],
        )
        return found

    passed = [link for link in candidates if safe_link(link, hosts) is not None]
    assert len(passed) > 1_000
    for link, url in zip(passed, await resolved(passed), strict=True):
        assert url is not None, link
        assert url["origin"] in origins, link
        assert url["anchor"] in origins, link
        assert url["user"] == "", link
        if link.startswith("/"):
            assert url["origin"] == url["again"] == "https://app.example", link

    # The candidates are no easy ones: thousands of them lead elsewhere.
    dropped = [link for link in candidates if safe_link(link, hosts) is None]
    elsewhere = [url for url in await resolved(dropped) if url and url["origin"] not in origins]
    assert len(elsewhere) > 1_000
