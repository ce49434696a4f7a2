"""The transform against its recurrences, its scale laws, and every way JAX can run it."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from oracle import Axes, Oracle, statistic, statistics

from stablegrad_optax import (
    LayerAxes,
    StableGradState,
    per_leaf,
    stablegrad,
    stablegrad_adam,
    stablegrad_adamw,
    stablegrad_sgd,
    stacked,
    weights_only,
)

# Newer versions of JAX have it at the top.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

Tree = Any
STEPS = 50

law = settings(max_examples=40, deadline=None, derandomize=True)

# Every rank and every kind of layer: (shape, pooled axes and centering, or None).
MIXED: dict[str, tuple[tuple[int, ...], Axes]] = {
    "a_dense": ((4, 3), ((0, 1), True)),
    "b_bias": ((3,), ((0,), False)),
    "c_stack": ((3, 4, 2), ((1, 2), True)),
    "d_conv": ((2, 2, 3, 2), ((0, 1, 2, 3), True)),
    "e_scalar": ((), None),
    "f_middle": ((2, 5, 3), ((-2,), True)),
    "g_entries": ((2,), ((), True)),
    "h_rms": ((3, 2), ((0, 1), False)),
    "i_late": ((2, 6), ((1,), True)),
}
MIXED_LAYERS = {
    name: axes if axes is None else LayerAxes(*axes) for name, (_, axes) in MIXED.items()
}
MIXED_AXES = [axes for _, axes in MIXED.values()]
MIXED_COUNT = 1 + 1 + 3 + 1 + 0 + 6 + 2 + 1 + 2
PREDICTION_SHAPES = {"boundary": (5,), "residual": (7, 2)}

SMALL = {"kernel": (4, 3), "bias": (3,), "stack": (2, 3, 2)}
SMALL_AXES: list[Axes] = [((0,), False), ((0, 1), True), ((1, 2), True)]
SMALL_LAYERS = {
    "bias": LayerAxes(0, centered=False),
    "kernel": LayerAxes((0, 1)),
    "stack": LayerAxes((1, 2)),
}


def normal(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in sorted(shapes.items())}


def mixed_steps(seed: int = 0) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Gradients whose common scale swings over 30 decades and whose layers die and wake."""
    rng = np.random.default_rng(seed)
    imbalance = {name: 10.0 ** rng.uniform(-3, 3) for name in MIXED}
    for t in range(STEPS):
        common = 10.0 ** (15.0 * np.sin(2 * np.pi * t / STEPS))
        grads = {
            name: (common * imbalance[name] * (0.7 + rng.normal(size=shape))).astype(np.float32)
            for name, (shape, _) in MIXED.items()
        }
        grads["c_stack"][1] *= 0.0 if 20 <= t < 25 else 1.0
        grads["a_dense"] *= np.float32(0.0 if 30 <= t < 33 else 1.0)
        grads["i_late"][0] *= 0.0 if t < 10 else 1.0
        drift = 10.0 ** (3.0 * np.cos(t / 7))
        prediction = {
            name: (drift * (0.5 + rng.normal(size=shape))).astype(np.float32)
            for name, shape in PREDICTION_SHAPES.items()
        }
        yield grads, prediction


def assert_matches(update: Callable[..., Any], oracle: Oracle) -> None:
    state = StableGradState(jnp.zeros(MIXED_COUNT), jnp.zeros(()))
    for t, (grads, prediction) in enumerate(mixed_steps()):
        updates, state = update(grads, state, prediction)
        expected = oracle.step(list(grads.values()), list(prediction.values()))
        np.testing.assert_allclose(
            state.grad_scale, oracle.grad_scale, rtol=1e-5, err_msg=f"grad_scale at {t}"
        )
        np.testing.assert_allclose(state.reference_scale, oracle.reference_scale, rtol=1e-5)
        for name, want in zip(grads, expected, strict=True):
            np.testing.assert_allclose(
                updates[name], want, rtol=1e-5, atol=1e-36, err_msg=f"{name} at {t}"
            )


# --- The recurrences -----------------------------------------------------------------------


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("reference", [0.37, "prediction"])
def test_agrees_with_the_float64_oracle_over_50_steps(
    reference: float | str, delayed: bool
) -> None:
    """Decay and balance are traced: one compilation serves the whole grid."""

    @jax.jit
    def update(grads: Tree, state: Tree, prediction: Tree, decay: Any, balance: Any) -> Any:
        tx = stablegrad(
            reference, decay=decay, balance=balance, delayed=delayed, layers=MIXED_LAYERS
        )
        return tx.update(grads, state, prediction_grad=prediction)

    for decay in (0.0, 0.5, 0.9):
        for balance in (0.0, 0.5, 1.0):
            oracle = Oracle(MIXED_AXES, reference, decay, balance, delayed)
            assert_matches(partial(update, decay=decay, balance=balance), oracle)
    assert update._cache_size() == 1


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    ("reference", "decay", "balance"),
    [(0.37, 0.0, 1.0), (1.0, 0.9, 0.5), ("prediction", 0.9, 1.0), ("prediction", 0.5, 0.0)],
)
def test_agrees_with_the_oracle_when_every_number_is_a_constant(
    reference: float | str, decay: float, balance: float, delayed: bool
) -> None:
    tx = stablegrad(reference, decay=decay, balance=balance, delayed=delayed, layers=MIXED_LAYERS)
    update = jax.jit(lambda g, s, p: tx.update(g, s, prediction_grad=p))
    assert_matches(update, Oracle(MIXED_AXES, reference, decay, balance, delayed))


