"""Background tasks: each has a name and one owner, and none dies unseen."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and return when the last one has ended.

    Cancels again until it has worked: on Python 3.11 a cancellation that arrives while aiopg ends
    a query can be swallowed, and the task would go on for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


class Supervisor:
    """Starts the service's background tasks, and tells when one ends that should not.

    A crashed task would otherwise show only at shutdown. Whoever runs the process waits for
    `failed` beside the signals, and stops.
    """

    def __init__(self) -> None:
        self.failed = asyncio.Event()
        self._tasks: dict[asyncio.Task[Any], str] = {}

    def start(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run `coroutine` as a task until `stop()`; if it ends earlier, `failed` is set."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks[task] = name
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        name = self._tasks.pop(task, None)
        if name is None:  # stopped by us
            return
        exc = None if task.cancelled() else task.exception()
        logger.critical("background task %s ended by itself, stopping", name, exc_info=exc)
        self.failed.set()

    async def stop(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks = list(self._tasks)
        self._tasks.clear()
        await cancel_and_wait(*tasks)
        for task in tasks:
            if not task.cancelled() and (exc := task.exception()) is not None:
                logger.error("%s failed while stopping", task.get_name(), exc_info=exc)


Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Batcher(Generic[Question, Answer]):
    """Answers many small questions by few large ones, in the order in which they came.

    While batches are under way, questions gather; an idle batcher asks at once. So a single
    question waits for nobody, and a storm of thousands costs the database a few dozen queries.
    """

    def __init__(
        self,
        name: str,
        answer: Callable[[list[Question]], Coroutine[Any, Any, Sequence[Answer]]],
        *,
        size: int,
        concurrency: int,
    ) -> None:
        """
        Args:
            name: For the tasks.
            answer: Takes up to `size` questions, returns as many answers in the same order.
            size: Most questions in one batch.
            concurrency: Most batches under way at once.
        """
        self._name = name
        self._answer = answer
        self._size = size
        self._concurrency = concurrency
        self._waiting: deque[tuple[Question, asyncio.Future[Answer]]] = deque()
        self._running: set[asyncio.Task[None]] = set()

    def ask(self, question: Question) -> asyncio.Future[Answer]:
        """The answer, when it is there; fails with whatever the batch failed with.

        Cancelling the future forgets the question, or its answer.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        self._start()
        return future

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._concurrency:
            batch: list[tuple[Question, asyncio.Future[Answer]]] = []
            while self._waiting and len(batch) < self._size:
                question, future = self._waiting.popleft()
                if not future.done():
                    batch.append((question, future))
            if batch:
                # A context of its own: a batch belongs to no one request, and must not be logged
                # as if it did.
                task = asyncio.create_task(
                    self._run(batch), name=self._name, context=contextvars.Context()
                )
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[tuple[Question, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._answer([question for question, _ in batch])
        except BaseException as exc:
            for _, future in batch:
                if future.done():
                    continue
                if isinstance(exc, asyncio.CancelledError):
                    future.cancel()
                else:
                    future.set_exception(exc)
            if not isinstance(exc, Exception):
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    async def finish(self, seconds: float) -> None:
        """Wait until all is answered, but no longer than that; then `close()`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    await asyncio.wait(self._running)
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and what waits."""
        while self._waiting:
            self._waiting.popleft()[1].cancel()
        await cancel_and_wait(*self._running)
