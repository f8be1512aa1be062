"""The report page: one HTML file with tables and SVG plots, of the figures in ``bench.json``.

Nothing is loaded from anywhere. Where a figure was measured more than once, the page shows the
median, and the lowest and highest beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from bench.load import Histogram

# Size of a plot and of the margins around its axes, in SVG units
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 86, 34, 14, 46

# Percentiles of the latency plots: the axis is logarithmic in what lies above.
PERCENTILES = (0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 97.5, 99.0, 99.5, 99.75, 99.9, 99.95, 99.99)
PERCENTILE_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99)

# A generator that is busier than this may have been what was measured.
BUSY = 0.9

COLOURS = {
    "service": "var(--a)",
    "baseline": "var(--h)",
    "c": "var(--b)",
    "nchan": "var(--c)",
    "go": "var(--d)",
    "better-sse": "var(--e)",
    "aiohttp-sse": "var(--f)",
    "sse-starlette": "var(--g)",
}

STYLE = """
:root { color-scheme: light dark; --fg: #1c2024; --soft: #60646c; --line: #d9dbdf; --bg: #fff;
  --a: #0b62d6; --b: #6b7076; --c: #16804a; --d: #0e8c9c; --e: #b45309; --f: #8e4ec6;
  --g: #d03a54; --h: #6ea8fe; }
@media (prefers-color-scheme: dark) { :root { --fg: #edeef0; --soft: #a5a9b0; --line: #3a3d42;
  --bg: #16181b; --a: #6cb0ff; --b: #a5a9b0; --c: #5bc48b; --d: #56c7d6; --e: #f0a04b;
  --f: #c89bf0; --g: #ff8095; --h: #3f7fd6; } }
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; background: var(--bg);
  color: var(--fg); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem }
p, li { max-width: 68ch } .soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap }
th { font-weight: 600; white-space: normal; vertical-align: bottom }
th:first-child, td:first-child { text-align: left } td small { display: block; color: var(--soft) }
tr.own td { font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr));
  gap: 1.5rem } figure { margin: 0 } figcaption { font-weight: 600; margin-bottom: .3rem }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: var(--soft) } svg .grid { stroke: var(--line) }
svg .series { fill: none; stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .2rem 0 0;
  list-style: none; font-size: 13px }
.legend i { display: inline-block; width: 1.1em; height: 3px; margin-right: .4em;
  vertical-align: middle }
"""


# Figures


class Figures:
    """The measurements, to be asked for by contender, scenario and number of streams."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.titles: dict[str, str] = result["titles"]
        self._all: list[dict[str, Any]] = result["measurements"]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [entry for entry in self._all if entry["failed"]]

    def of(self, contender: str, scenario: str, streams: int | None = None) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self._all
            if entry["contender"] == contender
            and entry["scenario"] == scenario
            and (streams is None or entry["streams"] == streams)
            and not entry["failed"]
        ]

    def streams(self, scenario: str) -> list[int]:
        """At which numbers of streams a scenario was measured."""
        return sorted({entry["streams"] for entry in self._all if entry["scenario"] == scenario})

    def values(
        self, contender: str, scenario: str, name: str, streams: int | None = None
    ) -> list[float]:
        return [
            entry["values"][name]
            for entry in self.of(contender, scenario, streams)
            if name in entry["values"]
        ]

    def by_repeat(self, contender: str, scenario: str, name: str, streams: int) -> dict[int, float]:
        return {
            entry["repeat"]: entry["values"][name]
            for entry in self.of(contender, scenario, streams)
            if name in entry["values"]
        }

    def latency(self, contender: str, scenario: str, streams: int | None = None) -> Histogram:
        return Histogram.sum(
            Histogram(entry["latency"]) for entry in self.of(contender, scenario, streams)
        )

    def ratio(self, scenario: str, name: str, streams: int, other: str) -> float | None:
        """The service's figure by another's, of the same repeat; the median of the repeats."""
        ours = self.by_repeat("service", scenario, name, streams)
        theirs = self.by_repeat(other, scenario, name, streams)
        ratios = [ours[repeat] / theirs[repeat] for repeat in ours if theirs.get(repeat)]
        return statistics.median(ratios) if ratios else None


