"""Snapshots: what they cover is what PostgreSQL says they show."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from sse_server.snapshot import NOTHING, Snapshot
from tests.listener import fetch


@st.composite
def snapshots(draw: st.DrawFn) -> str:
    # Never at a multiple of 2**32: PostgreSQL gives no such id to a transaction, nor takes one.
    xmin = draw(st.integers(1, 2**63 - 200).filter(lambda xmin: xmin % 2**32))
    xmax = xmin + draw(st.integers(0, 100).filter(lambda more: (xmin + more) % 2**32))
    running = draw(st.sets(st.integers(xmin, max(xmin, xmax - 1)), max_size=10))
    xip = sorted(xact for xact in running if xact % 2**32) if xmax > xmin else []
    return f"{xmin}:{xmax}:{','.join(map(str, xip))}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(snapshots(), st.integers(-3, 103))
def test_covers(db: Connection, text: str, offset: int) -> None:
    """`covers()` is PostgreSQL's pg_visible_in_snapshot()."""
    snapshot = Snapshot(text)
    xact = max(1, snapshot.xmin + offset)
    shown = fetch(db, "SELECT pg_visible_in_snapshot(%s, %s)", str(xact), text)
    assert [(snapshot.covers(xact),)] == shown


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(snapshots())
def test_parts(db: Connection, text: str) -> None:
    """A snapshot is taken apart as PostgreSQL takes it apart."""
    snapshot = Snapshot(text)
    assert fetch(
        db,
        "SELECT s::text, pg_snapshot_xmin(s)::text, pg_snapshot_xmax(s)::text, "
        "ARRAY(SELECT pg_snapshot_xip(s)::text) FROM CAST(%s AS pg_snapshot) AS s",
        text,
    ) == [
        (
            snapshot.text,
            str(snapshot.xmin),
            str(snapshot.xmax),
            [str(xact) for xact in sorted(snapshot.xip)],
        )
    ]


def test_nothing(db: Connection) -> None:
    """The snapshot of nothing covers no transaction that there can be, the oldest included."""
    assert not NOTHING.covers(3)
    assert not NOTHING.covers(1)
    shown = fetch(db, "SELECT pg_visible_in_snapshot('3', %s)", NOTHING.text)
    assert shown == [(False,)]


@pytest.mark.parametrize("text", ["", "1:1", "a:b:c", "1:2:3:4"])
def test_nonsense(text: str) -> None:
    """What is no snapshot is refused at once."""
    with pytest.raises(ValueError):
        Snapshot(text)


@pytest.mark.parametrize(
    "text, newest, lasting",
    [
        ("10:20:10,15", 0, "1:1:"),
        ("10:20:10,15", 9, "10:10:"),
        ("10:20:10,15", 12, "10:13:10"),
        ("10:20:10,15", 19, "10:20:10,15"),
        ("10:20:10,15", 25, "10:20:10,15"),
        (f"10:{2**32 + 9}:", 2**32 - 1, f"10:{2**32 + 3}:"),
    ],
)
def test_lasting(db: Connection, text: str, newest: int, lasting: str) -> None:
    """Up to the newest row a snapshot outlives a crash; PostgreSQL can read what is left of it."""
    assert Snapshot(text).lasting(newest).text == lasting
    assert fetch(db, "SELECT CAST(%s AS pg_snapshot)::text", lasting) == [(lasting,)]
