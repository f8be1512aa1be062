"""The bench counts right, ends what it starts, and its page says what was measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg2.extensions import connection as Connection  # noqa: N812

from bench.contenders import Contender, HttpPublisher, contenders, message
from bench.load import Histogram, Load, compile_c
from bench.machine import Cpu
from bench.report import render
from bench.scenarios import Measurement
from sse_server.sessions import COOKIE
from tests.conftest import ROOT, ServerProcessFactory, eventually, require_program
from tests.streaming import insert, sign_in, without_rate_limit

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The load generator."""
    require_program("cc", "install a C compiler, for example: apt install gcc libc6-dev")
    return compile_c(ROOT / "bench" / "load.c", tmp_path_factory.mktemp("load") / "load")


class Scripted:
    """A server that sends everybody the same pieces, one by one; at a threading.Event it waits."""

    def __init__(self, *pieces: bytes | threading.Event) -> None:
        self._pieces = pieces
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.recv(65536)
                for piece in self._pieces:
                    if isinstance(piece, threading.Event):
                        piece.wait(10)
                        continue
                    client.sendall(piece)
                    time.sleep(0.001)  # so that the other side gets it by itself

    def close(self) -> None:
        # close() alone would leave the thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for client in self._open:
            client.close()


@contextlib.contextmanager
def scripted(*pieces: bytes | threading.Event) -> Iterator[int]:
    server = Scripted(*pieces)
    try:
        yield server.port
    finally:
        server.close()


# The load generator


async def test_the_generator_counts_exactly_what_the_service_delivers(
    program: Path, server_process: ServerProcessFactory, db: Connection, tmp_path: Path
) -> None:
    """Every delivery of the service is counted once, with its own time of publishing."""
    server = await server_process()
    port = int(server.url.rsplit(":", 1)[1])
    without_rate_limit(db)
    users = [f"user-{number}" for number in range(5)]
    heads = [
        f"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {COOKIE}={key}"
        for key in sign_in(db, *users)
    ]
    with Load(program, port, "event: ready", heads, tmp_path) as load:
        opened = load.open(5, seconds=20)
        assert (opened.streams, opened.failed, opened.times.count) == (5, 0, 5)
        load.reset()
        load.record(20)
        published = time.monotonic_ns()
        for number in range(4):
            for user_id in users:
                insert(db, user_id, message(number))
        assert load.wait(20, seconds=20) == 20
        recorded = load.recorded()
        assert sorted(sequence for sequence, _ in recorded) == sorted([0, 1, 2, 3] * 5)
        assert all(published < at <= time.monotonic_ns() for _, at in recorded)
        stats = load.stats()
    assert (stats.delivered, stats.streams, stats.lost) == (20, 5, 0)
    assert stats.latency.count == 20
    assert stats.latency.ms(100) < 20_000


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_event_in_pieces_is_counted_once(program: Path, tmp_path: Path, newline: str) -> None:
    """Wherever the stream is cut into reads, each complete event counts, and nothing else does."""
    sent = time.monotonic_ns()
    lines = [
        f"data: a mark @7.{sent}@ in its midst",
        "",
        "data: someone@example.org, @12, @1.2, @.@ and @@ are none",
        "",
        f"data: the last @8.{sent}@",
        "",
    ]
    events = "".join(line + newline for line in lines).encode()
    pieces = [HEAD, *(events[at : at + 1] for at in range(len(events)))]
    unfinished = f"data: @9.{sent}@".encode() + newline.encode()
    with (
        scripted(*pieces, unfinished) as port,
        Load(program, port, "head", ["GET / HTTP/1.1"], tmp_path) as load,
    ):
        load.record(10)
        assert load.open(1).streams == 1
        load.wait(2, seconds=10)
        assert load.wait(3, seconds=0.1) == 2
        assert [sequence for sequence, _ in load.recorded()] == [7, 8]


