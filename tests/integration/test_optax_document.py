"""docs/optax.md: its code does what the text says, and every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from documents import Variables, variables_after_each_block

from stablegrad_optax import layer_scales, stablegrad

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "optax.md"


@pytest.fixture(scope="module")
def v(compiled_quickly: None) -> Variables:
    """The variables after the last block of code."""
    return variables_after_each_block(DOCUMENT)[-1]


def test_every_test_that_it_names_is_there() -> None:
    names = set(re.findall(r"`(test_\w+)(?:\[\w+\])?`", DOCUMENT.read_text()))
    code = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    assert names
    assert not {name for name in names if f"def {name}(" not in code}


def test_the_scales_of_a_part_are_those_of_its_own_leaves(v: Variables) -> None:
    assert list(v["kernel_scales"]) == ["in/kernel", "out"]
    kernel = np.asarray(v["grads"]["in"]["kernel"])
    assert float(v["kernel_scales"]["in/kernel"]) == pytest.approx(kernel.std(), rel=1e-5)


def test_an_option_set_by_hand_is_that_of_the_next_step(v: Variables) -> None:
    state = v["scheduled_state"][0]
    assert float(state.hyperparams["decay"]) == np.float32(0.9)
    assert float(state.hyperparams["reference"]) == 1
    want = layer_scales(stablegrad().update(v["grads"], state.inner_state)[1], v["params"])
    chex.assert_trees_all_close(layer_scales(state, v["params"]), want, rtol=1e-5)


def test_schedule_free_evaluates_elsewhere_than_it_takes_gradients(v: Variables) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(v["eval_params"], v["params"])
    assert list(layer_scales(v["free_state"], v["params"])) == ["in/bias", "in/kernel", "out"]


def test_the_searched_step_lowers_the_loss(v: Variables) -> None:
    assert float(v["loss"](v["searched_params"])) < float(v["loss"](v["params"]))


def test_the_average_is_that_of_the_params(v: Variables) -> None:
    params, want, state = v["params"], v["params"], v["averaged"].init(v["params"])
    for _ in range(3):
        params, _, state = v["step"](params, v["params"], state)
        want = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, params, want)
    chex.assert_trees_all_close(v["average"], want, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(v["averaged_state"], state)
