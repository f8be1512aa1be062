"""What is done to each contender, and what is measured meanwhile.

Every figure is a `Measurement`; the report takes medians over repeats. CPU seconds are those of the
server's processes; PostgreSQL's, with the work for whoever publishes, are apart.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders import (
    EVERYBODY,
    Contender,
    Database,
    Kind,
    Publisher,
    Running,
    SqlPublisher,
    connection,
    message,
    user,
)
from bench.load import Histogram, Load
from bench.machine import BenchError, Cpu, settle, settled_memory_bytes

# Streams that are opened and closed first: what a process loads or allocates once is no stream's.
WARM_UP_STREAMS = 20

# Connects under way at the same time, a storm apart.
AT_ONCE = 256

# Events that may be on their way while the next is published, where it goes as fast as it can.
WINDOW = 2

# Rates, per second
STEADY = 5.0
SINGLE = 2000.0
INSERTS = 200.0
ANNOUNCED = 2.0

# Streams of the scenarios that issue and report name.
INSERT_STREAMS = 1000
ANNOUNCED_STREAMS = 5000
BULK_STREAMS = 10_000

# Longest waits, seconds: a scenario that takes longer has failed.
OPEN_SECONDS = 60.0
ARRIVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        streams: Numbers of streams to measure fan-out and memory at.
        scenarios: By name; see `SCENARIOS`.
        seconds: Of each measurement.
        bulks: Statements for all users, one after the other.
    """

    streams: tuple[int, ...]
    scenarios: frozenset[str]
    seconds: float
    bulks: int = 3


SCENARIOS = {
    "idle": "memory and CPU of streams that nothing is sent to",
    "fanout": "one event to all, 5 a second and as fast as it can",
    "storm": "all streams are cut, and all come back at once",
    "connect": "how fast streams open, each another user's",
    "insert": "200 INSERTs a second, each for one of 1,000 streams; and one for 5,000 streams",
    "bulk": "one INSERT for all users, until the last stream has its row",
    "single": "2,000 events a second, each for one user",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One scenario of one contender, once.

    Attributes:
        values: Figures by name, the unit at the end of the name.
        latency: From when it was published, or COMMIT was sent, to the client.
        failed: What went wrong, instead of figures.
    """

    contender: str
    scenario: str
    streams: int
    repeat: int
    values: dict[str, float] = field(default_factory=dict)
    latency: list[tuple[float, int]] = field(default_factory=list)
    failed: str = ""


@dataclass
class Stage:
    """A contender that runs, with the streams of one kind.

    Attributes:
        empty_bytes: The server's memory without streams.
        note: Takes each measurement as soon as it is made.
    """

    contender: Contender
    server: Running
    load: Load
    database: Database
    kind: Kind
    repeat: int
    plan: Plan
    note: Callable[[Measurement], None]
    empty_bytes: int = 0

    def result(
        self, scenario: str, streams: int, values: dict[str, float], latency: Histogram
    ) -> None:
        self.note(
            Measurement(
                self.contender.name, scenario, streams, self.repeat, values, latency.buckets
            )
        )

    @contextlib.contextmanager
    def trying(self, scenario: str, streams: int) -> Iterator[None]:
        """What fails here is noted, and the next scenario has its turn if the server still runs."""
        try:
            yield
        except (BenchError, OSError) as error:
            self.note(
                Measurement(self.contender.name, scenario, streams, self.repeat, failed=str(error))
            )
            if self.server.ended:
                raise BenchError(
                    f"{self.contender.name} has ended: {self.server.said()}"
                ) from error
        self.forget()

    def open(self, streams: int, *, at_once: int = AT_ONCE) -> None:
        opened = self.load.open(streams, at_once=at_once, seconds=OPEN_SECONDS)
        if opened.streams < streams:
            raise BenchError(
                f"{opened.streams:,} of {streams:,} streams are open after {opened.seconds:.0f} s "
                f"(the last status was {opened.status})."
            )

    def forget(self) -> None:
        """Mark all rows as read, without a word: streams that open later shall not replay them."""
        if self.server.dsn is None:
            return
        with connection(self.server.dsn) as db, db.cursor() as cursor:
            cursor.execute("SET session_replication_role = replica")  # no trigger
            cursor.execute("UPDATE notifications SET read_at = now() WHERE read_at IS NULL")

    def cpu(self) -> Cpu:
        return Cpu(self.server.pid)

    def postgres_cpu(self) -> Cpu | None:
        return Cpu(self.database.pid) if self.contender.has_database else None


class Meter:
    """The time, the CPU of all involved, and what arrived, between two moments."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        stage.load.reset()
        self._generator = stage.load.stats().cpu_seconds
        self._postgres = stage.postgres_cpu()
        self._started = time.monotonic()
        self._cpu = stage.cpu()

    def read(self) -> tuple[dict[str, float], Histogram]:
        seconds = time.monotonic() - self._started
        cpu = self._cpu.seconds()
        stats = self._stage.load.stats()
        values = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "generator_cpu_share": (stats.cpu_seconds - self._generator) / seconds,
            "server_cpu_share": cpu / seconds,
            "delivered": float(stats.delivered),
            "deliveries_per_second": stats.delivered / seconds,
            "lost_streams": float(stats.lost),
        }
        if self._postgres is not None:
            values["postgres_cpu_seconds"] = self._postgres.seconds()
        if stats.delivered:
            values["deliveries_per_cpu_second"] = stats.delivered / cpu if cpu else 0.0
            values["cpu_us_per_delivery"] = 1e6 * cpu / stats.delivered
            values["bytes_per_delivery"] = stats.bytes / stats.delivered
        return values, stats.latency


