"""Runs ``sse-server`` as a person or a script does, and stubs for it to talk to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.conftest import ROOT


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Awaitable[Result]]


async def start(
    *arguments: str | Path, cwd: Path, environment: dict[str, str | None]
) -> asyncio.subprocess.Process:
    """Start the command in a directory without an ``.env``."""
    values = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *(arguments if str(arguments[0]).endswith(".py") else ("-m", "sse_server", *arguments)),
        env={name: value for name, value in values.items() if value is not None},
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def runner(dsn: str | None, cwd: Path) -> Run:
    """Make ``await run("stats", "--json", stdin="…", SSE_PORT="1")``."""

    async def run(
        *arguments: str | Path, stdin: str = "", timeout: float = 40, **environment: str | None
    ) -> Result:
        process = await start(*arguments, cwd=cwd, environment={"DATABASE_URL": dsn, **environment})
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Result(process.returncode, stdout.decode(), stderr.decode())

    return run


@contextlib.asynccontextmanager
async def serving(app: web.Application, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Serve a stub. Yields: its URL."""
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    try:
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