def test_init_is_zeros_of_the_documented_shape_and_dtype() -> None:
    params = {name: jnp.ones(shape) for name, (shape, _) in MIXED.items()}
    state = stablegrad(layers=MIXED_LAYERS).init(params)
    assert isinstance(state, StableGradState)
    assert state._fields == ("grad_scale", "reference_scale")
    assert (state.grad_scale.shape, state.grad_scale.dtype) == ((MIXED_COUNT,), jnp.float32)
    assert (state.reference_scale.shape, state.reference_scale.dtype) == ((), jnp.float32)
    assert not np.any(state.grad_scale)
    assert not np.any(state.reference_scale)


def test_defaults_are_reference_1_decay_09_balance_1_this_step_per_leaf() -> None:
    grads = [normal(SMALL, seed) for seed in range(3)]
    explicit = stablegrad(1.0, decay=0.9, balance=1.0, delayed=False, layers=per_leaf)
    outcomes = []
    for tx in (stablegrad(), explicit):
        state, update = tx.init(grads[0]), jax.jit(tx.update)
        for g in grads:
            updates, state = update(g, state)
        outcomes.append((updates, state))
    chex.assert_trees_all_equal(*outcomes)


def test_the_papers_rule_at_decay_zero() -> None:
    grads, prediction = normal(SMALL), {"y": np.float32([1.0, -3.0, 5.0])}
    tx = stablegrad("prediction", decay=0.0)
    updates, _ = tx.update(grads, tx.init(grads), prediction_grad=prediction)
    want = grads["kernel"] * np.std(prediction["y"]) / np.std(grads["kernel"])
    np.testing.assert_allclose(updates["kernel"], want, rtol=1e-6)


def test_delayed_equals_undelayed_on_the_first_step_and_lags_by_one_after() -> None:
    first, second = normal(SMALL), jax.tree.map(lambda g: 100 * g, normal(SMALL, 1))
    now, delayed = (stablegrad(decay=0.0, delayed=flag) for flag in (False, True))
    one_now, state_now = now.update(first, now.init(first))
    one_delayed, state_delayed = delayed.update(first, delayed.init(first))
    chex.assert_trees_all_close((one_now, state_now), (one_delayed, state_delayed), rtol=1e-6)

    lagging, state = delayed.update(second, state_delayed)
    want = second["kernel"] / np.std(first["kernel"])
    np.testing.assert_allclose(lagging["kernel"], want, rtol=1e-5)
    _, state_now = now.update(second, state_now)
    chex.assert_trees_all_close(state, state_now, rtol=1e-6)


def test_delayed_uses_this_steps_statistic_for_a_layer_that_comes_alive() -> None:
    grads = normal(SMALL)
    asleep = {**grads, "kernel": np.zeros_like(grads["kernel"])}
    tx = stablegrad(decay=0.5, delayed=True)
    updates, state = tx.update(asleep, tx.init(grads))
    np.testing.assert_array_equal(updates["kernel"], 0.0)
    updates, state = tx.update(grads, state)
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)


def test_delayed_prediction_reference_is_of_this_step() -> None:
    grads = normal(SMALL)
    tx = stablegrad("prediction", decay=0.0, delayed=True)
    state = tx.init(grads)
    for scale in (1.0, 50.0):
        prediction = np.float32([-scale, scale])
        updates, state = tx.update(grads, state, prediction_grad=prediction)
        assert float(state.reference_scale) == pytest.approx(scale, rel=1e-6)
        assert np.std(updates["kernel"]) == pytest.approx(scale, rel=1e-5)


def test_a_dead_layer_has_gain_one_and_its_scale_decays_by_d() -> None:
    grads = normal(SMALL)
    dead = {**grads, "kernel": np.zeros_like(grads["kernel"])}
    tx = stablegrad(5.0, decay=0.75)
    updates, state = tx.update(dead, tx.init(grads))
    np.testing.assert_array_equal(updates["kernel"], 0.0)
    _, state = tx.update(grads, state)
    before = state.grad_scale
    updates, state = tx.update(dead, state)
    np.testing.assert_array_equal(updates["kernel"], 0.0)
    np.testing.assert_allclose(state.grad_scale[1], 0.75 * before[1], rtol=1e-6)


