"""``python -m bench``: measure, and write the figures and the report page."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.contenders import Contender, Database, contenders
from bench.load import compile_c
from bench.machine import BenchError, facts, raise_file_limit
from bench.report import render
from bench.scenarios import SCENARIOS, Measurement, Plan, measure

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
OUT = HERE / "out"

# Descriptors of a process that are no streams.
SPARE_FILES = 300

WRITERS = (1, 8, 32)
INSERT_CASES = "no-notify,notify,auto"


class Stopped(Exception):
    """Ctrl-C or SIGTERM: end what was started, and write what there is."""


def numbers(text: str) -> tuple[int, ...]:
    values = tuple(sorted({int(part) for part in text.split(",")}))
    if values[0] < 1:
        raise ValueError(text)
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the service and its peers side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scenarios:\n" + "\n".join(f"  {name:8} {text}" for name, text in SCENARIOS.items()),
    )
    parser.add_argument("--quick", action="store_true", help="2,000 streams, once, under 3 minutes")
    parser.add_argument("--streams", type=numbers, help="numbers of streams (1000,5000,10000)")
    parser.add_argument("--repeats", type=int, help="how often everything is measured (2)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (3)")
    parser.add_argument(
        "--minutes", type=float, help="no contender is started after that (20, quick 2.5)"
    )
    parser.add_argument("--only", metavar="NAMES", help="contenders, with commas in between")
    parser.add_argument("--scenarios", metavar="NAMES", help="scenarios, with commas in between")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SSE_NAME=VALUE", help="for the service"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="CHECKOUT", help="another checkout, to compare with"
    )
    parser.add_argument(
        "--inserts", action=argparse.BooleanOptionalAction, help="run bench/inserts.py too"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="directory of bench.json and bench.html (bench/out)"
    )
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="only write the page of these figures"
    )
    result = parser.parse_args(arguments)
    quick = result.quick
    result.streams = result.streams or ((2000,) if quick else (1000, 5000, 10000))
    result.repeats = result.repeats or (1 if quick else 2)
    result.seconds = result.seconds or (1.5 if quick else 3.0)
    result.minutes = result.minutes or (2.5 if quick else 20.0)
    result.inserts = not quick if result.inserts is None else result.inserts
    names = result.scenarios.split(",") if result.scenarios else list(SCENARIOS)
    if unknown := set(names) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    result.scenarios = frozenset(names)
    if malformed := [text for text in result.set if "=" not in text]:
        parser.error(f"--set takes NAME=VALUE, not {malformed[0]}")
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Says what has been measured, and how long the rest will take."""

    def __init__(self, passes: int) -> None:
        self._started = time.monotonic()
        self._passes = passes
        self._done = 0
        self.measurements: list[Measurement] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def note(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)
        values = measurement.values
        what = [
            f"{values[name] * factor:,.{digits}f} {unit}"
            for name, factor, digits, unit in (
                ("bytes_per_stream", 1 / 1024, 1, "KB a stream"),
                ("accepts_per_second", 1, 0, "accepts/s"),
                ("deliveries_per_cpu_second", 1, 0, "deliveries/CPU-s"),
                ("last_ms", 1, 0, "ms to the last"),
            )
            if name in values
        ]
        text = f"failed: {measurement.failed}" if measurement.failed else ", ".join(what)
        say(
            f"  {self.seconds:5.0f} s  {measurement.contender:14} {measurement.scenario:14} "
            f"{measurement.streams:6,}  {text}"
        )

    def passed(self) -> None:
        self._done += 1
        left = self.seconds / self._done * (self._passes - self._done)
        say(f"  {self.seconds:5.0f} s  {self._done} of {self._passes}, about {left:.0f} s left")


