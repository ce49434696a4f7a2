"""What optax's own suites cannot see: that there is no eps, NaN, and stacked layers.

Statements about any gradients, checked on those that hypothesis finds.
"""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from stablegrad_optax import LayerAxes, per_leaf, stablegrad, stacked

Tree = Any

DECAY = 0.5
LAYERS, ROWS, COLUMNS = 3, 4, 2
# Magnitudes over the stated range; 0 is drawn too, and stands for a dead entry.
SMALLEST, LARGEST = 2.0**-99, 2.0**99
entries = st.one_of(
    st.just(0.0),
    st.floats(SMALLEST, LARGEST, width=32),
    st.floats(-LARGEST, -SMALLEST, width=32),
)
leaves = hnp.arrays(np.float32, (LAYERS, ROWS, COLUMNS), elements=entries)
faults = st.sampled_from([np.nan, np.inf, -np.inf])

alone = stablegrad(decay=DECAY, fade_below=0.0, layers={"w": LayerAxes((0, 1, 2), centered=False)})
together = stablegrad(decay=DECAY, layers=stacked("w"))
apart = stablegrad(decay=DECAY, layers=per_leaf)
few = settings(max_examples=40)
update_alone, update_together, update_apart = (
    jax.jit(tx.update) for tx in (alone, together, apart)
)


def finite(tree: Tree) -> bool:
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@few
@given(hnp.arrays(np.float32, (5, 3), elements=st.integers(-9, 9)), st.integers(-110, 110))
def test_there_is_no_eps_a_power_of_two_changes_nothing(gradient: np.ndarray, power: int) -> None:
    """An eps would show where the gradient is of its size, wherever that is."""
    state = alone.init({"w": gradient[None]})
    plain, _ = update_alone({"w": gradient[None]}, state)
    moved, _ = update_alone({"w": gradient[None] * np.float32(2.0**power)}, state)
    np.testing.assert_allclose(moved["w"], plain["w"], rtol=1e-5)


@few
@given(leaves)
def test_a_layer_has_gain_one_exactly_if_it_is_all_zero_and_unit_rms_otherwise(
    gradient: np.ndarray,
) -> None:
    updates, state = update_alone({"w": gradient}, alone.init({"w": gradient}))
    if not np.any(gradient):
        np.testing.assert_array_equal(updates["w"], 0.0)
        np.testing.assert_array_equal(state.grad_scale, 0.0)
        return
    rms = np.sqrt(np.mean(np.float64(updates["w"]) ** 2))
    assert rms == pytest.approx(1.0, rel=1e-3)


@few
@given(leaves, leaves, faults, st.integers(0, LAYERS * ROWS * COLUMNS - 1))
def test_a_step_with_a_fault_leaves_no_trace_in_the_faulty_layer(
    first: np.ndarray, second: np.ndarray, fault: float, place: int
) -> None:
    faulty = first.copy()
    faulty.flat[place] = fault
    layer = place // (ROWS * COLUMNS)
    start = together.init({"w": first})
    _, before = update_together({"w": first}, start)
    updates, after = update_together({"w": faulty}, before)
    assert finite(after)
    assert not np.all(np.isfinite(updates["w"][layer]))
    assert after.grad_scale[layer] == before.grad_scale[layer]
    assert after.peak_scale[layer] == before.peak_scale[layer]
    _, later = update_together({"w": second}, after)
    _, never = update_together({"w": second}, before)
    assert later.grad_scale[layer] == never.grad_scale[layer]


@few
@given(st.lists(leaves, min_size=2, max_size=4))
def test_a_stacked_leaf_is_its_layers_one_by_one(steps: list[np.ndarray]) -> None:
    """In optax's suites no leaf holds more than one layer."""
    stack_state = together.init({"w": steps[0]})
    apart_state = apart.init(list(steps[0]))
    for step in steps:
        stacked_updates, stack_state = update_together({"w": step}, stack_state)
        updates, apart_state = update_apart(list(step), apart_state)
        np.testing.assert_allclose(stacked_updates["w"], np.stack(updates), rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(stack_state.grad_scale, apart_state.grad_scale, rtol=1e-5)


@few
@given(st.lists(leaves, min_size=1, max_size=4), st.booleans())
def test_updates_and_state_are_finite_for_finite_gradients(
    steps: list[np.ndarray], with_zeros_between: bool
) -> None:
    state = together.init({"w": steps[0]})
    for step in steps:
        if with_zeros_between:
            _, state = update_together({"w": np.zeros_like(step)}, state)
        updates, state = update_together({"w": step}, state)
        assert finite((updates, state))
