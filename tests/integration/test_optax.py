"""The transform inside optax: chains, MultiSteps, optax.tree, and a training run."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SMALL, SMALL_LAYERS, Tree, normal

from stablegrad_optax import per_leaf, stablegrad, weights_only


def test_multi_steps_stays_finite_and_takes_the_mean_gradients() -> None:
    inner = optax.chain(stablegrad(decay=0.5), optax.sgd(0.1))
    tx = optax.MultiSteps(inner, every_k_schedule=2)
    grads = [normal(SMALL, seed) for seed in range(4)]
    params = jax.tree.map(jnp.zeros_like, grads[0])
    state, update = tx.init(params), jax.jit(tx.update)
    total = params
    for g in grads:
        updates, state = update(g, state, params)
        chex.assert_tree_all_finite((updates, state.inner_opt_state))
        total = optax.apply_updates(total, updates)

    want, inner_state = params, inner.init(params)
    for a, b in zip(grads[::2], grads[1::2], strict=True):
        mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
        updates, inner_state = inner.update(mean, inner_state, params)
        want = optax.apply_updates(want, updates)
    chex.assert_trees_all_close(total, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
def test_tree_get_finds_both_fields_in_a_chain(delayed: bool) -> None:
    tx = optax.chain(optax.clip(1e9), stablegrad(3.0, delayed=delayed), optax.adam(1e-3))
    grads = normal(SMALL)
    _, state = tx.update(grads, tx.init(grads), grads)
    assert optax.tree.get(state, "grad_scale").shape == (3,)
    assert float(optax.tree.get(state, "reference_scale")) == 3.0
    state = optax.tree.set(state, grad_scale=jnp.ones(3))
    chex.assert_trees_all_equal(optax.tree.get(state, "grad_scale"), jnp.ones(3))


@pytest.mark.parametrize(
    "layers",
    [per_leaf, SMALL_LAYERS, lambda params: {k: weights_only(params[k]) for k in SMALL}],
    ids=["rule", "tree", "rule_by_name"],
)
def test_map_params_passes_the_scales_to_transform_non_params(layers: Tree) -> None:
    tx = optax.chain(stablegrad(layers=layers), optax.adam(0.1))
    marked = optax.tree.map_params(
        tx, lambda _: "param", tx.init(normal(SMALL)), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked[0])) == {"other"}
    assert optax.tree.get(marked, "mu") == dict.fromkeys(SMALL, "param")


def test_prediction_gradient_passes_through_a_chain() -> None:
    tx = optax.chain(stablegrad("prediction"), optax.adam(1e-3), optax.scale(2.0))
    grads = normal(SMALL)
    _, state = tx.update(grads, tx.init(grads), grads, prediction_grad=np.float32([2, -2]))
    assert float(optax.tree.get(state, "reference_scale")) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(stablegrad(), optax.adam(1e-2)),
        optax.chain(stablegrad(0.1, delayed=True, balance=0.5), optax.adam(1e-2)),
        optax.chain(stablegrad(0.1), optax.sgd(0.1)),
    ],
    ids=["adam", "delayed", "sgd"],
)
def test_chains_train_a_small_model(tx: optax.GradientTransformationExtraArgs) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(32, 3)).astype(np.float32)
    targets = np.sin(inputs.sum(1, keepdims=True))
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 16)) / 2, jnp.float32),
        "b": jnp.zeros(16),
        "c": jnp.asarray(rng.normal(size=(16, 1)) / 4, jnp.float32),
    }

    def loss(p: Tree) -> jax.Array:
        hidden = jnp.tanh(inputs @ p["a"] + p["b"])
        return jnp.mean((hidden @ p["c"] - targets) ** 2)

    @jax.jit
    def train(params: Tree) -> Tree:
        def step(carry: Tree, _: None) -> tuple[Tree, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=150)[0][0]

    assert float(loss(train(params))) < 0.25 * float(loss(params))
