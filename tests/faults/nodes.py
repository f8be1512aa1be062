"""Nodes: real processes, kept running as an operator's process manager would."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.conftest import ROOT
from tests.faults.links import Direct, Link

POLL_SECONDS = 0.02
STOP_SECONDS = 60.0

_LISTENING = re.compile(r"listening on http://\S+:(\d+)")
_ALARM = re.compile(r"\d{4}-\d\d-\d\d \S+ (ERROR|CRITICAL) ")
_RECORD = re.compile(r"\d{4}-\d\d-\d\d \S+ [A-Z]+ ")


class Node:
    """One ``python -m sse_server`` behind two links; started again whenever it ends.

    Attributes:
        number: From 0.
        link: What the clients connect to.
        database_link: What it reaches PostgreSQL through, if anything can happen to that.
        died: How it ended when nobody had ended it: a fault of the service.
    """

    def __init__(
        self,
        number: int,
        directory: Path,
        environment: Mapping[str, str],
        *,
        link: Link | Direct,
        database_link: Link | None = None,
        clock: float = 0.0,
        module: str = "sse_server",
    ) -> None:
        """
        Args:
            number: Its own.
            directory: For what it writes.
            environment: Its settings.
            link: See above.
            database_link: See above.
            clock: Seconds by which its wall clock is off.
            module: What to run, if not the service itself; that module then runs the service.
        """
        self.number = number
        self.link = link
        self.database_link = database_link
        self.died: list[str] = []
        self.starts = 0
        self.pids: list[int] = []
        self._directory = directory
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SSE_", "PG")) and name != "DATABASE_URL"
        } | {"PYTHONPATH": str(ROOT), "SSE_PORT": "0", "SSE_DEMO": "1", "SSE_LOG_FORMAT": "text"}
        # All clients are one address here, and much more restless than people.
        for limit in ("API_CALLS", "ANONYMOUS_CALLS", "SIGN_INS"):
            self._environment[f"SSE_{limit}_PER_MINUTE"] = "0"
        self._environment |= environment
        self._command = [sys.executable, "-m", module]
        if clock:
            self._command = [sys.executable, "-m", "tests.faults.skewed"]
            self._environment["FAULTS_CLOCK"] = str(clock)
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None
        self._ended_by_us = False
        self._held = 0
        self._wake = asyncio.Event()
        self._serving = asyncio.Event()

    @property
    def log(self) -> Path:
        """What it has logged, over all its lives."""
        return self._directory / f"node-{self.number}.log"

    def alarms(self) -> list[str]:
        """What it has logged as an error, each with the end of its traceback."""
        if not self.log.exists():
            return []
        records: list[list[str]] = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            if _RECORD.match(line):
                records.append([line])
            elif records:
                records[-1].append(line)
        return [
            "\n    ".join([record[0], *record[1:][-3:]])
            for record in records
            if _ALARM.match(record[0])
        ]

    async def run(self) -> None:
        """Keep it running, until cancelled; then it is ended."""
        try:
            while True:
                self._wake.clear()
                if self._held:
                    await self._wake.wait()
                    continue
                if await self._start():
                    await self._watch()
        finally:
            self._kill()

    async def _start(self) -> bool:
        self.starts += 1
        self._ended_by_us = False
        path = self._directory / f"node-{self.number}.{self.starts}.out"
        with path.open("wb") as output, self.log.open("ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 (its output is in files)
                self._command,
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
            )
        self._process = process
        self.pids.append(process.pid)
        while process.poll() is None:
            if found := _LISTENING.search(path.read_text(encoding="utf-8")):
                self.link.target = int(found[1])
                self._serving.set()
                return True
            await asyncio.sleep(POLL_SECONDS)
        # Without a database it does not start; its manager tries again.
        if process.returncode not in (0, 2) and not self._ended_by_us:
            self.died.append(f"status {process.returncode} while starting")
        return False

    async def _watch(self) -> None:
        process = self._process
        assert process is not None
        while process.poll() is None:  # noqa: ASYNC110 (a process has no event)
            await asyncio.sleep(POLL_SECONDS)
        self.link.target = None
        self._serving.clear()
        if not self._ended_by_us:
            self.died.append(f"status {process.returncode}")

    async def serving(self) -> None:
        """Wait until it listens."""
        await self._serving.wait()

    # Faults

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _kill(self) -> None:
        if self._process is not None:
            self._ended_by_us = True
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGKILL)
            self._process.wait(STOP_SECONDS)

    async def kill(self, seconds: float) -> None:
        """End it without a word; it is started again after so many seconds."""
        await self._end(signal.SIGKILL, seconds)

    async def terminate(self, seconds: float) -> None:
        """Tell it to stop, as a deploy does; started again when it has, and so much later."""
        await self._end(signal.SIGTERM, seconds)

    async def _end(self, number: int, seconds: float) -> None:
        process = self._process
        self._held += 1
        try:
            self._ended_by_us = True
            self._signal(number)
            deadline = time.monotonic() + STOP_SECONDS
            while process is not None and process.poll() is None:
                if time.monotonic() > deadline:
                    self.died.append(f"does not stop within {STOP_SECONDS:.0f} s after a signal")
                    self._kill()
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(seconds)
        finally:
            self._held -= 1
            self._wake.set()

    async def freeze(self, seconds: float) -> None:
        """Let it stand still, with all its connections open, as a machine that is moved does."""
        process = self._process
        self._signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """End it for good, properly."""
        self._held += 1
        await self._end(signal.SIGTERM, 0.0)
