"""What each rule makes of each kind of leaf."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import (
    LayerAxes,
    layer_scales,
    per_leaf,
    stablegrad,
    stacked,
    weights_only,
)
from stablegrad_optax._layers import _split, _split_apart

Rule = tuple[tuple[int, ...], bool] | None


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def plain(layers: Any, params: Any) -> Any:
    """The rule's result as ``(sorted non-negative axes, centered)`` or None, leaf by leaf."""

    def one(leaf: Any, axes: LayerAxes | None) -> Rule:
        if axes is None:
            return None
        reduce = (axes.reduce,) if isinstance(axes.reduce, int) else axes.reduce
        return tuple(sorted(a % leaf.ndim for a in reduce)), axes.centered

    none = lambda x: x is None  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=none)
    results = jax.tree.leaves(layers, is_leaf=none)
    return [one(leaf, axes) for leaf, axes in zip(leaves, results, strict=True)]


RULES: list[tuple[Any, Rule, Rule]] = [
    # leaf, per_leaf, weights_only
    (struct(4, 3), ((0, 1), True), ((0, 1), True)),
    (struct(3, 3, 4, 8), ((0, 1, 2, 3), True), ((0, 1, 2, 3), True)),
    (struct(1, 5), ((0, 1), True), ((0, 1), True)),
    (struct(7), ((0,), False), None),
    (struct(2), ((0,), False), None),
    (struct(4, 3, dtype=jnp.bfloat16), ((0, 1), True), ((0, 1), True)),
    (struct(4, 3, dtype=jnp.complex64), ((0, 1), True), ((0, 1), True)),
    (struct(), None, None),
    (struct(1), None, None),
    (struct(1, 1), None, None),
    (struct(1, 1, 1), None, None),
    (struct(0), None, None),
    (struct(0, 3), None, None),
    (struct(4, 3, dtype=jnp.int32), None, None),
    (struct(7, dtype=jnp.bool_), None, None),
    (struct(7, dtype=jnp.uint8), None, None),
]


@pytest.mark.parametrize(("leaf", "by_leaf", "by_weights"), RULES, ids=repr)
def test_rules_on_each_kind_of_leaf(leaf: Any, by_leaf: Rule, by_weights: Rule) -> None:
    params = {"x": leaf}
    assert plain(per_leaf(params), params) == [by_leaf]
    assert plain(weights_only(params), params) == [by_weights]
    array = {"x": jnp.zeros(leaf.shape, leaf.dtype)}
    assert plain(per_leaf(array), array) == [by_leaf]


@pytest.mark.parametrize("rule", [per_leaf, weights_only, stacked("x")])
def test_rules_keep_the_structure_and_skip_none(rule: Any) -> None:
    params = {"a": None, "b": [struct(3, 2), (struct(4, 5),)], "c": optax.MaskedNode()}
    layers = rule(params)
    kept = jax.tree.map(lambda p: 0, params)
    marked = jax.tree.map(lambda p: 0, layers, is_leaf=lambda x: isinstance(x, LayerAxes))
    assert jax.tree.structure(kept) == jax.tree.structure(marked)


def test_rules_accept_python_numbers() -> None:
    assert plain(per_leaf({"x": 1.0}), {"x": np.float32(1.0)}) == [None]
    assert plain(weights_only({"x": 1.0}), {"x": np.float32(1.0)}) == [None]


