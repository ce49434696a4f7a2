"""``ScaleHistory`` holds scales from a whole run, however long, in arrays of fixed size."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import enable_x64

from stablegrad_optax import ScaleHistory, StableGradState, stablegrad

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PARAMS = {"bias": np.ones(4, np.float32), "kernel": np.ones((3, 4), np.float32)}
TX = stablegrad()


def state_of(step: Any) -> StableGradState:
    """A state that tells its step."""
    step = jnp.asarray(step, jnp.float32)
    return StableGradState(jnp.stack([step, 2 * step]), 3 * step, jnp.zeros(2))


def recorded(steps: int, length: int) -> ScaleHistory:
    def step(history: ScaleHistory, t: jax.Array) -> tuple[ScaleHistory, None]:
        return history.record(state_of(t)), None

    start = ScaleHistory.init(TX.init(PARAMS), length)
    return jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps))[0])()


@pytest.mark.parametrize("length", [2, 5, 8])
@pytest.mark.parametrize("steps", [0, 1, 5, 8, 9, 64, 100])
def test_steps_are_multiples_of_a_stride_that_doubles(length: int, steps: int) -> None:
    history = recorded(steps, length).in_order()
    held, stride = list(history.step), int(history.stride)
    assert stride & (stride - 1) == 0
    assert history.num_seen == steps
    assert len(held) == min(steps, length)
    assert set(range(0, steps, stride)) <= set(held)
    assert all(2 * step % stride == 0 for step in held)
    if steps:
        assert held == sorted(set(held))
        assert held[0] == 0
        assert max(np.diff([*held, steps])) <= stride <= max(1, 2 * steps / (length - 1))


def test_each_row_has_the_scales_and_the_reference_of_its_step() -> None:
    history = recorded(37, 8).in_order()
    np.testing.assert_array_equal(history.grad_scale, np.outer(history.step, [1, 2]))
    np.testing.assert_array_equal(history.reference_scale, 3 * history.step)


def test_as_long_as_the_run_it_holds_every_step() -> None:
    assert list(recorded(9, 9).in_order().step) == list(range(9))


def test_in_a_training_loop_it_has_what_each_step_returned() -> None:
    tx = optax.chain(stablegrad(), optax.sgd(0.1))
    grads = [jax.tree.map(lambda p, t=t: p * 2.0**t, PARAMS) for t in range(4)]

    @jax.jit
    def step(opt_state: Any, history: ScaleHistory, grads: Any) -> Any:
        _, opt_state = tx.update(grads, opt_state)
        return opt_state, history.record(opt_state)

    opt_state = tx.init(PARAMS)
    history = ScaleHistory.init(opt_state, length=4)
    for grad in grads:
        opt_state, history = step(opt_state, history, grad)
    want = 2.0 ** np.arange(4)[:, None] * [1, 1]
    np.testing.assert_allclose(history.in_order().grad_scale, want, rtol=1e-6)


def test_seeds_at_once_have_the_histories_of_each_seed_alone() -> None:
    def run(seed: jax.Array) -> ScaleHistory:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            opt_state, history = carry
            grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), PARAMS)
            _, opt_state = TX.update(grads, opt_state)
            return (opt_state, history.record(opt_state)), None

        start = (TX.init(PARAMS), ScaleHistory.init(TX.init(PARAMS), 4))
        keys = jax.random.split(jax.random.key(seed), 11)
        return jax.lax.scan(step, start, keys)[0][1]

    seeds = jnp.arange(3)
    batch = jax.jit(jax.vmap(run))(seeds)
    for seed in seeds:
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], batch)
        chex.assert_trees_all_close(one, jax.jit(run)(seed), rtol=1e-6)
    with pytest.raises(ValueError, match=r"a batch of shape \(3,\): take one out"):
        batch.in_order()


def test_a_batch_of_states_needs_a_batch_of_histories() -> None:
    states = jax.vmap(lambda _: TX.init(PARAMS))(jnp.arange(3))
    with pytest.raises(ValueError, match=r"jax\.vmap\(lambda s: ScaleHistory\.init"):
        ScaleHistory.init(states)
    histories = jax.vmap(lambda s: ScaleHistory.init(s, 4).record(s))(states)
    assert histories.grad_scale.shape == (3, 4, 2)


def test_shapes_alone_are_enough_to_start_one() -> None:
    shapes = jax.eval_shape(TX.init, PARAMS)
    history, other = ScaleHistory.init(shapes, 4), ScaleHistory.init(TX.init(PARAMS), 4)
    chex.assert_trees_all_equal(history, other, strict=True)


def test_it_has_the_dtype_of_the_state() -> None:
    with enable_x64():
        wide = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
        _, state = TX.update(wide, TX.init(wide))
        history = ScaleHistory.init(state, 4).record(state)
        assert history.grad_scale.dtype == history.reference_scale.dtype == np.float64
        assert history.step.dtype == np.int32


def test_a_length_below_two_cannot_be_thinned_out() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ScaleHistory.init(TX.init(PARAMS), 1)


def test_recording_calls_nothing_on_the_host() -> None:
    history = ScaleHistory.init(TX.init(PARAMS), 4)
    program = jax.jit(ScaleHistory.record).lower(history, TX.init(PARAMS)).as_text()
    assert "callback" not in program
    assert "scatter" in program or "dynamic_update_slice" in program


def test_it_shows_itself_on_one_line_traced_or_not() -> None:
    history = ScaleHistory.init(TX.init(PARAMS), 64)
    arrays = "step=int32[64], grad_scale=float32[64, 2], reference_scale=float32[64]"
    assert repr(history) == f"ScaleHistory({arrays}, stride=1, num_seen=0)"
    traced = []
    jax.eval_shape(lambda h: traced.append(repr(h)), history)
    assert traced[0].startswith(f"ScaleHistory({arrays}, stride=")
    assert repr(jax.tree.map(lambda _: None, history)).startswith("ScaleHistory(step=None, ")
