"""What the process counts, in Prometheus' terms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The metrics of one process, in a registry of their own (tests run several apps)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.streams = Gauge(
            "sse_streams", "Open streams by state.", ["state"], registry=self.registry
        )
        self.opened = Counter("sse_streams_opened", "Streams opened.", registry=self.registry)
        self.closed = Counter(
            "sse_streams_closed", "Streams ended, by reason.", ["reason"], registry=self.registry
        )
        self.turned_away = Counter(
            "sse_streams_turned_away",
            "Stream requests that were not served, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.deliveries = Counter(
            "sse_deliveries", "Frames of notifications written live.", registry=self.registry
        )
        self.replays = Counter("sse_replays", "Replays finished.", registry=self.registry)
        self.replayed = Counter(
            "sse_replayed_notifications",
            "Notifications written by replays.",
            registry=self.registry,
        )
        self.lagged = Counter(
            "sse_streams_lagged",
            "Times that a live stream went back to replaying, its client being slow.",
            registry=self.registry,
        )
        self.payloads = Counter(
            "sse_feed_payloads", "NOTIFY payloads received.", registry=self.registry
        )
        self.feed_connected = Gauge(
            "sse_feed_connected", "1 while the feed listens.", registry=self.registry
        )
        self.feed_reconnects = Counter(
            "sse_feed_reconnects",
            "Times that the feed lost its connection.",
            registry=self.registry,
        )
        self.feed_polling = Gauge(
            "sse_feed_polling",
            "1 while the feed polls the table, 0 while it is notified.",
            registry=self.registry,
        )
        self.feed_swept = Counter(
            "sse_feed_swept_notifications",
            "Notifications that no NOTIFY had announced, found by a sweep.",
            registry=self.registry,
        )
        self.latency = Histogram(
            "sse_created_to_written_seconds",
            "From the row's created_at to the live write to its streams.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
