"""Faults in a real model's training: the fast form of ``benchmarks.robustness.faults``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.robustness.faults import (
    ARMS,
    CLEAN,
    FINITE,
    MIDDLE,
    NON_FINITE,
    Arm,
    equals_the_run_without,
    make_runner,
    outcome,
)

# Flax and optax mix dtypes.
pytestmark = pytest.mark.standard_promotion

FAST = [arm for arm in ARMS if arm.name == "adam, delayed"]


@pytest.fixture(scope="module", params=FAST, ids=lambda arm: arm.name)
def runner(request: Any) -> Any:
    arm: Arm = request.param
    return make_runner(arm)


def test_the_faults_are_those_of_the_issue() -> None:
    """NaN and both infinities x entry, layer, all x first step, mid-run x once, ten in a row."""
    assert len(set(NON_FINITE)) == 3 * 3 * 2 * 2
    assert {fault.repeats for fault in FINITE if fault.where == "layer"} >= {1, 1000}
    assert CLEAN.active.sum() == 0


@pytest.mark.parametrize("fault", NON_FINITE[::4] + NON_FINITE[3::8], ids=lambda fault: fault.name)
def test_under_apply_if_finite_a_faulty_step_is_as_if_it_had_not_been(
    runner: Any, fault: Any
) -> None:
    assert equals_the_run_without(runner, fault)


@pytest.mark.parametrize(
    "fault", [fault for fault in FINITE if fault.start == MIDDLE], ids=lambda fault: fault.name
)
def test_after_a_finite_fault_the_run_goes_on_and_the_scales_come_back(
    runner: Any, fault: Any
) -> None:
    finite, ratio, accuracy = outcome(runner, fault, runner(CLEAN))
    assert finite
    assert ratio < 4
    assert accuracy > 0.9
