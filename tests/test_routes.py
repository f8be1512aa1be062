"""Nobody gets in where they don't belong: every route, and everybody who may knock."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from aiohttp import ClientResponse, DummyCookieJar, web
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.services import new_key
from sse_server.sessions import COOKIE
from tests.conftest import Client, SettingsFactory, eventually
from tests.sse import EventReader
from tests.streaming import end_session, query, sign_in

SECRET = "a secret of more than thirty-two bytes"
AUDIENCE = "notifications"

# The user whose rows nobody else may see or change, and what is to be seen of her nowhere else.
VICTIM = "alice"
CONFIDENTIAL = "confidential-c4f1"

#: Who knocks. All but the first and the last two are the cases of the threat list.
CALLERS = (
    "own",  # the victim herself: that the request is one that works
    "nobody",  # no session
    "other",  # the session of another user, naming the victim's rows
    "expired",  # the victim's session, after its end
    "revoked",  # the victim's session, its row deleted
    "malformed",  # a cookie that is no key
    "service",  # a service key
    "cross_site",  # the victim's session, but from a page of another origin
    "token",  # a sign-in token of another user
)

OK = "200"
NOT_SIGNED_IN = "401 not-signed-in"
INVALID_KEY = "401 invalid-key"
INVALID_TOKEN = "401 invalid-token"
CROSS_SITE = "403 cross-site"


@dataclasses.dataclass(frozen=True)
class Row:
    """What each caller is answered, as "status" or "status problem-type"."""

    body: object
    own: str
    nobody: str
    other: str
    expired: str
    revoked: str
    malformed: str
    service: str
    cross_site: str
    token: str


def for_sessions(body: object = None, *, own: str = OK, cross_site: str = CROSS_SITE) -> Row:
    """A route for whoever is signed in, and for nobody else."""
    return Row(
        body,
        own=own,
        nobody=NOT_SIGNED_IN,
        other=own,
        expired=NOT_SIGNED_IN,
        revoked=NOT_SIGNED_IN,
        malformed=NOT_SIGNED_IN,
        service=NOT_SIGNED_IN,
        cross_site=cross_site,
        token=NOT_SIGNED_IN,
    )


def for_all(
    body: object = None,
    answer: str = OK,
    *,
    cross_site: str | None = None,
    service: str | None = None,
    token: str | None = None,
) -> Row:
    """A route to which a session makes no difference."""
    return Row(
        body,
        **dict.fromkeys(("own", "nobody", "other", "expired", "revoked", "malformed"), answer),
        service=service or answer,
        cross_site=cross_site or answer,
        token=token or answer,
    )


# A page elsewhere may make a browser send a GET; without CORS it cannot read the answer.
READING = for_sessions(cross_site=OK)

# {id} is the victim's unread notification.
TABLE: dict[tuple[str, str], Row] = {
    # Opening a stream ends the session's other one, hence not for pages elsewhere.
    ("GET", "/api/stream"): for_sessions(),
    ("GET", "/api/notifications"): READING,
    ("GET", "/api/notifications/unread"): READING,
    ("POST", "/api/notifications/read"): for_sessions({"ids": ["{id}"]}),
    ("POST", "/api/notifications/{id}/read"): for_sessions({}),
    ("GET", "/api/preferences"): READING,
    ("PATCH", "/api/preferences"): for_sessions({"new_message": False}),
    ("PUT", "/api/preferences/{event_type}"): for_sessions({"enabled": False}),
    ("POST", "/api/session"): for_all({}, INVALID_TOKEN, cross_site=CROSS_SITE, token=OK),
    ("GET", "/api/session"): READING,
    ("DELETE", "/api/session"): for_sessions(own="204"),
    ("POST", "/api/publish"): for_all(
        {"recipients": ["carol"], "event_type": "new_message", "message": "hello"},
        INVALID_KEY,
        cross_site=CROSS_SITE,
        service=OK,
    ),
    ("GET", "/api/openapi.json"): for_all(),
    ("GET", "/api/docs"): for_all(),
    ("GET", "/livez"): for_all(),
    ("GET", "/readyz"): for_all(),
    ("GET", "/metrics"): for_all(),
    ("GET", "/"): for_all(),
    ("GET", "/static/{filename}"): for_all(),
    # In demo mode only. Whoever can reach it may sign in as anybody: that is what it is for.
    ("POST", "/demo/session"): for_all({"user_id": "carol"}, cross_site=CROSS_SITE),
    ("POST", "/demo/publish"): for_sessions(
        {"user_id": "carol", "event_type": "new_message", "message": "hello"}
    ),
}

#: Whose rows a request may change, where it is not only those of who asks.
MAY_CHANGE: dict[tuple[str, str], dict[str, set[str]]] = {
    ("POST", "/api/session"): {"token": {"mallory"}},
    ("POST", "/api/publish"): {"service": {"carol"}},
    ("POST", "/demo/session"): {
        # The session that the cookie holds ends, even one that is over.
        **{caller: {"carol"} for caller in CALLERS},
        "own": {"carol", VICTIM},
        "expired": {"carol", VICTIM},
        "other": {"carol", "mallory"},
        "cross_site": set(),
    },
    ("POST", "/demo/publish"): {"own": {"carol"}, "other": {"carol"}},
}

#: Tables without users, and who may add to them how.
OF_NOBODY = {
    "used_tokens": {("POST", "/api/session", "token")},
}


def served(app: web.Application) -> set[tuple[str, str]]:
    """(method, path) of every route; HEAD is GET without a body."""
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        static = isinstance(route.resource, web.StaticResource)
        path = route.resource.canonical + ("/{filename}" if static else "")
        found.add((route.method.replace("HEAD", "GET"), path))
    return found


def with_head(app: web.Application) -> set[str]:
    return {
        route.resource.canonical
        for route in app.router.routes()
        if route.method == "HEAD" and route.resource is not None
    }


@pytest.fixture
def build(settings: SettingsFactory) -> Callable[[], web.Application]:
    # Every case is a new session, and there are more than a minute's worth.
    return lambda: create_app(
        settings(
            jwt_secret=SECRET,
            jwt_audience=AUDIENCE,
            api_calls_per_minute=0,
            anonymous_calls_per_minute=0,
            sign_ins_per_minute=0,
        )
    )


def test_every_route_is_in_the_table(build: Callable[[], web.Application]) -> None:
    """Whoever adds a route says here who may use it."""
    assert served(build()) == TABLE.keys()


Dump = dict[str, set[str]]


def dump(db: Connection) -> Dump:
    """Every row of every table, as JSON; but for the audit, which may always grow."""
    tables = query(
        db,
        "SELECT c.oid::regclass::text FROM pg_class c WHERE c.relkind = 'r' "
        "AND c.relnamespace = current_schema()::regnamespace AND c.relname <> 'audit_log'",
    )
    found: Dump = {}
    for (table,) in tables:
        rows = query(db, f"SELECT (to_jsonb(t) - 'polling_until')::text FROM {table} AS t")
        found[table] = {row[0] for row in rows}
    return found


def changes(before: Dump, after: Dump) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that are new, gone, or different, with their tables."""
    assert before.keys() == after.keys()
    for table, rows in before.items():
        for row in rows ^ after[table]:
            yield table, json.loads(row)