PARAMS = {
    "blocks": {"bias": struct(6, 4), "gate": struct(6), "kernel": struct(6, 3, 4)},
    "head": {"kernel": struct(4, 2)},
    "layers": [struct(3, 4), struct(5, 2, 2)],
}
WHOLE_MATRIX: Rule = ((0, 1), True)
STACKED: list[tuple[Any, list[Rule]]] = [
    # bias, gate, kernel, head/kernel, layers/0, layers/1
    (
        stacked("blocks"),
        [((1,), False), None, ((1, 2), True), WHOLE_MATRIX, WHOLE_MATRIX, ((0, 1, 2), True)],
    ),
    (
        stacked("^blocks/kernel$"),
        [WHOLE_MATRIX, ((0,), False), ((1, 2), True), WHOLE_MATRIX, WHOLE_MATRIX,
         ((0, 1, 2), True)],
    ),
    (
        stacked("kernel"),
        [WHOLE_MATRIX, ((0,), False), ((1, 2), True), ((1,), False), WHOLE_MATRIX,
         ((0, 1, 2), True)],
    ),
    (
        stacked("layers/1"),
        [WHOLE_MATRIX, ((0,), False), ((0, 1, 2), True), WHOLE_MATRIX, WHOLE_MATRIX,
         ((1, 2), True)],
    ),
    (
        stacked("blocks", weights_only),
        [None, None, ((1, 2), True), WHOLE_MATRIX, WHOLE_MATRIX, ((0, 1, 2), True)],
    ),
    (
        stacked("nothing"),
        [WHOLE_MATRIX, ((0,), False), ((0, 1, 2), True), WHOLE_MATRIX, WHOLE_MATRIX,
         ((0, 1, 2), True)],
    ),
    (
        stacked("blocks", rule=stacked("kernel")),
        [((1,), False), None, ((2,), False), ((1,), False), WHOLE_MATRIX, ((0, 1, 2), True)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "want"), STACKED)
def test_stacked_gives_every_slice_of_a_matched_leaf_to_the_rule(
    rule: Any, want: list[Rule]
) -> None:
    assert plain(rule(PARAMS), PARAMS) == want


def test_stacked_shifts_negative_axes_and_int_axes_of_a_users_rule_rightly() -> None:
    last = lambda params: jax.tree.map(lambda _: LayerAxes(-1), params)  # noqa: E731
    first = lambda params: jax.tree.map(lambda _: LayerAxes(0, False), params)  # noqa: E731
    params = {"w": struct(6, 3, 4)}
    assert plain(stacked("w", last)(params), params) == [((2,), True)]
    assert plain(stacked("w", first)(params), params) == [((1,), False)]


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (2, 3, 4, 5)])
def test_stacked_layers_have_one_scale_a_slice(shape: tuple[int, ...]) -> None:
    grads = {"w": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    tx = stablegrad(decay=0.0, layers=stacked("w"))
    _, state = tx.update(grads, tx.init(grads))
    flat = grads["w"].reshape(shape[0], -1)
    want = flat.std(1) if len(shape) > 2 else np.sqrt((flat**2).mean(1))
    np.testing.assert_allclose(state.grad_scale, want, rtol=1e-5)


def test_stacked_checks_its_pattern() -> None:
    with pytest.raises((ValueError, TypeError), match=r"\("):
        stacked("(unclosed")


def test_layer_axes_is_frozen_hashable_and_centered_by_default() -> None:
    axes = LayerAxes((0, 1))
    assert axes.centered is True
    assert axes == LayerAxes((0, 1), centered=True)
    assert axes != LayerAxes((0, 1), centered=False)
    assert len({axes, LayerAxes((0, 1))}) == 1
    field = "centered"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(axes, field, False)
    assert jax.tree.leaves({"a": axes}) == [axes]


@pytest.mark.parametrize("reduce", ["0", 1.5, (0, 1.5), None])
def test_layer_axes_of_a_wrong_kind_are_an_error(reduce: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        stablegrad(layers={"w": LayerAxes(reduce)}).init({"w": jnp.zeros((2, 3))})


def test_a_tree_of_layers_and_a_function_of_params_are_the_same() -> None:
    grads = {"w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}
    tree = {"w": LayerAxes(0)}
    results = []
    for layers in (tree, lambda params: tree):
        tx = stablegrad(layers=layers)
        results.append(tx.update(grads, tx.init(grads)))
    np.testing.assert_array_equal(results[0][0]["w"], results[1][0]["w"])
    assert results[0][1].grad_scale.shape == (4,)


def test_a_function_of_params_may_choose_by_path() -> None:
    def by_path(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: LayerAxes(0) if "w" in jax.tree_util.keystr(path) else None, params
        )

    grads = {"b": jnp.ones(3), "w": jnp.asarray([[1.0, 2.0], [-1.0, 6.0]])}
    tx = stablegrad(decay=0.0, layers=by_path)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(state.grad_scale, [1.0, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 1.0)


def test_layers_may_be_a_tree_that_is_callable() -> None:
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Linear:
        kernel: Any

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.kernel

    tx = stablegrad(layers=Linear(LayerAxes(1)))
    assert tx.init(Linear(jnp.ones((3, 4)))).grad_scale.shape == (3,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """What Flax keeps an array in, and takes off between init and update of an optimizer."""

    value: Any


@pytest.mark.parametrize("layers", [stacked("kernel$"), {"kernel": LayerAxes(1), "bias": None}])
@pytest.mark.parametrize("boxed_layers", [False, True])
def test_layers_fit_an_array_in_its_box_and_out_of_it(layers: Any, boxed_layers: bool) -> None:
    if boxed_layers and isinstance(layers, dict):
        layers = {"kernel": Box(layers["kernel"]), "bias": Box(layers["bias"])}
    bare = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(1)}
    boxed = {name: Box(leaf) for name, leaf in bare.items()}
    tx = stablegrad(layers=layers)
    _, state = tx.update(bare, tx.init(boxed))
    assert state.grad_scale.shape == (3,)
    assert set(layer_scales(state, boxed, layers)) == {"kernel/value"}
    assert set(layer_scales(state, bare, layers)) == {"kernel"}


@pytest.mark.parametrize("rule", [per_leaf, weights_only, stacked("w")])
def test_a_leaf_that_is_a_function_is_an_error_that_names_the_filter(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"arrays or numbers.*tanh.*eqx\.filter"):
        stablegrad(layers=rule).init({"activation": jnp.tanh, "w": jnp.ones((2, 3))})


def test_a_slash_in_a_key_does_not_confuse_two_leaves() -> None:
    params = {"a/b": jnp.ones(4), "a": {"b": jnp.ones((4, 3))}}
    assert stablegrad().init(params).grad_scale.shape == (2,)


@pytest.mark.parametrize("sizes", [(), (1,), (3,), (1, 1, 1), (2, 1, 5, 1), (2, *[1] * 130, 3)])
def test_every_platform_splits_the_vector_alike(sizes: tuple[int, ...]) -> None:
    vector = jnp.arange(1.0, sum(sizes) + 1)
    for split in (_split, _split_apart):
        pieces = jax.jit(partial(split, sizes=sizes))(vector)
        assert [piece.shape for piece in pieces] == [(size,) for size in sizes]
        np.testing.assert_array_equal(np.concatenate([*pieces, vector[:0]]), vector)
