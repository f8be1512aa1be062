"""Proves the suite: each protection of the service is switched off on purpose, and is missed.

``python -m tests.faults.mutants [NAME …]`` makes a copy of the checkout for each mutation, applies
it there and runs seed after seed until one fails. It prints a table of mutation, seed and kind of
failure, and exits with status 1 if a mutation was not caught (or cannot be applied any more).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

COPIED = ("sse_server", "static", "tests", "schema.sql", "pyproject.toml", "run.py")
# Enough to be sure on a busy machine, and not the whole of the suite's patience.
DEADLINE_SECONDS = "30"


@dataclass(frozen=True, slots=True)
class Mutation:
    """A protection that is switched off.

    Attributes:
        name: What is off.
        changes: (file, text, text in its place); each text is there exactly once.
        without: Kinds of operations that would give it away for another reason.
    """

    name: str
    changes: tuple[tuple[str, str, str], ...]
    without: str = ""


MUTATIONS = (
    Mutation(
        "catch-up after the feed reconnects",
        (
            (
                "sse_server/feed.py",
                "            await self._sweep(connection)\n            await self._resync",
                "            self._snapshot = start.snapshot\n"
                "            self._hub.advance(start.snapshot)\n"
                "            await self._resync",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "dirty mark",
        (
            (
                "sse_server/hub.py",
                "                if not stream.live:\n                    stream.dirty = True\n",
                "                if not stream.live:\n",
            ),
        ),
    ),
    Mutation(
        "horizon: id > last id as the cursor",
        (
            (
                "sse_server/queries.sql",
                "(a.horizon || ':' || a.horizon || ':')::pg_snapshot",
                "NULL",
            ),
            (
                "sse_server/queries.sql",
                "AND id > q.after_id AND id IS DISTINCT FROM q.cursor",
                "AND id > greatest(q.after_id, q.cursor) AND id IS DISTINCT FROM q.cursor",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "horizon: the writing transaction's own id in its place",
        (
            (
                "schema.sql",
                "DEFAULT pg_snapshot_xmin(pg_current_snapshot()),",
                "DEFAULT pg_current_xact_id(),",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "one snapshot for all pages of a replay",
        (
            (
                "sse_server/queries.sql",
                "                THEN w.snapshot::pg_snapshot\n",
                "                THEN pg_current_snapshot()\n",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "probe",
        (
            (
                "sse_server/feed.py",
                "due = min(next_sweep, self._decided_at + DECIDE_SECONDS)",
                "due = loop.time() + 1e6",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "sweeps, as the net under NOTIFY",
        (
            (
                "sse_server/feed.py",
                "missed = [id for id, user_id, _ in page.rows if self._hub.missed(user_id, id)]",
                "missed: list[int] = []",
            ),
        ),
    ),
    Mutation(
        "polling until all that began before has ended",
        (
            (
                "sse_server/feed.py",
                "            self._leaving = True\n",
                "            self._set_polling(polling=False)\n",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "order of commits while polling: payloads are dispatched as they come",
        (
            (
                "sse_server/feed.py",
                "            self._sweep_now = True\n            return\n",
                "            pass\n",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "snapshots that outlive a crash",
        (
            (
                "sse_server/snapshot.py",
                "        if xmax >= self.xmax:\n",
                "        if True:\n",
            ),
        ),
        without="unannounced",
    ),
    Mutation(
        "supersede across nodes",
        (
            (
                "sse_server/feed.py",
                "            self._hub.supersede(session_id, number)\n",
                "            pass\n",
            ),
        ),
    ),
    Mutation(
        "sessions looked up again after the feed reconnects",
        (
            (
                "sse_server/feed.py",
                '        """Tell the streams what else changed while nobody listened."""\n'
                "        await self._check_sessions(connection)\n",
                '        """Tell the streams what else changed while nobody listened."""\n',
            ),
        ),
    ),
    Mutation(
        "seen: what a replay has written",
        (
            (
                "sse_server/hub.py",
                "            seen[notification.id] = notification.xact\n",
                "            pass\n",
            ),
        ),
    ),
    Mutation(
        "recent: what has been dispatched since the last sweep",
        (
            (
                "sse_server/hub.py",
                "        user.recent[notification.id] = notification.xact\n",
                "",
            ),
        ),
    ),
    Mutation(
        "replay after lagging: frames for a slow stream are dropped",
        (
            (
                "sse_server/hub.py",
                "                    self._lag(stream, user, notification.id)\n",
                "",
            ),
        ),
    ),
    Mutation(
        "each user's streams alone",
        (
            (
                "sse_server/hub.py",
                "        for stream in user.streams:\n            if stream.seen and",
                "        for stream in list(self._sessions.values()):\n"
                "            if stream.seen and",
            ),
        ),
    ),
)


class Stale(Exception):
    """The code has changed, and the mutation has to follow."""


def apply(mutation: Mutation, root: Path) -> None:
    """Change a copy of the checkout.

    Raises:
        Stale: A text is not there, or more than once.
    """
    for name, old, new in mutation.changes:
        path = root / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise Stale(f"{name} has {text.count(old)} times: {old.strip().splitlines()[0]}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def copy_checkout(destination: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, destination / name, ignore=ignored)
        else:
            shutil.copy(source, destination / name)


def caught(
    mutation: Mutation | None, *, first: int, seeds: int, log: Path | None
) -> tuple[int | None, dict[str, int], int, float]:
    """Run the suite with a mutation.

    Returns: The seed that failed, if one did; what kinds of problems it had; how many seeds were
        run; seconds.
    """
    with tempfile.TemporaryDirectory(prefix="sse-mutant-") as name:
        root = Path(name)
        copy_checkout(root)
        if mutation is not None:
            apply(mutation, root)
        report = root / "report.json"
        environment = {
            **os.environ,
            "FAULTS_FIRST": str(first),
            "FAULTS_SEEDS": str(seeds),
            "FAULTS_DEADLINE": DEADLINE_SECONDS,
            "FAULTS_SHRINK_SECONDS": "0",
            "FAULTS_REPORT": str(report),
            "FAULTS_WITHOUT": mutation.without if mutation is not None else "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "nothing_is_lost"]
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, *command, "tests/faults/test_faults.py"],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - started
        if log is not None:
            log.write_text(result.stdout + result.stderr, encoding="utf-8")
        if not report.exists():
            raise RuntimeError(f"the suite did not run:\n{result.stdout[-3000:]}{result.stderr}")
        found = json.loads(report.read_text(encoding="utf-8"))
        failed = found["failed"]
        problems = {kind: count for kind, count in found["problems"].items() if count}
        return (failed[0] if failed else None), problems, found["seeds"], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seeds", type=int, default=60, help="give up after so many")
    parser.add_argument("--logs", type=Path, help="a directory for the output of each run")
    arguments = parser.parse_args()
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    missed = 0
    print("| protection that is off | seed that catches it | as | seeds run | seconds |")
    print("|---|---|---|---|---|", flush=True)
    for number, mutation in enumerate(MUTATIONS):
        if arguments.names and not any(name in mutation.name for name in arguments.names):
            continue
        log = arguments.logs / f"{number}.log" if arguments.logs is not None else None
        try:
            seed, problems, run, seconds = caught(
                mutation, first=arguments.first, seeds=arguments.seeds, log=log
            )
        except Stale as exc:
            missed += 1
            print(f"| {mutation.name} | cannot be applied: {exc} | | | |", flush=True)
            continue
        missed += seed is None
        kinds = ", ".join(f"{kind} {count}" for kind, count in problems.items())
        print(
            f"| {mutation.name} | {'none' if seed is None else seed} | {kinds} | {run} "
            f"| {seconds:.0f} |",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