def wait_for(stage: Stage, total: int) -> None:
    """Raises: BenchError: Not all that was published has arrived."""
    delivered = stage.load.wait(total, seconds=ARRIVE_SECONDS)
    if delivered < total:
        raise BenchError(f"{delivered:,} of {total:,} events have arrived.")


# Scenarios


def idle(stage: Stage, streams: int) -> None:
    bytes_now = settled_memory_bytes(stage.server.pid)
    meter = Meter(stage)
    time.sleep(stage.plan.seconds)
    values, latency = meter.read()
    values = {name: values[name] for name in ("cpu_seconds", "server_cpu_share", "seconds")}
    values["empty_bytes"] = float(stage.empty_bytes)
    values["bytes"] = float(bytes_now)
    values["above_empty_bytes"] = float(bytes_now - stage.empty_bytes)
    values["bytes_per_stream"] = (bytes_now - stage.empty_bytes) / streams
    stage.result(f"idle_{stage.kind}", streams, values, latency)


def fanout_steady(stage: Stage, streams: int) -> None:
    """One event to all, at a fixed rate whether the server keeps up or not."""
    with contextlib.closing(stage.contender.publisher(stage.server)) as publisher:
        events = max(2, round(STEADY * stage.plan.seconds))
        meter = Meter(stage)
        begun = time.monotonic()
        for number in range(events):
            pause(begun + number / STEADY)
            publisher.everybody(message(number))
        wait_for(stage, events * streams)
        stage.result("fanout_5", streams, *meter.read())


def fanout_fast(stage: Stage, streams: int) -> None:
    """One event to all, the next as soon as all but `WINDOW` have arrived everywhere."""
    with contextlib.closing(stage.contender.publisher(stage.server)) as publisher:
        meter = Meter(stage)
        end = time.monotonic() + stage.plan.seconds
        number = 0
        while number < WINDOW or time.monotonic() < end:
            publisher.everybody(message(number))
            number += 1
            wait_for(stage, (number - WINDOW) * streams if number > WINDOW else 0)
        wait_for(stage, number * streams)
        stage.result("fanout_max", streams, *meter.read())


def announced(stage: Stage, streams: int) -> None:
    """The same by INSERT, to contenders that listen to PostgreSQL; clocked from COMMIT."""
    assert stage.server.dsn is not None
    with contextlib.closing(SqlPublisher(stage.server.dsn, durable=True)) as publisher:
        events = max(2, round(ANNOUNCED * stage.plan.seconds))
        meter = Meter(stage)
        stage.load.record(events * streams)
        sent: list[int] = []
        begun = time.monotonic()
        for number in range(events):
            pause(begun + number / ANNOUNCED)
            sent.append(publisher.commit_one(EVERYBODY, message(number)))
        wait_for(stage, events * streams)
        values, _ = meter.read()
        stage.result("insert_all", streams, values, since(sent, stage.load.recorded()))


def inserts(stage: Stage, streams: int) -> None:
    """Rows for one user after the other, each in a transaction, clocked from COMMIT."""
    assert stage.server.dsn is not None
    with contextlib.closing(SqlPublisher(stage.server.dsn, durable=True)) as publisher:
        count = max(100, round(INSERTS * stage.plan.seconds))
        meter = Meter(stage)
        stage.load.record(count)
        sent: list[int] = []
        begun = time.monotonic()
        for number in range(count):
            pause(begun + number / INSERTS)
            sent.append(publisher.commit_one(user(random.randrange(streams)), message(number)))
        took = time.monotonic() - begun
        wait_for(stage, count)
        values, _ = meter.read()
        values["inserts_per_second"] = count / took
        stage.result("insert_own", streams, values, since(sent, stage.load.recorded()))