def installed(
    known: dict[str, Contender], only: str | None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can run here, and why the others can't."""
    names = only.split(",") if only else list(known)
    if unknown := set(names) - set(known):
        raise BenchError(f"There is no contender {', '.join(sorted(unknown))}.")
    able: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            known[name].install(PEERS)
        except BenchError as error:
            skipped[name] = str(error)
            say(f"{name} is skipped: {error}")
        else:
            able[name] = known[name]
    return able, skipped


def insert_costs(work: Path) -> dict[str, dict[str, list[float]]]:
    """Inserts per second of bench/inserts.py, by case and number of writers."""
    script = HERE / "inserts.py"
    if not script.exists():
        return {}
    costs: dict[str, dict[str, list[float]]] = {}
    for writers in WRITERS:
        file = work / "inserts.json"
        say(f"  bench/inserts.py with {writers} writers")
        process = subprocess.Popen(
            [
                *(sys.executable, str(script), "--writers", str(writers)),
                *("--seconds", "3", "--rounds", "1", "--only", INSERT_CASES, "--json", str(file)),
            ],
            cwd=HERE.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(180)
        except BaseException as error:
            # Its Ctrl-C: it has a PostgreSQL to stop.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                say("  bench/inserts.py takes too long: left out")
                return costs
            raise
        if status:
            say(f"  bench/inserts.py failed with status {status}: left out")
            return costs
        for case, measured in json.loads(file.read_text(encoding="utf-8")).items():
            rates = [each["rate"] for each in measured["rounds"]]
            costs.setdefault(case, {})[str(writers)] = rates
    return costs


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; returns what goes into the JSON, also after Ctrl-C, as far as it came."""
    files = raise_file_limit()
    most = files - SPARE_FILES
    if arguments.streams[-1] > most:
        raise BenchError(
            f"{arguments.streams[-1]:,} streams need as many open files in one process, and this "
            f"one may have {files:,}: raise the hard limit (ulimit -Hn), or ask for --streams "
            f"{most}."
        )
    if arguments.baseline is not None and not (arguments.baseline / "sse_server").is_dir():
        raise BenchError(f"{arguments.baseline} is no checkout of the service.")
    baseline = None if arguments.baseline is None else arguments.baseline.resolve()
    settings = dict(text.split("=", 1) for text in arguments.set)
    known = contenders(files=files, settings=settings, baseline=baseline)
    program = compile_c(HERE / "load.c", PEERS / "load")
    able, skipped = installed(known, arguments.only)
    plan = Plan(arguments.streams, arguments.scenarios, arguments.seconds)
    progress = Progress(len(able) * arguments.repeats)
    result: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": facts(),
        "load_before": os.getloadavg()[0],
        "streams": list(plan.streams),
        "seconds": plan.seconds,
        "repeats": arguments.repeats,
        "settings": settings,
        "titles": {name: contender.title for name, contender in able.items()},
        "skipped": skipped,
        "complete": False,
        "inserts": {},
    }
    with tempfile.TemporaryDirectory(prefix="sse-bench-", ignore_cleanup_errors=True) as name:
        work = Path(name)
        work.chmod(0o755)  # root runs PostgreSQL as another account
        database = Database(work)
        try:
            database.start()
            # A B C, A B C: whatever else the machine does meets all of them.
            for repeat in range(arguments.repeats):
                for contender in able.values():
                    if progress.seconds > 60 * arguments.minutes:
                        skipped[contender.name] = (
                            f"its turn {repeat + 1} would have begun after more than "
                            f"{arguments.minutes:g} minutes (--minutes)."
                        )
                        say(f"{contender.name} is skipped: {skipped[contender.name]}")
                        continue
                    try:
                        measure(
                            contender,
                            repeat,
                            plan,
                            program=program,
                            work=work,
                            database=database,
                            note=progress.note,
                        )
                    except BenchError as error:
                        progress.note(
                            Measurement(contender.name, "run", 0, repeat, failed=str(error))
                        )
                    progress.passed()
            if arguments.inserts:
                database.stop()
                result["inserts"] = insert_costs(work)
            result["complete"] = True
        except Stopped:
            say("stopped")
        finally:
            database.stop()
    result["took_seconds"] = progress.seconds
    result["measurements"] = [asdict(measurement) for measurement in progress.measurements]
    return result


def write(result: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    figures, page = directory / "bench.json", directory / "bench.html"
    figures.write_text(json.dumps(result), encoding="utf-8")
    page.write_text(render(result), encoding="utf-8")
    print(f"{figures}\n{page}")


def stop(*_: object) -> None:
    # Once: an impatient second Ctrl-C must not disturb the ending of what was started.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.render is not None:
        with contextlib.suppress(FileNotFoundError):
            write(json.loads(arguments.render.read_text(encoding="utf-8")), arguments.out)
            return 0
        print(f"There is no file {arguments.render}.", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        result = bench(arguments)
    except Stopped:  # while the peers were being installed
        return 130
    except BenchError as error:
        print(error, file=sys.stderr)
        return 2
    write(result, arguments.out)
    return 0 if result["complete"] else 130


if __name__ == "__main__":
    sys.exit(main())
