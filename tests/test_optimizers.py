"""The ready optimizers equal the explicit chains and take optax's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import (
    layer_scales,
    per_leaf,
    stablegrad,
    stablegrad_adam,
    stablegrad_adamw,
    stablegrad_sgd,
    weights_only,
)

# Adam mixes dtypes.
pytestmark = pytest.mark.standard_promotion

Tree = Any
PAIRS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (stablegrad_sgd, optax.sgd),
    (stablegrad_adam, optax.adam),
    (stablegrad_adamw, optax.adamw),
]
OPTIONS: dict[str, Any] = {
    "reference": 0.5,
    "decay": 0.3,
    "attack": 0.1,
    "balance": 0.5,
    "equalize": "norm",
    "fade_below": 0.25,
    "delayed": True,
    "layers": weights_only,
}


def step_grads(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return {
        "b": jnp.asarray(rng.normal(size=3), jnp.float32),
        "w": jnp.asarray(100 * rng.normal(size=(4, 3)), jnp.float32),
    }


def trajectory(tx: optax.GradientTransformationExtraArgs, **extra: Any) -> Tree:
    params = step_grads(99)
    state = tx.init(params)
    for seed in range(4):
        updates, state = tx.update(step_grads(seed), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_signature_is_optaxs_own_plus_the_transforms_options(
    ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    parameters = inspect.signature(ours).parameters
    own = inspect.signature(theirs).parameters
    added = inspect.signature(stablegrad).parameters
    assert [name for name in parameters if name not in added] == list(own)
    for name, parameter in own.items():
        assert parameters[name].default == parameter.default, name
        assert parameters[name].kind == parameter.kind, name
    for name, parameter in added.items():
        assert parameters[name].default == parameter.default, name
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY, name


ARGUMENTS: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (stablegrad_sgd, optax.sgd, (0.1,), {}),
    (stablegrad_sgd, optax.sgd, (0.1, 0.9, True, jnp.bfloat16), {}),
    (stablegrad_sgd, optax.sgd, (optax.linear_schedule(0.1, 0.0, 5),), {"momentum": 0.5}),
    (stablegrad_adam, optax.adam, (1e-2,), {}),
    (
        stablegrad_adam,
        optax.adam,
        (1e-2, 0.8, 0.95, 1e-3, 1e-4, jnp.bfloat16),
        {"nesterov": True},
    ),
    (stablegrad_adamw, optax.adamw, (1e-2,), {}),
    (
        stablegrad_adamw,
        optax.adamw,
        (1e-2, 0.8, 0.95, 1e-3, 1e-4, jnp.bfloat16, 0.3, {"w": True, "b": False}),
        {"nesterov": True},
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "args", "kwargs"), ARGUMENTS)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["default", "options"])
def test_equals_the_explicit_chain(
    ours: Any, theirs: Any, args: Any, kwargs: Any, options: dict[str, Any]
) -> None:
    ready = trajectory(ours(*args, **kwargs, **options))
    explicit = trajectory(optax.chain(stablegrad(**options), theirs(*args, **kwargs)))
    chex.assert_trees_all_equal(ready, explicit)
    alone = trajectory(theirs(*args, **kwargs))
    assert not np.array_equal(alone["w"], ready["w"])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_takes_the_prediction_gradient(ours: Any, theirs: Any) -> None:
    extra = {"prediction_grad": jnp.asarray([1.0, 4.0])}
    ready = trajectory(ours(1e-2, reference="prediction"), **extra)
    explicit = trajectory(optax.chain(stablegrad("prediction"), theirs(1e-2)), **extra)
    chex.assert_trees_all_equal(ready, explicit)
    with pytest.raises((ValueError, TypeError), match="prediction_value_and_grad"):
        trajectory(ours(1e-2, reference="prediction"))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_is_found_and_works_as_any_optax_optimizer(ours: Any, theirs: Any) -> None:
    del theirs
    tx = ours(1e-2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = step_grads(0)
    _, state = tx.update(params, tx.init(params), params)
    assert list(layer_scales(state, params, per_leaf)) == ["b", "w"]
    assert optax.tree.get(state, "grad_scale").shape == (2,)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_learning_rate_can_be_injected(ours: Any, theirs: Any) -> None:
    del theirs
    tx = optax.inject_hyperparams(ours, static_args=("layers",))(
        learning_rate=optax.linear_schedule(1e-2, 0.0, 10), layers=per_leaf
    )
    params = step_grads(0)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    direct = ours(1e-2)
    want, _ = direct.update(params, direct.init(params), params)
    chex.assert_trees_all_close(updates, want, rtol=1e-5)
