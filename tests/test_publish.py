"""``POST /api/publish`` and ``sse-server service``: who may send, what is sent, and how often."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse
from click.testing import CliRunner, Result
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server import cli
from sse_server.app import create_app
from sse_server.database import Connection as DatabaseConnection
from sse_server.services import hash_key, new_key
from tests.conftest import Client, ServerProcessFactory, SettingsFactory, connect
from tests.streaming import query

ClientFactory = Callable[..., Awaitable[Client]]


def add_service(db: Connection, name: str = "shop", rate: int = 600) -> str:
    """Returns: its key."""
    key = new_key()
    query(
        db,
        "INSERT INTO services (name, key_hash, rate_per_minute) VALUES (%s, %s, %s)",
        name,
        hash_key(key),
        rate,
    )
    return key


@pytest.fixture
def key(db: Connection) -> str:
    return add_service(db)


def send(client: Client, key: str | None, **members: object) -> Any:
    """A request that is good but for `members`; ``...`` leaves one out."""
    body = {"recipients": ["ada"], "event_type": "new_message", "message": "hello"} | members
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    present = {name: value for name, value in body.items() if value is not ...}
    return client.post("/api/publish", json=present, headers=headers)


async def fault(response: ClientResponse, status: int) -> dict[str, Any]:
    """The problem document of a response that must have this status."""
    document: dict[str, Any] = await response.json()
    assert response.status == status, document
    assert response.content_type == "application/problem+json"
    assert document["status"] == status
    return document


def count(db: Connection) -> int:
    return int(query(db, "SELECT count(*) FROM notifications")[0][0])


# What is sent


async def test_answers_for_each_recipient(client: Client, db: Connection, key: str) -> None:
    """Created, suppressed and rate-limited recipients are told apart, in the request's order."""
    query(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    query(db, "UPDATE settings SET user_rate_per_minute = 1")
    query(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "VALUES ('full', 'new_message', 'x')",
    )
    response = await send(
        client, key, recipients=["zoe", "off", "full", "ada", "zoe"], link="/orders/17"
    )
    assert response.status == 200
    answer = await response.json()
    ids = dict(query(db, "SELECT user_id, id FROM notifications WHERE message = 'hello'"))
    assert answer == {
        "results": [
            {"user_id": "zoe", "outcome": "created", "id": ids["zoe"]},
            {"user_id": "off", "outcome": "suppressed", "id": None},
            {"user_id": "full", "outcome": "rate_limited", "id": None},
            {"user_id": "ada", "outcome": "created", "id": ids["ada"]},
        ],
        "created": 2,
        "suppressed": 1,
        "rate_limited": 1,
    }
    assert query(
        db,
        "SELECT source, event_type, message, link FROM notifications WHERE id = %s",
        ids["ada"],
    ) == [("shop", "new_message", "hello", "/orders/17")]


async def test_ten_thousand_recipients_in_one_round_trip(
    client: Client, db: Connection, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest request is one statement, and its body may be larger than 64 KiB."""
    statements: list[str] = []
    fetch = DatabaseConnection.fetch

    async def counted(self: DatabaseConnection, statement: str, *rest: Any) -> Any:
        if "publish" in statement or "services" in statement or "audit" in statement:
            statements.append(statement)
        return await fetch(self, statement, *rest)

    monkeypatch.setattr(DatabaseConnection, "fetch", counted)
    recipients = [f"user-{number:031d}" for number in range(10_000)]
    response = await send(client, key, recipients=recipients, idempotency_key="large")
    answer = await response.json()
    assert response.status == 200, answer
    assert [result["user_id"] for result in answer["results"]] == recipients
    assert answer["created"] == count(db) == 10_000
    assert len(statements) == 1


async def test_at_most_ten_thousand_recipients_and_one_mebibyte(
    client: Client, db: Connection, key: str
) -> None:
    """One recipient more is 422, a larger body is 413; other routes keep their 64 KiB."""
    many = [str(number) for number in range(10_001)]
    document = await fault(await send(client, key, recipients=many), 422)
    assert "recipients" in document["detail"]
    large = io.BytesIO(json.dumps({"recipients": ["x" * 200] * 6000}).encode())
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    await fault(await client.post("/api/publish", data=large, headers=headers), 413)
    response = await client.post("/demo/session", json={"user_id": "x" * 70_000})
    assert response.status == 413
    assert count(db) == 0


FAULTS: list[tuple[str, dict[str, object]]] = [
    ("recipients", {"recipients": []}),
    ("recipients", {"recipients": ...}),
    ("recipients.0", {"recipients": [""]}),
    ("recipients.1", {"recipients": ["ada", "a\0b"]}),
    ("recipients.0", {"recipients": ["a\nb"]}),
    ("recipients.0", {"recipients": ["a\x85b"]}),
    ("recipients.0", {"recipients": ["\ud800"]}),
    ("recipients.0", {"recipients": ["é" * 128]}),
    ("recipients.0", {"recipients": ["x" * 256]}),
    ("recipients.0", {"recipients": [17]}),
    ("recipients", {"recipients": "ada"}),
    ("event_type", {"event_type": "no_such_type"}),
    ("event_type", {"event_type": "new_message\n"}),
    ("event_type", {"event_type": "x" * 64}),
    ("event_type", {"event_type": "a\0"}),
    ("message", {"message": ""}),
    ("message", {"message": ...}),
    ("message", {"message": "a\0b"}),
    ("message", {"message": "x" * 2001}),
    ("link", {"link": ""}),
    ("link", {"link": "/a\0b"}),
    ("link", {"link": "/" + "x" * 2048}),
    ("link", {"link": "javascript:alert(1)"}),
    ("link", {"link": "//evil.example/"}),
    ("link", {"link": "https://evil.example/"}),
    ("idempotency_key", {"idempotency_key": ""}),
    ("idempotency_key", {"idempotency_key": "x" * 256}),
    ("idempotency_key", {"idempotency_key": "a\0"}),
    ("idempotency_key", {"idempotency_key": "a b"}),
    ("source", {"source": "somebody-else"}),
]


async def test_what_is_wrong_is_refused_by_name(client: Client, db: Connection, key: str) -> None:
    """A fault is 422 with the name of its field, and nothing is sent."""
    for field, members in FAULTS:
        document = await fault(await send(client, key, **members), 422)
        assert document["detail"].startswith(f"{field}: "), members
        assert [error["field"] for error in document["errors"]] == [field], members
    assert count(db) == 0


async def test_longest_values_pass(
    aiohttp_client: ClientFactory, settings: SettingsFactory, db: Connection, key: str
) -> None:
    """What is just within the limits is stored as it came."""
    client = await aiohttp_client(create_app(settings(link_hosts="app.example")))
    link = "https://app.example/" + "x" * 2028
    user_id = "é" * 127 + "x"
    response = await send(
        client,
        key,
        recipients=[user_id],
        message="😀" * 2000,
        link=link,
        idempotency_key="~" * 255,
    )
    assert response.status == 200, await response.text()
    assert query(db, "SELECT user_id, message, link FROM notifications") == [
        (user_id, "😀" * 2000, link)
    ]


async def test_what_only_the_table_refuses_is_no_server_error(
    client: Client, db: Connection, key: str
) -> None:
    """A constraint that an operator has tightened answers 422, not 500."""
    query(
        db,
        "ALTER TABLE notifications DROP CONSTRAINT notifications_user_id_format, "
        "ADD CONSTRAINT notifications_user_id_format CHECK (user_id <> 'ada')",
    )
    document = await fault(await send(client, key), 422)
    assert document["detail"].startswith("recipients: ")


# Who may send


NO_KEYS: list[str | None] = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer sse_",
    "Bearer sse_" + "g" * 48,
    "Bearer sse_" + "0" * 47,
    "Bearer sse_" + "0" * 48,
    "Bearer sse_" + "0" * 48 + " x",
    "Basic sse_" + "0" * 48,
    "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.",
]


async def test_without_a_valid_key(client: Client, db: Connection, key: str) -> None:
    """No key, a malformed one, an unknown one, a user's token: 401, and nothing is sent."""
    for authorization in NO_KEYS:
        response = await client.post(
            "/api/publish",
            json={"recipients": ["ada"], "event_type": "new_message", "message": "x"},
            headers={} if authorization is None else {"Authorization": authorization},
        )
        document = await fault(response, 401)
        assert document["type"] == "urn:sse-server:problem:invalid-key"
    assert count(db) == 0


async def test_a_session_is_no_key(client: Client, db: Connection, key: str) -> None:
    """A signed-in user cannot publish."""
    await client.post("/demo/session", json={"user_id": "ada"})
    await fault(await send(client, None), 401)
    assert count(db) == 0


async def test_revocation_works_at_once(client: Client, db: Connection, key: str) -> None:
    """The very next request with a revoked key is refused, though the key was good just before."""
    assert (await send(client, key)).status == 200
    query(db, "UPDATE services SET revoked_at = clock_timestamp()")
    document = await fault(await send(client, key), 401)
    assert document["type"] == "urn:sse-server:problem:revoked-key"
    query(db, "DELETE FROM services")
    document = await fault(await send(client, key), 401)
    assert document["type"] == "urn:sse-server:problem:invalid-key"
    assert count(db) == 1


# Once only


async def test_same_key_same_body_sends_once(client: Client, db: Connection, key: str) -> None:
    """A repeated request gets the same answer, byte for byte, and writes nothing."""
    query(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    first = await send(client, key, recipients=["ada", "off"], idempotency_key="order-17")
    second = await send(client, key, recipients=["ada", "off"], idempotency_key="order-17")
    assert (first.status, second.status) == (200, 200)
    assert await first.read() == await second.read()
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert count(db) == 1


async def test_same_key_other_body_is_a_conflict(client: Client, db: Connection, key: str) -> None:
    """Each member of the body counts; its spacing and the order of its members do not."""
    assert (await send(client, key, idempotency_key="k")).status == 200
    for change in (
        {"recipients": ["bob"]},
        {"event_type": "system_alert"},
        {"event_type": "no_such_type"},
        {"message": "other"},
        {"link": "/x"},
    ):
        document = await fault(await send(client, key, idempotency_key="k", **change), 409)
        assert document["type"] == "urn:sse-server:problem:idempotency-conflict"
    response = await client.post(
        "/api/publish",
        data=' {"idempotency_key":"k",  "message":"\\u0068ello", "event_type":"new_message",'
        '"recipients":["ada"], "link": null}',
        headers={"Authorization": f"bearer {key}", "Content-Type": "application/json"},
    )
    assert response.status == 200
    assert count(db) == 1


async def test_keys_are_of_one_service(client: Client, db: Connection, key: str) -> None:
    """Another service may use the same idempotency key."""
    other = add_service(db, "billing")
    assert (await send(client, key, idempotency_key="1")).status == 200
    assert (await send(client, other, idempotency_key="1", message="y")).status == 200
    assert count(db) == 2


async def test_a_refused_request_does_not_use_its_key_up(
    client: Client, db: Connection, key: str
) -> None:
    """After an unknown event type is put right, the same idempotency key works."""
    await fault(await send(client, key, event_type="no_such", idempotency_key="1"), 422)
    assert (await send(client, key, idempotency_key="1")).status == 200


async def test_after_24_hours_a_key_is_new(client: Client, db: Connection, key: str) -> None:
    """Whether or not the old answer has been cleaned up yet."""
    await send(client, key, idempotency_key="1")
    query(db, "UPDATE publications SET created_at = created_at - interval '23 hours 59 minutes'")
    assert (await send(client, key, idempotency_key="1")).headers["Idempotent-Replayed"]
    query(db, "UPDATE publications SET created_at = created_at - interval '2 minutes'")
    response = await send(client, key, idempotency_key="1", message="another body")
    assert response.status == 200
    assert "Idempotent-Replayed" not in response.headers
    assert count(db) == 2


async def test_once_also_when_all_come_at_once_on_two_nodes(
    aiohttp_client: ClientFactory, settings: SettingsFactory, dsn: str, db: Connection, key: str
) -> None:
    """30 equal requests at the same time on two nodes are one row and one answer."""
    nodes = [await aiohttp_client(create_app(settings())) for _ in range(2)]
    # Held until all are there, whatever their order: nobody can commit before.
    holder = connect(dsn)
    holder.autocommit = False
    query(holder, "LOCK TABLE notifications IN SHARE MODE")
    tasks = [
        asyncio.ensure_future(send(nodes[number % 2], key, idempotency_key="1"))
        for number in range(30)
    ]
    async with asyncio.timeout(10):
        while True:
            waiting = query(
                db,
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database()",
            )[0][0]
            if waiting >= 2:
                break
            await asyncio.sleep(0.01)
    holder.rollback()
    holder.close()
    responses = await asyncio.gather(*tasks)
    assert {response.status for response in responses} == {200}
    assert len({await response.read() for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in r.headers for r in responses) == 1
    assert count(db) == 1


async def test_conflicts_when_they_come_at_once(client: Client, db: Connection, key: str) -> None:
    """Of different requests with one idempotency key exactly one is sent."""
    responses = await asyncio.gather(
        *(send(client, key, idempotency_key="1", message=f"{number}") for number in range(20))
    )
    assert sorted(response.status for response in responses) == [200] + 19 * [409]
    assert count(db) == 1


# Limits


async def test_services_have_limits_of_their_own(client: Client, db: Connection, key: str) -> None:
    """Over its rate a service gets 429 with Retry-After, exact from the first requests on."""
    slow = add_service(db, "slow", rate=3)
    responses = await asyncio.gather(*(send(client, slow) for _ in range(12)))
    assert sorted(response.status for response in responses) == 3 * [200] + 9 * [429]
    assert count(db) == 3
    refused = next(response for response in responses if response.status == 429)
    document = await fault(refused, 429)
    assert document["type"] == "urn:sse-server:problem:too-many-requests"
    assert int(refused.headers["Retry-After"]) == 20
    assert (await send(client, key)).status == 200  # of another service

    query(db, "UPDATE services SET rate_per_minute = 100 WHERE name = 'shop'")
    assert (await send(client, key)).status == 200
    query(db, "UPDATE services SET rate_per_minute = 1 WHERE name = 'shop'")
    statuses = [(await send(client, key)).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]  # known from the first answer after the change


async def test_wrong_keys_are_limited_by_address(
    aiohttp_client: ClientFactory, settings: SettingsFactory, db: Connection, key: str
) -> None:
    """Guessing ends with 429; a service that is known here does not suffer from it."""
    client = await aiohttp_client(create_app(settings(sign_ins_per_minute=5)))
    assert (await send(client, key)).status == 200
    statuses = [(await send(client, new_key())).status for _ in range(8)]
    assert statuses == 5 * [401] + 3 * [429]
    assert (await send(client, None)).status == 429
    assert (await send(client, key)).status == 200
    assert (await send(client, add_service(db, "late"))).status == 429


# The command


def run(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["--database-url", dsn, "service", *arguments])


async def test_the_command(client: Client, dsn: str, db: Connection) -> None:
    """add prints a key once that works, list shows it without the key, revoke ends it."""
    added = await asyncio.to_thread(run, dsn, "add", "shop", "--rate", "7")
    assert added.exit_code == 0, added.output
    key = added.stdout.strip()
    assert re.fullmatch(r"sse_[0-9a-f]{48}", key)
    [(stored,)] = query(db, "SELECT key_hash FROM services WHERE name = 'shop'")
    assert bytes(stored) == hash_key(key)
    assert (await send(client, key)).status == 200

    listed = await asyncio.to_thread(run, dsn, "list", "--json")
    [service] = json.loads(listed.stdout)
    assert (service["name"], service["rate_per_minute"]) == ("shop", 7)
    assert service["revoked_at"] is None
    table = await asyncio.to_thread(run, dsn, "list")
    assert "shop" in table.stdout
    for output in (listed.output, table.output):
        assert key not in output
        assert hash_key(key).hex() not in output

    again = await asyncio.to_thread(run, dsn, "add", "shop")
    assert again.exit_code == 1
    assert "already" in again.stderr

    revoked = await asyncio.to_thread(run, dsn, "revoke", "shop")
    assert revoked.exit_code == 0
    await fault(await send(client, key), 401)
    assert (await asyncio.to_thread(run, dsn, "revoke", "shop")).exit_code == 1

    renewed = (await asyncio.to_thread(run, dsn, "add", "shop")).stdout.strip()
    assert (await send(client, renewed)).status == 200
    await fault(await send(client, key), 401)


async def test_names_that_no_service_can_have(dsn: str, db: Connection) -> None:
    """Neither what the table refuses, nor the name of a database role: audited alike."""
    for name in ("", "a b", "x" * 64, "-x", "a\nb", "é", "postgres"):
        result = await asyncio.to_thread(run, dsn, "add", "--", name)
        assert result.exit_code in (1, 2)
        assert result.stdout == ""
    assert query(db, "SELECT count(*) FROM services") == [(0,)]


async def test_the_command_uses_the_database_of_a_running_server(
    server_process: ServerProcessFactory, public_dir: Any
) -> None:
    """Without DATABASE_URL it finds the embedded database, whether a server runs or not."""
    directory = str(public_dir / "data")
    server = await server_process(DATABASE_URL=None, SSE_DEMO=None, SSE_DATA_DIR=directory)

    def add(name: str) -> Result:
        arguments = ["--data-dir", directory, "service", "add", name]
        return CliRunner().invoke(cli.main, arguments)

    first = await asyncio.to_thread(add, "shop")
    assert first.exit_code == 0, first.output
    assert server.popen.poll() is None
    server.terminate()
    assert await server.wait() == 0
    second = await asyncio.to_thread(add, "billing")
    assert second.exit_code == 0, second.output
