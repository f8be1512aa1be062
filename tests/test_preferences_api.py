"""The user decides which event types reach them: all or nothing, from the next row on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.errors import DatabaseError
from sse_server.sessions import COOKIE
from sse_server.store import Store
from tests.conftest import Client, connect
from tests.sse import EventReader
from tests.streaming import insert, query, sign_in

PREFERENCES = "/api/preferences"
TYPES = ["new_message", "status_change", "system_alert"]


@pytest.fixture
def headers(db: Connection) -> dict[str, str]:
    """Alice's."""
    return {"Cookie": f"{COOKIE}={sign_in(db, 'alice')[0]}"}


def stored(db: Connection) -> dict[tuple[str, str], bool]:
    rows = query(db, "SELECT user_id, event_type, enabled FROM user_preferences")
    return {(user_id, event_type): enabled for user_id, event_type, enabled in rows}


async def call(
    client: Client, method: str, path: str, headers: dict[str, str], body: object = None
) -> tuple[int, Any]:
    if method != "GET":
        headers = {**headers, "Content-Type": "application/json"}
    data = None if method == "GET" else json.dumps(body)
    async with client.request(method, path, data=data, headers=headers) as response:
        return response.status, await response.json()


def enabled(answer: Any) -> dict[str, bool]:
    return {item["event_type"]: item["enabled"] for item in answer["preferences"]}


