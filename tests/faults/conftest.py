"""The cluster of the runs, and the sum of them all at the end."""

from __future__ import annotations

import collections
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sse_server.embedded import EmbeddedPostgres
from tests.conftest import ROOT, connect, execute

# When each transaction committed is asked at the end; a crash is to lose what it can lose.
OPTIONS = {
    "fsync": "off",
    "max_connections": "300",
    "track_commit_timestamp": "on",
    "wal_writer_delay": "2s",
}

# Under which each run leaves its figures with its test's report.
PROPERTY = "faults"


@pytest.fixture(scope="session")
def fault_cluster() -> Iterator[EmbeddedPostgres]:
    """A cluster that is restarted and crashed all the time."""
    with tempfile.TemporaryDirectory(prefix="sse-faults-", ignore_cleanup_errors=True) as name:
        postgres = EmbeddedPostgres(Path(name), options=OPTIONS)
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()


class Databases:
    """Makes databases with the schema, one for each run."""

    def __init__(self, cluster: EmbeddedPostgres) -> None:
        self.cluster = cluster
        self._count = 0

    def create(self) -> str:
        self._count += 1
        name = f"run_{self._count}"
        execute(self.cluster.dsn("postgres"), f"CREATE DATABASE {name}")
        execute(self.cluster.dsn(name), (ROOT / "schema.sql").read_text(encoding="utf-8"))
        return self.cluster.dsn(name)

    def drop(self, dsn: str) -> None:
        connection = connect(dsn)
        name = connection.info.dbname
        connection.close()
        execute(self.cluster.dsn("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def databases(fault_cluster: EmbeddedPostgres) -> Databases:
    return Databases(fault_cluster)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of all runs, each given by `Outcome.figures()`."""
    found: dict[str, Any] = {"seeds": len(runs)}
    for name in runs[0]:
        values = [run[name] for run in runs]
        if name == "seed":
            continue
        if isinstance(values[0], dict):
            total: collections.Counter[str] = collections.Counter()
            for value in values:
                total.update(value)
            found[name] = dict(total.most_common())
        else:
            found[name] = round(sum(values), 1)
    found["failed"] = sorted(run["seed"] for run in runs if any(run["problems"].values()))
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # By way of the reports, which come from other processes with pytest-xdist.
    runs = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not runs:
        return
    found = summary(cast(list[dict[str, Any]], runs))
    terminalreporter.section("faults")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind} {count}" for kind, count in value.items())
        terminalreporter.write_line(f"{name}: {value}")
    if path := os.environ.get("FAULTS_REPORT"):
        Path(path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
