"""docs/checkpoints.md: its code runs from top to bottom, and does what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from documents import Variables, variables_after_each_block

from stablegrad_optax import stablegrad, weights_only

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SAVE, RESUME, ADD, MOMENTS, ELSEWHERE, REMOVE, OPTION = range(7)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> list[Variables]:
    """The variables after each block of code, where an earlier run has been."""
    folder = tmp_path_factory.mktemp("document")
    for name in ("with_stablegrad", "adam_alone"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return variables_after_each_block(DOCUMENT)


def update(tx: Any, grads: Any, opt_state: Any, steps: int = 1) -> Any:
    """The last of some updates by the same gradients."""

    def step(opt_state: Any, _: None) -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, opt_state, grads)
        return opt_state, updates

    updates = jax.jit(lambda state: jax.lax.scan(step, state, length=steps)[1])(opt_state)
    return jax.tree.map(lambda leaf: leaf[-1], updates)


def norm(tree: Any) -> float:
    return float(np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])))


def test_a_restored_job_goes_on_bit_for_bit(after: list[Variables]) -> None:
    v = after[RESUME]
    straight = v["train"](v["tx"], v["params"], v["tx"].init(v["params"]), steps=200)
    chex.assert_trees_all_equal(v["job"], straight, strict=True)
    assert v["loss"](v["job"]["params"]) < v["loss"](after[SAVE]["job"]["params"])


def test_adding_it_gives_the_state_of_the_chain_and_keeps_adams(after: list[Variables]) -> None:
    v = after[ADD]
    chex.assert_trees_all_equal_structs(v["opt_state"], v["tx"].init(v["params"]))
    assert int(optax.tree.get(v["opt_state"], "count")) == 100
    with pytest.raises(ValueError, match="grad_scale"):
        v["ocp"].StandardCheckpointer().restore(
            v["directory"] / "adam_alone",
            {"params": v["params"], "opt_state": v["tx"].init(v["params"])},
        )


@pytest.mark.parametrize(("size", "without"), [(1e-2, (2, 10)), (1e4, (0, 0.05))])
def test_adam_with_converted_moments_takes_the_step_it_would_have_taken(
    after: list[Variables], size: float, without: tuple[float, float]
) -> None:
    v = after[MOMENTS]
    params, adam_state = v["old_job"]["params"], v["old_job"]["opt_state"]
    times = v["with_moments_times"]
    # As if the loss, and so every gradient, had always been `size` times as large.
    old = times(jax.tree.map(lambda _: size, params), adam_state)
    grads = jax.tree.map(lambda g: size * g, jax.grad(v["loss"])(params))
    scaled, scaling_state = jax.jit(v["scaling"].update)(grads, v["scaling"].init(params))
    converted = times(v["gains_of"](scaled, grads), old)
    alone = update(v["adam"], grads, old)
    chex.assert_trees_all_close(
        update(v["tx"], grads, (scaling_state, converted)), alone, rtol=1e-2
    )
    as_it_was = update(v["tx"], grads, (scaling_state, old), steps=100)
    low, high = without
    assert low < norm(as_it_was) / norm(update(v["adam"], grads, old, steps=100)) < high


def test_moments_of_nnx_are_converted_too(after: list[Variables]) -> None:
    nnx = after[ELSEWHERE]["nnx"]
    v = after[ELSEWHERE]
    model = v["model"]
    old = nnx.Optimizer(model, v["adam"], wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 3))) ** 2))(model)
    old.update(model, grads)
    doubled = v["with_moments_times"](jax.tree.map(lambda _: 2.0, grads), old.opt_state)
    chex.assert_trees_all_equal_structs(doubled, old.opt_state)
    for name, factor in (("mu", 2), ("nu", 4)):
        got, want = (optax.tree.get(state, name) for state in (doubled, old.opt_state))
        chex.assert_trees_all_close(got, jax.tree.map(lambda x, f=factor: f * x, want))


def test_the_state_can_be_added_wherever_an_optimizer_state_sits(after: list[Variables]) -> None:
    v = after[ELSEWHERE]
    nnx, params, tx = v["nnx"], v["params"], v["tx"]
    fresh = nnx.Optimizer(v["model"], tx, wrt=nnx.Param)
    chex.assert_trees_all_equal_structs(nnx.state(v["optimizer"]), nnx.state(fresh))

    for optimizer, opt_state in (
        (v["state"].tx, v["state"].opt_state),
        (v["named"], v["named_state"]),
        (v["multi_steps"], v["multi_steps_state"]),
        (v["injected_tx"], v["injected_state"]),
    ):
        chex.assert_trees_all_equal_structs(opt_state, optimizer.init(params))
        _, after_a_step = jax.eval_shape(optimizer.update, params, opt_state, params)
        assert optax.tree.get(after_a_step, "grad_scale").shape == (2,)


def test_taken_out_adam_goes_on_at_its_old_scale(after: list[Variables]) -> None:
    v = after[REMOVE]
    chex.assert_trees_all_equal_structs(v["adam_job"]["opt_state"], v["adam"].init(v["params"]))
    adam_state = v["with_moments_times"](v["gains"], v["adam_state"])
    chex.assert_trees_all_close(
        update(v["adam"], v["grads"], adam_state),
        update(v["tx"], v["grads"], v["job"]["opt_state"]),
        rtol=0.1,
    )


def test_other_layers_need_a_new_state(after: list[Variables]) -> None:
    v = after[OPTION]
    chex.assert_trees_all_equal_structs(v["job"]["opt_state"], v["new_tx"].init(v["params"]))
    three = {**v["params"], "bias": jnp.ones(2)}
    state = stablegrad().init(three)
    with pytest.raises(ValueError, match=re.escape("has scales of shape (3,), but the gradients")):
        stablegrad(layers=weights_only).update(three, state)


def test_a_change_of_reference_without_a_new_state_does_what_the_document_says() -> None:
    grads = {"kernel": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    faint = {"kernel": grads["kernel"] * 1e-12}

    number, prediction = stablegrad(1.0, decay=0.5), stablegrad("prediction", decay=0.5)
    steps = {tx: jax.jit(tx.update) for tx in (number, prediction)}

    def after(tx: Any, grads: Any, state: Any, count: int = 1) -> Any:
        for _ in range(count):
            state = steps[tx](grads, state, prediction_grad=np.float32([1e-3, -1e-3]))[1]
        return state

    from_number = after(number, grads, number.init(grads), count=2)
    from_prediction = after(prediction, grads, prediction.init(grads), count=2)
    assert from_prediction.reference_scale == pytest.approx(1e-3)
    carried_on = after(prediction, grads, from_number)
    assert carried_on.reference_scale == pytest.approx(0.5 * 1 + 0.5 * 1e-3)

    assert after(number, faint, from_number, count=40).reference_scale < 0.1
    assert after(number, faint, from_prediction, count=40).reference_scale == 1