class Scene:
    """The database and whoever may knock."""

    def __init__(self, client: Client, db: Connection) -> None:
        self.client = client
        self.db = db
        self.key = new_key()
        query(
            db,
            "INSERT INTO services (name, key_hash) VALUES ('shop', %s)",
            hashlib.sha256(self.key.encode()).digest(),
        )
        [(self.id,)] = query(
            db,
            "INSERT INTO notifications (user_id, event_type, message, link) "
            "VALUES (%s, 'status_change', %s, '/private') RETURNING id",
            VICTIM,
            CONFIDENTIAL,
        )
        query(
            db,
            "INSERT INTO user_preferences VALUES (%s, 'system_alert', false), "
            "('bob', 'system_alert', false)",
            VICTIM,
        )
        sign_in(db, "bob")

    def _cookie(self, user_id: str, seconds: float = 3600) -> tuple[str, dict[str, str]]:
        [key] = sign_in(self.db, user_id, seconds=seconds)
        return key, {"Cookie": f"{COOKIE}={key}"}

    def headers(self, caller: str) -> dict[str, str]:
        """What this caller sends; sessions are made anew."""
        match caller:
            case "nobody":
                return {}
            case "own":
                return self._cookie(VICTIM)[1]
            case "other":
                return self._cookie("mallory")[1]
            case "expired":
                return self._cookie(VICTIM, seconds=-1)[1]
            case "revoked":
                key, cookie = self._cookie(VICTIM)
                end_session(self.db, key)
                return cookie
            case "malformed":
                return {"Cookie": f"{COOKIE}={secrets.choice(MALFORMED)}"}
            case "service":
                return {"Authorization": f"Bearer {self.key}"}
            case "cross_site":
                return {
                    **self._cookie(VICTIM)[1],
                    "Origin": "https://evil.example",
                    "Sec-Fetch-Site": "cross-site",
                }
            case "token":
                now = int(time.time())
                claims = {
                    "sub": "mallory",
                    "aud": AUDIENCE,
                    "iat": now,
                    "exp": now + 60,
                    "jti": secrets.token_hex(),
                }
                return {"Authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}
            case _:
                raise AssertionError(caller)

    async def call(
        self, method: str, path: str, headers: dict[str, str], body: object = None
    ) -> tuple[str, str]:
        """The answer as the table has it, and its text."""
        path = path.replace("{id}", str(self.id)).replace("{event_type}", "new_message")
        path = path.replace("{filename}", "client.js")
        data = None
        if body is not None:
            data = json.dumps(body).replace('"{id}"', str(self.id))
            headers = {"Content-Type": "application/json", **headers}
        async with self.client.request(method, path, data=data, headers=headers) as response:
            text = await _text(response)
            answer = str(response.status)
            if response.status >= 400:
                answer += " " + json.loads(text)["type"].removeprefix("urn:sse-server:problem:")
            return answer, text


async def _text(response: ClientResponse) -> str:
    if response.status != 200 or response.content_type != "text/event-stream":
        return await response.text()
    events = EventReader(response)
    text = ""
    while not text.endswith("ready"):
        event = await events.next_event()
        text += f"{event.data}\n{event.event}"
    response.close()
    return text


MALFORMED = (
    "",
    "x",
    "%00",
    "a" * 42,
    "a" * 44,
    "a" * 4000,
    "../../../../etc/passwd",
    "' OR 1=1 --",
    '"' + "a" * 41 + '"',
    "é" * 43,
)


@pytest.fixture
async def scene(aiohttp_client: Any, build: Callable[[], web.Application], db: Connection) -> Scene:
    # Without a jar: a session that one call got must not be sent with the next.
    return Scene(await aiohttp_client(build(), cookie_jar=DummyCookieJar()), db)


@pytest.mark.parametrize("caller", CALLERS)
async def test_the_table(scene: Scene, caller: str) -> None:
    """Each route answers this caller as the table says, and no row of another user appears or
    changes."""
    wrong = {}
    for (method, path), row in TABLE.items():
        headers = scene.headers(caller)
        before = dump(scene.db)
        answer, text = await scene.call(method, path, headers, row.body)
        if path == "/api/stream":
            # That it has ended is written after it has.
            await eventually(
                lambda: not query(scene.db, "SELECT id FROM sessions WHERE stream_at IS NOT NULL")
            )
        after = dump(scene.db)
        expected = getattr(row, caller)
        if answer != expected:
            wrong[method, path] = f"{answer}, not {expected}: {text[:200]}"
        own = {"own": {VICTIM}, "other": {"mallory"}}.get(caller, set())
        allowed = MAY_CHANGE.get((method, path), {}).get(caller, own)
        if method == "GET" and path != "/api/stream":
            allowed = set()
        for table, changed in changes(before, after):
            if "user_id" in changed:
                assert changed["user_id"] in allowed, (method, path, table, changed)
            else:
                assert (method, path, caller) in OF_NOBODY.get(table, ()), (table, changed)
        if caller not in ("own", "cross_site"):
            assert CONFIDENTIAL not in text, (method, path)
            assert (
                VICTIM not in text or path.startswith(("/static", "/api/openapi")) or (path == "/")
            ), (method, path)
        # The next row of the table finds the victim's notification as it was.
        query(scene.db, "UPDATE notifications SET read_at = NULL WHERE id = %s", scene.id)
    assert wrong == {}


async def test_what_the_victim_may_see_is_there(scene: Scene) -> None:
    """The table tests something: her own calls show and change her rows."""
    headers = scene.headers("own")
    for path in ("/api/notifications", "/api/notifications/unread", "/api/stream"):
        assert CONFIDENTIAL in (await scene.call("GET", path, headers))[1]
    assert (
        '"marked":1' in (await scene.call("POST", "/api/notifications/{id}/read", headers, {}))[1]
    )
    [(read,)] = query(
        scene.db, "SELECT read_at IS NOT NULL FROM notifications WHERE id = %s", scene.id
    )
    assert read


@pytest.mark.parametrize("caller", ["nobody", "own", "cross_site"])
async def test_head_is_get_without_a_body(
    scene: Scene, build: Callable[[], web.Application], caller: str
) -> None:
    """HEAD is served where the answer is the same for all, and nowhere else."""
    head = with_head(build())
    for method, path in TABLE:
        if method != "GET":
            continue
        route = path.removesuffix("/{filename}")
        if route in head:
            assert TABLE[method, path] == for_all()
        headers = scene.headers(caller)
        target = path.replace("{filename}", "client.js")
        async with scene.client.head(target, headers=headers) as response:
            refused = 403 if (caller, path) == ("cross_site", "/api/stream") else 405
            assert response.status == (200 if route in head else refused), path
            assert await response.read() == b""


@pytest.mark.parametrize("cookie", MALFORMED)
async def test_a_malformed_cookie_is_no_session(client: Client, cookie: str) -> None:
    """Whatever stands in the cookie: no session, and never a failure."""
    headers = {"Cookie": f"{COOKIE}={cookie}"}
    async with client.get("/api/session", headers=headers) as response:
        assert response.status == 401


async def test_a_cookie_is_used_once(client: Client, db: Connection) -> None:
    """Two cookies of the name: no mixture, one session or none."""
    [key, other] = sign_in(db, "alice", "bob")
    for value in (f"{COOKIE}={key}; {COOKIE}={other}", f"{COOKIE}={other}; {COOKIE}={key}"):
        async with client.get("/api/session", headers={"Cookie": value}) as response:
            assert response.status in (200, 401)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def test_what_is_no_route_is_a_problem(scene: Scene, method: str) -> None:
    """Other methods and paths: 404 or 405, with or without a session, and nothing changes."""
    before = dump(scene.db)
    for caller in ("nobody", "other", "service"):
        headers = scene.headers(caller)
        before = dump(scene.db)
        for path in ("/api", "/api/", "/api/notifications/", "/nowhere", "/static/../schema.sql"):
            answer, _ = await scene.call(method, path, headers, {} if method != "GET" else None)
            assert answer == "404 not-found", path
        for path in {path for _, path in TABLE}:
            if (method, path) not in TABLE:
                answer, _ = await scene.call(method, path, headers, {})
                assert answer == "405 method-not-allowed", path
        assert dump(scene.db) == before
