"""What is going to happen: a list of timed operations, a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

FEED_MODES = ("notify", "poll", "auto")
EVENT_TYPES = ("new_message", "status_change", "system_alert")

# Kinds that make rows or change them; the others are faults, or clients that come and go.
WORK = (
    "insert",
    "transaction",
    "late_commit",
    "bulk",
    "notify_users",
    "unannounced",
    "read",
    "read_by_api",
    "preference",
    "feed_mode",
)
CLIENT_FAULTS = ("cut", "pause", "switch", "double", "sign_out", "storm")
NODE_FAULTS = ("kill", "terminate", "freeze")
DATABASE_FAULTS = ("end_feeds", "end_pool", "restart", "crash", "forget")
LINK_FAULTS = ("link_delay", "link_stall", "link_loss", "link_reset", "link_refuse")
FAULTS = (*NODE_FAULTS, *DATABASE_FAULTS, *LINK_FAULTS, "feed_mode")


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that is done, `at` seconds after the start."""

    at: float
    kind: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        arguments = " ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.at:7.3f}  {self.kind:<13} {arguments}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run.

    Attributes:
        nodes: How many, each with its settings (environment) on top of the common ones.
        clocks: Seconds by which each node's wall clock is off.
        delays: Seconds by which answers of the database may be late at each node: some more, some
            less, so that what one connection brings is overtaken by what another does.
        devices: For each user, the number of sessions.
        feed_mode: The first ``settings.feed_mode``.
        rate: ``settings.user_rate_per_minute``.
        operations: In the order of time.
    """

    seed: int
    nodes: tuple[dict[str, str], ...]
    clocks: tuple[float, ...]
    delays: tuple[float, ...]
    devices: dict[str, int]
    feed_mode: str
    rate: int
    operations: tuple[Operation, ...]

    @property
    def clients(self) -> list[tuple[str, int]]:
        """(user, number of the device) of each client."""
        return [(user, device) for user, count in self.devices.items() for device in range(count)]

    @property
    def seconds(self) -> float:
        return max((operation.at for operation in self.operations), default=0.0)

    def of(self, operations: tuple[Operation, ...]) -> Plan:
        """The same run with other operations."""
        return replace(self, operations=operations)

    def without(self, kinds: Collection[str]) -> Plan:
        """The same run without some kinds of operations."""
        return self.of(tuple(done for done in self.operations if done.kind not in kinds))

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {len(self.operations)} operations, "
            f"rate {self.rate}/min, feed mode {self.feed_mode}"
        ]
        for number, settings in enumerate(self.nodes):
            told = " ".join(f"{name}={value}" for name, value in settings.items())
            lines.append(
                f"node {number}: {told}, clock {self.clocks[number]:+.0f} s, "
                f"delay {self.delays[number]} s"
            )
        lines.append("users: " + " ".join(f"{user}*{n}" for user, n in self.devices.items()))
        return "\n".join([*lines, *map(str, self.operations)])


def generate(seed: int, *, seconds: float = 4.0, intensity: float = 1.0) -> Plan:
    """The plan of a seed.

    Each seed leaves out some kinds of faults, so that the others are not always drowned in them.

    Args:
        seed: Everything follows from it, and from the other two arguments.
        seconds: How long operations are begun.
        intensity: 2.0 does everything twice as often.
    """
    return _Generator(seed, seconds, intensity).plan()


class _Generator:
    def __init__(self, seed: int, seconds: float, intensity: float) -> None:
        self._seed = seed
        self._rng = random.Random(seed)
        self._seconds = seconds
        self._intensity = intensity
        self._users = [f"user-{number}" for number in range(self._rng.randint(3, 6))]
        # Rows of the others are never marked read: every single one has to arrive.
        self._readers = self._users[: self._rng.randint(1, 2)]
        self._devices = {user: self._rng.randint(1, 3) for user in self._users}
        self._nodes = self._rng.choice((2, 2, 3))
        # Without long transactions, a row's horizon is just below it: its cursor covers a lot.
        self._brisk = self._rng.random() < 0.5
        self._makers: dict[str, Callable[[], dict[str, Any]]] = {
            "insert": self._insert,
            "transaction": self._transaction,
            "late_commit": self._late_commit,
            "bulk": self._bulk,
            "notify_users": self._notify_users,
            "unannounced": self._insert,
            "read": self._read,
            "read_by_api": self._read_by_api,
            "preference": self._preference,
            "feed_mode": lambda: {"mode": self._rng.choice(FEED_MODES)},
            "cut": self._client,
            "pause": lambda: {**self._client(), "seconds": self._duration(0.3, 2.5)},
            "switch": lambda: {**self._client(), "node": self._rng.randrange(self._nodes)},
            "double": lambda: {**self._client(), "node": self._rng.randrange(self._nodes)},
            "sign_out": self._client,
            "storm": dict,
            "kill": lambda: {**self._node(), "seconds": self._duration(0.0, 1.0)},
            "terminate": lambda: {**self._node(), "seconds": self._duration(0.0, 1.0)},
            "freeze": lambda: {**self._node(), "seconds": self._duration(0.3, 3.0)},
            "end_feeds": dict,
            "end_pool": dict,
            "restart": dict,
            "crash": lambda: {"seconds": self._duration(0.0, 0.6)},
            "forget": lambda: {"transactions": self._rng.randint(2, 8)},
            "link_delay": lambda: {**self._link(), "delay": self._duration(0.02, 0.3)},
            "link_stall": self._link,
            "link_loss": self._link,
            "link_reset": self._link,
            "link_refuse": self._link,
        }

    def plan(self) -> Plan:
        rng = self._rng
        common = {
            "SSE_PROBE_SECONDS": rng.choice(("0.2", "0.5", "1")),
            "SSE_QUERY_TIMEOUT": rng.choice(("1", "2")),
            "SSE_CONNECT_TIMEOUT": "3",
            "SSE_POOL_SIZE": rng.choice(("2", "4")),
            "SSE_HEARTBEAT_SECONDS": "1",
            "SSE_DRAIN_SECONDS": rng.choice(("0.5", "2")),
            "SSE_SLOW_SECONDS": rng.choice(("1", "5")),
            "SSE_STREAM_BUFFER_BYTES": rng.choice(("4096", "4096", "16384")),
            "SSE_REPLAY_PAGE_ROWS": rng.choice(("3", "7", "20", "500")),
            "SSE_STREAM_MAX_SECONDS": rng.choice(("4", "3600", "3600")),
        }
        clocks = [0.0] * self._nodes
        if rng.random() < 0.4:
            clocks[-1] = rng.choice((-86_400.0, -3_600.0, -1.0, 1.0, 3_600.0, 86_400.0 * 400))
        rate = rng.choice((0, 0, 0, 0, 60))
        kinds = self._rates()
        operations = [
            Operation(round(at, 3), kind, self._makers[kind]())
            for kind, per_second in kinds.items()
            for at in self._times(per_second)
        ]
        operations.sort(key=lambda operation: (operation.at, operation.kind))
        return Plan(
            self._seed,
            tuple(dict(common) for _ in range(self._nodes)),
            tuple(clocks),
            tuple(rng.choice((0.0, 0.01, 0.05, 0.15)) for _ in range(self._nodes)),
            self._devices,
            rng.choice(FEED_MODES),
            rate,
            tuple(operations),
        )

    def _rates(self) -> dict[str, float]:
        """How often per second each kind is done, of those that this seed has."""
        rng = self._rng
        rates = {
            "insert": 12.0,
            "transaction": 8.0,
            "late_commit": 1.0,
            "bulk": 1.5,
            "notify_users": 1.5,
            "unannounced": 0.5,
            "read": 1.0,
            "read_by_api": 1.0,
            "preference": 0.5,
        }
        for kind in ("late_commit", "bulk", "notify_users", "unannounced", "read", "preference"):
            if rng.random() < 0.2:
                del rates[kind]
        if self._brisk:
            rates.pop("late_commit", None)
            rates["insert"] = 30.0
        clients = sum(self._devices.values())
        rates |= {
            "cut": rng.choice((0.1, 0.4, 1.5)) * clients,
            "pause": rng.choice((0.0, 0.03, 0.1)) * clients,
            "switch": rng.choice((0.0, 0.1, 0.3)) * clients,
            "double": rng.choice((0.0, 0.05, 0.2)) * clients,
            "sign_out": rng.choice((0.0, 0.0, 0.02)) * clients,
            "storm": rng.choice((0.0, 0.0, 0.3)),
            "feed_mode": rng.choice((0.0, 0.5, 1.5)),
        }
        faults = [*NODE_FAULTS, *DATABASE_FAULTS, *LINK_FAULTS]
        present = rng.sample(faults, rng.randint(2, 6))
        # Together about two faults a second, however many kinds there are.
        rates |= {kind: 2.0 / len(present) for kind in present}
        for kind in ("restart", "crash", "forget"):
            if kind in rates:
                rates[kind] = 0.25
        return {kind: rate * self._intensity for kind, rate in rates.items()}

    def _times(self, per_second: float) -> Iterator[float]:
        if per_second <= 0:
            return
        at = self._rng.expovariate(per_second)
        while at < self._seconds:
            yield at
            at += self._rng.expovariate(per_second)

    def _duration(self, least: float, most: float) -> float:
        return round(self._rng.uniform(least, most), 3)

    # Arguments

    def _row(self) -> dict[str, Any]:
        return {
            "user": self._rng.choice(self._users),
            "event_type": self._rng.choice(EVENT_TYPES),
            # Some do not fit into the payload of a NOTIFY.
            "size": self._rng.choice((10, 10, 10, 100, 1000, 1999)),
        }

    def _insert(self) -> dict[str, Any]:
        return {"rows": [self._row()]}

    def _transaction(self) -> dict[str, Any]:
        """Statements with pauses between them, savepoints, and a commit or not."""
        rng = self._rng
        return {
            "rows": [self._row() for _ in range(rng.randint(1, 5))],
            "pause": self._duration(0.0, 0.01 if self._brisk else 0.08),
            "savepoints": rng.random() < 0.3,
            "isolation": self._isolation(),
            "commit": rng.random() < 0.8,
        }

    def _late_commit(self) -> dict[str, Any]:
        return {
            "rows": [self._row() for _ in range(self._rng.randint(1, 2))],
            "seconds": self._duration(0.5, 3.0),
            "isolation": self._isolation(),
            "commit": self._rng.random() < 0.9,
        }

    def _isolation(self) -> str:
        return self._rng.choice(("READ COMMITTED",) * 4 + ("REPEATABLE READ", "SERIALIZABLE"))

    def _bulk(self) -> dict[str, Any]:
        row = self._row()
        return {
            "users": self._rng.sample(self._users, self._rng.randint(1, len(self._users))),
            "event_type": row["event_type"],
            "size": row["size"],
            "each": self._rng.choice((1, 1, 4, 12)),
        }

    def _notify_users(self) -> dict[str, Any]:
        return {key: value for key, value in self._bulk().items() if key != "each"}

    def _read(self) -> dict[str, Any]:
        return {"user": self._rng.choice(self._readers), "most": self._rng.randint(1, 5)}

    def _read_by_api(self) -> dict[str, Any]:
        number = self._rng.choice(
            [n for n, (user, _) in enumerate(self._clients()) if user in self._readers]
        )
        return {"client": number, "how": self._rng.choice(("one", "ids", "ids", "up_to"))}

    def _preference(self) -> dict[str, Any]:
        return {
            "client": self._client()["client"],
            "event_type": self._rng.choice(EVENT_TYPES),
            "enabled": self._rng.random() < 0.6,
            "api": self._rng.random() < 0.5,
        }

    def _clients(self) -> list[tuple[str, int]]:
        return [(user, device) for user, count in self._devices.items() for device in range(count)]

    def _client(self) -> dict[str, Any]:
        return {"client": self._rng.randrange(len(self._clients()))}

    def _node(self) -> dict[str, Any]:
        return {"node": self._rng.randrange(self._nodes)}

    def _link(self) -> dict[str, Any]:
        return {
            **self._node(),
            "side": self._rng.choice(("clients", "database")),
            "seconds": self._duration(0.2, 2.5),
        }