def number(value: float) -> str:
    """As many digits as say something."""
    if value and abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def cell(values: Sequence[float], factor: float = 1.0) -> str:
    """The median, and below it the lowest and highest if there are several."""
    if not values:
        return "<td>–</td>"
    scaled = [value * factor for value in values]
    text = number(statistics.median(scaled))
    if len(scaled) > 1:
        text += f"<small>{number(min(scaled))} – {number(max(scaled))}</small>"
    return f"<td>{text}</td>"


def table(head: Iterable[str], rows: Iterable[str]) -> str:
    heads = "".join(f"<th>{text}</th>" for text in head)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(name: str, title: str, cells: Iterable[str]) -> str:
    kind = ' class="own"' if name == "service" else ""
    return f"<tr{kind}><td>{escape(title)}</td>{''.join(cells)}</tr>"


# Plots


@dataclass
class Axis:
    """One axis of a plot.

    Attributes:
        place: Maps a value to something linear.
        ticks: Values and how they are written.
    """

    title: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    place: Callable[[float], float] = field(default=float)

    def at(self, value: float) -> float:
        """From 0 to 1."""
        low, high = self.place(self.low), self.place(self.high)
        return (self.place(value) - low) / (high - low) if high > low else 0.5


def linear(title: str, values: Sequence[float]) -> Axis:
    """From 0 to a round number above all values."""
    most = max([*values, 1e-9])
    step = 10.0 ** math.floor(math.log10(most))
    step = next(step * by for by in (0.2, 0.5, 1, 2) if most / (step * by) <= 6)
    count = math.ceil(most / step)
    ticks = [(n * step, f"{n * step:,.10g}") for n in range(count + 1)]
    return Axis(title, 0, count * step, ticks)


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """Powers of ten around all values."""
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    ticks = [(10.0**n, f"{10.0**n:,.10g}") for n in range(low, high + 1)]
    return Axis(title, 10.0**low, 10.0**high, ticks, lambda value: math.log10(max(value, 1e-9)))


def counts(title: str, values: Sequence[float]) -> Axis:
    """Exactly the numbers that were measured, from 0."""
    ticks = [(value, f"{value:,.0f}") for value in sorted(set(values))]
    return Axis(title, 0, max(values), ticks)


def percentiles() -> Axis:
    def place(percentile: float) -> float:
        return -math.log10(1 - percentile / 100)

    ticks = [(value, f"{value:g} %") for value in PERCENTILE_TICKS]
    return Axis("of all deliveries", 0, PERCENTILES[-1], ticks, place)


