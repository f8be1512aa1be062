"""What the database tells about itself."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sse_server.doctor.faults import Report
from sse_server.errors import DatabaseError
from sse_server.operator import Operator
from sse_server.store import Store, schema_version

# Longest wait for a NOTIFY
HEAR_SECONDS = 3.0

# Rows with the smallest ids that retention is judged by
OLDEST_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Limits:
    """From where on something is a finding."""

    transaction_seconds: float = 300.0
    skew_seconds: float = 2.0
    queue_usage: float = 0.1  # 0 to 1
    dead_rows: int = 10_000  # and twice what makes autovacuum begin
    frozen_age: int = 1_000_000_000
    connections: float = 0.9  # of those allowed, 0 to 1


async def examine_database(
    store: Store, report: Report, *, limits: Limits, connections: int
) -> None:
    """Look at the database, and change nothing.

    Args:
        store: On it, as the role that the servers use.
        report: To add to.
        limits: From where on something is a finding.
        connections: That one server needs.
    """
    operator = Operator(store.database)
    before = time.time()
    try:
        await store.ping()
    except DatabaseError as exc:
        report.find("database-unreachable", f"It says: {exc}.")
        return
    after = time.time()

    async def look(check: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except DatabaseError as exc:
            report.skip(check, f"the database says: {exc}")

    await look("LISTEN and NOTIFY", lambda: _listening(operator, report))
    await look(
        "server",
        lambda: _server(operator, report, limits, connections=connections, delay=after - before),
    )
    await look("transactions", lambda: _transactions(operator, report, limits))
    await look("replication slots", lambda: _slots(operator, report))
    version = await store.applied_schema()
    if version is None:
        report.find("schema-missing", "The first schema of the search path has no table settings.")
        return
    if version == schema_version():
        report.ok("schema", "that of this version")
    else:
        report.find(
            "schema-differs", "What was applied last is not the schema.sql of this version."
        )
    await look("triggers", lambda: _triggers(operator, report))
    await look("settings", lambda: _settings(operator, report))
    await look("autovacuum", lambda: _tables(operator, report, limits))
    await look("rights of roles", lambda: _grants(operator, report))
    await look("retention", lambda: _retention(operator, report))


async def _listening(operator: Operator, report: Report) -> None:
    try:
        listening = await operator.listening(HEAR_SECONDS)
    except DatabaseError as exc:
        # A pooler in statement mode, for one, allows no transaction.
        report.find("notify-lost", f"Trying it failed: {exc}.")
        return
    if not listening.same_backend:
        report.find(
            "transaction-pooler",
            "Two statements of one connection were carried out by two backends"
            + ("." if listening.heard else ", and a NOTIFY did not arrive."),
        )
    elif not listening.heard:
        report.find("notify-lost", f"A NOTIFY did not arrive within {HEAR_SECONDS:g} s.")
    else:
        report.ok("LISTEN and NOTIFY", "a notification arrived")


async def _server(
    operator: Operator, report: Report, limits: Limits, *, connections: int, delay: float
) -> None:
    before = time.time()
    server = await operator.server()
    after = time.time()
    if server.standby:
        report.find("database-read-only", "It is in recovery.")
    skew = _outside(server.clock, before - limits.skew_seconds, after + limits.skew_seconds)
    if skew:
        report.find(
            "database-clock-skew",
            f"It is {abs(server.clock - after):.1f} s {'ahead of' if skew > 0 else 'behind'} "
            "this machine's.",
        )
    else:
        report.ok("database's clock", f"that of this machine; {delay * 1000:.0f} ms away")
    if server.queue_usage > limits.queue_usage:
        report.find("notify-queue", f"{server.queue_usage:.2%} of it are in use.")
    else:
        report.ok("queue of NOTIFY", f"{server.queue_usage:.2%} used")
    if not server.autovacuum:
        report.find("autovacuum-off", "autovacuum or track_counts is off in the server.")
    if server.frozen_age > limits.frozen_age:
        report.find(
            "wraparound", f"The oldest is {server.frozen_age:,} transactions old and not frozen."
        )
    else:
        report.ok("transaction ids", f"the oldest is {server.frozen_age:,} transactions old")
    own = [limit for limit in (server.database_limit, server.role_limit) if limit is not None]
    allowed = min([server.allowed, *own])
    if connections > allowed:
        report.find(
            "connections", f"One server takes up to {connections}, and {allowed} are allowed."
        )
    elif server.connections > limits.connections * server.allowed:
        report.find("connections", f"{server.connections} of {server.allowed} are in use.")
    else:
        report.ok(
            "connections",
            f"{server.connections} of {server.allowed} in use; a server takes up to {connections}",
        )
    if not server.sees_all:
        report.skip("transactions of other roles", "this role is not a member of pg_read_all_stats")


def _outside(value: float, least: float, most: float) -> int:
    return (value > most) - (value < least)


async def _transactions(operator: Operator, report: Report, limits: Limits) -> None:
    found = await operator.transactions(limits.transaction_seconds)
    for transaction in found:
        name = f" ({transaction.application})" if transaction.application else ""
        report.find(
            "long-transaction",
            f"Process {transaction.pid} of {transaction.role}{name} is {transaction.state} in one "
            f"for {transaction.seconds:,.0f} s"
            + (" and has written." if transaction.wrote else "; it only reads."),
        )
    prepared = await operator.prepared(limits.transaction_seconds)
    for one in prepared:
        report.find(
            "prepared-transaction",
            f"{one.gid!r} of {one.role}, for {one.seconds:,.0f} s.",
        )
    if not found and not prepared:
        report.ok("transactions", f"none is open for more than {limits.transaction_seconds:g} s")


async def _slots(operator: Operator, report: Report) -> None:
    slots = await operator.slots()
    for slot in slots:
        kept = "" if slot.wal_bytes is None else f" keeps {slot.wal_bytes:,} bytes of WAL"
        report.find("replication-slot", f"The {slot.kind} slot {slot.name}{kept}.")
    if not slots:
        report.ok("replication slots", "none is abandoned")


async def _triggers(operator: Operator, report: Report) -> None:
    triggers = await operator.triggers()
    for trigger in triggers:
        if trigger.state is None:
            report.find("trigger-missing", f"{trigger.name} on {trigger.table}.")
        elif trigger.state not in ("O", "A"):
            report.find(
                "trigger-disabled",
                f"{trigger.name}: ALTER TABLE {trigger.table} ENABLE TRIGGER {trigger.name}.",
            )
    if not report.found("trigger-missing", "trigger-disabled"):
        report.ok("triggers", f"all {len(triggers)} are there and enabled")


async def _settings(operator: Operator, report: Report) -> None:
    if await operator.settings_rows() != 1:
        report.find("settings-missing", "It is empty.")
    else:
        report.ok("settings")


async def _tables(operator: Operator, report: Report, limits: Limits) -> None:
    for table in await operator.tables():
        if not table.autovacuum:
            report.find("autovacuum-off", f"It is off for the table {table.name}.")
        if table.dead > max(limits.dead_rows, 2 * table.threshold):
            last = table.vacuumed_seconds
            when = "never" if last is None else f"{last / 3600:.1f} hours ago"
            report.find(
                "dead-rows",
                f"{table.name} has {table.dead:,} dead rows beside {table.rows:,}; the last vacuum "
                f"was {when}.",
            )
    if not report.found("autovacuum-off", "dead-rows"):
        report.ok("autovacuum", "keeps up")


async def _grants(operator: Operator, report: Report) -> None:
    for grant in await operator.grants():
        report.find("role-with-rights", f"{grant.role} has {grant.privileges} on {grant.table}.")
    if not report.found("role-with-rights"):
        report.ok("rights of roles", "none has more than publishers need")


async def _retention(operator: Operator, report: Report) -> None:
    overdue = await operator.overdue(OLDEST_ROWS)
    if overdue is None:
        return  # no settings: found already
    if overdue.rows:
        report.find(
            "retention-behind",
            f"{overdue.rows:,} of the {OLDEST_ROWS:,} oldest rows are more than "
            f"{overdue.retention_days + 1} days old.",
        )
    else:
        report.ok("retention", f"nothing is older than {overdue.retention_days} days and one")
