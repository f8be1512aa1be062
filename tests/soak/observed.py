"""``python -m sse_server``, which tells what it holds when it is asked.

On SIGUSR1 it appends a line of JSON to the file ``SOAK_REPORT``: the number of asyncio tasks, of
threads, and of objects that the garbage collector knows, the frozen ones of the start among them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import runpy
import signal
import threading
from pathlib import Path
from types import FrameType


def report(signum: int, frame: FrameType | None) -> None:
    # In the main thread, inside of the running loop.
    gc.collect()
    held = {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()) + gc.get_freeze_count(),
    }
    with Path(os.environ["SOAK_REPORT"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, report)
    runpy.run_module("sse_server", run_name="__main__", alter_sys=True)
