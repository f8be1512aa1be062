"""The audit trail: every send, sign-in, refusal and key change, in the log and in SQL."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg2
import psycopg2.errors
import pytest
from psycopg2 import sql
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.app import create_app
from sse_server.audit import AUDIT
from sse_server.services import new_key
from tests.conftest import Client, SettingsFactory, connect, eventually, execute
from tests.streaming import query
from tests.test_publish import add_service, run, send

ClientFactory = Callable[..., Awaitable[Client]]

TEXT = "the-text-of-a-message"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """What the logger has written so far, without the times."""
    caplog.set_level(logging.INFO, "sse_server.audit")

    def read() -> list[dict[str, Any]]:
        found = []
        for record in caplog.records:
            if record.name == "sse_server.audit" and record.levelno == logging.INFO:
                assert "\n" not in record.getMessage()
                line = json.loads(record.getMessage())
                assert line.pop("at").endswith("Z")
                found.append(line)
        return found

    return read


Lines = Callable[[], list[dict[str, Any]]]


def trail(db: Connection, condition: str = "true", *parameters: object) -> list[tuple[Any, ...]]:
    return query(
        db,
        "SELECT actor, action, user_id, event_type, notification_id, outcome FROM audit_trail "
        f"WHERE {condition} ORDER BY at, notification_id",
        *parameters,
    )


@pytest.fixture
def role(dsn: str, db: Connection) -> Any:
    """A connection as a role that may publish and nothing else, and its name."""
    name = f"backend_{db.info.dbname}"
    role = sql.Identifier(name)
    execute(dsn, sql.SQL("CREATE ROLE {} LOGIN").format(role))
    execute(
        dsn,
        sql.SQL(
            "GRANT USAGE ON SCHEMA public TO {0};"
            "GRANT INSERT (user_id, event_type, message, link) ON notifications TO {0};"
            "GRANT EXECUTE ON FUNCTION notify_user(text, text, text, text),"
            "notify_users(text[], text, text, text) TO {0}"
        ).format(role),
    )
    connection = connect(dsn.replace("postgres@", f"{name}@"))
    yield connection, name
    connection.close()
    execute(dsn, sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


async def test_sends_of_services(client: Client, db: Connection, lines: Lines) -> None:
    """One line and one row of the view for each recipient, whatever the outcome."""
    key = add_service(db)
    query(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    query(db, "UPDATE settings SET user_rate_per_minute = 1")
    query(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "VALUES ('full', 'new_message', 'x')",
    )
    response = await send(
        client, key, recipients=["ada", "off", "full"], message=TEXT, idempotency_key="k"
    )
    [ada, *_] = (await response.json())["results"]
    common = {"action": "send", "actor": "service:shop", "event_type": "new_message"}
    assert lines() == [
        {**common, "user_id": "ada", "notification_id": ada["id"], "outcome": "created"},
        {**common, "user_id": "off", "outcome": "suppressed"},
        {**common, "user_id": "full", "outcome": "rate_limited"},
    ]
    found = trail(db, "action = 'send' AND actor = 'service:shop'")
    # Those that were not written have used up an id each.
    assert sorted(found, key=lambda row: row[2]) == [
        ("service:shop", "send", "ada", "new_message", ada["id"], "created"),
        ("service:shop", "send", "full", "new_message", ada["id"] + 2, "rate_limited"),
        ("service:shop", "send", "off", "new_message", ada["id"] + 1, "suppressed"),
    ]


async def test_refused_requests(client: Client, db: Connection, lines: Lines) -> None:
    """A wrong or revoked key, an unknown type, a conflict, a bad body: who, why, for how many."""
    key = add_service(db)
    wrong = new_key()
    await send(client, wrong, message=TEXT)
    await send(client, key, event_type="no_such", recipients=["ada", "bob"], message=TEXT)
    await send(client, key, message=TEXT, idempotency_key="k")
    await send(client, key, message=TEXT, idempotency_key="k")
    await send(client, key, message=TEXT + "!", idempotency_key="k")
    await send(client, key, message=TEXT, link="javascript:" + TEXT)
    query(db, "UPDATE services SET revoked_at = clock_timestamp()")
    await send(client, key, message=TEXT)
    expected = [
        ("address:127.0.0.1", "invalid-key", None),
        ("service:shop", "invalid-body", "no_such"),
        ("service:shop", "repeated", "new_message"),
        ("service:shop", "idempotency-conflict", "new_message"),
        ("service:shop", "invalid-body", None),
        ("address:127.0.0.1", "revoked-key", "new_message"),
    ]
    publish = [line for line in lines() if line["action"] == "publish"]
    assert [(x["actor"], x["outcome"], x.get("event_type")) for x in publish] == expected
    assert publish[1]["recipients"] == 2
    assert publish[1]["user_ids"] == ["ada", "bob"]
    assert publish[-1]["service"] == "shop"
    await eventually(lambda: len(trail(db, "action = 'publish'")) == len(expected))
    rows = trail(db, "action = 'publish'")
    assert [(row[0], row[5], row[3]) for row in rows] == expected
    everything = json.dumps(lines()) + str(query(db, "SELECT * FROM audit_trail"))
    for secret in (TEXT, key, wrong, key[4:]):
        assert secret not in everything


async def test_sends_by_sql(role: tuple[Connection, str], db: Connection) -> None:
    """The trail names the role that inserted the row; so do rows that were not written."""
    connection, name = role
    query(db, "INSERT INTO user_preferences VALUES ('off', 'new_message', false)")
    insert = "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)"
    query(connection, insert, "ada", "new_message", TEXT)
    query(connection, insert, "off", "new_message", TEXT)
    query(
        connection,
        "SELECT * FROM notify_users(ARRAY['bob', 'off'], 'new_message', %s)",
        TEXT,
    )
    ids = dict(query(db, "SELECT user_id, id FROM notifications"))
    by_user = sorted(trail(db), key=lambda row: str(row[2]))
    assert by_user == [
        (f"role:{name}", "send", "ada", "new_message", ids["ada"], "created"),
        (f"role:{name}", "send", "bob", "new_message", ids["bob"], "created"),
        (f"role:{name}", "send", "off", "new_message", ids["ada"] + 1, "suppressed"),
        (f"role:{name}", "send", "off", "new_message", ids["bob"] + 1, "suppressed"),
    ]
    for statement in (
        "SELECT * FROM audit_log",
        "SELECT * FROM audit_trail",
        "DELETE FROM audit_log",
        "INSERT INTO audit_log (actor, action, outcome) VALUES ('role:x', 'send', 'created')",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            query(connection, statement)


async def test_rejected_inserts_bear_their_record(
    role: tuple[Connection, str], db: Connection
) -> None:
    """A rejection undoes all that its transaction wrote; PostgreSQL's log gets its DETAIL."""
    connection, name = role
    query(db, "UPDATE settings SET user_rate_per_minute = 1")
    insert = "INSERT INTO notifications (user_id, event_type, message) VALUES (%s, %s, %s)"
    query(connection, insert, "ada", "new_message", TEXT)
    for event_type, outcome in (
        ("new_message", "rate_limited"),
        ("no_such", "unknown_event_type"),
    ):
        with pytest.raises(psycopg2.Error) as refused:
            query(connection, insert, "ada", event_type, TEXT)
        detail = refused.value.diag.message_detail
        assert detail is not None
        assert json.loads(detail.removeprefix("audit: ")) == {
            "action": "send",
            "actor": f"role:{name}",
            "user_id": "ada",
            "event_type": event_type,
            "outcome": outcome,
        }