def test_a_layer_with_scale_zero_has_gain_one_not_the_reference() -> None:
    """Only a non-finite gradient can show the gain of a layer whose scale is 0."""
    tx = stablegrad(5.0, layers={"w": LayerAxes(0)})
    grads = {"w": np.float32([np.nan, 2.0, -3.0])}
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], grads["w"])
    np.testing.assert_array_equal(state.grad_scale, 0.0)


def test_leaves_without_layer_axes_pass_bit_for_bit() -> None:
    grads = {"w": normal(SMALL)["kernel"], "scalar": np.float32(3.3), "off": np.float32([1, 2])}
    tx = stablegrad(7.0, layers={"w": LayerAxes((0, 1)), "scalar": None, "off": None})
    updates, state = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_equal(
        {k: updates[k] for k in ("scalar", "off")}, {k: grads[k] for k in ("scalar", "off")}
    )
    assert state.grad_scale.shape == (1,)


def test_weights_only_leaves_biases_alone() -> None:
    grads = normal(SMALL)
    tx = stablegrad(layers=weights_only)
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["bias"], grads["bias"])
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)
    assert state.grad_scale.shape == (2,)


def test_pooled_scale_counts_every_entry_once() -> None:
    """A layer of 100 entries weighs 100 times one of a single entry; dead entries count too."""
    grads = {"big": np.full(100, 2.0, np.float32), "dead": np.zeros(27, np.float32),
             "one": np.float32([1000.0])}  # fmt: skip
    layers = {"big": LayerAxes(0, False), "dead": LayerAxes(0, False), "one": LayerAxes(0, False)}
    tx = stablegrad(1.0, balance=0.0, layers=layers)
    updates, _ = tx.update(grads, tx.init(grads))
    pooled = np.sqrt((100 * 2.0**2 + 1000.0**2) / 128)
    np.testing.assert_allclose(updates["big"], 2.0 / pooled, rtol=1e-6)
    np.testing.assert_allclose(updates["one"], 1000.0 / pooled, rtol=1e-6)


@pytest.mark.parametrize("delayed", [False, True])
def test_pooled_scale_neither_overflows_nor_vanishes(delayed: bool) -> None:
    tx = stablegrad(1.0, decay=0.5, balance=0.5, delayed=delayed, layers=SMALL_LAYERS)
    update = jax.jit(tx.update)
    for scale in (1e-37, 1e-25, 1e25, 1e37):
        grads = jax.tree.map(lambda g: np.float32(scale) * np.sign(g), normal(SMALL))  # noqa: B023
        oracle = Oracle(SMALL_AXES, 1.0, 0.5, 0.5, delayed)
        state = tx.init(grads)
        for _ in range(2):
            updates, state = update(grads, state)
            expected = oracle.step(list(grads.values()))
            chex.assert_trees_all_close(list(updates.values()), expected, rtol=2e-5)


@pytest.mark.parametrize(("reference", "scale"), [(1e6, 1e-36), (1e-6, 1e36)])
def test_the_gain_itself_may_leave_the_range_of_float32(reference: float, scale: float) -> None:
    grads = {"w": np.float32([scale, -scale, scale, -scale])}
    tx = stablegrad(reference)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(np.abs(updates["w"]), reference, rtol=1e-5)


# --- Laws ----------------------------------------------------------------------------------


LAW_SHAPES = [(4, 3), (3, 4), (12,), (2, 6)]
paper = stablegrad(decay=0.0)
half = stablegrad(0.5, decay=0.5, balance=0.5)


@jax.jit
def paper_step(grads: list[jax.Array]) -> Any:
    return paper.update(grads, paper.init(grads))


@jax.jit
def half_two_steps(first: list[jax.Array], second: list[jax.Array]) -> Any:
    _, state = half.update(first, half.init(first))
    return half.update(second, state)


def law_grads(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in LAW_SHAPES]


seeds = st.integers(0, 2**31)
exponents = st.floats(-30, 30)


@law
@given(seeds, exponents, st.integers(0, 3))
def test_law_scaling_one_layers_gradient_leaves_its_update_unchanged(
    seed: int, exponent: float, which: int
) -> None:
    grads = law_grads(seed)
    scaled = list(grads)
    scaled[which] = (grads[which].astype(np.float64) * 10.0**exponent).astype(np.float32)
    (plain, _), (rescaled, _) = paper_step(grads), paper_step(scaled)
    chex.assert_trees_all_close(rescaled, plain, rtol=1e-4)


@law
@given(seeds, exponents)
def test_law_scaling_all_layers_together_cancels_for_any_balance(
    seed: int, exponent: float
) -> None:
    first, second = law_grads(seed), law_grads(seed + 1)
    factor = 10.0**exponent
    scale = partial(jax.tree.map, lambda g: (g.astype(np.float64) * factor).astype(np.float32))
    plain, _ = half_two_steps(first, second)
    scaled, _ = half_two_steps(scale(first), scale(second))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-4)