def bulk(stage: Stage, streams: int) -> None:
    """One statement for all users; how long until the last stream has its row."""
    assert stage.server.dsn is not None
    with contextlib.closing(SqlPublisher(stage.server.dsn, durable=True)) as publisher:
        last: list[float] = []
        commits: list[float] = []
        latencies: list[Histogram] = []
        values: dict[str, float] = {}
        for number in range(stage.plan.bulks):
            meter = Meter(stage)
            stage.load.record(streams)
            sent = publisher.commit_many(streams, message(number))
            commits.append((time.monotonic_ns() - sent) / 1e6)
            wait_for(stage, streams)
            values, _ = meter.read()
            recorded = stage.load.recorded()
            last.append((max(at for _, at in recorded) - sent) / 1e6)
            latencies.append(since({number: sent}, recorded))
        values["last_ms"] = sorted(last)[len(last) // 2]
        values["last_worst_ms"] = max(last)
        values["commit_ms"] = sorted(commits)[len(commits) // 2]
        stage.result("bulk", streams, values, Histogram.sum(latencies))


def single(stage: Stage, streams: int, name: str = "single") -> None:
    """Events for one user each, at a fixed rate, over two connections."""
    publishers = [stage.contender.publisher(stage.server) for _ in range(2)]
    try:
        # The service's feed looks at the load once a second, and then decides how to learn of rows.
        stage.load.reset()
        wait_for(stage, publish_singly(publishers, streams, 2.5 if stage.contender.sql else 0.5))
        meter = Meter(stage)
        begun = time.monotonic()
        count = publish_singly(publishers, streams, stage.plan.seconds)
        took = time.monotonic() - begun
        wait_for(stage, count)
        values, latency = meter.read()
        values["events_per_second"] = count / took
        stage.result(name, streams, values, latency)
    finally:
        for publisher in publishers:
            publisher.close()


def single_notified(stage: Stage, streams: int) -> None:
    """The same while the service is notified of each row: under such a load it would poll."""
    assert stage.server.dsn is not None
    with contextlib.closing(SqlPublisher(stage.server.dsn, durable=False)) as publisher:
        publisher.execute("UPDATE settings SET feed_mode = 'notify'")
        try:
            single(stage, streams, "single_notify")
        finally:
            # The load must be over when the feed decides by itself again, once a second.
            time.sleep(2.0)
            publisher.execute("UPDATE settings SET feed_mode = 'auto'")


def publish_singly(publishers: list[Publisher], streams: int, seconds: float) -> int:
    """Publish at `SINGLE` per second in all, evenly from each; return how many."""
    counts = [0] * len(publishers)
    errors: list[Exception] = []

    def publish(index: int) -> None:
        rate = SINGLE / len(publishers)
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < seconds:
                pause(begun + counts[index] / rate)
                publishers[index].user(random.randrange(streams), message(counts[index]))
                counts[index] += 1
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the thread
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(len(publishers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise BenchError(f"Publishing failed: {errors[0]}") from errors[0]
    return sum(counts)


def storm(stage: Stage, streams: int) -> None:
    """Cut all streams and open as many, all at the same time."""
    postgres, cpu = stage.postgres_cpu(), stage.cpu()
    stage.load.close()
    opened = stage.load.open(streams, at_once=streams, seconds=OPEN_SECONDS)
    values = connect_values(opened.seconds, streams, cpu, postgres, opened.cpu_seconds)
    if opened.streams < streams:
        raise BenchError(f"{opened.streams:,} of {streams:,} streams came back.")
    stage.result("storm", streams, values, opened.times)


def connect(stage: Stage, streams: int) -> None:
    """Open streams, `AT_ONCE` at a time, from none."""
    postgres, cpu = stage.postgres_cpu(), stage.cpu()
    opened = stage.load.open(streams, at_once=AT_ONCE, seconds=OPEN_SECONDS)
    values = connect_values(opened.seconds, opened.opened, cpu, postgres, opened.cpu_seconds)
    if opened.streams < streams:
        raise BenchError(
            f"{opened.streams:,} of {streams:,} streams are open after {opened.seconds:.0f} s "
            f"(the last status was {opened.status})."
        )
    if "connect" in stage.plan.scenarios:
        stage.result("connect", streams, values, opened.times)


def connect_values(
    seconds: float, opened: int, cpu: Cpu, postgres: Cpu | None, generator: float
) -> dict[str, float]:
    used = cpu.seconds()
    values = {
        "seconds": seconds,
        "cpu_seconds": used,
        "accepts_per_second": opened / seconds,
        "accepts_per_cpu_second": opened / used if used else 0.0,
        "cpu_us_per_accept": 1e6 * used / max(opened, 1),
        "server_cpu_share": used / seconds,
        "generator_cpu_share": generator / seconds,
    }
    if postgres is not None:
        values["postgres_cpu_seconds"] = postgres.seconds()
        values["postgres_us_per_accept"] = 1e6 * values["postgres_cpu_seconds"] / max(opened, 1)
    return values


def since(sent: Any, recorded: list[tuple[int, int]]) -> Histogram:
    """From the moments at which COMMIT was sent, by sequence number, to the arrivals."""
    return Histogram.of(max(0, at - sent[sequence]) / 1000 for sequence, at in recorded)


def pause(until: float) -> None:
    """Sleep until then (monotonic seconds), if that is in the future."""
    left = until - time.monotonic()
    if left > 0:
        time.sleep(left)


# The course of one contender


@contextlib.contextmanager
def staged(
    contender: Contender,
    kind: Kind,
    repeat: int,
    plan: Plan,
    program: Path,
    work: Path,
    database: Database,
    note: Callable[[Measurement], None],
) -> Iterator[Stage]:
    """Start a contender and aim a load generator at it."""
    with contender.running(work, database) as server:
        heads = contender.heads(kind, max(plan.streams), server.port, server.dsn)
        with Load(program, server.port, contender.ready, heads, work) as load:
            stage = Stage(contender, server, load, database, kind, repeat, plan, note)
            stage.open(min(WARM_UP_STREAMS, *plan.streams))
            load.close()
            stage.empty_bytes = settled_memory_bytes(server.pid, seconds=2.0)
            yield stage


def of_everybody(stage: Stage) -> None:
    """What is done with streams that all get the same."""
    plan = stage.plan
    # Memory first, while their number grows: what was sent leaves buffers behind.
    for streams in plan.streams:
        stage.open(streams)
        if "idle" in plan.scenarios:
            with stage.trying("idle_all", streams):
                idle(stage, streams)
    for streams in reversed(plan.streams):
        stage.load.close(keep=streams)
        settle(stage.server.pid)
        stage.open(streams)  # those that a storm has not brought back
        if "fanout" in plan.scenarios:
            with stage.trying("fanout_5", streams):
                fanout_steady(stage, streams)
            with stage.trying("fanout_max", streams):
                fanout_fast(stage, streams)
        if (
            "insert" in plan.scenarios
            and stage.contender.has_database
            and streams == nearest(ANNOUNCED_STREAMS, plan.streams)
        ):
            with stage.trying("insert_all", streams):
                announced(stage, streams)
        if "storm" in plan.scenarios and streams == plan.streams[-1]:
            with stage.trying("storm", streams):
                storm(stage, streams)


def of_users(stage: Stage) -> None:
    """What is done with streams each of which belongs to another user."""
    plan = stage.plan
    streams = nearest(BULK_STREAMS, plan.streams)
    with stage.trying("connect", streams):
        connect(stage, streams)
    stage.open(streams)  # those that were too late
    if "idle" in plan.scenarios:
        with stage.trying("idle_own", streams):
            idle(stage, streams)
    if "bulk" in plan.scenarios and stage.contender.has_database:
        with stage.trying("bulk", streams):
            bulk(stage, streams)
    if "single" in plan.scenarios:
        with stage.trying("single", streams):
            single(stage, streams)
        if stage.contender.sql:
            with stage.trying("single_notify", streams):
                single_notified(stage, streams)
    if "insert" in plan.scenarios and stage.contender.has_database:
        few = min(INSERT_STREAMS, streams)
        with stage.trying("insert_own", few):
            stage.load.close(keep=few)
            settle(stage.server.pid)
            inserts(stage, few)


def nearest(wanted: int, streams: tuple[int, ...]) -> int:
    """The number of streams that is measured and nearest to the one that is named."""
    return min(streams, key=lambda number: abs(number - wanted))


def measure(
    contender: Contender,
    repeat: int,
    plan: Plan,
    *,
    program: Path,
    work: Path,
    database: Database,
    note: Callable[[Measurement], None],
) -> None:
    """Let one contender go through everything once.

    Raises:
        BenchError: It does not start, or ended in the middle; what was measured before is noted.
    """
    kinds: tuple[tuple[Kind, frozenset[str], Callable[[Stage], None]], ...] = (
        ("all", frozenset({"idle", "fanout", "insert", "storm"}), of_everybody),
        ("own", frozenset({"idle", "connect", "insert", "bulk", "single"}), of_users),
    )
    for kind, scenarios, course in kinds:
        if scenarios & plan.scenarios:
            with staged(contender, kind, repeat, plan, program, work, database, note) as stage:
                course(stage)
