"""``layer_scales`` and ``scale_metrics`` find the running scales wherever the state sits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import (
    LayerAxes,
    ScaleHistory,
    layer_scales,
    per_leaf,
    plot_scales,
    scale_metrics,
    scale_table,
    stablegrad,
    stablegrad_adamw,
    stacked,
    weights_only,
)

# Adam mixes dtypes.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("compiled_quickly")]


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "blocks": {"bias": draw(3, 4), "kernel": draw(3, 5, 4)},
        "head": [draw(4, 2), draw(2), draw()],
        "none": None,
    }


def after_one_step(tx: optax.GradientTransformationExtraArgs, grads: Any) -> Any:
    return jax.jit(lambda: tx.update(grads, tx.init(grads), grads)[1])()


def expected(grads: Any) -> dict[str, Any]:
    kernel, bias = (np.asarray(grads["blocks"][k]) for k in ("kernel", "bias"))
    return {
        "blocks/bias": np.sqrt((bias**2).mean(1)),
        "blocks/kernel": kernel.std((1, 2)),
        "head/0": np.asarray(grads["head"][0]).std(),
        "head/1": np.sqrt((np.asarray(grads["head"][1]) ** 2).mean()),
    }


def plain(**options: Any) -> optax.GradientTransformationExtraArgs:
    return stablegrad(decay=0.0, layers=stacked("blocks"), **options)


WRAPPED: dict[str, Any] = {
    "bare": plain(),
    "chain": optax.chain(optax.clip(1e9), plain(), optax.adam(1e-3)),
    "nested": optax.chain(optax.chain(plain(), optax.scale(2.0)), optax.sgd(0.1, momentum=0.9)),
    "apply_if_finite": optax.apply_if_finite(optax.chain(plain(), optax.adam(1e-3)), 3),
    "multi_steps": optax.MultiSteps(optax.chain(plain(), optax.sgd(0.1)), 1),
    "inject_hyperparams": optax.inject_hyperparams(stablegrad, static_args=("layers",))(
        decay=0.0, layers=stacked("blocks")
    ),
    "optimizer": stablegrad_adamw(1e-3, decay=0.0, layers=stacked("blocks")),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED.keys())
def test_scales_by_path_wherever_the_state_sits(tx: Any) -> None:
    grads = tree()
    scales = layer_scales(after_one_step(tx, grads), grads, stacked("blocks"))
    want = expected(grads)
    assert list(scales) == list(want)
    for path, scale in scales.items():
        assert isinstance(scale, jax.Array)
        assert scale.shape == np.shape(want[path])
        np.testing.assert_allclose(scale, want[path], rtol=1e-5)


OF_THE_BLOCKS = {
    "masked": optax.chain(
        optax.masked(plain(), {"blocks": True, "head": False, "none": False}), optax.adam(1e-3)
    ),
    "partition": optax.partition(
        {"scaled": optax.chain(plain(), optax.sgd(0.1)), "plain": optax.adam(1e-3)},
        {"blocks": "scaled", "head": "plain", "none": "plain"},
    ),
}


@pytest.mark.parametrize("tx", OF_THE_BLOCKS.values(), ids=OF_THE_BLOCKS.keys())
def test_of_a_part_of_the_params_the_rest_is_none(tx: Any) -> None:
    grads = tree()
    state, blocks = after_one_step(tx, grads), {**grads, "head": None}
    scales = layer_scales(state, blocks, stacked("blocks"))
    for path in ("blocks/bias", "blocks/kernel"):
        np.testing.assert_allclose(scales.pop(path), expected(grads)[path], rtol=1e-5)
    assert scales == {}
    with pytest.raises(ValueError, match="params with None in place of the leaves"):
        layer_scales(state, grads, stacked("blocks"))


@pytest.mark.parametrize("name", [*WRAPPED, *OF_THE_BLOCKS])
def test_every_diagnostic_has_the_same_layers_and_scales_wherever_the_state_sits(name: str) -> None:
    grads, layers = tree(), stacked("blocks")
    state = after_one_step({**WRAPPED, **OF_THE_BLOCKS}[name], grads)
    params = {**grads, "head": None} if name in OF_THE_BLOCKS else grads

    metrics = scale_metrics(state, params, layers, prefix="")
    scales = layer_scales(state, params, layers)
    assert list(metrics.values()) == [x for scale in scales.values() for x in np.ravel(scale)]
    rows = scale_table(state, params, layers, grads=params).rows
    assert {row.layer: row.grad_scale for row in rows} == metrics
    history = ScaleHistory.init(state).record(state)
    assert list(history.in_order().grad_scale[0]) == list(metrics.values())
    heat_map = plot_scales(history, params, layers).axes[0]
    assert [label.get_text() for label in heat_map.get_yticklabels()] == list(metrics)


def test_metrics_are_floats_with_one_name_for_each_layer_in_tree_order() -> None:
    grads = tree()
    state = after_one_step(plain(), grads)
    metrics = scale_metrics(state, grads, stacked("blocks"))
    assert list(metrics) == [
        *(f"grad_scale/blocks/bias/{layer}" for layer in range(3)),
        *(f"grad_scale/blocks/kernel/{layer}" for layer in range(3)),
        *("grad_scale/head/0", "grad_scale/head/1"),
    ]
    assert all(type(value) is float for value in metrics.values())
    flat = np.concatenate([np.ravel(scale) for scale in expected(grads).values()])
    np.testing.assert_allclose(list(metrics.values()), flat, rtol=1e-5)


def test_layers_along_two_axes_have_two_indices_in_their_names() -> None:
    params = {"w": jnp.ones((2, 3, 4))}
    layers = {"w": LayerAxes(-1)}
    state = stablegrad(layers=layers).init(params)
    names = list(scale_metrics(state, params, layers, prefix="scale of "))
    assert names == [f"scale of w/{i}/{j}" for i in range(2) for j in range(3)]


@pytest.mark.parametrize("layers", [per_leaf, weights_only])
def test_leaves_without_layer_axes_are_not_in_it(layers: Any) -> None:
    grads = tree()
    scales = layer_scales(after_one_step(stablegrad(layers=layers), grads), grads, layers)
    names = ["blocks/bias", "blocks/kernel", "head/0"]
    assert list(scales) == names + (["head/1"] if layers is per_leaf else [])
    assert all(scale.shape == () for scale in scales.values())


def test_the_default_rule_is_per_leaf() -> None:
    grads = tree()
    state = after_one_step(stablegrad(), grads)
    assert list(layer_scales(state, grads)) == list(layer_scales(state, grads, per_leaf))


def test_scales_have_the_shape_of_the_axes_that_are_not_pooled() -> None:
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)}
    layers = {"w": LayerAxes(1)}
    scales = layer_scales(
        after_one_step(stablegrad(decay=0.0, layers=layers), grads), grads, layers
    )
    np.testing.assert_allclose(scales["w"], np.asarray(grads["w"]).std(1), rtol=1e-5)


def test_works_compiled_and_on_abstract_params() -> None:
    grads = tree()
    state = after_one_step(plain(), grads)
    eager = layer_scales(state, grads, stacked("blocks"))
    compiled = jax.jit(lambda s: layer_scales(s, grads, stacked("blocks")))(state)
    shapes = jax.eval_shape(lambda: grads)
    for path, scale in layer_scales(state, shapes, stacked("blocks")).items():
        np.testing.assert_array_equal(scale, eager[path])
        np.testing.assert_array_equal(compiled[path], eager[path])


def test_a_fresh_state_has_zero_scales_and_an_empty_one_none() -> None:
    grads = tree()
    fresh = layer_scales(stablegrad().init(grads), grads)
    assert all(float(scale) == 0.0 for scale in fresh.values())
    assert layer_scales(stablegrad().init({}), {}) == {}


def test_no_state_is_an_error() -> None:
    grads = tree()
    with pytest.raises(ValueError, match="stablegrad"):
        layer_scales(optax.adam(1e-3).init(grads), grads)


def test_more_than_one_state_is_an_error() -> None:
    grads = tree()
    with pytest.raises(ValueError, match=r"2|one|more"):
        layer_scales(optax.chain(stablegrad(), stablegrad()).init(grads), grads)


@pytest.mark.parametrize("other", [{"w": jnp.ones((2, 2))}, {}])
def test_params_that_do_not_fit_the_count_are_an_error(other: Any) -> None:
    grads = tree()
    with pytest.raises(ValueError, match="layers"):
        layer_scales(stablegrad().init(grads), other)
    with pytest.raises(ValueError, match="layers"):
        layer_scales(plain().init(grads), grads)
