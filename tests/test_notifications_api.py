"""The lists, the count and the marks are the database's, of one moment, and lose nothing."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.api.notifications import MOST_IDS, PLACE_XIP, Place
from sse_server.app import create_app
from sse_server.events import MAX_ID
from sse_server.sessions import COOKIE
from sse_server.snapshot import Snapshot
from tests.conftest import Client, SettingsFactory, connect, eventually
from tests.sse import EventReader
from tests.streaming import insert, query, sign_in, without_rate_limit

LIST = "/api/notifications"
UNREAD = "/api/notifications/unread"
READ = "/api/notifications/read"


class User:
    """A signed-in user's calls."""

    def __init__(self, client: Client, db: Connection, user_id: str) -> None:
        [key] = sign_in(db, user_id)
        self.headers = {"Cookie": f"{COOKIE}={key}"}
        self.client = client

    async def get(self, path: str, status: int = 200, **headers: str) -> Any:
        async with self.client.get(path, headers=self.headers | headers) as response:
            assert response.status == status, await response.text()
            return await response.json() if response.content_type.endswith("json") else None

    async def post(self, path: str, body: object = None, status: int = 200) -> Any:
        async with self.client.post(path, json=body or {}, headers=self.headers) as response:
            assert response.status == status, await response.text()
            return await response.json()

    async def etag(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.client.get(path, headers=self.headers | headers) as response:
            return response.status, response.headers["ETag"]

    def stream(self, **headers: str) -> Any:
        return self.client.get("/api/stream", headers=self.headers | headers)

    async def pages(self, after: str = "", limit: int = 3) -> AsyncIterator[Any]:
        """The pages of one pass, as a client asks for them."""
        while True:
            page = await self.get(f"{UNREAD}?after={after}&limit={limit}")
            yield page
            if not page["more"]:
                return
            after = page["next"]


@pytest.fixture
async def client(
    aiohttp_client: Callable[..., Awaitable[Client]], settings: SettingsFactory
) -> Client:
    """Without a limit on calls: these tests make many of them."""
    return await aiohttp_client(create_app(settings(api_calls_per_minute=0)))


@pytest.fixture
def alice(client: Client, db: Connection) -> User:
    without_rate_limit(db)
    return User(client, db, "alice")


def ids_of(page: Any) -> list[int]:
    return [item["id"] for item in page["notifications"]]


def unread_ids(db: Connection, user_id: str) -> list[int]:
    rows = query(
        db,
        "SELECT id FROM notifications WHERE user_id = %s AND read_at IS NULL ORDER BY id",
        user_id,
    )
    return [row[0] for row in rows]


# History


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
async def test_history_pages_cover_everything_once(alice: User, db: Connection, count: int) -> None:
    """Newest first; each row on one page; the last page says that it is the last."""
    ids = insert(db, "alice", *map(str, range(count))) if count else []
    insert(db, "bob", "not for alice")
    pages: list[list[int]] = []
    before: str | None = ""
    while before is not None:
        page = await alice.get(f"{LIST}?limit=3{before}")
        assert page["unread_count"] == count
        pages.append(ids_of(page))
        before = None if page["next_before"] is None else f"&before={page['next_before']}"
    newest_first = ids[::-1]
    assert pages == [newest_first[start : start + 3] for start in range(0, max(count, 1), 3)]


async def test_history_filters(alice: User, db: Connection) -> None:
    """By type, and by being unread; the count is that of all unread rows."""
    ids = [
        query(
            db,
            "INSERT INTO notifications (user_id, event_type, message) "
            "VALUES ('alice', %s, 'x') RETURNING id",
            event_type,
        )[0][0]
        for event_type in ("new_message", "status_change", "new_message", "status_change")
    ]
    await alice.post(READ, {"ids": ids[:2]})

    async def found(parameters: str) -> list[int]:
        page = await alice.get(f"{LIST}?{parameters}")
        assert page["unread_count"] == 2
        return ids_of(page)

    assert await found("") == ids[::-1]
    assert await found("unread=true") == [ids[3], ids[2]]
    assert await found("unread=false") == ids[::-1]
    assert await found("event_type=new_message") == [ids[2], ids[0]]
    assert await found("event_type=new_message&unread=true") == [ids[2]]
    assert await found("event_type=system_alert") == []
    assert await found(f"unread=true&before={ids[3]}") == [ids[2]]


async def test_list_and_count_are_of_one_moment(alice: User, db: Connection, dsn: str) -> None:
    """While others insert and mark, the number of unread rows listed is always the count."""
    stop = threading.Event()

    def write() -> None:
        connection = connect(dsn)
        while not stop.is_set():
            query(
                connection,
                "INSERT INTO notifications (user_id, event_type, message) "
                "SELECT 'alice', 'new_message', 'x' FROM generate_series(1, 5)",
            )
            query(
                connection,
                "UPDATE notifications SET read_at = now() WHERE id IN ("
                "SELECT id FROM notifications WHERE read_at IS NULL ORDER BY random() LIMIT 5)",
            )
        connection.close()

    insert(db, "alice", *map(str, range(20)))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            page = await alice.get(f"{LIST}?limit=500&unread=true")
            assert len(page["notifications"]) == page["unread_count"]
            page = await alice.get(f"{UNREAD}?limit=500")
            assert len(page["notifications"]) == page["unread_count"]
    finally:
        stop.set()
        writer.join()


async def test_a_wrong_parameter_is_refused_by_name(alice: User) -> None:
    """What is not understood is not ignored: a mistyped `before` would be page one for ever."""
    for parameters, fault in (
        ("before=0", "before"),
        ("before=x", "before"),
        ("before=", "before"),
        ("before=%C2%B2", "before"),
        (f"before={MAX_ID + 1}", "before"),
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=1_0", "limit"),
        ("limit=%2B1", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("unread=1", "unread"),
        ("event_type=New", "event_type"),
        ("event_type=%00", "event_type"),
        ("befor=3", "befor"),
        ("limit=1&limit=2", "twice"),
    ):
        problem = await alice.get(f"{LIST}?{parameters}", 400)
        assert fault in problem["detail"]


# Unread


async def test_unread_is_what_the_stream_sends(alice: User, db: Connection, dsn: str) -> None:
    """Same rows, order and members, with and without a cursor, in whatever order of commit."""
    late = connect(dsn)
    late.autocommit = False
    insert(late, "alice", "late <b>bold</b> & co.")
    ids = insert(db, "alice", "one", "two")
    late.commit()
    late.close()
    query(
        db,
        "INSERT INTO notifications (user_id, event_type, message, link) VALUES "
        "('alice', 'system_alert', '<script>alert(1)</script>', 'javascript:alert(1)'), "
        "('alice', 'status_change', 'three', '/orders/3')",
    )
    for after in ("", str(ids[0]), "999999", "garbage", "0"):
        page = await alice.get(f"{UNREAD}?after={after}")
        async with alice.stream(**({"Last-Event-ID": after} if after else {})) as response:
            events = EventReader(response)
            sent = []
            reset = False
            while (event := await events.next_event()).event != "ready":
                if event.event == "notification":
                    sent.append(event.json)
                reset |= event.event == "reset"
            assert page["unread_count"] == event.json["unread_count"]
        assert page["notifications"] == sent
        assert [list(item) for item in page["notifications"]] == [list(item) for item in sent]
        assert page["reset"] is reset
        assert page["more"] is False
        assert page["next"] == str(sent[-1]["id"])


async def test_a_page_at_a_time_covers_everything_once(alice: User, db: Connection) -> None:
    """Rows of one transaction, more than a page: each comes once, and the pass ends."""
    ids = insert(db, "alice", *map(str, range(10)))
    pages = [page async for page in alice.pages()]
    assert [id for page in pages for id in ids_of(page)] == ids
    assert [len(page["notifications"]) for page in pages] == [3, 3, 3, 1]
    assert all(page["unread_count"] == 10 and not page["reset"] for page in pages)
    assert pages[-1]["next"] == str(ids[-1])
    # After a cursor as well: the rest, and those that are not older than it.
    again = [id async for page in alice.pages(after=str(ids[4])) for id in ids_of(page)]
    assert again == [id for id in ids if id != ids[4]]


async def test_a_row_that_commits_between_two_pages_comes(
    alice: User, db: Connection, dsn: str
) -> None:
    """Its id is smaller than those of the first page; it comes after this pass at the latest."""
    late = connect(dsn)
    late.autocommit = False
    [missing] = insert(late, "alice", "late")
    ids = insert(db, "alice", *map(str, range(3)))
    first = await alice.get(f"{UNREAD}?limit=2")
    assert ids_of(first) == ids[:2]
    late.commit()
    late.close()
    # Written when the late one had ended, and so covering it.
    newer = insert(db, "alice", "newer")
    rest = [id async for page in alice.pages(first["next"], limit=2) for id in ids_of(page)]
    assert rest == ids[2:]
    next_pass = [id async for page in alice.pages(str(rest[-1]), limit=2) for id in ids_of(page)]
    assert {missing, *newer} <= set(next_pass)
    # From now on it is covered.
    page = await alice.get(f"{UNREAD}?after={newer[0]}")
    assert ids_of(page) == []
    assert page["next"] == str(newer[0])


async def test_a_row_that_commits_after_a_pass_comes(alice: User, db: Connection, dsn: str) -> None:
    """A poll after the last id still finds what was being written then."""
    late = connect(dsn)
    late.autocommit = False
    [missing] = insert(late, "alice", "late")
    [seen] = insert(db, "alice", "seen")
    page = await alice.get(UNREAD)
    assert ids_of(page) == [seen]
    late.commit()
    late.close()
    assert ids_of(await alice.get(f"{UNREAD}?after={page['next']}")) == [missing]


async def test_polling_loses_nothing_under_concurrent_transactions(alice: User, dsn: str) -> None:
    """Many writers, whose transactions overlap: a client that follows `next` gets every row."""
    chance = random.Random(17)
    written: set[int] = set()

    def write(seed: int) -> None:
        rng = random.Random(seed)
        connection = connect(dsn)
        connection.autocommit = False
        for _ in range(15):
            ids = []
            for _ in range(rng.randint(1, 3)):
                ids += insert(connection, "alice", *map(str, range(rng.randint(1, 4))))
                query(connection, "SELECT pg_sleep(%s)", rng.random() / 50)
            if rng.random() < 0.2:
                connection.rollback()
            else:
                connection.commit()
                written.update(ids)
        connection.close()

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for writer in writers:
        writer.start()
    received: set[int] = set()
    after = ""
    done = False
    while not done:
        done = not any(writer.is_alive() for writer in writers)  # then once more
        async for page in alice.pages(after, limit=chance.randint(2, 6)):
            received.update(ids_of(page))
            assert not page["reset"]
            after = page["next"] or ""
    assert received == written


async def test_a_long_transaction_does_not_stop_the_pages(
    alice: User, db: Connection, dsn: str
) -> None:
    """While one runs, no row covers another; the passes end all the same."""
    late = connect(dsn)
    late.autocommit = False
    insert(late, "somebody", "else")
    ids = [insert(db, "alice", str(number))[0] for number in range(8)]
    found = [id async for page in alice.pages() for id in ids_of(page)]
    assert found == ids
    again = [id async for page in alice.pages(str(ids[-1])) for id in ids_of(page)]
    assert again == ids[:-1]  # repeated, and dropped by their ids
    late.close()


async def test_an_unknown_cursor_is_a_reset(alice: User, db: Connection) -> None:
    """Malformed, foreign, deleted: all unread rows, and word of it; never silence."""
    ids = insert(db, "alice", "one", "two")
    [foreign] = insert(db, "bob", "foreign")
    [deleted] = insert(db, "alice", "deleted")
    query(db, "DELETE FROM notifications WHERE id = %s", deleted)
    for after in ("x", "-1", "1.5", "%00", "%ED%A0%80", foreign, deleted, MAX_ID, "9" * 30):
        page = await alice.get(f"{UNREAD}?after={after}")
        assert page["reset"], after
        assert ids_of(page) == ids
    assert (await alice.get(f"{UNREAD}?after={foreign}&limit=1"))["more"]


async def test_an_unknown_cursor_with_nothing_unread(alice: User) -> None:
    """A reset, and nothing to go on from."""
    page = await alice.get(f"{UNREAD}?after=17")
    assert page == {
        "notifications": [],
        "unread_count": 0,
        "reset": True,
        "more": False,
        "next": None,
    }


async def test_a_made_up_place_shows_only_own_rows(alice: User, db: Connection) -> None:
    """Whatever `after` says of snapshots: never an error, never another user's row."""
    ids = insert(db, "alice", *map(str, range(4)))
    [foreign] = insert(db, "bob", "foreign")
    [xmax] = query(db, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")[0]
    places = [
        f"0.0.3-{xmax}-",
        f"{foreign}.{ids[0]}.3-{xmax}-",
        f"{ids[0]}.0.{xmax}-{xmax}-",
        f"0.0.3-{xmax}-{'_'.join(str(3 + i) for i in range(PLACE_XIP))}",
        f"{MAX_ID}.{MAX_ID}.{MAX_ID}-{MAX_ID}-",
        "0.0.0-0-",
        "0.0.9-3-",
        "0.0.3-9-9",
        "0.0.3-9-5_4",
        "0.0.3-9-4_4",
        "0.0.3-9-_",
        f"0.0.3-{2**64}-",
        "9" * 19 + ".0.3-9-",
    ]
    for place in places:
        page = await alice.get(f"{UNREAD}?after={place}&limit=2")
        assert set(ids_of(page)) <= set(ids), place


async def test_a_place_of_another_cluster_starts_over(alice: User, db: Connection) -> None:
    """After a restore, transactions are numbered anew: a place from before hides nothing."""
    ids = insert(db, "alice", *map(str, range(4)))
    [xmax] = query(db, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")[0]
    page = await alice.get(f"{UNREAD}?after=0.{ids[2]}.{xmax + 1000}-{xmax + 1000}-")
    assert ids_of(page) == ids


xacts = st.lists(st.integers(3, MAX_ID), min_size=1, max_size=PLACE_XIP + 3, unique=True)


@given(st.integers(0, MAX_ID), st.integers(0, MAX_ID), xacts)
def test_places_come_back_as_they_went(cursor: int, after_id: int, numbers: list[int]) -> None:
    """A place survives the way through the client; one with many transactions shows less."""
    xmin, *xip, xmax = sorted([*numbers, max(numbers)])
    text = ",".join(map(str, [xmin, *xip] if xmin < xmax else []))
    place = Place(
        cursor or None, after_id, Snapshot(f"{xmin}:{xmax}:{text}".replace(f",{xmax}", ""))
    )
    back = Place.parse(str(place))
    assert back is not None
    if len(place.snapshot.xip) <= PLACE_XIP:
        assert back == place
    else:
        assert (back.cursor, back.after_id) == (place.cursor, place.after_id)
        assert back.snapshot.xmin == back.snapshot.xmax == place.snapshot.xmin


@given(
    st.one_of(st.text(), st.from_regex(r"[0-9]{1,20}\.[0-9]{1,20}\.[0-9_-]{1,40}", fullmatch=True))
)
def test_what_is_no_place_is_none(text: str) -> None:
    """Any text: a place that PostgreSQL takes, or none."""
    place = Place.parse(text)
    if place is not None:
        snapshot = place.snapshot
        assert 3 <= snapshot.xmin <= snapshot.xmax <= MAX_ID
        assert all(snapshot.xmin <= xact < snapshot.xmax for xact in snapshot.xip)


# ETag


async def test_the_etag_changes_with_the_answer(alice: User, db: Connection) -> None:
    """New rows, and marks that change nothing but the count; not what does not matter."""
    # In transactions of their own: after the second the list is empty, and only the count is left.
    ids = insert(db, "alice", "one") + insert(db, "alice", "two")
    path = f"{UNREAD}?after={ids[-1]}"
    seen: list[str] = []

    async def changed() -> bool:
        status, etag = await alice.etag(path)
        assert status == 200
        again = await alice.etag(path, **{"If-None-Match": etag})
        assert again == (304, etag)
        known = etag in seen
        seen.append(etag)
        return not known

    assert await changed()
    assert not await changed()
    await alice.post(READ, {"ids": ids[:1]})
    assert await changed()
    await alice.client.patch(
        "/api/preferences", json={"status_change": False}, headers=alice.headers
    )
    insert(db, "bob", "not for alice")
    assert not await changed()
    insert(db, "alice", "three")
    assert await changed()
    query(db, "UPDATE notifications SET message = 'edited' WHERE message = 'three'")
    assert await changed()


async def test_if_none_match(alice: User, db: Connection) -> None:
    """Weak and strong forms, lists and ``*`` (RFC 9110, 13.1.2); a stale one gets the answer."""
    insert(db, "alice", "one")
    _, etag = await alice.etag(UNREAD)
    assert etag.startswith('W/"')
    for held in (etag, etag[2:], f'"x", {etag}', f'W/"y",{etag} , "z"', "*"):
        assert (await alice.etag(UNREAD, **{"If-None-Match": held}))[0] == 304, held
    for held in ('"x"', "garbage", "", etag[:-2], etag.upper()):
        assert (await alice.etag(UNREAD, **{"If-None-Match": held}))[0] == 200, held


async def test_an_unchanged_page_that_is_not_the_last_is_304(alice: User, db: Connection) -> None:
    """Another snapshot each time, and yet the same answer; the older `next` leads on as well."""
    ids = insert(db, "alice", *map(str, range(4)))
    path = f"{UNREAD}?limit=2"
    page = await alice.get(path)
    _, etag = await alice.etag(path)
    insert(db, "bob", "a transaction")
    assert (await alice.etag(path, **{"If-None-Match": etag}))[0] == 304
    assert ids_of(await alice.get(f"{path}&after={page['next']}")) == ids[2:]


# Reading


async def test_mark_one_some_up_to_and_all(alice: User, db: Connection) -> None:
    """Each marks what it names, once, and answers with what is left."""
    ids = insert(db, "alice", *map(str, range(8)))

    async def marked(path: str, body: object = None) -> tuple[int, int]:
        answer = await alice.post(path, body)
        assert answer["unread_count"] == len(unread_ids(db, "alice"))
        return answer["marked"], answer["unread_count"]

    assert await marked(f"{LIST}/{ids[0]}/read") == (1, 7)
    assert await marked(f"{LIST}/{ids[0]}/read") == (0, 7)
    assert await marked(READ, {"ids": [ids[1], ids[3], ids[1], 999999]}) == (2, 5)
    assert await marked(READ, {"ids": [ids[1], ids[3]]}) == (0, 5)
    assert await marked(READ, {"up_to": ids[4]}) == (2, 3)
    assert unread_ids(db, "alice") == ids[5:]
    assert await marked(READ, {"all": True}) == (3, 0)
    assert await marked(READ, {"all": True}) == (0, 0)
    history = (await alice.get(LIST))["notifications"]
    assert all(item["read_at"] is not None for item in history)
    first = {item["id"]: item["read_at"] for item in history}
    await marked(READ, {"up_to": MAX_ID})
    assert {item["id"]: item["read_at"] for item in (await alice.get(LIST))["notifications"]} == (
        first
    )


async def test_another_users_notification_is_not_marked_and_not_told(
    alice: User, db: Connection
) -> None:
    """The same answer as for an id that does not exist; nothing changes."""
    insert(db, "alice", "own")
    ids = insert(db, "bob", "one", "two")
    nowhere = await alice.post(f"{LIST}/999999/read")
    assert await alice.post(f"{LIST}/{ids[0]}/read") == nowhere
    assert await alice.post(READ, {"ids": ids}) == nowhere == {"marked": 0, "unread_count": 1}
    await alice.post(READ, {"all": True})
    assert unread_ids(db, "bob") == ids


async def test_marks_reach_the_other_streams(alice: User, client: Client, db: Connection) -> None:
    """Every device of the user is told; marking again tells nobody anything."""
    ids = insert(db, "alice", "one", "two", "three")
    devices = [User(client, db, "alice") for _ in range(2)]
    stranger = User(client, db, "bob")
    responses = [await device.stream() for device in (*devices, stranger)]
    readers = [EventReader(response) for response in responses]
    for reader in readers:
        await reader.next_of("ready")
    await alice.post(f"{LIST}/{ids[0]}/read")
    await alice.post(f"{LIST}/{ids[0]}/read")
    await alice.post(READ, {"ids": ids[:2]})
    await alice.post(READ, {"all": True})
    insert(db, "alice", "end")
    insert(db, "bob", "end")
    for reader in readers[:2]:
        told: list[int] = []
        while (event := await reader.next_event()).event != "notification":
            assert event.event == "read"
            assert event.id is None
            told += event.json["ids"]
        assert told == ids
    assert (await readers[2].next_event()).event == "notification"
    for response in responses:
        response.close()


def blocked(db: Connection) -> bool:
    return bool(query(db, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


@pytest.mark.parametrize("ways", [("ids",), ("up_to",), ("one",)])
async def test_the_count_is_right_beside_another_mark(
    alice: User, db: Connection, dsn: str, ways: tuple[str]
) -> None:
    """Rows that somebody else marks at this moment are not counted as unread, nor as marked."""
    ids = insert(db, "alice", "one", "two", "three")
    other = connect(dsn)
    other.autocommit = False
    query(other, "UPDATE notifications SET read_at = now() WHERE id = %s", ids[0])
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "ids": lambda: alice.post(READ, {"ids": ids[:2]}),
        "up_to": lambda: alice.post(READ, {"up_to": ids[1]}),
        "one": lambda: alice.post(f"{LIST}/{ids[0]}/read"),
    }
    call = asyncio.ensure_future(calls[ways[0]]())
    await eventually(lambda: blocked(db))
    other.commit()
    other.close()
    answer = await call
    assert answer["unread_count"] == len(unread_ids(db, "alice"))
    assert answer["marked"] == (0 if ways == ("one",) else 1)


async def test_marking_the_same_rows_at_once_never_deadlocks(
    alice: User, client: Client, db: Connection
) -> None:
    """Overlapping lists in opposite orders: every call succeeds, each row is marked once."""
    ids = insert(db, "alice", *map(str, range(400)))
    devices = [alice, *(User(client, db, "alice") for _ in range(5))]
    bodies: list[object] = [
        {"ids": ids},
        {"ids": ids[::-1]},
        {"up_to": ids[300]},
        {"all": True},
        {"ids": ids[::2]},
        {"ids": ids[::-3]},
    ]
    answers = await asyncio.gather(
        *(device.post(READ, body) for device, body in zip(devices, bodies, strict=True))
    )
    assert sum(answer["marked"] for answer in answers) == len(ids)
    assert unread_ids(db, "alice") == []


async def test_a_wrong_body_marks_nothing(alice: User, db: Connection) -> None:
    """Refused by name, with nothing of the values, before anything is done."""
    ids = insert(db, "alice", "one")
    headers = {**alice.headers, "Content-Type": "application/json"}
    bodies: list[object] = [
        *({}, [], None, "all"),
        *({"all": False}, {"all": None}, {"all": 1}, {"all": "true"}),
        *({"ids": []}, {"ids": None, "all": True}, {"ids": [1], "all": True}),
        *({"ids": ["1"]}, {"ids": [1.5]}, {"ids": [True]}, {"ids": [0]}, {"ids": [2**63]}),
        *({"ids": [10**400]}, {"ids": [1] * (MOST_IDS + 1)}),
        *({"up_to": -1}, {"up_to": "1"}, {"up_to": False}, {"all": True, "user_id": "bob"}),
    ]
    for body in bodies:
        data = json.dumps(body)
        async with alice.client.post(READ, data=data, headers=headers) as response:
            assert response.status == 422, data
            problem = await response.json()
        assert problem["errors"]
        assert unread_ids(db, "alice") == ids


async def test_what_is_not_json_is_refused(alice: User) -> None:
    """Empty, cut off, twice, too deep, too large: a problem document each time."""
    headers = {**alice.headers, "Content-Type": "application/json"}
    for raw, status in (
        (b"", 400),
        (b"{", 400),
        (b'{"all": true}{', 400),
        (b'{"all": true, "all": true}', 400),
        (b'{"ids": [NaN]}', 400),
        (b"\xff\xfe{\x00}\x00", 400),
        (b"[" * 60000, 400),
        (b'{"ids": [' + b"9" * 5000 + b"]}", 400),
        (b" " * 65537, 413),
    ):
        async with alice.client.post(READ, data=raw, headers=headers) as response:
            assert response.status == status, raw[:50]


async def test_marking_one_takes_no_fields(alice: User, db: Connection) -> None:
    """An empty object; a field is refused by name."""
    [id] = insert(db, "alice", "one")
    headers = {**alice.headers, "Content-Type": "application/json"}

    async def answer(data: bytes | None, path: str = f"{LIST}/{id}/read") -> ClientResponse:
        return await alice.client.post(path, data=data, headers=headers)

    response = await answer(b'{"user_id": "bob"}')
    assert response.status == 422
    assert "user_id" in (await response.json())["detail"]
    assert unread_ids(db, "alice") == [id]
    assert (await answer(None)).status == 400
    assert (await answer(b"{}")).status == 200
    for wrong in ("0", "x", "-1", "1.0", str(2**63), "%C2%B2", "9" * 100):
        assert (await answer(b"{}", f"{LIST}/{wrong}/read")).status == 400


async def test_answers_are_not_stored(alice: User) -> None:
    """No cache keeps what is a user's own."""
    for path in (LIST, UNREAD):
        async with alice.client.get(path, headers=alice.headers) as response:
            assert response.headers["Cache-Control"] == "no-store"
