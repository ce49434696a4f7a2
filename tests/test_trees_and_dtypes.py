"""Every dtype, and every shape of tree, that gradients and prediction gradients come in."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SMALL, SMALL_AXES, SMALL_LAYERS, Tree, enable_x64, normal
from oracle import Oracle, statistic

from stablegrad_optax import LayerAxes, per_leaf, stablegrad


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [
        (jnp.float32, 1e-5),
        (jnp.bfloat16, 2.0**-7),
        (jnp.float16, 2.0**-9),
        (jnp.complex64, 1e-5),
    ],
)
@pytest.mark.parametrize("delayed", [False, True])
def test_updates_keep_the_dtype_and_statistics_are_float32(
    dtype: Any, rtol: float, delayed: bool
) -> None:
    params = {k: jnp.zeros(shape, dtype) for k, shape in SMALL.items()}
    tx = stablegrad(0.5, decay=0.5, balance=0.5, delayed=delayed, layers=SMALL_LAYERS)
    oracle = Oracle(SMALL_AXES, 0.5, 0.5, 0.5, delayed)
    update, state = jax.jit(tx.update), tx.init(params)
    for seed in range(3):
        grads = {k: 0.3 + jnp.asarray(g).astype(dtype) for k, g in normal(SMALL, seed).items()}
        if dtype == jnp.complex64:
            imaginary = normal(SMALL, 10 + seed)
            grads = {k: jax.lax.complex(g.real, imaginary[k]) for k, g in grads.items()}
        updates, state = update(grads, state)
        assert all(u.dtype == dtype for u in updates.values())
        assert state.grad_scale.dtype == state.reference_scale.dtype == jnp.float32
        wide = np.complex64 if dtype == jnp.complex64 else np.float32
        expected = oracle.step([np.asarray(grads[k]).astype(wide) for k in sorted(grads)])
        np.testing.assert_allclose(state.grad_scale, oracle.grad_scale, rtol=1e-5)
        for name, want in zip(sorted(grads), expected, strict=True):
            np.testing.assert_allclose(np.asarray(updates[name]).astype(wide), want, rtol=rtol)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
@pytest.mark.parametrize("delayed", [False, True])
def test_float64_gradients_have_float64_statistics(dtype: Any, delayed: bool) -> None:
    with enable_x64():
        params = {k: jnp.zeros(shape, dtype) for k, shape in SMALL.items()}
        tx = stablegrad("prediction", decay=0.5, balance=0.5, delayed=delayed, layers=SMALL_LAYERS)
        oracle = Oracle(SMALL_AXES, "prediction", 0.5, 0.5, delayed, epsilon=2.0**-52)
        update = jax.jit(lambda g, s: tx.update(g, s, prediction_grad=g["kernel"]))
        state = tx.init(params)
        assert state.grad_scale.dtype == jnp.float64
        for seed in range(3):
            rng = np.random.default_rng(seed)
            grads = {k: rng.normal(size=shape).astype(dtype) for k, shape in SMALL.items()}
            grads["kernel"] += 1j * rng.normal(size=(4, 3)) if dtype == jnp.complex128 else 0.5
            updates, state = update(grads, state)
            assert updates["kernel"].dtype == dtype
            assert state.grad_scale.dtype == jnp.float64
            expected = oracle.step([grads[k] for k in sorted(grads)], [grads["kernel"]])
            np.testing.assert_allclose(state.grad_scale, oracle.grad_scale, rtol=1e-12)
            np.testing.assert_allclose(state.reference_scale, oracle.reference_scale, rtol=1e-12)
            for name, want in zip(sorted(grads), expected, strict=True):
                np.testing.assert_allclose(updates[name], want, rtol=1e-12)


def test_one_float64_leaf_makes_the_vector_float64_and_leaves_keep_their_own_dtype() -> None:
    with enable_x64():
        grads = {
            "half": jnp.asarray([1.0, -2.0, 3.0], jnp.bfloat16),
            "single": jnp.asarray([1.0, -2.0, 3.0], jnp.float32),
            "double": jnp.asarray([1.0, -2.0, 3.0], jnp.float64),
        }
        tx = stablegrad(decay=0.5, balance=0.5)
        state = tx.init(grads)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(grads, state)
        assert state.grad_scale.dtype == jnp.float64
        assert {k: u.dtype for k, u in updates.items()} == {k: g.dtype for k, g in grads.items()}
        single = stablegrad().init({"single": grads["single"]})
        assert single.grad_scale.dtype == jnp.float32


def test_none_leaves_pass() -> None:
    grads = {"kernel": normal(SMALL)["kernel"], "absent": None}
    for layers in (per_leaf, {"kernel": LayerAxes((0, 1)), "absent": None}):
        tx = stablegrad(layers=layers)
        updates, state = tx.update(grads, tx.init(grads))
        assert updates["absent"] is None
        assert state.grad_scale.shape == (1,)


def test_masked_leaves_pass() -> None:
    grads = normal(SMALL)
    tx = optax.masked(stablegrad(decay=0.0), {"kernel": True, "bias": False, "stack": True})
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)
    assert optax.tree.get(state, "grad_scale").shape == (2,)


def test_masked_leaves_pass_with_a_tree_of_layers_for_all_params() -> None:
    """The places a mask empties are ignored in ``layers``, whatever stands there."""
    grads = normal(SMALL)
    for bias in (LayerAxes(0, centered=False), None):
        tx = optax.masked(
            stablegrad(decay=0.0, layers={**SMALL_LAYERS, "bias": bias}),
            {"kernel": True, "bias": False, "stack": True},
        )
        updates, state = tx.update(grads, tx.init(grads))
        np.testing.assert_array_equal(updates["bias"], grads["bias"])
        assert optax.tree.get(state, "grad_scale").shape == (3,)


def test_two_masked_transforms_of_one_chain_do_not_touch_each_others_leaves() -> None:
    grads = normal(SMALL)
    labels = {"kernel": "weights", "bias": "vectors", "stack": "weights"}
    tx = optax.partition(
        {"weights": stablegrad(2.0, decay=0.0), "vectors": stablegrad(3.0, decay=0.0)}, labels
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert np.std(updates["kernel"]) == pytest.approx(2.0, rel=1e-5)
    assert np.sqrt(np.mean(updates["bias"] ** 2)) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("tree", [{}, [], (), {"a": None}, {"a": {}}, None])
@pytest.mark.parametrize("delayed", [False, True])
def test_an_empty_tree_has_an_empty_state(tree: Tree, delayed: bool) -> None:
    tx = stablegrad("prediction", balance=0.5, delayed=delayed)
    update = jax.jit(lambda g, s: tx.update(g, s, prediction_grad=jnp.ones(3)))
    updates, state = update(tree, tx.init(tree))
    assert updates == tree
    assert state.grad_scale.shape == (0,)
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("layers", [per_leaf, {"w": LayerAxes((0, 1)), "v": LayerAxes(0)}])
def test_leaves_with_no_entries_give_no_nan(layers: Any) -> None:
    grads = {"w": jnp.zeros((0, 3)), "v": jnp.asarray([1.0, -1.0])}
    tx = stablegrad(balance=0.5, layers=layers)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert updates["w"].shape == (0, 3)
    chex.assert_tree_all_finite((updates, state))
    np.testing.assert_allclose(np.abs(updates["v"]), 1.0, rtol=1e-5)


def test_a_scalar_leaf_is_left_alone_unless_it_is_named_a_layer() -> None:
    grads = {"w": jnp.asarray(-4.0)}
    tx = stablegrad()
    updates, state = tx.update(grads, tx.init(grads))
    assert float(updates["w"]) == -4.0
    assert state.grad_scale.shape == (0,)
    tx = stablegrad(layers={"w": LayerAxes(())})
    updates, state = tx.update(grads, tx.init(grads))
    assert float(updates["w"]) == pytest.approx(-1.0)
    np.testing.assert_allclose(state.grad_scale, [4.0])


def test_python_float_leaves_in_init() -> None:
    grads = {"w": jnp.asarray([3.0, -3.0]), "b": jnp.asarray(2.0)}
    tx = stablegrad(layers={"w": LayerAxes(0), "b": LayerAxes(())})
    state = tx.init({"w": jnp.ones(2), "b": 1.0})
    assert (state.grad_scale.shape, state.grad_scale.dtype) == ((2,), jnp.float32)
    updates, _ = jax.jit(tx.update)(grads, state)
    assert float(updates["b"]) == pytest.approx(1.0)
    state = stablegrad().init({"w": jnp.ones(2), "b": 1.0})
    assert state.grad_scale.shape == (1,)


def test_integer_leaves_are_left_alone() -> None:
    grads = {"table": jnp.arange(6), "w": jnp.asarray([1.0, -3.0])}
    tx = stablegrad()
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal(updates["table"], grads["table"])
    assert state.grad_scale.shape == (1,)


def test_gradients_of_another_dtype_than_the_params_keep_their_own() -> None:
    params = {"w": jnp.ones((3, 2), jnp.bfloat16)}
    tx = stablegrad()
    updates, state = tx.update({"w": normal({"w": (3, 2)})["w"]}, tx.init(params))
    assert updates["w"].dtype == jnp.float32
    assert state.grad_scale.dtype == jnp.float32


def test_numpy_gradients_and_unused_extra_arguments_are_accepted() -> None:
    grads = normal(SMALL)
    tx = stablegrad()
    updates, _ = tx.update(grads, tx.init(grads), grads, value=1.0, prediction_grad=None)
    assert isinstance(updates["kernel"], jax.Array)


PREDICTIONS: list[tuple[Any, float]] = [
    (np.float32([1.0, -1.0, 3.0]), statistic(np.float32([1.0, -1.0, 3.0]), True)),
    ({"a": np.float32([2.0]), "b": np.float32([[4.0, 6.0]])}, np.sqrt(8 / 3)),
    (np.float32(-5.0), 5.0),
    (np.full(7, 0.1, np.float32), 0.1),
    ([np.full(3, 1e25, np.float32), np.full(3, -1e25, np.float32)], 1e25),
    ((np.full(3, 1e-30, np.float32), np.full(1, -1e-30, np.float32)), np.sqrt(0.75) * 1e-30),
    ({"a": np.float32([3.0, -3.0]), "none": None}, 3.0),
    (np.complex64([3 + 4j, -3 - 4j]), 5.0),
    (np.zeros(4, np.float32), 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "want"), PREDICTIONS)
def test_reference_is_one_population_over_the_whole_prediction_gradient(
    prediction: Tree, want: float
) -> None:
    grads = {"w": np.float32([2.0, -2.0])}
    tx = stablegrad("prediction", decay=0.0)
    update = jax.jit(lambda g, s, p: tx.update(g, s, prediction_grad=p))
    updates, state = update(grads, tx.init(grads), prediction)
    np.testing.assert_allclose(state.reference_scale, want, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], [want, -want], rtol=1e-5)
    assert state.reference_scale.dtype == jnp.float32


def test_prediction_gradients_of_mixed_dtypes_form_one_population() -> None:
    prediction = {"a": jnp.asarray([1.0, 2.0], jnp.bfloat16), "b": jnp.asarray([4.0, 9.0])}
    grads = {"w": np.float32([2.0, -2.0])}
    tx = stablegrad("prediction")
    _, state = tx.update(grads, tx.init(grads), prediction_grad=prediction)
    np.testing.assert_allclose(state.reference_scale, np.std([1.0, 2.0, 4.0, 9.0]), rtol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
def test_float64_arrays_of_numpy_are_float32_to_jax_as_everywhere(delayed: bool) -> None:
    """A warning would be an error here."""
    grads = {"kernel": np.random.default_rng(0).normal(size=(4, 3))}
    tx = stablegrad(decay=0.0, delayed=delayed)
    updates, state = tx.update(grads, tx.init(grads))
    assert state.grad_scale.dtype == updates["kernel"].dtype == jnp.float32
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)