def plot(
    caption: str,
    series: dict[str, list[tuple[float, float]]],
    titles: dict[str, str],
    x: Axis,
    y: Axis,
) -> str:
    """Lines with a point at each value, a legend below."""

    def px(value: float) -> float:
        return LEFT + x.at(value) * (WIDTH - LEFT - RIGHT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - y.at(value) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">']
    for value, text in y.ticks:
        parts.append(
            f'<path class="grid" d="M{LEFT} {py(value):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 8}" y="{py(value) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for value, text in x.ticks:
        parts.append(
            f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{text}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.title)}</text>'
    )
    legend = []
    for name, points in series.items():
        colour = COLOURS.get(name, "var(--b)")
        title = escape(titles.get(name, name))
        line = "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in points)
        parts.append(f'<path class="series" stroke="{colour}" d="M{line}"/>')
        for a, b in points:
            parts.append(
                f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="3" fill="{colour}">'
                f"<title>{title}: {number(b)}</title></circle>"
            )
        legend.append(f'<li><i style="background:{colour}"></i>{title}</li>')
    parts.append("</svg>")
    return (
        f"<figure><figcaption>{escape(caption)}</figcaption>{''.join(parts)}"
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def against_streams(
    figures: Figures, caption: str, unit: str, scenario: str, name: str, factor: float = 1.0
) -> str:
    series: dict[str, list[tuple[float, float]]] = {}
    for contender in figures.titles:
        points = [
            (float(streams), factor * statistics.median(values))
            for streams in figures.streams(scenario)
            if (values := figures.values(contender, scenario, name, streams))
        ]
        if points:
            series[contender] = points
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    return plot(
        caption,
        series,
        figures.titles,
        counts("streams", [x for x, _ in every]),
        linear(unit, [y for _, y in every]),
    )


def latencies(figures: Figures, caption: str, scenario: str) -> str:
    streams = figures.streams(scenario)[-1:]
    series: dict[str, list[tuple[float, float]]] = {}
    for contender in figures.titles:
        histogram = figures.latency(contender, scenario, *streams)
        # No percentile of fewer events than it stands for.
        shown = [p for p in PERCENTILES if histogram.count * (1 - p / 100) >= 1]
        if len(shown) > 2:
            series[contender] = [(p, histogram.ms(p)) for p in shown]
    if not series:
        return ""
    values = [y for points in series.values() for _, y in points]
    return plot(
        f"{caption}, {streams[0]:,} streams",
        series,
        figures.titles,
        percentiles(),
        logarithmic("ms, no more than", values),
    )


def insert_costs(inserts: dict[str, dict[str, list[float]]]) -> str:
    colours = ["service", "nchan", "better-sse", "aiohttp-sse", "go", "sse-starlette", "c"]
    # The plot's colours go by contender; these are the service's cases.
    series = {
        colour: [
            (float(writers), statistics.median(rates))
            for writers, rates in sorted(inserts[case].items(), key=lambda item: int(item[0]))
        ]
        for colour, case in zip(colours, inserts, strict=False)
    }
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    return plot(
        "What an INSERT costs: by bench/inserts.py",
        series,
        dict(zip(colours, inserts, strict=False)),
        counts("concurrent writers", [x for x, _ in every]),
        linear("inserts per second", [y for _, y in every]),
    )


# The page


def overview(figures: Figures, streams: int, own: int) -> str:
    head = [
        "server",
        "memory per idle stream, KB<br>all on one channel",
        "each its own",
        "idle, heartbeats: % of a core",
        "deliveries per CPU-s, one event to all<br>5 a second",
        "as fast as it can",
        "deliveries per second, as fast as it can",
        "accepts per second",
        "CPU µs per accept",
        "storm: accepts per second",
        "CPU µs per event for one user, 2,000/s",
    ]
    rows = []
    for name, title in figures.titles.items():
        rows.append(
            row(
                name,
                title,
                [
                    cell(figures.values(name, "idle_all", "bytes_per_stream", streams), 1 / 1024),
                    cell(figures.values(name, "idle_own", "bytes_per_stream", own), 1 / 1024),
                    cell(figures.values(name, "idle_own", "server_cpu_share", own), 100),
                    cell(figures.values(name, "fanout_5", "deliveries_per_cpu_second", streams)),
                    cell(figures.values(name, "fanout_max", "deliveries_per_cpu_second", streams)),
                    cell(figures.values(name, "fanout_max", "deliveries_per_second", streams)),
                    cell(figures.values(name, "connect", "accepts_per_second", own)),
                    cell(figures.values(name, "connect", "cpu_us_per_accept", own)),
                    cell(figures.values(name, "storm", "accepts_per_second", streams)),
                    cell(figures.values(name, "single", "cpu_us_per_delivery", own)),
                ],
            )
        )
    return table(head, rows)


def times(figures: Figures) -> str:
    """Latencies, of all repeats together."""
    scenarios = [
        ("fanout_5", "one event to all, 5/s"),
        ("single", "one user each, 2,000/s"),
        ("single_notify", "the same, each notified"),
        ("insert_own", "COMMIT → client, 200/s"),
        ("insert_all", "COMMIT → client, one row to all"),
        ("bulk", "COMMIT → client, one row for each"),
        ("connect", "connect → open"),
    ]
    shown = [(name, title) for name, title in scenarios if figures.streams(name)]
    rows = []
    for contender, title in figures.titles.items():
        cells = []
        for scenario, _ in shown:
            histogram = figures.latency(contender, scenario, figures.streams(scenario)[-1])
            cells.append(
                f"<td>{number(histogram.ms(50))} / {number(histogram.ms(99))}</td>"
                if histogram.count
                else "<td>–</td>"
            )
        rows.append(row(contender, title, cells))
    head = ["p50 / p99, ms"]
    head += [f"{title}<br>{figures.streams(name)[-1]:,} streams" for name, title in shown]
    return table(head, rows)


def goals(figures: Figures, streams: int, own: int) -> str:
    """The service against what it is meant to reach."""
    rows: list[str] = []

    def line(text: str, measured: float | None, unit: str, goal: float, *, most: bool) -> None:
        if measured is None:
            return
        met = measured <= goal if most else measured >= goal
        sign = "≤" if most else "≥"
        rows.append(
            f"<tr><td>{text}</td><td>{number(measured)} {unit}</td>"
            f"<td>{sign} {number(goal)} {unit}</td><td>{'yes' if met else 'no'}</td></tr>"
        )

    def median(scenario: str, name: str, at: int | None, factor: float = 1.0) -> float | None:
        values = figures.values("service", scenario, name, at)
        return factor * statistics.median(values) if values else None

    def ms(scenario: str, percentile: float) -> float | None:
        histogram = figures.latency("service", scenario)
        return histogram.ms(percentile) if histogram.count else None

    for other, goal in (("nchan", 1.5), ("sse-starlette", 5.0), ("c", 0.85)):
        for scenario, text in (("fanout_5", "5/s"), ("fanout_max", "as fast as it can")):
            line(
                f"One event to {streams:,} streams, {text}: deliveries per CPU-s, by those of "
                f"{escape(figures.titles.get(other, other))}",
                figures.ratio(scenario, "deliveries_per_cpu_second", streams, other),
                "×",
                goal,
                most=False,
            )
    line(
        f"Memory per idle authenticated stream, {own:,} users",
        median("idle_own", "bytes_per_stream", own, 1 / 1024),
        "KB",
        3.0,
        most=True,
    )
    line(
        "Authenticated connects per CPU second of the service",
        median("connect", "accepts_per_cpu_second", own),
        "",
        3000.0,
        most=False,
    )
    for scenario, percentile, goal, text in (
        ("insert_own", 50.0, 0.9, "200 inserts/s"),
        ("insert_own", 99.0, 4.0, "200 inserts/s"),
        ("insert_all", 99.0, 60.0, "One INSERT for all"),
    ):
        for measured in figures.streams(scenario)[-1:]:
            text += f", {measured:,} streams, COMMIT → client, p{percentile:g}"
        line(text, ms(scenario, percentile), "ms", goal, most=True)
    line(
        f"One statement for {own:,} users: the last stream",
        median("bulk", "last_ms", own),
        "ms",
        250.0,
        most=True,
    )
    return table(["goal of the service", "measured", "goal", "met"], rows) if rows else ""


def generator(figures: Figures, streams: int) -> str:
    """How busy the load generator was, beside the fastest server."""
    rows = []
    for name, title in figures.titles.items():
        shares = figures.values(name, "fanout_max", "generator_cpu_share", streams)
        warn = "busy: a lower bound" if shares and max(shares) > BUSY else ""
        rows.append(
            row(
                name,
                title,
                [
                    cell(shares, 100),
                    cell(figures.values(name, "fanout_max", "server_cpu_share", streams), 100),
                    cell(figures.values(name, "fanout_max", "deliveries_per_second", streams)),
                    f"<td>{warn}</td>",
                ],
            )
        )
    return table(
        [
            "as fast as it can",
            "generator, % of a core",
            "server, % of a core",
            "deliveries per second",
            "",
        ],
        rows,
    )


def apart(figures: Figures, own: int) -> str:
    """What PostgreSQL did meanwhile."""
    rows = []
    for name, title in figures.titles.items():
        bulk = figures.values(name, "bulk", "last_ms", own)
        if not bulk and not figures.values(name, "insert_own", "postgres_cpu_seconds"):
            continue
        rows.append(
            row(
                name,
                title,
                [
                    cell(figures.values(name, "connect", "postgres_us_per_accept", own)),
                    cell(figures.values(name, "insert_own", "cpu_us_per_delivery")),
                    cell(figures.values(name, "insert_own", "inserts_per_second")),
                    cell(bulk),
                    cell(figures.values(name, "bulk", "commit_ms", own)),
                    cell(figures.values(name, "bulk", "postgres_cpu_seconds", own), 1000),
                ],
            )
        )
    if not rows:
        return ""
    return table(
        [
            "told by PostgreSQL",
            "PostgreSQL, CPU µs per accept",
            "200 inserts/s: server, CPU µs each",
            "inserts per second, reached",
            f"one statement for {own:,} users: ms to the last stream",
            "of them COMMIT itself, ms",
            "PostgreSQL, CPU ms",
        ],
        rows,
    )


def render(result: dict[str, Any]) -> str:
    """The page of one ``bench.json``."""
    figures = Figures(result)
    streams = (figures.streams("fanout_5") or figures.streams("idle_all") or [0])[-1]
    own = (figures.streams("connect") or figures.streams("idle_own") or [0])[-1]
    facts = " · ".join(escape(text) for text in result["machine"].values())
    notes = [
        f"{escape(name)} was skipped: {escape(why)}" for name, why in result["skipped"].items()
    ]
    notes += [
        f"{escape(entry['contender'])}, {escape(entry['scenario'])}, {entry['streams']:,} streams: "
        f"{escape(entry['failed'])}"
        for entry in figures.failures
    ]
    if not result["complete"]:
        notes.append("The run was stopped before its end.")
    if result["settings"]:
        notes.append("The service ran with " + escape(str(result["settings"])) + ".")
    plots = [
        against_streams(
            figures,
            "Deliveries per CPU second, one event to all, 5 a second",
            "deliveries per CPU second",
            "fanout_5",
            "deliveries_per_cpu_second",
        ),
        against_streams(
            figures,
            "Deliveries per CPU second, as fast as it can",
            "deliveries per CPU second",
            "fanout_max",
            "deliveries_per_cpu_second",
        ),
        against_streams(
            figures,
            "Memory of idle streams, above the empty process",
            "MiB",
            "idle_all",
            "above_empty_bytes",
            1 / 2**20,
        ),
        latencies(figures, "Latency of one event to all, 5 a second", "fanout_5"),
        latencies(figures, "Latency from COMMIT, 200 inserts a second", "insert_own"),
        latencies(figures, "Latency from COMMIT, one row to all", "insert_all"),
        latencies(figures, "Latency from COMMIT, one statement with a row for each", "bulk"),
        latencies(figures, "Latency of events for one user each, 2,000 a second", "single"),
        insert_costs(result["inserts"]),
    ]
    sections = [
        f"<h2>At {streams:,} streams</h2>",
        overview(figures, streams, own),
        f"<h2>Goals</h2>{text}" if (text := goals(figures, streams, own)) else "",
        f'<h2>Plots</h2><div class="plots">{"".join(plots)}</div>',
        "<h2>Latencies</h2>",
        times(figures),
        f"<h2>PostgreSQL's share</h2>{text}" if (text := apart(figures, own)) else "",
        "<h2>Is it the load generator that was measured?</h2>",
        "<p>The generator is one C process with one thread. Were it the bottleneck, it would use a "
        "whole core while the server waits; and no server could be faster than it. So here is how "
        "busy both were, with the fastest server there is, the C program, as the measure of what "
        "the generator can take. (Deliveries per CPU second do not depend on it: a server that "
        "waits uses no CPU.)</p>",
        generator(figures, streams),
    ]
    if notes:
        sections.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sse-server: bench</title><style>{STYLE}</style></head><body>"
        "<h1>The service and its peers</h1>"
        f'<p class="soft">{escape(result["started"])} · {facts} · load before: '
        f"{result['load_before']:.1f} · {result['took_seconds']:.0f} s · {result['repeats']} × "
        f"{result['seconds']:g} s each · events of about 250 bytes, loopback</p>"
        "<p>Medians of the repeats; small print: lowest and highest. CPU is that of the server's "
        "processes, user and system. What each line means: bench/README.md.</p>"
        f"{''.join(sections)}</body></html>\n"
    )
