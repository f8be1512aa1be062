"""Several processes on one port: gunicorn keeps them, and each serves by itself.

gunicorn forks them, replaces one that dies or hangs, passes signals on and waits for their end.
Nothing of its HTTP is used: a worker runs what a single process runs, on a listening socket of its
own (``SO_REUSEPORT``), among which the kernel spreads new connections evenly. On one socket for all
of them whoever happens to be awake takes what there is, and streams stay where they were taken.

Imported only where there is more than one worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker as BaseWorker

logger = logging.getLogger(__name__)

# Exit statuses
EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2

# Timeouts
# A worker that shows no sign of life for so long is ended: its event loop is stuck.
HANG_SECONDS = 30
READY_SECONDS = 0.05

# Each worker may die once in this time and is started again at once; more are made to wait, longer
# and longer, so that what kills them all does not keep a processor busy as well.
DEATHS_SECONDS = 60.0
DELAY_FIRST = 0.5
DELAY_MOST = 15.0

# What a worker may tell the master
_READY = b"."
_MISCONFIGURED = b"!"

# What the master passes on. Blocked over a fork, until the worker has handlers of its own: one that
# comes in between would end up in a copy of the master's queue, which nobody reads.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_NOT_FOR_WORKERS = (
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGTTIN,
    signal.SIGTTOU,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        count: How many workers.
        work: What each does, in its own process; returns its exit status.
        ready: Called in this process once all of them serve.
        stop_seconds: How long they may take to stop before they are killed.
        reloads: Whether SIGHUP is for the workers; else it stops everything.
    """

    count: int
    work: Callable[[Worker], int]
    ready: Callable[[], None]
    stop_seconds: float
    reloads: bool


def run(plan: Plan) -> int:
    """Keep the workers running until this process is told to stop. Returns: the exit status."""
    try:
        _Master(_Application(plan)).run()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) and exc.code >= 0 else EXIT_FAILED
    return 0


@contextlib.contextmanager
def metrics_directory() -> Iterator[None]:
    """Where the workers put their metrics, so that each can answer for all of them.

    prometheus_client looks for the variable when it is imported: enter this before.
    """
    with tempfile.TemporaryDirectory(prefix="sse-server-metrics-") as path:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = path
        yield


class Worker(BaseWorker):
    """A worker's own view of itself.

    Attributes:
        first: Whether it is one of those that the service starts with; if such a one cannot start,
            the service does not.
        delay: Seconds that it should wait before it starts.
    """

    def __init__(self, age: int, ppid: int, sockets: object, app: _Application, *rest: object):
        super().__init__(age, ppid, sockets, app, *rest)  # type: ignore[arg-type]
        self._service = app
        self.first = age <= app.plan.count
        self.delay = app.delay()

    def init_process(self) -> NoReturn:
        """Do the work and end the process.

        Here, and not by an exception: above are the stack frames of the master, with all that it
        would clean up.
        """
        status = EXIT_FAILED
        try:
            self.init_signals()
            status = self._service.plan.work(self)
        except BaseException:
            logger.critical("worker %d failed", os.getpid(), exc_info=True)
        finally:
            logging.shutdown()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            if status == EXIT_MISCONFIGURED and self.first:
                os.write(self._service.word_end, _MISCONFIGURED)
            os._exit(status)

    def init_signals(self) -> None:
        for number in _NOT_FOR_WORKERS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGABRT, self.handle_abort)
        # The master's last word before SIGKILL.
        signal.signal(signal.SIGQUIT, lambda *_: os._exit(EXIT_FAILED))

    def handle_abort(self, sig: int, frame: FrameType | None) -> None:
        """The master has not heard from us."""
        stack = "".join(traceback.format_stack(frame))
        logger.critical("worker %d hangs and is ended; it was at:\n%s", os.getpid(), stack)
        os._exit(EXIT_FAILED)

    def take_signals(self) -> None:
        """To be called when the handlers are in place; what has come meanwhile comes then."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def beat(self) -> bool:
        """Show that we are alive, every few seconds. Returns: Whether the master is."""
        self.notify()
        return os.getppid() == self.ppid

    def ready(self) -> None:
        """Tell the master that we serve."""
        if self.first:
            os.write(self._service.word_end, _READY)


class _Application(BaseApplication):
    """gunicorn's idea of what it runs: the settings, and what master and workers share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.deaths: deque[float] = deque()
        # A word from each of the first workers to the master.
        self.master_end, self.word_end = os.pipe()
        os.set_blocking(self.master_end, False)
        super().__init__()

    def load_config(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108  # for heartbeats, which should not touch a disk
        settings = {
            "bind": [],
            "reuse_port": True,
            "workers": self.plan.count,
            "worker_class": Worker,
            "timeout": HANG_SECONDS,
            "graceful_timeout": int(self.plan.stop_seconds) + 1,
            "worker_tmp_dir": str(memory) if os.access(memory, os.W_OK | os.X_OK) else None,
            "control_socket_disable": True,
            "logger_class": _Log,
            "child_exit": _Master.child_exit,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def delay(self) -> float:
        """How long the next worker has to wait."""
        while self.deaths and self.deaths[0] < time.monotonic() - DEATHS_SECONDS:
            self.deaths.popleft()
        excess = len(self.deaths) - self.plan.count
        return min(DELAY_FIRST * 2.0 ** min(excess, 16), DELAY_MOST) if excess > 0 else 0.0


class _Master(Arbiter):
    def __init__(self, app: _Application) -> None:
        super().__init__(app)
        self._service = app
        self._ready = 0
        self._misconfigured = False
        self._stopping = False

    def _starting(self) -> bool:
        return self._ready < self._service.plan.count and not self._stopping

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            words = os.read(self._service.master_end, self._service.plan.count)
            self._ready += words.count(_READY)
            self._misconfigured |= _MISCONFIGURED in words

    def spawn_worker(self) -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return super().spawn_worker()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def child_exit(self, worker: Worker) -> None:
        """A worker has ended, however that came."""
        # Imported late, as in metrics_directory().
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
        if self._stopping:
            return
        if self._starting():
            # Not by the exit status that gunicorn has for this: two workers with that status, and
            # it fails while it stops.
            self._hear()
            status = EXIT_MISCONFIGURED if self._misconfigured else EXIT_FAILED
            raise HaltServer("A worker ended before all of them served.", status)
        self._service.deaths.append(time.monotonic())
        logger.error("worker %s has ended, starting another one", worker.pid)

    def wait_for_signals(self, timeout: float | None = 1.0) -> list[int]:
        if self._starting():
            self._hear()
            timeout = READY_SECONDS
            if not self._starting():
                self._service.plan.ready()
        return super().wait_for_signals(timeout)

    def stop(self, graceful: bool = True) -> None:
        self._stopping = True
        super().stop(graceful)

    # Signals, where gunicorn's meaning is not ours

    def handle_hup(self) -> None:
        if not self._service.plan.reloads:
            raise StopIteration  # the terminal has gone
        self.kill_workers(signal.SIGHUP)

    def handle_int(self) -> None:
        raise StopIteration  # a second one, while streams are ended, does not wait for them

    def handle_usr1(self) -> None:
        pass

    def handle_usr2(self) -> None:
        pass


class _Log(Logger):
    """No handlers of its own: what gunicorn has to say goes where all goes, if it is a warning."""

    def setup(self, cfg: Config) -> None:
        self.cfg = cfg
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
