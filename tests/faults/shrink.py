"""The shortest history that still fails: delta debugging (Zeller and Hildebrandt, 2002)."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.faults.plan import Operation, Plan


def shrink(plan: Plan, fails: Callable[[Plan], bool], *, seconds: float, attempts: int = 2) -> Plan:
    """Leave out as many operations as possible.

    What fails depends on chance as well, so a plan counts as passing only after some attempts.

    Args:
        plan: One that has failed.
        fails: Carries out a plan.
        seconds: No new attempt is begun after so long.
        attempts: For each candidate.
    """
    deadline = time.monotonic() + seconds

    def still_fails(operations: tuple[Operation, ...]) -> bool:
        for _ in range(attempts):
            if time.monotonic() > deadline:
                return False
            if fails(plan.of(operations)):
                return True
        return False

    operations = plan.operations
    parts = 2
    while len(operations) > 1 and time.monotonic() < deadline:
        size = -(-len(operations) // parts)
        for start in range(0, len(operations), size):
            rest = operations[:start] + operations[start + size :]
            if rest and still_fails(rest):
                operations = rest
                parts = max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(operations), 2 * parts)
    return plan.of(operations)
