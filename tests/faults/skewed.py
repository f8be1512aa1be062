"""``python -m sse_server`` on a machine whose wall clock is off by ``FAULTS_CLOCK`` seconds.

Only what Python's `time.time()` says is shifted. That is all the service asks, and no library
need be preloaded for it.
"""

from __future__ import annotations

import os
import runpy
import time


def main() -> None:
    offset = float(os.environ["FAULTS_CLOCK"])
    right = time.time
    right_ns = time.time_ns
    time.time = lambda: right() + offset
    time.time_ns = lambda: right_ns() + int(offset * 1_000_000_000)
    runpy.run_module("sse_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
