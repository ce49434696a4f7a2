"""Meta-gradients: derivatives through the update, as learned learning rates need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SMALL, enable_x64, normal

from stablegrad_optax import stablegrad

pytestmark = pytest.mark.usefixtures("compiled_quickly")

STEPS = 3
DIRECTION, WEIGHTS = normal(SMALL, seed=1), normal(SMALL, seed=2)
OPTIONS: list[dict[str, Any]] = [
    {"decay": 0.0},
    {"decay": 0.5},
    {"decay": 0.5, "balance": 0.5},
    {"decay": 0.5, "balance": 0.0, "fade_below": 1.0},
    {"decay": 0.5, "balance": 0.3, "delayed": True},
    {"decay": 0.9, "attack": 0.1, "balance": 0.5, "equalize": "norm"},
]


def meta_loss(options: dict[str, Any], dtype: Any) -> Callable[..., jax.Array]:
    """A weighted sum of three steps' updates, of gradients that a scalar moves."""

    def loss(knob: Any, size: Any = 1.0) -> jax.Array:
        tx = stablegrad(**options)
        grads = {k: jnp.asarray(g, dtype) for k, g in normal(SMALL).items()}

        def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            moved = {
                k: (g / (1 + t) + knob * jnp.asarray(DIRECTION[k], dtype))
                * (jnp.asarray(size, dtype) * jnp.asarray(4, dtype) ** -t)
                for k, g in grads.items()
            }
            moved["bias"] = moved["bias"] * jnp.asarray(1e-3, dtype)
            updates, state = tx.update(moved, state)
            weighed = [jnp.sum(jnp.asarray(WEIGHTS[k], dtype) * u) for k, u in updates.items()]
            return state, jnp.sum(jnp.stack(weighed))

        _, sums = jax.lax.scan(step, tx.init(grads), jnp.arange(STEPS, dtype=dtype))
        return jnp.sum(sums)

    return loss


@pytest.mark.parametrize("options", OPTIONS)
def test_meta_gradients_equal_finite_differences_at_any_size(options: dict[str, Any]) -> None:
    with enable_x64():
        exact, h = jax.jit(meta_loss(options, jnp.float64)), 1e-5
        want = float(exact(h) - exact(-h)) / (2 * h)
    assert abs(want) > 0.1
    loss = meta_loss(options, jnp.float32)
    for derivative in (jax.jit(jax.grad(loss)), jax.jit(jax.jacfwd(loss))):
        for size in (1e-30, 1e-20, 1.0, 1e20, 1e30):
            got = derivative(jnp.float32(0.0), jnp.float32(size))
            assert float(got) == pytest.approx(want, rel=1e-3)


def test_second_derivatives_equal_finite_differences() -> None:
    options = {"decay": 0.5, "balance": 0.5}
    with enable_x64():
        slope, h = jax.jit(jax.grad(meta_loss(options, jnp.float64))), 1e-5
        want = float(slope(h) - slope(-h)) / (2 * h)
    got = jax.jit(jax.grad(jax.grad(meta_loss(options, jnp.float32))))(jnp.float32(0.0))
    assert float(got) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_meta_gradients_are_finite_at_zero_gradients(options: dict[str, Any]) -> None:
    tx = stablegrad(**options)

    @jax.jit
    @jax.grad
    def slope(knobs: dict[str, jax.Array]) -> jax.Array:
        grads = {k: g * knobs[k] for k, g in normal(SMALL).items()}

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            updates, state = tx.update(grads, state)
            weighed = [jnp.sum(WEIGHTS[k] * u) for k, u in updates.items()]
            return state, jnp.sum(jnp.stack(weighed))

        return jnp.sum(jax.lax.scan(step, tx.init(grads), length=STEPS)[1])

    for dead in (("kernel",), ("bias", "stack"), tuple(SMALL)):
        slopes = slope({k: jnp.float32(0.0 if k in dead else 1.0) for k in SMALL})
        assert all(np.isfinite(value) for value in slopes.values()), dead


def test_a_learned_learning_rate_learns() -> None:
    """The example of the docs: the loss after an inner step, differentiated by its rate."""
    tx = stablegrad(decay=0.0)
    target = jnp.asarray(normal({"x": (6, 5)})["x"])

    def outer(log_rate: jax.Array) -> jax.Array:
        x = jnp.zeros_like(target)
        state = tx.init(x)
        for _ in range(STEPS):
            updates, state = tx.update(x - target, state)
            x = x - jnp.exp(log_rate) * updates
        return jnp.mean((x - target) ** 2)

    rate, loss = jnp.float32(-3.0), jax.jit(jax.value_and_grad(outer))
    first, _ = loss(rate)
    for _ in range(20):
        rate -= 0.3 * loss(rate)[1]
    assert float(loss(rate)[0]) < 0.5 * float(first)