@law
@given(seeds, st.floats(1e-6, 1e6))
def test_law_every_layers_own_statistic_leaves_as_the_reference(
    seed: int, reference: float
) -> None:
    grads = law_grads(seed)
    updates, _ = reference_step(grads, reference)
    own: list[Axes] = [((0, 1), True), ((0, 1), True), ((0,), False), ((0, 1), True)]
    leaving = statistics([np.asarray(u) for u in updates], own)
    np.testing.assert_allclose(leaving, reference, rtol=1e-4)


@jax.jit
def reference_step(grads: list[jax.Array], reference: jax.Array) -> Any:
    tx = stablegrad(reference, decay=0.0)
    return tx.update(grads, tx.init(grads))


@law
@given(seeds, exponents)
def test_law_the_direction_of_every_leaf_is_kept(seed: int, exponent: float) -> None:
    grads = law_grads(seed)
    grads[1] = (grads[1].astype(np.float64) * 10.0**exponent).astype(np.float32)
    for run in (paper_step, lambda g: half_two_steps(g, g)):
        updates, _ = run(grads)
        for update, grad in zip(updates, grads, strict=True):
            gain = np.asarray(update, np.float64) / grad.astype(np.float64)
            assert np.all(gain > 0)
            np.testing.assert_allclose(gain, gain.flat[0], rtol=1e-5)