async def test_all_types_with_their_defaults(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """By name, each as it holds for this user."""
    query(db, "INSERT INTO event_types VALUES ('digest', 'Weekly', false, false)")
    query(db, "INSERT INTO event_types VALUES ('terms', 'New terms', false, true)")
    query(db, "INSERT INTO user_preferences VALUES ('bob', 'new_message', false)")
    status, answer = await call(client, "GET", PREFERENCES, headers)
    assert status == 200
    assert answer["preferences"][0] == {
        "event_type": "digest",
        "description": "Weekly",
        "enabled": False,
        "required": False,
    }
    assert enabled(answer) == {"digest": False, "terms": True, **dict.fromkeys(TYPES, True)}
    assert [item["event_type"] for item in answer["preferences"] if item["required"]] == ["terms"]


async def test_put_changes_one(client: Client, db: Connection, headers: dict[str, str]) -> None:
    """Off and on again, as often as one likes; the others stay."""
    for wanted in (False, False, True, True):
        path = f"{PREFERENCES}/status_change"
        status, answer = await call(client, "PUT", path, headers, {"enabled": wanted})
        assert status == 200
        assert answer["event_type"] == "status_change"
        assert answer["enabled"] is wanted
        _, everything = await call(client, "GET", PREFERENCES, headers)
        assert enabled(everything) == {**dict.fromkeys(TYPES, True), "status_change": wanted}
        assert stored(db) == {("alice", "status_change"): wanted}


async def test_patch_changes_several(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """Those that are named; the answer is the whole, as it is now."""
    body = {"system_alert": False, "new_message": False}
    status, answer = await call(client, "PATCH", PREFERENCES, headers, body)
    assert status == 200
    assert enabled(answer) == {"new_message": False, "status_change": True, "system_alert": False}
    assert answer == (await call(client, "GET", PREFERENCES, headers))[1]
    body = {"status_change": False, "new_message": True}
    _, answer = await call(client, "PATCH", PREFERENCES, headers, body)
    assert enabled(answer) == {"new_message": True, "status_change": False, "system_alert": False}
    assert (await call(client, "PATCH", PREFERENCES, headers, {}))[1] == answer


async def test_a_refused_change_changes_nothing(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """All or nothing: one that is unknown or required stops the others, too."""
    query(db, "UPDATE event_types SET required = true WHERE name = 'system_alert'")
    unknown = "urn:sse-server:problem:unknown-event-type"
    required = "urn:sse-server:problem:required-event-type"
    for body, expected in (
        ({"new_message": False, "nonsense": False}, (404, unknown)),
        ({"nonsense": True}, (404, unknown)),
        ({"a\0b": True, "\ud800": False, "": False, "x" * 1000: True}, (404, unknown)),
        ({"new_message": False, "system_alert": False}, (409, required)),
        ({"system_alert": False, "nonsense": False}, (404, unknown)),
    ):
        status, problem = await call(client, "PATCH", PREFERENCES, headers, body)
        assert (status, problem["type"]) == expected
        if status == 404:
            assert problem["known"] == TYPES
            assert set(problem["unknown"]) == body.keys() & {"nonsense"}
        else:
            assert problem["required"] == ["system_alert"]
        assert stored(db) == {}
    for name, status in (("nonsense", 404), ("%00", 404), ("%ED%A0%80", 404), ("New", 404)):
        body = {"enabled": False}
        answer = await call(client, "PUT", f"{PREFERENCES}/{name}", headers, body)
        assert (answer[0], answer[1]["known"]) == (status, TYPES)
    for wanted, status in ((False, 409), (True, 200)):
        path = f"{PREFERENCES}/system_alert"
        assert (await call(client, "PUT", path, headers, {"enabled": wanted}))[0] == status
    # To switch on what is on anyhow is no harm.
    body = {"system_alert": True, "new_message": False}
    status, answer = await call(client, "PATCH", PREFERENCES, headers, body)
    assert (status, enabled(answer)["new_message"]) == (200, False)


async def test_wrong_bodies_change_nothing(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """Truth values and nothing else; refused by name."""
    wrong: list[tuple[object, str]] = [
        ([], "dictionary"),
        (None, "dictionary"),
        ({"new_message": 0}, "new_message"),
        ({"new_message": "false"}, "new_message"),
        ({"new_message": None}, "new_message"),
        ({"new_message": {"enabled": False}}, "new_message"),
        ({"system_alert": False, "new_message": 1}, "new_message"),
        ({f"type_{number}": True for number in range(101)}, "100"),
    ]
    for body, fault in wrong:
        status, problem = await call(client, "PATCH", PREFERENCES, headers, body)
        assert status == 422
        assert fault in problem["detail"]
    for body, fault in (
        ({}, "enabled"),
        ({"enabled": "no"}, "enabled"),
        ({"enabled": True, "user_id": "bob"}, "user_id"),
    ):
        status, problem = await call(client, "PUT", f"{PREFERENCES}/new_message", headers, body)
        assert status == 422
        assert fault in problem["detail"]
    assert stored(db) == {}


async def test_muting_holds_from_the_next_row_and_deletes_nothing(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """What is there stays, unread; what comes is suppressed until it is switched on again."""

    async def switch(wanted: bool) -> None:
        assert (await call(client, "PATCH", PREFERENCES, headers, {"new_message": wanted}))[
            0
        ] == 200

    before = insert(db, "alice", "before")
    await switch(False)
    assert insert(db, "alice", "muted") == []
    assert len(insert(db, "bob", "not muted")) == 1
    _, page = await call(client, "GET", "/api/notifications/unread", headers)
    assert [item["id"] for item in page["notifications"]] == before
    await switch(True)
    after = insert(db, "alice", "after")
    _, page = await call(client, "GET", "/api/notifications/unread", headers)
    assert [item["id"] for item in page["notifications"]] == before + after


async def test_a_change_reaches_the_other_streams(
    client: Client, db: Connection, headers: dict[str, str]
) -> None:
    """Every device of the user is told what changed; a refused or empty change tells nothing."""
    keys = sign_in(db, "alice", "alice", "bob")
    responses = [
        await client.get("/api/stream", headers={"Cookie": f"{COOKIE}={key}"}) for key in keys
    ]
    readers = [EventReader(response) for response in responses]
    for reader in readers:
        await reader.next_of("ready")
    body = {"new_message": False, "status_change": False}
    await call(client, "PATCH", PREFERENCES, headers, body)
    await call(client, "PATCH", PREFERENCES, headers, {"new_message": True, "nonsense": True})
    await call(client, "PATCH", PREFERENCES, headers, body)
    for user_id in ("alice", "bob"):
        statement = "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, 'x')"
        query(db, statement, user_id, "system_alert")
    for reader in readers[:2]:
        told: dict[str, bool] = {}
        while (event := await reader.next_event()).event != "notification":
            assert event.event == "preferences"
            assert event.id is None
            changes = {item["event_type"]: item["enabled"] for item in event.json["preferences"]}
            assert not changes.keys() & told.keys()
            told |= changes
        assert told == body
    assert (await readers[2].next_event()).event == "notification"
    for response in responses:
        response.close()


async def test_opposite_changes_at_once(client: Client, db: Connection) -> None:
    """Two devices at once: no deadlock, and one of the two holds as a whole."""
    on = dict.fromkeys(TYPES, True)
    off = dict.fromkeys(reversed(TYPES), False)
    everybody = [{"Cookie": f"{COOKIE}={key}"} for key in sign_in(db, *["alice"] * 6)]
    for _ in range(5):
        answers = await asyncio.gather(
            *(
                call(client, "PATCH", PREFERENCES, device, on if number % 2 else off)
                for number, device in enumerate(everybody)
            )
        )
        assert [status for status, _ in answers] == [200] * 6
        assert len(set(stored(db).values())) == 1


async def test_a_type_that_goes_away_meanwhile_is_unknown(
    client: Client, db: Connection, headers: dict[str, str], dsn: str
) -> None:
    """A type that is being deleted while it is switched: 404, and no failure."""
    query(db, "INSERT INTO event_types VALUES ('fleeting')")
    other = connect(dsn)
    other.autocommit = False
    query(other, "DELETE FROM event_types WHERE name = 'fleeting'")
    body = {"enabled": False}
    switch = asyncio.ensure_future(call(client, "PUT", f"{PREFERENCES}/fleeting", headers, body))
    while not query(db, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
        assert not switch.done()
        await asyncio.sleep(0.01)
    other.commit()
    other.close()
    status, problem = await switch
    assert (status, problem["known"]) == (404, TYPES)


async def test_a_failure_of_another_kind_stays_one(
    client: Client, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a type that has gone is asked for again."""
    calls = []

    async def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise DatabaseError("no", "42501")

    monkeypatch.setattr(Store, "set_preferences", fail)
    # Not by the client that checks answers: the document has no 500.
    with pytest.raises(AssertionError, match="500"):
        await call(client, "PATCH", PREFERENCES, headers, {"new_message": False})
    assert len(calls) == 1
