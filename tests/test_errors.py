"""Bad options, states and layers are errors that name what is wrong; good ones are accepted."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SMALL, normal, small_run
from oracle import Axes, Oracle, statistic

from stablegrad_optax import (
    LayerAxes,
    per_leaf,
    stablegrad,
    stablegrad_adam,
    stablegrad_adamw,
    stablegrad_sgd,
)

BAD: list[tuple[str, Any]] = [
    *[("reference", v) for v in (0.0, -1.0, np.nan, np.inf, "predictions", None, [1.0], 1j)],
    *[("reference", v) for v in (np.float32(0), np.ones(3), np.float64(-2), {"a": 1.0})],
    *[("reference", v) for v in (1e-50, 1e39, 10**400, np.array("a"), np.bool_(True))],
    *[("decay", v) for v in (1 - 1e-9, np.complex64(0))],  # the first is 1 in float32
    *[("decay", v) for v in (-0.1, 1.0, 1.5, np.nan, np.inf, "0.9", None, [0.5], np.ones(2))],
    *[("balance", v) for v in (-0.1, 1.01, np.nan, "1", None, [0.5], np.float32(2), 1j)],
    *[("attack", v) for v in (-0.1, 1.0, np.nan, "0", [0.5])],
    *[("equalize", v) for v in ("rms", None, 1, True)],
    *[("delayed", v) for v in (1, 0, None, "yes", 0.5)],
    *[("layers", v) for v in (None, 3, "per_leaf", 1.0)],
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=lambda v: repr(v)[:20])
def test_bad_options_are_errors_that_name_the_option(option: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        stablegrad(**{option: value})


@pytest.mark.parametrize("make", [stablegrad_sgd, stablegrad_adam, stablegrad_adamw])
def test_the_ready_optimizers_check_their_options_too(make: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="decay"):
        make(1e-3, decay=1.0)


@pytest.mark.parametrize(
    ("option", "value"), [("reference", -1.0), ("decay", 1.0), ("balance", 2.0)]
)
def test_concrete_jax_arrays_are_checked(option: str, value: float) -> None:
    with pytest.raises((ValueError, TypeError), match=option):
        stablegrad(**{option: jnp.asarray(value)})


@pytest.mark.parametrize(
    "options",
    [
        {"reference": 1, "decay": 0, "balance": 0},
        {"reference": np.float32(2.0), "decay": np.float64(0.5), "balance": np.int32(1)},
        {"reference": 1e-30, "decay": 0.999999, "balance": 1},
        {"decay": 0.9, "attack": 0, "equalize": "norm"},
        {"delayed": True},
    ],
)
def test_good_options_of_every_number_type_are_accepted(options: dict[str, Any]) -> None:
    grads = normal(SMALL)
    tx = stablegrad(**options)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert updates["kernel"].dtype == jnp.float32
    assert state.grad_scale.dtype == state.reference_scale.dtype == jnp.float32


def test_concrete_jax_arrays_are_accepted() -> None:
    grads = normal(SMALL)
    arrays = stablegrad(jnp.asarray(2.0), decay=jnp.asarray(0.5), balance=jnp.asarray(0.5))
    floats = stablegrad(2.0, decay=0.5, balance=0.5)
    chex.assert_trees_all_close(small_run(arrays), small_run(floats), rtol=1e-5)
    assert arrays.update(grads, arrays.init(grads))[0]["bias"].dtype == jnp.float32


def test_layers_none_is_an_error_that_names_static_args() -> None:
    with pytest.raises(TypeError, match="static_args"):
        stablegrad(layers=None)


@pytest.mark.parametrize("option", ["reference", "decay", "attack", "balance"])
def test_traced_options_are_never_checked(option: str) -> None:
    @jax.jit
    def step(value: jax.Array) -> Any:
        tx = stablegrad(**{option: value})
        return tx.update(normal(SMALL), tx.init(normal(SMALL)))

    chex.assert_tree_all_finite(step(0.5))
    step(-1.0)


@pytest.mark.parametrize("option", ["decay", "attack"])
def test_a_traced_nan_never_enters_the_state(option: str) -> None:
    grads = normal(SMALL)

    @jax.jit
    def step(value: jax.Array) -> Any:
        tx = stablegrad(**{option: value})
        _, state = tx.update(grads, tx.init(grads))
        larger = {name: 2 * gradient for name, gradient in grads.items()}
        return state, tx.update(larger, state)[1]

    before, after = step(np.nan)
    np.testing.assert_array_equal(after.grad_scale, before.grad_scale)
    chex.assert_tree_all_finite(after)


@pytest.mark.standard_promotion
def test_inject_hyperparams_with_a_schedule_on_decay() -> None:
    schedule = lambda count: 0.2 * count  # noqa: E731
    injected = optax.inject_hyperparams(stablegrad, static_args=("layers",))
    tx = injected(decay=schedule, balance=0.5, layers=per_leaf)
    oracle_axes: list[Axes] = [((0,), False), ((0, 1), True), ((0, 1, 2), True)]
    oracle = Oracle(oracle_axes, 1.0, 0.0, 0.5)
    update, state = jax.jit(tx.update), tx.init(normal(SMALL))
    for t in range(4):
        grads = normal(SMALL, t)
        oracle.decay = 0.2 * t
        updates, state = update(grads, state)
        expected = oracle.step(list(grads.values()))
        chex.assert_trees_all_close(list(updates.values()), expected, rtol=1e-5)
        np.testing.assert_allclose(
            optax.tree.get(state, "grad_scale"), oracle.grad_scale, rtol=1e-5
        )
    assert float(state.hyperparams["decay"]) == pytest.approx(0.6)


def test_inject_hyperparams_keeps_a_prediction_reference() -> None:
    injected = optax.inject_hyperparams(stablegrad, static_args=("layers",))
    tx = injected("prediction", delayed=True)
    grads = normal(SMALL)
    update = jax.jit(lambda g, s: tx.update(g, s, prediction_grad=g["bias"]))
    _, state = update(grads, tx.init(grads))
    want = statistic(grads["bias"], True)
    assert float(optax.tree.get(state, "reference_scale")) == pytest.approx(want, rel=1e-5)


def test_inject_hyperparams_on_bfloat16_params_with_a_float32_hyperparam_dtype() -> None:
    injected = optax.inject_hyperparams(
        stablegrad, static_args=("layers",), hyperparam_dtype=jnp.float32
    )
    tx = injected(decay=0.999, layers=per_leaf)
    grads = {k: jnp.asarray(g, jnp.bfloat16) for k, g in normal(SMALL).items()}
    state = tx.init(grads)
    for factor in (1.0, 1000.0):
        _, state = tx.update(jax.tree.map(lambda g: g * factor, grads), state)  # noqa: B023
    first = statistic(np.asarray(grads["bias"], np.float32), False)
    scale = float(optax.tree.get(state, "grad_scale")[0])
    assert scale == pytest.approx(first * (0.999 + 0.001 * 1000), rel=1e-2)


def test_a_missing_prediction_gradient_names_the_function_that_gives_it() -> None:
    grads = normal(SMALL)
    tx = stablegrad("prediction")
    with pytest.raises((ValueError, TypeError), match="prediction_value_and_grad"):
        tx.update(grads, tx.init(grads))
    chain = optax.chain(tx, optax.sgd(0.1))
    state = chain.init(grads)
    with pytest.raises((ValueError, TypeError), match="prediction_value_and_grad"):
        jax.jit(chain.update)(grads, state)


def test_a_state_of_other_params_names_init() -> None:
    tx = stablegrad()
    state = tx.init({"kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="init"):
        tx.update(normal(SMALL), state)
    with pytest.raises(ValueError, match="init"):
        jax.jit(tx.update)(normal(SMALL), state)


def test_a_state_of_another_transform_names_init() -> None:
    grads = normal(SMALL)
    with pytest.raises(ValueError, match=r"must be a StableGradState.*init"):
        stablegrad().update(grads, optax.adam(1e-3).init(grads))


def test_an_empty_prediction_gradient_is_as_good_as_none() -> None:
    tx, grads = stablegrad("prediction"), normal(SMALL)
    with pytest.raises(ValueError, match="prediction_value_and_grad"):
        tx.update(grads, tx.init(grads), prediction_grad=jnp.zeros(0))


MISFITS: list[tuple[Any, str]] = [
    ({"net": {"w": LayerAxes((0, 1))}}, "net/b|b"),
    ({"net": {"w": LayerAxes((0, 1)), "b": LayerAxes(0), "c": LayerAxes(0)}}, "net/c|c"),
    ({"net": {"w": LayerAxes((0, 2)), "b": LayerAxes(0)}}, "net/w"),
    ({"net": {"w": LayerAxes((0, -3)), "b": LayerAxes(0)}}, "net/w"),
    ({"net": {"w": LayerAxes((0, -2)), "b": LayerAxes(0)}}, "net/w"),
    ({"net": {"w": (0, 1), "b": LayerAxes(0)}}, "net/w"),
    ({"net": {"w": LayerAxes((0, 1)), "b": "all"}}, "net/b"),
    ({"net": LayerAxes((0, 1))}, "net"),
]


@pytest.mark.parametrize(("layers", "path"), MISFITS)
@pytest.mark.parametrize("called", [False, True])
def test_layers_that_do_not_fit_the_tree_name_the_path(
    layers: Any, path: str, called: bool
) -> None:
    params = {"net": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}}
    with pytest.raises((ValueError, TypeError), match=path):
        stablegrad(layers=(lambda _: layers) if called else layers).init(params)
