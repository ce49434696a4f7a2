"""Faults in a real model's training: the fast form of ``benchmarks.robustness.faults``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.robustness.faults import (
    CLEAN,
    FINITE,
    MIDDLE,
    NON_FINITE,
    Arm,
    Run,
    equals_the_run_without,
    make_runner,
    outcome,
)

# Flax and optax mix dtypes.
pytestmark = pytest.mark.standard_promotion

AROUND = Arm("adam", delayed=True, guard="around")
BEHIND = Arm("adam", delayed=False, guard="behind")


@pytest.fixture(scope="module")
def around() -> Any:
    return make_runner(AROUND)


@pytest.fixture(scope="module")
def behind() -> Any:
    return make_runner(BEHIND)


@pytest.fixture(scope="module")
def clean_around(around: Any) -> Run:
    return around(CLEAN)


@pytest.fixture(scope="module")
def clean_behind(behind: Any) -> Run:
    return behind(CLEAN)


def assert_it_goes_on(runner: Any, fault: Any, clean: Run) -> None:
    finite, ratio, accuracy = outcome(runner, fault, clean)
    assert finite
    assert ratio < 4
    assert accuracy > 0.9


def test_the_faults_are_those_of_the_issue() -> None:
    """NaN and both infinities x entry, layer, all x first step, mid-run x once, ten in a row."""
    assert len(set(NON_FINITE)) == 3 * 3 * 2 * 2
    assert {fault.repeats for fault in FINITE if fault.where == "layer"} >= {1, 1000}
    assert CLEAN.active.sum() == 0


@pytest.mark.parametrize("fault", NON_FINITE[::4] + NON_FINITE[3::8], ids=lambda fault: fault.name)
def test_under_apply_if_finite_a_faulty_step_is_as_if_it_had_not_been(
    around: Any, fault: Any
) -> None:
    assert equals_the_run_without(around, fault)


@pytest.mark.parametrize(
    "fault", [f for f in NON_FINITE if BEHIND.leaves_out(f)][::3], ids=lambda fault: fault.name
)
def test_with_the_guard_behind_it_a_step_that_is_faulty_everywhere_is_as_if_it_had_not_been(
    behind: Any, fault: Any
) -> None:
    """Here the transform's own state sees the fault: only its own rule keeps it out."""
    assert equals_the_run_without(behind, fault)


@pytest.mark.parametrize(
    "fault",
    [f for f in NON_FINITE if not BEHIND.leaves_out(f)][::6],
    ids=lambda fault: fault.name,
)
def test_with_the_guard_behind_it_a_fault_in_some_layers_leaves_every_number_finite(
    behind: Any, clean_behind: Run, fault: Any
) -> None:
    assert_it_goes_on(behind, fault, clean_behind)


@pytest.mark.parametrize(
    "fault", [fault for fault in FINITE if fault.start == MIDDLE], ids=lambda fault: fault.name
)
def test_after_a_finite_fault_the_run_goes_on_and_the_scales_come_back(
    around: Any, clean_around: Run, fault: Any
) -> None:
    assert_it_goes_on(around, fault, clean_around)