async def test_an_auditor_needs_no_more_than_the_view(dsn: str, db: Connection) -> None:
    """SELECT on audit_trail shows everything but the texts."""
    name = f"auditor_{db.info.dbname}"
    query(db, f"CREATE ROLE {name} LOGIN")
    query(db, f"GRANT SELECT ON audit_trail TO {name}")
    query(
        db,
        "INSERT INTO notifications (user_id, event_type, message) "
        "VALUES ('ada', 'new_message', 'x')",
    )
    connection = connect(dsn.replace("postgres@", f"{name}@"))
    assert [row[2] for row in trail(connection)] == ["ada"]
    for table in ("notifications", "audit_log", "services"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            query(connection, f"SELECT * FROM {table}")
    connection.close()
    query(db, f"DROP OWNED BY {name}")
    query(db, f"DROP ROLE {name}")


async def test_key_changes(dsn: str, db: Connection, lines: Lines) -> None:
    """By the command or by plain SQL, each is a row; never with the key or its hash."""
    result = await asyncio.to_thread(run, dsn, "add", "shop", "--rate", "7")
    key = result.stdout.strip()
    await asyncio.to_thread(run, dsn, "revoke", "shop")
    await asyncio.to_thread(run, dsn, "add", "shop")
    query(db, "UPDATE services SET rate_per_minute = 9")
    query(db, "UPDATE services SET rate_per_minute = 9")
    query(db, "DELETE FROM services")
    rows = query(db, "SELECT actor, action, outcome, detail FROM audit_log ORDER BY id")
    assert [(row[1], row[3]["rate_per_minute"]) for row in rows] == [
        ("service_added", 7),
        ("service_revoked", 7),
        ("service_added", 600),
        ("service_changed", 9),
        ("service_deleted", 9),
    ]
    assert {(row[0], row[2], row[3]["service"]) for row in rows} == {
        ("role:postgres", "ok", "shop")
    }
    assert [line["action"] for line in lines()] == [
        "service_added",
        "service_revoked",
        "service_added",
    ]
    assert key not in str(rows) + str(lines())


async def test_refusals_by_limits(
    aiohttp_client: ClientFactory, settings: SettingsFactory, db: Connection, lines: Lines
) -> None:
    """The first refusal of a user, an address and a service at once; not one row for each."""
    slow = add_service(db, "slow", rate=1)
    app = create_app(settings(api_calls_per_minute=1, anonymous_calls_per_minute=1))
    client = await aiohttp_client(app)
    for _ in range(5):
        await client.get("/api/preferences")
        await send(client, slow)
    await client.post("/demo/session", json={"user_id": "ada"})
    for _ in range(5):
        await client.get("/api/preferences")
    found = [
        (line["actor"], line["limit"], line["outcome"], line["count"])
        for line in lines()
        if line["action"] == "limit"
    ]
    assert found == [
        ("address:127.0.0.1", "calls without a session", "too-many-requests", 1),
        ("service:slow", "publishing", "too-many-requests", 1),
        ("user:ada", "API calls", "too-many-requests", 1),
    ]
    await eventually(lambda: len(trail(db, "action = 'limit'")) == 3)


async def test_what_others_say_cannot_break_the_trail(
    client: Client, db: Connection, lines: Lines
) -> None:
    """NUL, lone surrogates, line ends, NaN and endless text are stored in some form."""
    audit = client.app[AUDIT]
    await audit.record(
        "sign_in",
        actor="address:192.0.2.1",
        outcome="invalid-token",
        user_id="a\0b\ud800\nINFO forged",
        reason="\u202e\x1b[31m" + "x" * 100_000,
        number=float("nan"),
        claims={"a\0": ["\udfff", None, True, 1.5]},
    )
    [(user_id, detail)] = query(db, "SELECT user_id, detail FROM audit_log")
    assert user_id == "a\ufffdb?\nINFO forged"
    assert len(detail["reason"]) == 255
    assert detail["claims"] == {"a\ufffd": ["?", None, True, 1.5]}
    [line] = lines()
    assert line["user_id"] == user_id


async def test_without_the_database_there_are_lines(
    client: Client, db: Connection, lines: Lines
) -> None:
    """What is audited goes on, and the warning says what is missing in the table."""
    query(db, "ALTER TABLE audit_log RENAME TO away")
    audit = client.app[AUDIT]
    await asyncio.gather(
        *(audit.record("sign_out", actor="user:ada", outcome="ok") for _ in range(20))
    )
    assert len(lines()) == 20


async def test_what_waits_is_written_at_the_end(
    aiohttp_client: ClientFactory, settings: SettingsFactory, db: Connection
) -> None:
    """note() does not wait; stopping the server does."""
    client = await aiohttp_client(create_app(settings()))
    for number in range(1200):
        client.app[AUDIT].note("test", actor=f"user:{number}", outcome="ok")
    await client.close()
    assert query(db, "SELECT count(DISTINCT actor) FROM audit_log") == [(1200,)]
