"""Gains against closed forms, and weights against N(0, G^2 / fan_in)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import enable_x64

from stablegrad_optax import activation_aware, activation_gain

identity = lambda z: z  # noqa: E731

GAINS: list[tuple[Callable[..., Any], float]] = [
    (jax.nn.relu, math.sqrt(2.0)),
    (identity, 1.0),
    (jnp.square, 1 / math.sqrt(3.0)),
    (jnp.sin, 1 / math.sqrt((1 - math.exp(-2.0)) / 2)),
    (jnp.cos, 1 / math.sqrt((1 + math.exp(-2.0)) / 2)),
    (jnp.exp, 1 / math.exp(1.0)),
    (lambda z: 3.0 * z, 1 / 3),
    (jnp.tanh, 1.5925),
    (jax.nn.silu, 1.6765),
    (jax.nn.gelu, 1.5335),
]


@pytest.mark.parametrize(("fn", "want"), GAINS)
def test_gain_is_one_over_the_root_mean_square_under_a_unit_gaussian(
    fn: Callable[..., Any], want: float
) -> None:
    gain = activation_gain(fn)
    assert type(gain) is float
    assert gain == pytest.approx(want, abs=1e-4)


def test_gain_of_a_numpy_function_and_of_a_kinked_one() -> None:
    assert activation_gain(np.tanh) == pytest.approx(activation_gain(jnp.tanh), rel=1e-5)
    leaky = math.sqrt(2 / (1 + 0.1**2))
    assert activation_gain(lambda z: jnp.where(z > 0, z, 0.1 * z)) == pytest.approx(leaky, rel=1e-4)


@pytest.mark.parametrize("fn", [jnp.tanh, jax.nn.relu])  # relu is compiled, with its own derivative
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_gain_can_be_asked_inside_a_compiled_or_stacked_init(transform: Any, fn: Any) -> None:
    def init(key: jax.Array) -> jax.Array:
        assert type(activation_gain(fn)) is float
        return activation_aware(fn)(key, (4, 3), jnp.float32)

    keys = jax.random.split(jax.random.key(0), 2)
    one_by_one = [activation_aware(fn)(key, (4, 3)) for key in keys]
    got = transform(init)(keys) if transform is jax.vmap else [transform(init)(k) for k in keys]
    np.testing.assert_allclose(np.stack(got), np.stack(one_by_one), rtol=1e-6)


BAD: list[Any] = [jnp.zeros_like, lambda z: z * jnp.nan, lambda z: jnp.full_like(z, jnp.inf)]


@pytest.mark.parametrize("fn", BAD, ids=["zero", "nan", "inf"])
def test_a_function_without_a_finite_positive_mean_square_is_an_error(fn: Any) -> None:
    with pytest.raises(ValueError, match="activation"):
        activation_gain(fn)


SHAPES: list[tuple[tuple[int, ...], dict[str, Any], int]] = [
    # shape, options, fan_in
    ((400, 300), {}, 400),
    ((3, 3, 40, 200), {}, 360),
    ((300, 400), {"in_axis": -1, "out_axis": -2}, 400),
    ((200, 40, 3, 3), {"in_axis": 1, "out_axis": 0}, 360),
    ((8, 100, 100), {"batch_axis": 0}, 100),
    ((8, 100, 100), {}, 800),
    ((10, 20, 300), {"in_axis": (0, 1), "out_axis": 2}, 200),
]


@pytest.mark.parametrize(("shape", "options", "fan_in"), SHAPES)
def test_weights_have_mean_zero_and_variance_gain_squared_over_fan_in(
    shape: tuple[int, ...], options: dict[str, Any], fan_in: int
) -> None:
    weights = np.asarray(activation_aware(jnp.tanh, **options)(jax.random.key(0), shape))
    assert weights.shape == shape
    assert weights.dtype == np.float32
    std = activation_gain(jnp.tanh) / math.sqrt(fan_in)
    count = weights.size
    assert abs(weights.mean()) < 5 * std / math.sqrt(count)
    assert weights.std() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
    # Gaussian, not truncated and not uniform: the fourth moment is 3.
    assert np.mean((weights / std) ** 4) == pytest.approx(3.0, rel=0.1)
    assert np.abs(weights / std).max() > 3.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("at_call", [True, False])
def test_weights_have_the_dtype_asked_for(dtype: Any, at_call: bool) -> None:
    key, shape = jax.random.key(1), (200, 200)
    if at_call:
        weights = activation_aware(jnp.sin)(key, shape, dtype)
    else:
        weights = activation_aware(jnp.sin, dtype=dtype)(key, shape)
    assert weights.dtype == dtype
    wide = np.asarray(weights).astype(np.complex128)
    variance = np.mean(np.abs(wide) ** 2)
    assert variance == pytest.approx(activation_gain(jnp.sin) ** 2 / 200, rel=0.03)


def test_float64_weights() -> None:
    with enable_x64():
        weights = activation_aware(jnp.tanh)(jax.random.key(0), (4, 3), jnp.float64)
        assert weights.dtype == jnp.float64


def test_keys_decide_the_weights() -> None:
    init = activation_aware(jax.nn.relu)
    a, b = (init(jax.random.key(seed), (5, 5)) for seed in (0, 1))
    np.testing.assert_array_equal(a, init(jax.random.key(0), (5, 5)))
    assert not np.any(np.asarray(a) == np.asarray(b))


@pytest.mark.parametrize("fn", [jnp.tanh, jax.nn.relu, jnp.sin])
def test_a_deep_network_keeps_the_scale_of_its_signal(fn: Callable[..., Any]) -> None:
    init = activation_aware(fn)
    signal = jax.random.normal(jax.random.key(0), (64, 256))
    for layer in range(20):
        weights = init(jax.random.key(layer + 1), (256, 256))
        signal = fn(signal) @ weights
    assert float(jnp.sqrt(jnp.mean(signal**2))) == pytest.approx(1.0, rel=0.5)


@pytest.mark.parametrize(("fn", "lowest", "highest"), [(jax.nn.relu, 1, 1), (jnp.tanh, 1.17, 1.18)])
def test_gradient_variance_changes_by_gain_squared_times_that_of_the_slope(
    fn: Callable[..., Any], lowest: float, highest: float
) -> None:
    """What the docstring of activation_aware says of relu and tanh."""
    z, weights = np.polynomial.hermite_e.hermegauss(128)
    slope = np.asarray(jax.vmap(jax.grad(fn))(jnp.asarray(z, jnp.float32)), np.float64)
    factor = activation_gain(fn) ** 2 * np.sum(weights * slope**2) / np.sum(weights)
    assert lowest - 1e-5 <= factor <= highest + 1e-5