def test_what_was_published_before_a_reset_does_not_count(program: Path, tmp_path: Path) -> None:
    """A straggler of one measurement is not taken for a delivery of the next."""
    old, new = (f"data: @1.{at}@\n\n".encode() for at in (time.monotonic_ns(), 1 << 62))
    go_on = threading.Event()
    with (
        scripted(HEAD, go_on, old + new) as port,
        Load(program, port, "head", ["GET / HTTP/1.1"], tmp_path) as load,
    ):
        assert load.open(1, seconds=10).streams == 1
        load.reset()
        go_on.set()
        load.wait(1, seconds=10)
        assert load.wait(2, seconds=0.1) == 1


def test_what_is_refused_or_cut_is_no_open_stream(program: Path, tmp_path: Path) -> None:
    """A status that is not 200 is a failure; a stream that the server ends is lost."""
    with (
        scripted(b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as port,
        Load(program, port, "head", ["GET / HTTP/1.1"], tmp_path) as load,
    ):
        opened = load.open(3, seconds=10)
        assert (opened.streams, opened.failed, opened.status) == (0, 3, 503)
    server = Scripted(HEAD)
    try:
        with Load(program, server.port, "head", ["GET / HTTP/1.1"], tmp_path) as load:
            assert load.open(2, seconds=10).streams == 2
            load.reset()
            server.close()
            load.wait(1, seconds=0.1)
            assert (load.stats().streams, load.stats().lost) == (0, 2)
    finally:
        server.close()


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_are_within_a_bucket(values: list[int], percentile: float) -> None:
    """A percentile is no less than the true one, and at most 1/64 and a microsecond more."""
    histogram = Histogram.of(values)
    rank = max(1, -int(-len(values) * percentile // 100))
    true = sorted(values)[min(rank, len(values)) - 1]
    assert true <= histogram.ms(percentile) * 1000 <= true * (1 + 1 / 64) + 1.001


# The peers


def test_a_peer_delivers_what_it_is_posted(program: Path, tmp_path: Path) -> None:
    """The C program gives an event for all to all, and one for a user to that user."""
    contender = contenders(files=1024, settings={}, baseline=None)["c"]
    contender.install(tmp_path)
    with started(contender, tmp_path) as (port, pid):
        for kind, expected in (("all", 4), ("own", 1)):
            heads = contender.heads("all" if kind == "all" else "own", 4, port, None)
            with Load(program, port, contender.ready, heads, tmp_path) as load:
                assert load.open(4, seconds=10).streams == 4
                load.reset()
                cpu = Cpu(pid)
                with contextlib.closing(HttpPublisher(port)) as publisher:
                    if kind == "all":
                        publisher.everybody(message(1))
                    else:
                        publisher.user(2, message(1))
                    load.wait(expected, seconds=10)
                    assert load.wait(expected + 1, seconds=0.1) == expected
                assert load.stats().bytes / expected == pytest.approx(250, abs=15)
                assert cpu.seconds() >= 0


@contextlib.contextmanager
def started(contender: Contender, directory: Path) -> Iterator[tuple[int, int]]:
    """Start a peer without a database."""
    with contender.running(directory, None) as server:
        yield server.port, server.pid


# The whole


def command(directory: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "bench", "--streams", "10", "--no-inserts"),
        *("--out", str(directory), *arguments),
    ]


def launch(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(directory, *arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.timeout(180)
async def test_a_run_measures_the_service_and_a_peer(program: Path, tmp_path: Path) -> None:
    """A tiny run has every figure of both, nothing failed, and a page."""
    arguments = ("--only", "c,service", "--repeats", "1", "--seconds", "0.2")
    process = await asyncio.to_thread(
        subprocess.run,
        command(tmp_path, *arguments, "--scenarios", "fanout,insert,bulk"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert result["complete"]
    assert not [entry for entry in result["measurements"] if entry["failed"]]
    found = {(entry["contender"], entry["scenario"]) for entry in result["measurements"]}
    own = {"insert_all", "insert_own", "bulk"}
    assert found == {
        *((name, scenario) for name in ("c", "service") for scenario in ("fanout_5", "fanout_max")),
        *(("service", scenario) for scenario in own),
    }
    for entry in result["measurements"]:
        assert entry["values"]["delivered"] > 0
        assert entry["values"]["lost_streams"] == 0
        assert sum(count for _, count in entry["latency"]) > 0
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "C + epoll" in page


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_run_that_is_stopped_leaves_nothing_behind(
    program: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """After Ctrl-C or SIGTERM all processes that it started end, and what there is is written."""
    process = launch(tmp_path, "--only", "service", "--seconds", "30", "--scenarios", "fanout")
    try:
        root = psutil.Process(process.pid)

        def family() -> list[psutil.Process]:
            return root.children(recursive=True)

        def under_way() -> bool:
            names = ""
            for child in family():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    names += " ".join(child.cmdline())
            return "sse_server" in names and "event: ready" in names

        await eventually(under_way, timeout=60, message="it does not start")
        started = family()
        os.kill(process.pid, number)
        assert await asyncio.to_thread(process.wait, 50) == 130
        assert not [child for child in started if child.is_running()]
        assert not json.loads((tmp_path / "bench.json").read_text())["complete"]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(50)


# The page


class Page(HTMLParser):
    """The text of each cell, by row, and whatever the page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href")]
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        elif tag == "small":
            self.rows[-1][-1] += " | "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def stored() -> dict[str, Any]:
    """A result of two repeats, with a contender that failed."""
    rates = {"service": [150_000.0, 90_000.0, 120_000.0], "nchan": [100_000.0, 50_000.0, 60_000.0]}
    latency = [(1000.0, 900), (2000.0, 99), (64000.0, 1)]
    measurements = [
        Measurement(name, "fanout_5", streams, repeat, values, latency)
        for name, of in rates.items()
        for streams in (1000, 10_000)
        for repeat, rate in enumerate(of)
        for values in [{"deliveries_per_cpu_second": rate}]
    ]
    measurements.append(
        Measurement("nchan", "storm", 10_000, 0, failed="<script>alert(1)</script>")
    )
    return {
        "started": "2026-01-01T00:00:00Z",
        "machine": {"processor": "a & b"},
        "load_before": 0.1,
        "streams": [1000, 10_000],
        "seconds": 3.0,
        "repeats": 3,
        "settings": {},
        "titles": {"service": "the service", "nchan": "nginx + nchan"},
        "skipped": {"go": "go is missing."},
        "complete": True,
        "took_seconds": 60.0,
        "inserts": {"notify": {"1": [900.0], "8": [2000.0, 2200.0]}},
        "measurements": json.loads(json.dumps([asdict(entry) for entry in measurements])),
    }


def test_the_page_shows_medians_and_ratios_of_the_same_repeat() -> None:
    """Figures are medians with their spread; a goal compares figures that were taken together."""
    page = Page(render(stored()))
    (service,) = [row for row in page.rows if row[0] == "the service" and len(row) == 11]
    assert service[4] == "120,000 | 90,000 – 150,000"
    assert statistics.median([1.5, 1.8, 2.0]) == 1.8
    (goal,) = [row for row in page.rows if "nchan" in row[0] and "5/s" in row[0]]
    assert goal[1:] == ["1.80 ×", "≥ 1.50 ×", "yes"]
    assert ["the service", "1.00 / 2.00"] in page.rows


def test_the_page_stands_alone() -> None:
    """It loads nothing, its plots are well-formed, and what failed is shown as text."""
    html = render(stored())
    assert Page(html).loads == []
    assert "&lt;script&gt;alert(1)" in html
    assert "go is missing." in html
    plots = html.split("<svg ")[1:]
    assert len(plots) == 3
    for plot in plots:
        ElementTree.fromstring(f"<svg {plot.partition('</svg>')[0]}</svg>")


def test_a_page_without_figures_is_a_page() -> None:
    """A run that was stopped at once still says so."""
    empty = stored() | {"measurements": [], "inserts": {}, "complete": False}
    assert "stopped before its end" in render(empty)
