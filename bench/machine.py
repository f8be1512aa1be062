"""What processes use, and what they run on: read from ``/proc`` by psutil."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

# A process that used less of a core than that, for so long, has nothing to do.
SETTLED_SHARE = 0.05
SETTLED_SECONDS = 1.0


class BenchError(Exception):
    """Something that the bench needs is missing or failed; the text is a sentence."""


def raise_file_limit() -> int:
    """Allow this process, and those it starts, as many open files as may be; return that number."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # "Unlimited" is more than some kernels grant.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return now if now != resource.RLIM_INFINITY else 1 << 30


def processes(roots: Iterable[int]) -> list[psutil.Process]:
    """These processes and all their descendants, as far as they still run."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
    return list(found.values())


class Cpu:
    """CPU seconds (user + system) that process trees have used since this was made.

    To the nanosecond where the kernel has ``/proc/PID/task/TID/schedstat``, else in ticks of 10 ms.
    Processes that start meanwhile count; what a process or thread has used that ends meanwhile is
    lost, but no server here has such.
    """

    def __init__(self, *roots: int) -> None:
        self._roots = roots
        self._before = self._read()

    def _read(self) -> dict[int, float]:
        used: dict[int, float] = {}
        for process in processes(self._roots):
            with contextlib.suppress(psutil.NoSuchProcess):
                used[process.pid] = _cpu_seconds(process)
        return used

    def seconds(self) -> float:
        return sum(used - self._before.get(pid, 0.0) for pid, used in self._read().items())


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        threads = list(Path(f"/proc/{process.pid}/task").iterdir())
        return sum(int((path / "schedstat").read_text().split()[0]) for path in threads) / 1e9
    except (OSError, ValueError, IndexError):  # another kernel, or a thread that has just ended
        times = process.cpu_times()
        return times.user + times.system


def settle(*roots: int, seconds: float = 20.0) -> None:
    """Wait until processes have nothing to do, but no longer than that.

    Seeing off thousands of streams takes seconds of CPU, which are no delivery's.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        cpu = Cpu(*roots)
        time.sleep(SETTLED_SECONDS)
        if cpu.seconds() < SETTLED_SHARE * SETTLED_SECONDS:
            return


def memory_bytes(*roots: int) -> int:
    """The proportional set size of process trees: pages that are shared are counted once."""
    total = 0
    for process in processes(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def settled_memory_bytes(*roots: int, seconds: float = 4.0) -> int:
    """The memory once it has stopped to change, but no later than after `seconds`."""
    deadline = time.monotonic() + seconds
    last = memory_bytes(*roots)
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = memory_bytes(*roots)
        if abs(now - last) <= 0.002 * last:
            return now
        last = now
    return last


def facts() -> dict[str, str]:
    """What the figures depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = psutil.virtual_memory().total / 2**30
    return {
        "processor": f"{model}, {os.cpu_count()} visible",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
