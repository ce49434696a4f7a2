"""When a fixed reference fades, and when it must not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL, SMALL_AXES, SMALL_LAYERS, normal
from oracle import Oracle

from stablegrad_optax import StableGradState, stablegrad
from stablegrad_optax._reference import faded

Tree = Any

LIMIT = 2.0**-23


def after(
    tx: Any, *sizes: float | dict[str, float], state: Any = None
) -> tuple[Tree, StableGradState]:
    """The last update and state, where step t has the gradients times ``sizes[t]``."""
    grads = normal(SMALL)
    state, update = state or tx.init(grads), jax.jit(tx.update)
    for size in sizes:
        factors = size if isinstance(size, dict) else dict.fromkeys(SMALL, size)
        updates, state = update({k: g * np.float32(factors[k]) for k, g in grads.items()}, state)
    return updates, state


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("fade_below", [0.0, LIMIT, 1e-3, 1.0])
def test_agrees_with_the_float64_oracle_while_gradients_vanish_and_return(
    fade_below: float, delayed: bool
) -> None:
    options = {"decay": 0.5, "delayed": delayed, "fade_below": fade_below}
    oracle = Oracle(SMALL_AXES, 2.0, **options)
    tx = stablegrad(2.0, layers=SMALL_LAYERS, **options)
    grads = normal(SMALL)
    update, state = jax.jit(tx.update), tx.init(grads)
    for t in range(60):
        common = np.float32(10.0 ** (-10 * np.sin(np.pi * t / 30) ** 2))
        step = {k: g * common for k, g in grads.items()}
        step["kernel"] *= np.float32(np.nan if t == 7 else 0.0 if t in (8, 9) else 1.0)
        updates, state = update(step, state)
        want = oracle.step([step[k] for k in sorted(step)])
        np.testing.assert_allclose(state.reference_scale, oracle.reference_scale, rtol=1e-5)
        np.testing.assert_allclose(state.peak_scale, oracle.peak_scale, rtol=1e-5)
        for name, one in zip(sorted(step), want, strict=True):
            np.testing.assert_allclose(updates[name], one, rtol=1e-5)


@pytest.mark.parametrize("fall", [1.0, 1e-3, 2e-7])
def test_above_the_limit_the_reference_is_kept_to_the_bit(fall: float) -> None:
    _, state = after(stablegrad(0.3, decay=0.0), 1.0, 1.0, fall)
    assert state.reference_scale == np.float32(0.3)


@pytest.mark.parametrize("fall", [1e-8, 1e-12, 1e-30])
def test_below_the_limit_the_update_shrinks_with_the_gradient(fall: float) -> None:
    updates, state = after(stablegrad(0.3, decay=0.0), 1.0, 1.0, fall)
    assert float(state.reference_scale) == pytest.approx(0.3 * fall / LIMIT, rel=1e-5)
    assert np.std(updates["kernel"]) == pytest.approx(0.3 * fall / LIMIT, rel=1e-5)


@pytest.mark.parametrize("survivor", sorted(SMALL))
def test_one_layer_that_keeps_its_gradient_keeps_the_reference(survivor: str) -> None:
    """A network whose Jacobian shrinks, or a layer that dies, is no vanishing loss."""
    fallen = dict.fromkeys(SMALL, 1e-20) | {survivor: 1.0}
    updates, state = after(stablegrad(decay=0.0), 1.0, 1.0, fallen)
    assert float(state.reference_scale) == 1.0
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)


def test_a_spike_of_one_step_is_no_peak() -> None:
    for sizes in [(1e30, 1.0, 1.0), (1.0, 1e30, 1.0, 1.0), (1.0, 1.0, 1e30, 1.0)]:
        _, state = after(stablegrad(decay=0.0), *sizes)
        assert float(state.reference_scale) == 1.0
        np.testing.assert_array_equal(state.peak_scale, after(stablegrad(), 1.0, 1.0)[1].peak_scale)


def test_a_layer_that_is_new_keeps_the_reference() -> None:
    late = dict.fromkeys(SMALL, 1e-20)
    quiet = dict.fromkeys(SMALL, 1.0) | {"stack": 0.0}
    _, state = after(stablegrad(decay=0.0), quiet, quiet, late)
    assert float(state.reference_scale) == 1.0


def test_no_gradient_at_all_keeps_the_reference() -> None:
    _, state = after(stablegrad(0.5), 0.0, 0.0)
    assert float(state.reference_scale) == 0.5
    np.testing.assert_array_equal(state.peak_scale, 0.0)


def test_the_reference_returns_with_the_gradient() -> None:
    _, state = after(stablegrad(decay=0.0, fade_below=1.0), 1.0, 1.0, 1e-9, 1.0)
    assert float(state.reference_scale) == 1.0


def test_fade_below_1_makes_the_update_proportional_to_a_gradient_that_falls_as_one() -> None:
    tx = stablegrad(decay=0.0, fade_below=1.0)
    sizes = (1.0, 1.0, 0.5, 0.03, 1e-4)
    for steps in range(2, len(sizes) + 1):
        updates, _ = after(tx, *sizes[:steps])
        assert np.std(updates["kernel"]) == pytest.approx(sizes[steps - 1], rel=1e-5)


def test_a_state_without_peaks_never_fades_and_keeps_none() -> None:
    tx = stablegrad(decay=0.0, fade_below=1.0)
    hand_made = tx.init(normal(SMALL))._replace(peak_scale=None)
    assert hand_made == StableGradState(hand_made.grad_scale, hand_made.reference_scale)
    updates, state = after(tx, 1.0, 1.0, 1e-12, state=hand_made)
    assert state.peak_scale is None
    assert float(state.reference_scale) == 1.0
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)


def test_sgd_with_a_reference_that_falls_settles_where_a_kept_one_circles() -> None:
    """Minimize |x|^2 / 2 with steps of a fixed learning rate; the gradient is x itself."""

    def distance(fade_below: float) -> float:
        tx = stablegrad(decay=0.0, fade_below=fade_below)

        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = tx.update(x, state)
            return (x - 0.1 * updates, state), None

        x = jnp.asarray(normal({"x": (50,)})["x"])
        return float(jnp.linalg.norm(jax.lax.scan(step, (x, tx.init(x)), length=1000)[0][0]))

    assert distance(0.0) > 0.1
    assert distance(1.0) < 1e-6


def test_meta_gradients_are_finite_where_a_scale_grows_past_its_peak_without_bound() -> None:
    scale, peak = jnp.asarray([1e5, 1.0]), jnp.asarray([1e-36, 1.0])
    for slope in jax.jit(jax.grad(faded, argnums=(1, 2)))(1.0, scale, peak, 2**-23):
        np.testing.assert_array_equal(slope, 0)
