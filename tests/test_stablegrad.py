"""The transform against its recurrences, and under gradients that are not finite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIONS, SMALL, SMALL_AXES, SMALL_LAYERS, Tree, normal
from oracle import Axes, Oracle

from stablegrad_optax import LayerAxes, StableGradState, per_leaf, stablegrad, weights_only

STEPS = 50

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
    zeros = jnp.zeros(MIXED_COUNT)
    state = StableGradState(zeros, jnp.zeros(()), None if oracle.peak_scale is None else zeros)
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


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(
    ("reference", "options"),
    [
        (1.0, {"decay": 0.9, "attack": 0.0}),
        (0.37, {"decay": 0.9, "attack": 0.25, "balance": 0.5, "equalize": "norm"}),
        ("prediction", {"decay": 0.5, "attack": 0.0, "equalize": "norm"}),
    ],
)
def test_agrees_with_the_oracle_with_an_attack_and_with_equal_norms(
    reference: float | str, options: dict[str, Any], delayed: bool
) -> None:
    tx = stablegrad(reference, **options, delayed=delayed, layers=MIXED_LAYERS)
    update = jax.jit(lambda g, s, p: tx.update(g, s, prediction_grad=p))
    assert_matches(update, Oracle(MIXED_AXES, reference, delayed=delayed, **options))


def test_with_an_attack_of_0_no_update_is_larger_than_the_reference() -> None:
    """The scale is that of a spike at once, and falls from there by the decay."""
    tx = stablegrad(decay=0.9, attack=0.0, layers={"w": LayerAxes((0, 1), centered=False)})
    update, state = jax.jit(tx.update), tx.init({"w": np.ones((4, 3), np.float32)})
    seen = []
    for size in (1.0, 100.0, 1.0, 1.0, 0.5):
        updates, state = update({"w": np.full((4, 3), size, np.float32)}, state)
        seen.append(float(np.max(updates["w"])))
    scales = [1.0, 100.0, 90.1, 81.19, 73.121]
    np.testing.assert_allclose(seen, np.array([1, 100, 1, 1, 0.5]) / scales, rtol=1e-5)


def test_equal_norms_are_equal_and_the_updates_root_mean_square_is_the_reference() -> None:
    grads = {"large": normal({"x": (40, 30)})["x"], "small": 1e-9 * normal({"x": (7,)}, 1)["x"]}
    tx = stablegrad(0.5, equalize="norm")
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    rms = {k: float(np.sqrt(np.mean(np.square(u)))) for k, u in updates.items()}
    norms = {k: rms[k] * np.sqrt(grads[k].size) for k in rms}
    assert norms["large"] == pytest.approx(norms["small"], rel=1e-2)  # a mean beside the std
    assert norms["small"] == pytest.approx(0.5 * np.sqrt((1200 + 7) / 2), rel=1e-4)


def test_layers_without_entries_do_not_count_for_equal_norms() -> None:
    grads = {"empty": np.zeros((0, 4), np.float32), "full": np.ones(3, np.float32)}
    layers = {"empty": LayerAxes((0, 1)), "full": LayerAxes((0,), centered=False)}
    tx = stablegrad(equalize="norm", layers=layers)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    np.testing.assert_allclose(updates["full"], 1.0, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-37, 1e37, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_steady_gradient_keeps_its_scale_at_the_ends_of_the_range(
    size: float, balance: float
) -> None:
    signs = np.where(np.arange(12).reshape(4, 3) % 2, -1, 1)
    grads = {"kernel": (size * signs).astype(np.float32)}
    tx = stablegrad(decay=0.9, balance=balance)
    update, state = jax.jit(tx.update), tx.init(grads)
    for _ in range(STEPS):
        updates, state = update(grads, state)
    np.testing.assert_allclose(state.grad_scale, [size], rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], signs, rtol=1e-5)


@pytest.mark.parametrize("decay", [1e-7, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1 - 2**-24])
def test_the_largest_gradient_there_is_does_not_bring_infinity_into_the_state(decay: float) -> None:
    grads = {"kernel": np.full((3, 2), np.finfo(np.float32).max)}
    tx = stablegrad(decay=decay)
    update, state = jax.jit(tx.update), tx.init(grads)
    for _ in range(STEPS):
        _, state = update(grads, state)
    np.testing.assert_allclose(state.grad_scale, [np.finfo(np.float32).max], rtol=1e-4)


def test_init_is_zeros_of_the_documented_shape_and_dtype() -> None:
    params = {name: jnp.ones(shape) for name, (shape, _) in MIXED.items()}
    state = stablegrad(layers=MIXED_LAYERS).init(params)
    assert isinstance(state, StableGradState)
    assert state._fields == ("grad_scale", "reference_scale", "peak_scale")
    assert (state.grad_scale.shape, state.grad_scale.dtype) == ((MIXED_COUNT,), jnp.float32)
    assert (state.reference_scale.shape, state.reference_scale.dtype) == ((), jnp.float32)
    assert not np.any(state.grad_scale)
    assert not np.any(state.reference_scale)
    assert (state.peak_scale.shape, state.peak_scale.dtype) == ((MIXED_COUNT,), jnp.float32)
    assert not np.any(state.peak_scale)
    assert stablegrad("prediction", layers=MIXED_LAYERS).init(params).peak_scale is None


def test_defaults_are_reference_1_decay_0_balance_1_this_step_per_leaf() -> None:
    grads = [normal(SMALL, seed) for seed in range(3)]
    explicit = stablegrad(1.0, decay=0.0, balance=1.0, delayed=False, layers=per_leaf)
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


@pytest.fixture(params=["cpu", "accelerators"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what TPUs and GPUs do, where a branch takes the statistic once more."""
    if request.param == "accelerators":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, **of: default(*a))


@pytest.mark.usefixtures("platform")
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


@pytest.mark.usefixtures("platform")
def test_delayed_uses_this_steps_statistic_for_a_layer_that_comes_alive() -> None:
    grads = normal(SMALL)
    asleep = {**grads, "kernel": np.zeros_like(grads["kernel"])}
    tx = stablegrad(decay=0.5, delayed=True)
    updates, state = tx.update(asleep, tx.init(grads))
    np.testing.assert_array_equal(updates["kernel"], 0.0)
    updates, state = tx.update(grads, state)
    assert np.std(updates["kernel"]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a branch takes it again")
def test_on_a_cpu_delayed_takes_the_statistic_once() -> None:
    def sums(delayed: bool) -> int:
        tx, grads = stablegrad(delayed=delayed), normal(SMALL)
        program = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()
        return (program.as_text() or "").count(" reduce(")

    assert sums(delayed=True) == sums(delayed=False) > 0


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


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.9])
def test_a_tiny_layer_beside_many_dead_entries_stays_finite(balance: float) -> None:
    grads = {
        "live": jnp.tile(jnp.asarray([1e-36, -1e-36]), (4, 2)),
        "dead": jnp.zeros((3000, 3000)),
    }
    tx = stablegrad(balance=balance)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    assert np.all(np.isfinite(updates["live"]))
    assert np.all(np.abs(updates["live"]) > 0)
