"""One forward and one backward pass give value, gradients and prediction gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import prediction_value_and_grad, stablegrad

Tree = Any


def make_params(seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": draw(3, 8), "b": draw(8), "c": draw(8, 8), "d": draw(8, 2)}


def make_batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
    )


def predict(params: Tree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    del targets
    hidden = jnp.tanh(inputs @ params["a"] + params["b"])
    return jnp.tanh(hidden @ params["c"]) @ params["d"]


def loss(prediction: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    del inputs
    return jnp.mean((prediction - targets) ** 2)


def composed(params: Tree, *args: Any, **kwargs: Any) -> jax.Array:
    return loss(predict(params, *args, **kwargs), *args, **kwargs)


def matrix_products(f: Callable[..., Any], *args: Any) -> int:
    text = jax.jit(f).lower(*args).compile().as_text()
    products = re.findall(r" dot\(|custom_call_target=\"[^\"]*(?:matmul|gemm|dot)", text, re.I)
    return len(products)


@pytest.mark.parametrize("compiled", [False, True])
def test_equals_value_and_grad_of_the_composition(compiled: bool) -> None:
    params, batch = make_params(), make_batch()
    f: Any = prediction_value_and_grad(predict, loss)
    g: Any = jax.value_and_grad(composed)
    if compiled:
        f, g = jax.jit(f), jax.jit(g)
    value, (grads, prediction_grad) = f(params, *batch)
    want_value, want_grads = g(params, *batch)
    chex.assert_trees_all_close((value, grads), (want_value, want_grads), rtol=1e-5, atol=1e-7)
    want = 2 * (predict(params, *batch) - batch[1]) / batch[1].size
    np.testing.assert_allclose(prediction_grad, want, rtol=1e-5, atol=1e-7)


def test_costs_the_same_number_of_matrix_products() -> None:
    params, batch = make_params(), make_batch()
    ours = matrix_products(prediction_value_and_grad(predict, loss), params, *batch)
    plain = matrix_products(jax.value_and_grad(composed), params, *batch)
    assert ours == plain
    assert plain == 3 + 3 + 2
    twice = matrix_products(
        lambda p, *b: (jax.value_and_grad(composed)(p, *b), predict(jax.tree.map(jnp.cos, p), *b)),
        params,
        *batch,
    )
    assert twice > plain


def test_calls_predict_and_loss_once() -> None:
    calls = []

    def counted(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            calls.append(name)
            return f(*args)

        return wrapper

    f = prediction_value_and_grad(counted("predict", predict), counted("loss", loss))
    f(make_params(), *make_batch())
    assert sorted(calls) == ["loss", "predict"]


def test_both_functions_get_the_same_positional_and_keyword_arguments() -> None:
    def predict(params: jax.Array, scale: jax.Array, *, shift: float) -> jax.Array:
        return params * scale + shift

    def loss(prediction: jax.Array, scale: jax.Array, *, shift: float) -> jax.Array:
        return jnp.sum(prediction * scale) + shift

    params, scale = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 5.0])
    value, (grads, prediction_grad) = prediction_value_and_grad(predict, loss)(
        params, scale, shift=0.5
    )
    assert float(value) == pytest.approx(3 * 3.5 + 5 * 10.5 + 0.5)
    np.testing.assert_allclose(grads, scale**2)
    np.testing.assert_allclose(prediction_grad, scale)


def predict_aux(params: Tree, *batch: Any) -> Any:
    return predict(params, *batch), {"norm": jnp.sum(params["b"] ** 2), "count": 3}


def loss_aux(prediction: jax.Array, *batch: Any) -> Any:
    return loss(prediction, *batch), {"error": prediction - batch[1]}


AUX: list[tuple[bool, bool]] = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("has_aux", "predict_has_aux"), AUX)
@pytest.mark.parametrize("compiled", [False, True])
def test_aux_of_either_function(has_aux: bool, predict_has_aux: bool, compiled: bool) -> None:
    params, batch = make_params(), make_batch()
    f: Any = prediction_value_and_grad(
        predict_aux if predict_has_aux else predict,
        loss_aux if has_aux else loss,
        has_aux=has_aux,
        predict_has_aux=predict_has_aux,
    )
    value, (grads, _) = (jax.jit(f) if compiled else f)(params, *batch)
    want_value, want_grads = jax.value_and_grad(composed)(params, *batch)
    from_predict = {"norm": jnp.sum(params["b"] ** 2), "count": 3}
    from_loss = {"error": predict(params, *batch) - batch[1]}
    want: Any = want_value
    if has_aux and predict_has_aux:
        want = (want_value, (from_predict, from_loss))
    elif has_aux or predict_has_aux:
        want = (want_value, from_loss if has_aux else from_predict)
    assert jax.tree.structure(value) == jax.tree.structure(want)
    chex.assert_trees_all_close(value, want, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(grads, want_grads, rtol=1e-5, atol=1e-7)


def test_aux_of_loss_has_the_form_of_jax_value_and_grad() -> None:
    params, batch = make_params(), make_batch()
    ours = prediction_value_and_grad(predict, loss_aux, has_aux=True)(params, *batch)[0]
    both = jax.value_and_grad(lambda p: loss_aux(predict(p, *batch), *batch), has_aux=True)
    chex.assert_trees_all_close(ours, both(params)[0], rtol=1e-5, atol=1e-6)


def test_pytree_predictions_of_a_physics_loss_with_input_derivatives() -> None:
    """Residual and boundary values enter the loss: both are the prediction."""

    def network(params: Tree, x: jax.Array) -> jax.Array:
        return (jnp.tanh(x[None, None] @ params["a"][:1] + params["b"]) @ params["d"])[0, 0]

    def predict(params: Tree, points: jax.Array) -> Tree:
        second = jax.vmap(jax.grad(jax.grad(network, 1), 1), (None, 0))(params, points)
        edges = jax.vmap(network, (None, 0))(params, jnp.asarray([-1.0, 1.0]))
        return {"residual": second + jnp.sin(points), "boundary": (edges,)}

    def loss(prediction: Tree, points: jax.Array) -> jax.Array:
        del points
        residual, (edges,) = prediction["residual"], prediction["boundary"]
        return jnp.mean(residual**2) + 10.0 * jnp.mean(edges**2)

    params, points = make_params(), jnp.linspace(-1.0, 1.0, 7)
    value, (grads, prediction_grad) = jax.jit(prediction_value_and_grad(predict, loss))(
        params, points
    )
    want = jax.value_and_grad(lambda p: loss(predict(p, points), points))(params)
    chex.assert_trees_all_close((value, grads), want, rtol=1e-5, atol=1e-6)
    prediction = predict(params, points)
    expected = {
        "residual": 2 * prediction["residual"] / 7,
        "boundary": (10.0 * prediction["boundary"][0],),
    }
    chex.assert_trees_all_close(prediction_grad, expected, rtol=1e-5, atol=1e-6)

    tx = stablegrad("prediction", decay=0.0)
    _, state = tx.update(grads, tx.init(params), prediction_grad=prediction_grad)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected)])
    np.testing.assert_allclose(state.reference_scale, flat.std(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_predictions_keep_their_dtype(dtype: Any) -> None:
    params = jax.tree.map(lambda p: p.astype(dtype), make_params())
    batch = tuple(b.astype(dtype) for b in make_batch())
    value, (grads, prediction_grad) = prediction_value_and_grad(predict, loss)(params, *batch)
    want = jax.value_and_grad(composed)(params, *batch)
    chex.assert_trees_all_equal((value, grads), want)
    assert prediction_grad.dtype == dtype


def test_complex_params_follow_jax_grad() -> None:
    params = jnp.asarray([1.0 + 2.0j, -0.5j])
    predict = lambda p: p * p  # noqa: E731
    loss = lambda y: jnp.sum(jnp.abs(y) ** 2)  # noqa: E731
    value, (grads, prediction_grad) = prediction_value_and_grad(predict, loss)(params)
    want_value, want = jax.value_and_grad(lambda p: loss(predict(p)))(params)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    np.testing.assert_allclose(grads, want, rtol=1e-6)
    np.testing.assert_allclose(prediction_grad, jax.grad(loss)(predict(params)), rtol=1e-6)


def test_vmap_over_examples_gives_per_example_gradients() -> None:
    params, (inputs, targets) = make_params(), make_batch()
    f = prediction_value_and_grad(predict, loss)
    values, (grads, prediction_grad) = jax.vmap(f, (None, 0, 0))(params, inputs, targets)
    _, want = jax.vmap(jax.value_and_grad(composed), (None, 0, 0))(params, inputs, targets)
    assert values.shape == (5,)
    assert prediction_grad.shape == (5, 2)
    chex.assert_trees_all_close(grads, want, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_a_scalar_is_an_error() -> None:
    vector = lambda prediction, *batch: prediction.sum(0)  # noqa: E731
    with pytest.raises((ValueError, TypeError)):
        prediction_value_and_grad(predict, vector)(make_params(), *make_batch())


def test_trains_with_the_prediction_reference() -> None:
    tx = optax.chain(stablegrad("prediction"), optax.sgd(0.5, momentum=0.9))
    params, batch = make_params(), make_batch()
    f = prediction_value_and_grad(predict, loss)

    @jax.jit
    def step(params: Tree, state: Tree) -> Any:
        value, (grads, prediction_grad) = f(params, *batch)
        updates, state = tx.update(grads, state, params, prediction_grad=prediction_grad)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    values = []
    for _ in range(100):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
