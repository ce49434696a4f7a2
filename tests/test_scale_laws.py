"""What scaling, permuting, stacking or restarting must do to the updates, on random gradients."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SMALL, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Axes, statistics

from stablegrad_optax import stablegrad, stacked

law = settings(max_examples=40, deadline=None, derandomize=True)

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
