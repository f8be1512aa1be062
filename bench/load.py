"""Talks with the load generator, ``load.c``, which is compiled when it is first needed."""

from __future__ import annotations

import array
import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.machine import BenchError

HERE = Path(__file__).resolve().parent

# Addresses 127.0.0.2 and up that streams come from: each has some 28,000 ports.
CLIENT_ADDRESSES = 8

COMPILER_SECONDS = 60.0


def compile_c(source: Path, program: Path) -> Path:
    """Compile one file, unless that has been done since it was last changed.

    Raises:
        BenchError: There is no C compiler, or it fails.
    """
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchError(
            "There is no C compiler, which the load generator needs: install one, for example with "
            "apt install gcc libc6-dev."
        )
    program.parent.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_name(f"{program.name}.new")
    result = subprocess.run(
        [compiler, "-O2", "-std=gnu11", "-o", unfinished, source],
        capture_output=True,
        text=True,
        timeout=COMPILER_SECONDS,
        check=False,
    )
    if result.returncode:
        raise BenchError(f"{source.name} does not compile: {result.stderr.strip()[-500:]}")
    unfinished.replace(program)
    return program


class Histogram:
    """A distribution of times: ``[[upper end in µs, count], ...]``, ends 1/64 apart."""

    def __init__(self, buckets: Iterable[Sequence[float]] = ()) -> None:
        self.buckets = sorted((float(end), int(count)) for end, count in buckets)
        self.count = sum(count for _, count in self.buckets)

    @classmethod
    def of(cls, values_us: Iterable[float]) -> Histogram:
        """From single values, as finely as the generator's."""
        counts: dict[float, int] = {}
        for value in values_us:
            whole = max(0, int(value))
            shift = max(0, whole.bit_length() - 7)
            end = float(((whole >> shift) + 1) << shift)
            counts[end] = counts.get(end, 0) + 1
        return cls(counts.items())

    @classmethod
    def sum(cls, histograms: Iterable[Histogram]) -> Histogram:
        counts: dict[float, int] = {}
        for histogram in histograms:
            for end, count in histogram.buckets:
                counts[end] = counts.get(end, 0) + count
        return cls(counts.items())

    def ms(self, percentile: float) -> float:
        """The time that `percentile` % of all stay below, in ms; 0 if there are none."""
        wanted = self.count * percentile / 100
        seen = 0
        for end, count in self.buckets:
            seen += count
            if seen >= wanted:
                return end / 1000
        return 0.0


@dataclass(frozen=True, slots=True)
class Opened:
    """Attributes:
    streams: That are open now.
    opened: Of them, those that this call opened.
    failed: Tried in vain.
    status: The last HTTP status that was seen.
    seconds: All of it took.
    times: From connect() until a stream was ready.
    """

    streams: int
    opened: int
    failed: int
    status: int
    seconds: float
    cpu_seconds: float
    times: Histogram


@dataclass(frozen=True, slots=True)
class Stats:
    """Since the last reset, but for `cpu_seconds`, which is since the generator's start."""

    streams: int
    lost: int
    delivered: int
    bytes: int
    first_ns: int
    last_ns: int
    cpu_seconds: float
    latency: Histogram


class Load:
    """One load generator, aimed at one server. A context manager: leaving it ends the process.

    Args:
        program: What `compile_c` made of ``load.c``.
        port: On 127.0.0.1.
        ready: The text after which a stream counts as open; ``head`` for the end of the head.
        heads: The heads of the requests, without the empty line.
        directory: For the file with the heads.
    """

    def __init__(
        self, program: Path, port: int, ready: str, heads: Iterable[str], directory: Path
    ) -> None:
        file = directory / "heads"
        file.write_bytes(b"".join(f"{head}\r\n\r\n".encode() + b"\0" for head in heads))
        self._dump = directory / "arrivals"
        self._process = subprocess.Popen(
            [program, "127.0.0.1", str(port), ready, file, str(CLIENT_ADDRESSES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(f"The load generator has ended at: {command}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"The load generator: {answer['error']}: {command}.")
        return answer

    def open(self, streams: int, *, at_once: int = 256, seconds: float = 120.0) -> Opened:
        """Open streams until there are so many.

        Args:
            streams: Stream n always sends head n.
            at_once: Connects under way at the same time.
            seconds: Give up after that.
        """
        answer = self._ask(f"open {streams} {at_once} {seconds * 1000:.0f}")
        return Opened(
            answer["open"],
            answer["opened"],
            answer["failed"],
            answer["status"],
            answer["seconds"],
            answer["cpu_seconds"],
            Histogram(answer["connects"]["buckets"]),
        )

    def wait(self, total: int, *, seconds: float) -> int:
        """Wait until so many events have arrived since the reset; return how many have."""
        return int(self._ask(f"wait {total} {seconds * 1000:.0f}")["delivered"])

    def reset(self) -> None:
        """Count from 0, and only what is published from now on."""
        self._ask("reset")

    def record(self, count: int) -> None:
        """Keep the arrivals of the next events one by one."""
        self._ask(f"record {count}")

    def recorded(self) -> list[tuple[int, int]]:
        """The sequence numbers of those, and when (CLOCK_MONOTONIC, ns) they arrived."""
        self._ask(f"dump {self._dump}")
        numbers = array.array("Q", self._dump.read_bytes())
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def stats(self) -> Stats:
        answer = self._ask("stats")
        return Stats(
            answer["open"],
            answer["lost"],
            answer["delivered"],
            answer["bytes"],
            answer["first_ns"],
            answer["last_ns"],
            answer["cpu_seconds"],
            Histogram(answer["latency"]["buckets"]),
        )

    def close(self, keep: int = 0) -> None:
        """Close all streams but the first so many."""
        self._ask(f"close {keep}")