@law
@given(seeds, st.permutations(range(4)))
def test_law_permuting_leaves_permutes_results(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    draw = lambda: [  # noqa: E731
        (10.0 ** rng.uniform(-5, 5) * rng.normal(size=(4, 3))).astype(np.float32) for _ in range(4)
    ]
    first, second = draw(), draw()
    updates, state = half_two_steps(first, second)
    permuted, permuted_state = half_two_steps([first[i] for i in order], [second[i] for i in order])
    chex.assert_trees_all_close(permuted, [updates[i] for i in order], rtol=1e-5)
    np.testing.assert_allclose(
        permuted_state.grad_scale, np.asarray(state.grad_scale)[order], rtol=1e-5
    )


@law
@given(seeds, st.floats(0.0, 1.0))
def test_law_balance_moves_scales_geometrically_between_pooled_and_own(
    seed: int, balance: float
) -> None:
    grads = law_grads(seed)
    grads[0] *= np.float32(1e4)
    shared, own, between = (balanced_step(grads, b) for b in (0.0, 1.0, balance))
    for s, o, b in zip(shared, own, between, strict=True):
        want = np.abs(s) ** (1 - balance) * np.abs(o) ** balance
        np.testing.assert_allclose(np.abs(b), want, rtol=1e-4)


@jax.jit
def balanced_step(grads: list[jax.Array], balance: jax.Array) -> list[jax.Array]:
    tx = stablegrad(decay=0.0, balance=balance)
    return tx.update(grads, tx.init(grads))[0]


def test_law_balance_zero_keeps_the_proportions_of_the_layers() -> None:
    grads = law_grads(0)
    grads[2] *= np.float32(1e6)
    updates = balanced_step(grads, 0.0)
    gains = [np.median(u / g) for u, g in zip(updates, grads, strict=True)]
    np.testing.assert_allclose(gains, gains[0], rtol=1e-5)


@pytest.mark.parametrize("delayed", [False, True])
def test_law_vmap_of_update_equals_stacked_on_the_same_data(delayed: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {"bias": (3, 5), "kernel": (3, 4, 5), "conv": (3, 2, 2, 3)}
    options: Any = {"decay": 0.5, "delayed": delayed}
    mapped, whole = stablegrad(**options), stablegrad(**options, layers=stacked(""))
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    mapped_state, whole_state = jax.vmap(mapped.init)(params), whole.init(params)
    assert whole_state.grad_scale.shape == (9,)
    mapped_update, whole_update = jax.jit(jax.vmap(mapped.update)), jax.jit(whole.update)
    for _ in range(3):
        grads = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
        mapped_updates, mapped_state = mapped_update(grads, mapped_state)
        whole_updates, whole_state = whole_update(grads, whole_state)
        chex.assert_trees_all_close(mapped_updates, whole_updates, rtol=1e-5)
        np.testing.assert_allclose(
            np.ravel(mapped_state.grad_scale.T), whole_state.grad_scale, rtol=1e-5
        )


@pytest.mark.standard_promotion
@pytest.mark.parametrize("delayed", [False, True])
def test_law_restarting_from_a_saved_state_is_bit_equal_to_not_stopping(delayed: bool) -> None:
    tx = optax.chain(stablegrad("prediction", balance=0.5, delayed=delayed), optax.adam(1e-2))
    update = jax.jit(lambda g, s, p: tx.update(g, s, prediction_grad=p))
    grads = [normal(SMALL, seed) for seed in range(6)]
    state = tx.init(grads[0])
    for t, g in enumerate(grads):
        if t == 3:
            file = io.BytesIO()
            leaves, treedef = jax.tree.flatten(state)
            np.savez(file, *[np.asarray(leaf) for leaf in leaves])
            file.seek(0)
            saved = np.load(file)
            restored = jax.tree.unflatten(treedef, [saved[name] for name in saved.files])
        updates, state = update(g, state, g["bias"])
        if t >= 3:
            resumed, restored = update(g, restored, g["bias"])
            chex.assert_trees_all_equal((resumed, restored), (updates, state))


# --- Every way JAX can run it --------------------------------------------------------------


def small_run(
    tx: optax.GradientTransformationExtraArgs,
    update: Callable[..., Any] | None = None,
    steps: int = 3,
) -> tuple[Tree, Tree]:
    grads = [normal(SMALL, seed) for seed in range(steps)]
    state = tx.init(grads[0])
    for g in grads:
        updates, state = (update or tx.update)(g, state)
    return updates, state


OPTIONS: list[dict[str, Any]] = [
    {"decay": 0.0},
    {"decay": 0.5, "balance": 0.5},
    {"decay": 0.5, "balance": 0.0, "delayed": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_jit_equals_eager(options: dict[str, Any]) -> None:
    tx = stablegrad(**options)
    chex.assert_trees_all_close(
        small_run(tx, jax.jit(tx.update)), small_run(tx), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_scan_carries_the_state_with_dtypes_shapes_and_weak_types_unchanged(
    options: dict[str, Any],
) -> None:
    tx = stablegrad(**options)
    grads = [normal(SMALL, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    state = tx.init(grads[0])
    final, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, stack)
    last, want = small_run(tx, jax.jit(tx.update))
    chex.assert_trees_all_close(jax.tree.map(lambda u: u[-1], updates), last, rtol=1e-6)
    chex.assert_trees_all_close(final, want, rtol=1e-6)
    abstract = jax.eval_shape(tx.update, grads[0], state)[1]
    assert [(a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(abstract)] == [
        (s.shape, s.dtype, s.weak_type) for s in jax.tree.leaves(state)
    ]


def test_lax_cond_can_skip_a_step() -> None:
    tx = stablegrad()
    grads = normal(SMALL)
    state = tx.init(grads)

    @jax.jit
    def step(take: jax.Array, grads: Tree, state: Tree) -> Any:
        return jax.lax.cond(take, tx.update, lambda g, s: (g, s), grads, state)

    chex.assert_trees_all_close(step(True, grads, state), tx.update(grads, state), rtol=1e-5)
    chex.assert_trees_all_equal(step(False, grads, state), (grads, state))


@pytest.mark.parametrize("delayed", [False, True])
def test_gradients_that_the_compiler_knows_are_scaled_like_any_others(delayed: bool) -> None:
    """Constants and broadcast scalars take other paths of XLA's simplifier than parameters do."""
    tx = stablegrad(decay=0.0, delayed=delayed)
    grads = normal(SMALL)
    state = tx.init(grads)
    folded = jax.jit(lambda: tx.update(grads, state))()
    chex.assert_trees_all_close(folded, jax.jit(tx.update)(grads, state), rtol=1e-5)

    @jax.jit
    def broadcast(value: jax.Array) -> Any:
        return tx.update({k: jnp.full(shape, value) for k, shape in SMALL.items()}, state)

    for value in (3.0, -1e-30, 1e30):
        updates, after = broadcast(value)
        np.testing.assert_allclose(after.grad_scale, abs(value), rtol=1e-5)
        for update in updates.values():
            np.testing.assert_allclose(update, np.sign(value), rtol=1e-5)


def test_grad_flows_through_the_update_and_is_finite() -> None:
    tx = stablegrad(balance=0.5)
    grads = jax.tree.map(jnp.asarray, normal(SMALL))
    grads["bias"] = jnp.zeros_like(grads["bias"])

    def total(g: Tree) -> jax.Array:
        updates, _ = tx.update(g, tx.init(g))
        return sum(jnp.sum(u**3) for u in jax.tree.leaves(updates))

    chex.assert_tree_all_finite(jax.jit(jax.grad(total))(grads))


@pytest.mark.parametrize("delayed", [False, True])
def test_compiles_once_for_any_number_of_steps(delayed: bool) -> None:
    tx = stablegrad("prediction", balance=0.5, delayed=delayed)
    traces = 0

    @jax.jit
    def update(grads: Tree, state: Tree) -> Any:
        nonlocal traces
        traces += 1
        return tx.update(grads, state, prediction_grad=grads["bias"])

    small_run(tx, update, steps=6)
    assert traces == 1


@pytest.mark.parametrize("delayed", [False, True])
def test_the_state_can_be_donated(delayed: bool) -> None:
    tx = stablegrad(delayed=delayed)
    want = small_run(tx, jax.jit(tx.update))
    chex.assert_trees_all_equal(small_run(tx, jax.jit(tx.update, donate_argnums=(0, 1))), want)


def test_init_works_on_abstract_params_and_under_eval_shape() -> None:
    tx = stablegrad(layers=stacked("stack"))
    params = jax.tree.map(jnp.asarray, normal(SMALL))
    want = jax.eval_shape(lambda: tx.init(params))
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(want, jax.eval_shape(tx.init, shapes))
    chex.assert_trees_all_equal_shapes_and_dtypes(want, tx.init(shapes))


def test_pmap_runs_one_step_a_device() -> None:
    tx = stablegrad(decay=0.5, balance=0.5)
    count = min(2, jax.device_count())
    devices = jax.devices()[:count]
    grads = [normal(SMALL, seed) for seed in range(count)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *grads)
    state = jax.pmap(tx.init, devices=devices)(stack)
    updates, state = jax.pmap(tx.update, devices=devices)(stack, state)
    for i, g in enumerate(grads):
        want = tx.update(g, tx.init(g))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], (updates, state)), want, rtol=1e-5
        )


def mesh() -> Mesh:
    assert jax.device_count() >= 4, "conftest.py gives the tests 8 CPU devices"
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


@pytest.mark.parametrize("delayed", [False, True])
def test_shard_map_on_averaged_gradients_equals_one_device(delayed: bool) -> None:
    tx = stablegrad(decay=0.5, balance=0.5, delayed=delayed)
    per_device = [normal(SMALL, seed) for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *per_device)
    mean = jax.tree.map(lambda x: x.mean(0), stack)
    spec = PartitionSpec(("data", "model"))

    def update(grads: Tree, state: Tree) -> Any:
        average = jax.tree.map(lambda g: jax.lax.pmean(g[0], ("data", "model")), grads)
        return tx.update(average, state)

    mapped = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh(),
            in_specs=(spec, PartitionSpec()),
            out_specs=PartitionSpec(),
        )
    )
    state = tx.init(mean)
    one, one_state = mapped(stack, state)
    want, want_state = tx.update(mean, state)
    chex.assert_trees_all_close((one, one_state), (want, want_state), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        mapped(stack, one_state), tx.update(mean, want_state), rtol=1e-4, atol=1e-6
    )


@pytest.mark.standard_promotion
def test_partitioned_params_and_gradients_give_the_same_and_a_replicated_state() -> None:
    tx = optax.chain(stablegrad("prediction", decay=0.5, balance=0.5), optax.adam(1e-2))
    shapes = {"kernel": (8, 4), "bias": (4,), "stack": (2, 4, 6)}
    specs = {
        "kernel": PartitionSpec("data", "model"),
        "bias": PartitionSpec("model"),
        "stack": PartitionSpec(None, "model", "data"),
    }
    grads = normal(shapes)
    devices = mesh()
    placed = {k: jax.device_put(g, NamedSharding(devices, specs[k])) for k, g in grads.items()}
    update = jax.jit(lambda g, s: tx.update(g, s, prediction_grad=g["kernel"]))
    want, want_state = update(grads, tx.init(grads))
    state = jax.jit(tx.init)(placed)
    got, got_state = update(placed, state)
    chex.assert_trees_all_close((got, got_state), (want, want_state), rtol=1e-5, atol=1e-7)
    assert optax.tree.get(got_state, "grad_scale").sharding.is_fully_replicated
    for name, leaf in got.items():
        assert leaf.sharding.is_equivalent_to(placed[name].sharding, leaf.ndim)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="no mesh context in this JAX")
@pytest.mark.parametrize("layers", [per_leaf, stacked("stack")], ids=["per_leaf", "stacked"])
@pytest.mark.parametrize("delayed", [False, True])
def test_explicitly_sharded_gradients_give_the_same(layers: Any, delayed: bool) -> None:
    """Under explicit axes every operation must say how its result is sharded."""
    tx = stablegrad("prediction", decay=0.5, balance=0.5, delayed=delayed, layers=layers)
    shapes = {"bias": (4,), "kernel": (8, 4), "stack": (2, 4, 6)}
    specs = {
        "bias": PartitionSpec("model"),
        "kernel": PartitionSpec("data", "model"),
        "stack": PartitionSpec("data", None, "model"),
    }
    grads = normal(shapes)
    update = lambda g, s: tx.update(g, s, prediction_grad=g["kernel"])  # noqa: E731
    want = jax.jit(update)(grads, tx.init(grads))
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    devices = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=explicit, devices=jax.devices()[:4]
    )
    with jax.set_mesh(devices):
        placed = {k: jax.device_put(g, NamedSharding(devices, specs[k])) for k, g in grads.items()}
        got = jax.jit(update)(placed, jax.jit(tx.init)(placed))
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-5)


