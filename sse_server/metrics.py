"""What the process counts, in Prometheus' terms.

Several worker processes of one service share the files of the directory that the environment
variable ``PROMETHEUS_MULTIPROC_DIR`` names; whichever of them is asked answers for all. Whoever
starts the workers sets it for them, and calls ``multiprocess.mark_process_dead(pid)`` of
prometheus-client when one has ended. Without it a process answers for itself.

Every label has few values, and none that a client could choose: states, reasons, outcomes, limits,
templates of routes. No user, no address, no event type.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from sse_server import __version__

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

# Seconds. What is live takes milliseconds; what takes seconds has met something.
LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """The metrics of one process, in a registry of their own (tests run several apps)."""

    def __init__(self) -> None:
        self.shared = DIRECTORY in os.environ
        # prometheus-client decides when it is imported, which a worker that was forked did before
        # it was told the directory.
        values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._streams()
        self._feed()
        self._database()
        self._requests()
        self._retention()
        self.build = self._gauge(
            "sse_build_info", "1, with what runs as labels.", "version", "python", mode="livemax"
        )
        self.build.labels(__version__, platform.python_version()).set(1)
        self.workers = self._gauge("sse_workers", "Processes that serve.", mode="livesum")
        self.workers.set(1)
        self.ready = self._gauge(
            "sse_ready",
            "1 while the feed listens and the process does not drain (/readyz asks the database "
            "besides). Of several workers, the worst.",
            mode="livemin",
        )

    def _streams(self) -> None:
        self.streams = self._gauge(
            "sse_streams",
            "Open streams by state: replaying, live, or lagging: replaying because the client was "
            "slow.",
            "state",
            mode="livesum",
        )
        self.opened = self._counter("sse_streams_opened", "Streams opened.")
        self.closed = self._counter("sse_streams_closed", "Streams ended, by reason.", "reason")
        self.turned_away = self._counter(
            "sse_streams_turned_away", "Stream requests that were not served, by reason.", "reason"
        )
        self.deliveries = self._counter("sse_deliveries", "Frames of notifications written live.")
        self.replays = self._counter("sse_replays", "Replays finished.")
        self.replayed = self._counter(
            "sse_replayed_notifications", "Notifications written by replays."
        )
        self.lagged = self._counter(
            "sse_streams_lagged",
            "Times that a live stream went back to replaying, its client being slow.",
        )
        self.latency = self._histogram(
            "sse_created_to_written_seconds",
            "From the row's created_at (the database's clock when the INSERT ran, not the commit) "
            "to the live write to its streams (this host's clock).",
            LATENCY_BUCKETS,
        )

    def _feed(self) -> None:
        self.payloads = self._counter("sse_feed_payloads", "NOTIFY payloads received.")
        self.feed_connected = self._gauge(
            "sse_feed_connected",
            "1 while the feed listens. Of several workers, the worst.",
            mode="livemin",
        )
        self.feed_reconnects = self._counter(
            "sse_feed_reconnects", "Times that the feed lost its connection."
        )
        self.feed_polling = self._gauge(
            "sse_feed_polling",
            "1 while the feed polls the table, 0 while it is notified.",
            mode="livemax",
        )
        self.feed_swept = self._counter(
            "sse_feed_swept_notifications",
            "Notifications that no NOTIFY had announced, found by a sweep.",
        )
        # Times, not ages: an age stands still with the process that measures it.
        self.feed_swept_at = self._gauge(
            "sse_feed_swept_timestamp_seconds",
            "When the last sweep of the table was complete: all that was committed before has been "
            "dispatched. Of several workers, the oldest.",
            mode="livemin",
        )
        self.feed_heard_at = self._gauge(
            "sse_feed_heard_timestamp_seconds",
            "When the feed last had anything from the database. Of several workers, the oldest.",
            mode="livemin",
        )

    def _database(self) -> None:
        self.pool = self._gauge(
            "sse_pool_connections", "Database connections in use.", mode="livesum"
        )
        self.pool_size = self._gauge(
            "sse_pool_size", "Most database connections there may be.", mode="livesum"
        )
        self.pool_waiting = self._gauge(
            "sse_pool_waiting", "Queries that wait for a database connection.", mode="livesum"
        )

    def _requests(self) -> None:
        self.requests = self._counter(
            "sse_http_requests",
            "Answers, by template of the route (other: no route) and class of the status.",
            "route",
            "status",
        )
        self.request_seconds = self._histogram(
            "sse_http_request_seconds",
            "From a request's head to the head of its answer.",
            REQUEST_BUCKETS,
            "route",
        )
        self.refusals = self._counter(
            "sse_limiter_refusals", "Requests over a limit, by limit.", "limit"
        )
        self.publish_requests = self._counter(
            "sse_publish_requests",
            "Requests to publish, by outcome: published, repeated, or the slug of the refusal.",
            "outcome",
        )
        self.publish_recipients = self._counter(
            "sse_publish_recipients",
            "Recipients of what was published over HTTP, by outcome: created, suppressed or "
            "rate_limited. Rows that are inserted by SQL are not seen here.",
            "outcome",
        )

    def _retention(self) -> None:
        self.retention_deleted = self._counter(
            "sse_retention_deleted", "Rows deleted because they had had their time.", "what"
        )
        # Not live…: what a worker did counts after its end.
        self.retention_run_at = self._gauge(
            "sse_retention_run_timestamp_seconds",
            "When a clean-up last came to its end.",
            "what",
            mode="max",
        )
        self.retention_seconds = self._gauge(
            "sse_retention_duration_seconds",
            "How long that clean-up took, pauses included.",
            "what",
            mode="mostrecent",
        )

    # Reading

    def gathered(self) -> CollectorRegistry:
        """What is to be told: of all workers, or of this process if it has no siblings."""
        if not self.shared:
            return self.registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry

    def exposition(self) -> bytes:
        """The text format. With several workers it reads their files, which may block."""
        return generate_latest(self.gathered())

    def totals(self) -> Totals:
        """All values. With several workers it reads their files, which may block."""
        return Totals(
            (sample.name, dict(sample.labels), sample.value)
            for metric in self.gathered().collect()
            for sample in metric.samples
        )

    # Making

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str, mode: str) -> Gauge:
        return Gauge(
            name,
            text,
            labels,
            registry=self.registry,
            multiprocess_mode=mode,  # type: ignore[arg-type]
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class Totals:
    """The values of one moment."""

    def __init__(self, samples: Iterator[tuple[str, Mapping[str, str], float]]) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for name, labels, value in samples:
            self._samples.setdefault(name, []).append((labels, value))

    def one(self, name: str, default: float = 0.0) -> float:
        """The value of a metric without labels."""
        found = self._samples.get(name)
        return found[0][1] if found else default

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a metric with one label."""
        return {labels[label]: value for labels, value in self._samples.get(name, ())}
