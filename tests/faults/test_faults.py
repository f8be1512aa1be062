"""After any sequence of faults, each client has exactly what was committed for it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import PROPERTY, Databases
from tests.faults.drill import DEADLINE_SECONDS, Outcome, run
from tests.faults.mutants import MUTATIONS, Mutation, apply, copy_checkout
from tests.faults.plan import Plan, generate
from tests.faults.shrink import shrink

# `make faults SEEDS=200 FIRST=1000`
SEEDS = int(os.environ.get("FAULTS_SEEDS", "10"))
FIRST = int(os.environ.get("FAULTS_FIRST", "1"))
SECONDS = float(os.environ.get("FAULTS_SECONDS", "4"))
INTENSITY = float(os.environ.get("FAULTS_INTENSITY", "1"))
# Kinds of operations to leave out, separated by commas.
WITHOUT = frozenset(filter(None, os.environ.get("FAULTS_WITHOUT", "").split(",")))
# How long a failing seed may be repeated, to find a shorter history.
SHRINK_SECONDS = float(os.environ.get("FAULTS_SHRINK_SECONDS", "180"))


def carry_out(plan: Plan, databases: Databases, directory: Path) -> Outcome:
    directory.mkdir()
    dsn = databases.create()
    try:
        return run(plan, databases.cluster, dsn, directory)
    finally:
        databases.drop(dsn)
        shutil.rmtree(directory)


def failure(outcome: Outcome) -> str:
    return f"{outcome}\n\n{outcome.plan}\n\n{outcome.history}"


@pytest.mark.timeout(10 * DEADLINE_SECONDS + 2 * SHRINK_SECONDS + 300)
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_nothing_is_lost(
    seed: int,
    databases: Databases,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Each client ends with exactly what was committed for it, whatever happened."""
    plan = generate(seed, seconds=SECONDS, intensity=INTENSITY).without(WITHOUT)
    outcome = carry_out(plan, databases, tmp_path / "run")
    record_property(PROPERTY, outcome.figures())
    print(outcome, *outcome.remarks, sep="\n")
    if not outcome.problems:
        return
    began = time.monotonic()
    shortest = outcome

    def fails(candidate: Plan) -> bool:
        nonlocal shortest
        again = carry_out(candidate, databases, tmp_path / "run")
        # Another kind of failure would be another history.
        if not again.problems.found.keys() & outcome.problems.found.keys():
            return False
        shortest = again
        return True

    shrink(plan, fails, seconds=SHRINK_SECONDS)
    pytest.fail(
        f"{failure(outcome)}\n\n"
        f"the shortest history that fails, found in {time.monotonic() - began:.0f} s:\n\n"
        f"{failure(shortest)}",
        pytrace=False,
    )


def test_a_plan_is_a_pure_function_of_its_seed() -> None:
    """A seed that has failed once can be tried again."""
    assert generate(7) == generate(7)
    assert str(generate(7)) == str(generate(7))
    assert generate(7) != generate(8)


def test_shrinking_finds_the_operations_that_matter() -> None:
    """Two operations that fail together are all that is left of a long history."""
    plan = generate(3)
    culprits = (plan.operations[5], plan.operations[-7])

    def fails(candidate: Plan) -> bool:
        return all(culprit in candidate.operations for culprit in culprits)

    assert shrink(plan, fails, seconds=60).operations == culprits


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_protection_can_be_switched_off(mutation: Mutation, tmp_path: Path) -> None:
    """The mutations that prove this suite follow the code (``python -m tests.faults.mutants``)."""
    copy_checkout(tmp_path)
    apply(mutation, tmp_path)
    for name, _, _ in mutation.changes:
        if name.endswith(".py"):
            compile((tmp_path / name).read_text(encoding="utf-8"), name, "exec")