@pytest.mark.standard_promotion
def test_jit_init_accepts_out_shardings_on_partitioned_params() -> None:
    tx = optax.chain(stablegrad(), optax.adam(1e-2))
    devices = mesh()
    sharded = NamedSharding(devices, PartitionSpec("data", "model"))
    replicated = NamedSharding(devices, PartitionSpec())
    params = {"kernel": jax.device_put(jnp.ones((4, 2)), sharded)}
    shapes = jax.eval_shape(tx.init, params)
    shardings = optax.tree.map_params(
        tx, lambda _: sharded, shapes, transform_non_params=lambda _: replicated
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert optax.tree.get(state, "grad_scale").sharding == replicated
    assert optax.tree.get(state, "mu")["kernel"].sharding == sharded


def test_no_host_callback_and_no_captured_constant_array() -> None:
    for options in ({}, {"delayed": True, "balance": 0.5}, {"reference": "prediction"}):
        tx = stablegrad(**options)
        grads = normal(SMALL)
        state = tx.init(grads)
        step = lambda g, s, tx=tx: tx.update(g, s, prediction_grad=g["bias"])  # noqa: E731
        jaxpr = jax.make_jaxpr(step)(grads, state)
        assert "callback" not in str(jaxpr)
        assert not any(isinstance(constant, jax.Array) for constant in jaxpr.consts)
    control = lambda x: jax.pure_callback(np.sin, x, x)  # noqa: E731
    assert "callback" in str(jax.make_jaxpr(control)(jnp.ones(())))


CONSTRUCTION = """
import jax
import stablegrad_optax as so
so.stablegrad(); so.stablegrad("prediction", decay=0.5, balance=0.5, delayed=True)
so.stablegrad(layers=so.stacked("blocks", so.weights_only)); so.LayerAxes((0, 1))
so.stablegrad_sgd(0.1, momentum=0.9); so.stablegrad_adam(1e-3); so.stablegrad_adamw(1e-3)
so.prediction_value_and_grad(lambda p: p, lambda y: y)
{extra}
jax.config.update("jax_num_cpu_devices", 3)  # an error once any array exists
assert jax.device_count() == 3
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    from pathlib import Path

    import stablegrad_optax

    root = Path(stablegrad_optax.__file__).parents[1]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "PATH": ""}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_import_and_construction_make_no_array() -> None:
    result = run_python(CONSTRUCTION.format(extra=""))
    assert result.returncode == 0, result.stderr
    control = run_python(CONSTRUCTION.format(extra="import jax.numpy as jnp; jnp.zeros(())"))
    assert control.returncode != 0


# --- Kinds of numbers and trees ------------------------------------------------------------


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


# --- Non-finite gradients ------------------------------------------------------------------


FAULTS = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("delayed", [False, True])
def test_a_faulty_layer_keeps_its_scale_shows_the_fault_and_spares_the_others(
    delayed: bool,
) -> None:
    tx = stablegrad(0.7, decay=0.5, balance=1.0, delayed=delayed, layers=SMALL_LAYERS)
    update = jax.jit(tx.update)
    for fault, when in itertools.product(FAULTS, (0, 2)):
        state = clean_state = tx.init(normal(SMALL))
        for t in range(4):
            clean = normal(SMALL, t)
            grads = jax.tree.map(np.copy, clean)
            if t == when:
                grads["stack"][1, 0, 0] = fault
                previous = state
            updates, state = update(grads, state)
            clean_updates, clean_state = update(clean, clean_state)
            chex.assert_tree_all_finite(state)
            for name in ("kernel", "bias"):
                chex.assert_trees_all_equal(updates[name], clean_updates[name])
            chex.assert_trees_all_equal(state.grad_scale[:3], clean_state.grad_scale[:3])
            if t == when:
                assert float(state.grad_scale[3]) == float(previous.grad_scale[3])
                assert not np.all(np.isfinite(updates["stack"][1]))
                chex.assert_trees_all_equal(updates["stack"][0], clean_updates["stack"][0])
            else:
                chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("when", [0, 2])
def test_the_step_after_a_wholly_faulty_one_is_as_if_it_had_not_been(
    options: dict[str, Any], when: int
) -> None:
    tx = stablegrad("prediction", **options)
    update = jax.jit(lambda g, s: tx.update(g, s, prediction_grad=g["bias"]))
    state = clean_state = tx.init(normal(SMALL))
    for t in range(4):
        grads = normal(SMALL, t)
        if t == when:
            bad = jax.tree.map(lambda g: np.where(g == g.max(), np.float32(np.nan), g), grads)
            _, after = update(bad, state)
            chex.assert_trees_all_equal(after, state)
            state = after
        updates, state = update(grads, state)
        clean_updates, clean_state = update(grads, clean_state)
        chex.assert_trees_all_equal((updates, state), (clean_updates, clean_state))


@pytest.mark.parametrize("delayed", [False, True])
def test_a_faulty_prediction_gradient_never_enters_the_reference(delayed: bool) -> None:
    tx = stablegrad("prediction", decay=0.5, delayed=delayed)
    update = jax.jit(lambda g, s, p: tx.update(g, s, prediction_grad=p))
    grads, good = normal(SMALL), np.float32([1.0, 5.0])
    for fault in FAULTS:
        bad = np.float32([1.0, fault])
        _, first = update(grads, tx.init(grads), bad)
        assert float(first.reference_scale) == 0.0
        _, state = update(grads, first, good)
        assert float(state.reference_scale) == pytest.approx(2.0)
        updates, after = update(grads, state, bad)
        assert float(after.reference_scale) == float(state.reference_scale)
        chex.assert_tree_all_finite(updates)


def test_a_fault_in_one_layer_reaches_the_pool_of_no_other() -> None:
    oracle = Oracle(SMALL_AXES, 1.0, 0.5, 0.25)
    tx = stablegrad(decay=0.5, balance=0.25, layers=SMALL_LAYERS)
    update, state = jax.jit(tx.update), tx.init(normal(SMALL))
    for t in range(4):
        grads = normal(SMALL, t)
        if t in (0, 2):
            grads["kernel"][0, 0] = np.inf
        updates, state = update(grads, state)
        expected = oracle.step(list(grads.values()))
        np.testing.assert_allclose(state.grad_scale, oracle.grad_scale, rtol=1e-5)
        np.testing.assert_allclose(updates["stack"], expected[2], rtol=1e-5)
        np.testing.assert_allclose(updates["bias"], expected[0], rtol=1e-5)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("outside", [True, False])
def test_under_apply_if_finite_the_trajectory_equals_one_without_the_faulty_step(
    delayed: bool, outside: bool
) -> None:
    scaling = stablegrad(decay=0.5, balance=0.5, delayed=delayed)
    if outside:
        tx = optax.apply_if_finite(optax.chain(scaling, optax.adam(1e-2)), 5)
    else:
        tx = optax.chain(scaling, optax.apply_if_finite(optax.adam(1e-2), 5))
    update = jax.jit(tx.update)

    def trajectory(faulty: bool) -> Tree:
        params = jax.tree.map(jnp.asarray, normal(SMALL, 9))
        state = tx.init(params)
        for t in range(4):
            if faulty and t in (0, 2):
                bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
                updates, state = update(bad, state, params)
                params = optax.apply_updates(params, updates)
            updates, state = update(normal(SMALL, t), state, params)
            params = optax.apply_updates(params, updates)
        return params

    clean = trajectory(False)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(trajectory(True), clean)


# --- Bad input -----------------------------------------------------------------------------


BAD: list[tuple[str, Any]] = [
    *[("reference", v) for v in (0.0, -1.0, np.nan, np.inf, "predictions", None, [1.0], 1j)],
    *[("reference", v) for v in (np.float32(0), np.ones(3), np.float64(-2), {"a": 1.0})],
    *[("decay", v) for v in (-0.1, 1.0, 1.5, np.nan, np.inf, "0.9", None, [0.5], np.ones(2))],
    *[("balance", v) for v in (-0.1, 1.01, np.nan, "1", None, [0.5], np.float32(2), 1j)],
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


@pytest.mark.parametrize("option", ["reference", "decay", "balance"])
def test_traced_options_are_never_checked(option: str) -> None:
    @jax.jit
    def step(value: jax.Array) -> Any:
        tx = stablegrad(**{option: value})
        return tx.update(normal(SMALL), tx.init(normal(SMALL)))

    chex.assert_tree_all_finite(step(0.5))
    step(-1.0)


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


# --- In optax ------------------------------------------------------------------------------


@pytest.mark.standard_promotion
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


@pytest.mark.standard_promotion
@pytest.mark.parametrize("delayed", [False, True])
def test_tree_get_finds_both_fields_in_a_chain(delayed: bool) -> None:
    tx = optax.chain(optax.clip(1e9), stablegrad(3.0, delayed=delayed), optax.adam(1e-3))
    grads = normal(SMALL)
    _, state = tx.update(grads, tx.init(grads), grads)
    assert optax.tree.get(state, "grad_scale").shape == (3,)
    assert float(optax.tree.get(state, "reference_scale")) == 3.0
    state = optax.tree.set(state, grad_scale=jnp.ones(3))
    chex.assert_trees_all_equal(optax.tree.get(state, "grad_scale"), jnp.ones(3))


@pytest.mark.standard_promotion
def test_prediction_gradient_passes_through_a_chain() -> None:
    tx = optax.chain(stablegrad("prediction"), optax.adam(1e-3), optax.scale(2.0))
    grads = normal(SMALL)
    _, state = tx.update(grads, tx.init(grads), grads, prediction_grad=np.float32([2, -2]))
    assert float(optax.tree.get(state, "reference_scale")) == pytest.approx(2.0)


@pytest.mark.standard_promotion
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
