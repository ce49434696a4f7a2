"""What docs/optax.md says about each part of optax around, behind or in front of the transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import SMALL, SMALL_LAYERS, Tree, normal

from stablegrad_optax import layer_scales, stablegrad

pytestmark = pytest.mark.usefixtures("compiled_quickly")

contrib = optax.contrib

PARAMS = jax.tree.map(jnp.asarray, normal(SMALL, 9))
GRADS = [jax.tree.map(jnp.asarray, normal(SMALL, seed)) for seed in range(4)]
LABELS = {"bias": "vectors", "kernel": "weights", "stack": "weights"}
WEIGHTS = {name: label == "weights" for name, label in LABELS.items()}
OPTIONS = {"decay": 0.5, "balance": 0.5}  # with a memory, and with what the layers share


@functools.cache
def compiled_step(tx: Any) -> Callable[..., tuple[Tree, Any]]:
    @jax.jit
    def step(params: Tree, state: Any, grads: Tree, **extra: Any) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, grads: list[Any], params: Tree = PARAMS, **extra: Any) -> tuple[Tree, Any]:
    """The params and the state after compiled steps by these gradients."""

    state = tx.init(params)
    for g in grads:
        params, state = compiled_step(tx)(params, state, g, **extra)
    return params, state


@functools.cache
def compiled(**options: Any) -> optax.GradientTransformation:
    tx = stablegrad(**options)
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


def scaled(grads: list[Tree], **options: Any) -> list[Tree]:
    """The gradients after the transform alone."""
    tx = compiled(**options)
    state, results = tx.init(grads[0]), []
    for g in grads:
        updates, state = tx.update(g, state)
        results.append(updates)
    return results


def weights_of(tree: Tree) -> Tree:
    return {name: leaf for name, leaf in tree.items() if WEIGHTS[name]}


def without_vectors(tree: Tree) -> Tree:
    return {name: leaf if WEIGHTS[name] else None for name, leaf in tree.items()}


def is_close(got: Tree, want: Tree) -> bool:
    return jax.tree.all(jax.tree.map(functools.partial(np.allclose, rtol=1e-3), got, want))


def assert_close(got: Any, want: Any) -> None:
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


BEHIND: dict[str, optax.GradientTransformation] = {
    "add_decayed_weights": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "dadapt_adamw": contrib.dadapt_adamw(0.1, estim_lr0=0.1),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "flatten": optax.flatten(optax.adam(0.1)),
    "mechanize": contrib.mechanize(optax.sgd(1.0), s_init=0.1),
    "muon": contrib.muon(0.1),
    "prodigy": contrib.prodigy(0.1, estim_lr0=0.1),
    "reduce_on_plateau": optax.chain(
        optax.sgd(0.1), contrib.reduce_on_plateau(factor=0.5, patience=1)
    ),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.1),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.1),
}


@pytest.mark.parametrize("base", BEHIND.values(), ids=BEHIND.keys())
def test_what_stands_behind_it_sees_the_scaled_gradients(base: Any) -> None:
    params, state = run(optax.chain(stablegrad(**OPTIONS), base), GRADS, value=1.0)
    base = optax.with_extra_args_support(base)
    assert_close(params, run(base, scaled(GRADS, **OPTIONS), value=1.0)[0])
    assert not is_close(params, run(base, GRADS, value=1.0)[0])
    assert list(layer_scales(state, PARAMS)) == ["bias", "kernel", "stack"]


def test_muon_does_not_notice_a_constant_factor() -> None:
    one, seven = (
        run(optax.chain(stablegrad(reference), contrib.muon(0.1)), GRADS)[0]
        for reference in (1.0, 7.0)
    )
    chex.assert_trees_all_close(one, seven, rtol=1e-3)


def test_masked_and_selective_transform_equal_the_transform_on_the_sub_tree() -> None:
    want, want_state = run(
        optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1)),
        [weights_of(g) for g in GRADS],
        weights_of(PARAMS),
    )
    want_scales = layer_scales(want_state, weights_of(PARAMS))

    tx = optax.chain(optax.masked(stablegrad(**OPTIONS), WEIGHTS), optax.sgd(0.1))
    params, state = run(tx, GRADS)
    assert_close(weights_of(params), want)
    assert_close(layer_scales(state, without_vectors(PARAMS)), want_scales)
    with pytest.raises(ValueError, match=r"optax.masked .* None in place of"):
        layer_scales(state, PARAMS)

    if hasattr(optax, "selective_transform"):  # not in 0.2.5
        frozen = {name: not is_weight for name, is_weight in WEIGHTS.items()}
        tx = optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1))
        params, state = run(optax.selective_transform(tx, freeze_mask=frozen), GRADS)
        assert_close(params, {**PARAMS, **want})
        assert_close(layer_scales(state, without_vectors(PARAMS)), want_scales)


@pytest.mark.skipif(not hasattr(optax, "freeze"), reason="no optax.freeze in this optax")
def test_leaves_frozen_in_front_of_it_have_no_scale_and_count_as_zeros_of_the_pool() -> None:
    gains = []
    for grads in (GRADS[0], weights_of(GRADS[0])):
        in_front = optax.freeze({name: not WEIGHTS[name] for name in grads})
        zeros = jax.tree.map(jnp.zeros_like, grads)
        updates, state = run(optax.chain(in_front, stablegrad(balance=0.0)), [grads], zeros)
        gains.append(updates["kernel"] / grads["kernel"])
        assert float(layer_scales(state, grads).get("bias", 0)) == 0
    entries = sum(leaf.size for leaf in weights_of(PARAMS).values())
    assert_close(gains[0], gains[1] * np.sqrt((entries + PARAMS["bias"].size) / entries))


def test_each_stablegrad_of_a_partition_pools_over_its_own_leaves() -> None:
    parts = {
        name: optax.chain(stablegrad(reference, **OPTIONS), optax.sgd(0.1))
        for name, reference in (("weights", 2.0), ("vectors", 3.0))
    }
    params, state = run(optax.partition(parts, LABELS), GRADS)
    for label, tx in parts.items():
        own = lambda tree, label=label: {k: v for k, v in tree.items() if LABELS[k] == label}  # noqa: E731
        want, want_state = run(tx, [own(g) for g in GRADS], own(PARAMS))
        assert_close(own(params), want)
        scales = layer_scales(
            state.inner_states[label],
            {k: v if LABELS[k] == label else None for k, v in PARAMS.items()},
        )
        assert_close(scales, layer_scales(want_state, own(PARAMS)))
    with pytest.raises(ValueError, match="2 StableGradState"):
        layer_scales(state, PARAMS)


def test_multi_steps_takes_the_prediction_gradient_of_the_last_mini_step() -> None:
    tx = optax.MultiSteps(stablegrad("prediction"), every_k_schedule=2)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for size in (1.0, 2.0, 3.0, 4.0):
        prediction_grad = jnp.asarray([size, -size])
        _, state = update(GRADS[0], state, PARAMS, prediction_grad=prediction_grad)
        emitted = float(optax.tree.get(state, "reference_scale"))
        assert emitted == pytest.approx(2 * (size // 2))


def test_multi_steps_with_skip_not_finite_skips_a_faulty_mini_step() -> None:
    tx = optax.MultiSteps(
        optax.chain(stablegrad(**OPTIONS), optax.adam(0.1)),
        every_k_schedule=2,
        should_skip_update_fn=optax.skip_not_finite,
    )
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
    faulty = run(tx, [bad, *GRADS[:3], bad, GRADS[3]])
    want = run(tx, GRADS)
    chex.assert_trees_all_equal(faulty[0], want[0])
    chex.assert_trees_all_equal(faulty[1].inner_opt_state, want[1].inner_opt_state)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "reference": optax.linear_schedule(1.0, 0.1, 3),
    "decay": optax.linear_schedule(0.9, 0.0, 3),
    "balance": optax.linear_schedule(0.0, 1.0, 3),
    "fade_below": optax.linear_schedule(0.0, 1.0, 3),
}


def test_scheduled_options_are_their_numbers_at_each_step() -> None:
    falling = [jax.tree.map(lambda x, t=t: x / 4**t, g) for t, g in enumerate(GRADS)]
    injected = optax.inject_hyperparams(stablegrad, static_args=("layers",))
    tx = injected(**SCHEDULES, layers=SMALL_LAYERS)

    @jax.jit
    def with_numbers(numbers: dict[str, Any], grads: Tree, state: Any) -> Any:
        return stablegrad(**numbers, layers=SMALL_LAYERS).update(grads, state)

    def by_hand(**constants: Any) -> Any:
        state = stablegrad(layers=SMALL_LAYERS).init(PARAMS)
        for t, g in enumerate(falling):
            numbers = {option: schedule(t) for option, schedule in SCHEDULES.items()}
            updates, state = with_numbers(numbers | constants, g, state)
        return updates, state

    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for g in falling:
        updates, state = update(g, state)
    assert_close((updates, state.inner_state), by_hand())
    assert list(layer_scales(state, PARAMS, SMALL_LAYERS)) == ["bias", "kernel", "stack"]
    for option, schedule in SCHEDULES.items():  # each is noticed
        unscheduled, _ = by_hand(**{option: schedule(0)})
        assert not is_close(updates, unscheduled), option


def test_injected_decay_of_bfloat16_params_needs_a_hyperparam_dtype() -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = optax.inject_hyperparams(stablegrad, static_args=("layers",))(decay=0.999)
    with pytest.raises(ValueError, match="hyperparam_dtype"):
        tx.init(params)
    assert float(jax.jit(tx.init)(params).hyperparams["decay"]) == 1  # traced: nothing to check


def test_apply_if_finite_lets_a_fault_through_at_last_and_the_scales_stay() -> None:
    tx = optax.apply_if_finite(optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1)), 1)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
    ignored, state = run(tx, [GRADS[0], bad])
    chex.assert_tree_all_finite(ignored)
    after, last_state = run(tx, [GRADS[0], bad, bad])
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(after))
    scales, last_scales = (layer_scales(s, PARAMS) for s in (state, last_state))
    chex.assert_trees_all_equal(scales, last_scales)


def test_named_chain_equals_chain_and_has_the_state_under_its_name() -> None:
    parts = (stablegrad(**OPTIONS), optax.adam(0.1))
    params, state = run(optax.named_chain(("stablegrad", parts[0]), ("adam", parts[1])), GRADS)
    want, (want_scaling, _) = run(optax.chain(*parts), GRADS)
    chex.assert_trees_all_equal((params, state["stablegrad"]), (want, want_scaling))
    assert list(layer_scales(state, PARAMS)) == ["bias", "kernel", "stack"]


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead_steps_by_it_and_its_layers_are_those_of_the_fast_params(
    reset_state: bool,
) -> None:
    inner = optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1))
    tx = optax.lookahead(inner, 2, slow_step_size=0.5, reset_state=reset_state)
    both = optax.LookaheadParams.init_synced(PARAMS)
    params, state = run(tx, GRADS[:2], both)

    fast, inner_state = run(inner, GRADS[:2])
    mean = jax.tree.map(lambda a, b: (a + b) / 2, PARAMS, fast)
    assert_close(params, optax.LookaheadParams(mean, mean))
    want = layer_scales(inner.init(PARAMS) if reset_state else inner_state, PARAMS)
    assert_close(layer_scales(state, params.fast), want)
    with pytest.raises(ValueError, match="make 6 layers"):
        layer_scales(state, params)


def test_sam_scales_the_gradient_at_the_adversarial_point_alone() -> None:
    rho = 0.05
    outer = optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1))
    tx = contrib.sam(outer, optax.chain(contrib.normalize(), optax.sgd(rho)))
    grad = jax.jit(jax.grad(lambda p: sum(jnp.sum(jnp.sin(3 * x) * x) for x in p.values())))
    update, params, state = jax.jit(tx.update), PARAMS, tx.init(PARAMS)
    outer_update, want, outer_state = jax.jit(outer.update), PARAMS, outer.init(PARAMS)
    for _ in range(2):
        for _ in range(2):
            updates, state = update(grad(params), state, params)
            params = optax.apply_updates(params, updates)
        ascent = grad(want)
        step = rho / optax.tree.norm(ascent)
        adversarial = jax.tree.map(lambda p, g, step=step: p + step * g, want, ascent)
        updates, outer_state = outer_update(grad(adversarial), outer_state)
        want = optax.apply_updates(want, updates)
        assert_close(params, want)
    assert_close(layer_scales(state, PARAMS), layer_scales(outer_state, PARAMS))


def test_schedule_free_around_it_equals_it_in_front_of_schedule_free() -> None:
    base, scaling = optax.adam(0.1, b1=0.0), stablegrad(**OPTIONS)
    around, state = run(contrib.schedule_free(optax.chain(scaling, base), 0.1), GRADS)
    behind, (_, own_state) = run(optax.chain(scaling, contrib.schedule_free(base, 0.1)), GRADS)
    assert_close(around, behind)
    assert_close(
        contrib.schedule_free_eval_params(state, around),
        contrib.schedule_free_eval_params(own_state, behind),
    )
    assert list(layer_scales(state, around)) == ["bias", "kernel", "stack"]


def test_conditionally_transform_lets_gradients_pass_and_conditionally_mask_stops_them() -> None:
    scaling = stablegrad(**OPTIONS)
    is_odd = lambda step: step % 2 == 1  # noqa: E731
    passing, stopping = (
        wrap(scaling, is_odd) for wrap in (optax.conditionally_transform, optax.conditionally_mask)
    )
    passed, stopped = ((jax.jit(tx.update), tx.init(PARAMS)) for tx in (passing, stopping))
    (pass_update, pass_state), (stop_update, stop_state) = passed, stopped
    odd = iter(scaled(GRADS[1::2], **OPTIONS))
    for t, g in enumerate(GRADS):
        let_through, pass_state = pass_update(g, pass_state)
        masked, stop_state = stop_update(g, stop_state)
        want = next(odd) if t % 2 else None
        assert_close(let_through, want or g)
        assert_close(masked, want or jax.tree.map(jnp.zeros_like, g))
    assert_close(layer_scales(pass_state, PARAMS), layer_scales(stop_state, PARAMS))


def test_flatten_around_it_makes_all_params_one_layer() -> None:
    tx = optax.flatten(stablegrad())
    updates, state = jax.jit(tx.update)(GRADS[0], tx.init(PARAMS))
    everything = np.concatenate([np.ravel(g) for g in jax.tree.leaves(GRADS[0])])
    size = np.sqrt(np.mean(everything**2))
    assert_close(optax.tree.get(state, "grad_scale"), np.float32([size]))
    assert_close(updates, jax.tree.map(lambda g: g / size, GRADS[0]))
    with pytest.raises(ValueError, match=r"scales have shape \(1,\)"):
        layer_scales(state, PARAMS)


def test_weight_decay_behind_it_is_decoupled_and_in_front_of_it_part_of_the_gradient() -> None:
    decay, scaling, sgd = optax.add_decayed_weights(0.1), stablegrad(), optax.sgd(1.0)
    behind, _ = run(optax.chain(scaling, decay, sgd), GRADS[:1])
    (direction,) = scaled(GRADS[:1])
    assert_close(behind, jax.tree.map(lambda p, d: p - d - 0.1 * p, PARAMS, direction))
    front, _ = run(optax.chain(decay, scaling, sgd), GRADS[:1])
    (direction,) = scaled([jax.tree.map(lambda g, p: g + 0.1 * p, GRADS[0], PARAMS)])
    assert_close(front, jax.tree.map(lambda p, d: p - d, PARAMS, direction))


def test_split_real_and_imaginary_around_it_makes_two_layers_of_one() -> None:
    real, imaginary = (normal({"w": (4, 3)}, seed)["w"] for seed in range(2))
    grads = {"w": jnp.asarray(real + 10j * imaginary)}
    split = contrib.split_real_and_imaginary
    in_front = optax.chain(stablegrad(), split(optax.sgd(1.0)))
    around = split(optax.chain(stablegrad(), optax.sgd(1.0)))
    (whole, state), (apart, apart_state) = (
        jax.jit(tx.update)(grads, tx.init(grads)) for tx in (in_front, around)
    )
    assert list(layer_scales(state, grads)) == ["w"]
    assert_close(whole["w"], -grads["w"] / np.std(grads["w"]))
    assert optax.tree.get(apart_state, "grad_scale").shape == (2,)
    assert_close(apart["w"], jnp.asarray(-real / real.std() - 1j * imaginary / imaginary.std()))


def test_wrappers_without_extra_arguments_refuse_the_prediction_gradient() -> None:
    tx, prediction_grad = stablegrad("prediction"), jnp.asarray([3.0, -3.0])
    both = optax.LookaheadParams.init_synced(PARAMS)
    for wrapped, params in (
        (optax.lookahead(tx, 2, 0.5), both),
        (contrib.sam(tx, optax.sgd(0.1)), PARAMS),
        (contrib.split_real_and_imaginary(tx), PARAMS),
    ):
        state = wrapped.init(params)
        with pytest.raises(TypeError, match="prediction_grad"):
            wrapped.update(GRADS[0], state, params, prediction_grad=prediction_grad)
    for base in (
        optax.GradientTransformation(*contrib.sam(optax.sgd(0.1), optax.sgd(0.1))),
        contrib.split_real_and_imaginary(optax.sgd(0.1)),
    ):
        _, state = run(optax.chain(tx, base), GRADS[:1], prediction_grad=prediction_grad)
        assert float(optax.tree.get(state, "reference_scale")) == pytest.approx(3.0)


SEARCH = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
CURVATURE = {"bias": 0.1, "kernel": np.logspace(0, 2, 12).reshape(4, 3), "stack": 1.0}


def losses_with_line_search(tx: Any, **extra: Any) -> np.ndarray:
    """Of twenty steps on a quadratic."""

    def loss(params: Tree, prediction_grad: Any = None) -> jax.Array:
        del prediction_grad  # line searches give value_fn all that they do not know themselves
        return sum(jnp.sum(CURVATURE[k] * x**2) for k, x in params.items())

    @jax.jit
    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, **extra
        )
        return (optax.apply_updates(params, updates), state), value

    return np.asarray(jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=20)[1])


@pytest.mark.parametrize("reference", [1.0, "prediction"])
def test_a_line_search_goes_down_along_the_scaled_gradient(reference: Any) -> None:
    tx = optax.chain(stablegrad(reference), optax.sgd(1.0), SEARCH)
    losses = losses_with_line_search(tx, prediction_grad=jnp.asarray([1.0, -1.0]))
    assert np.all(np.diff(losses) < 0)


def test_lbfgs_loses_its_curvature_behind_it() -> None:
    lbfgs = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0), SEARCH)
    alone = losses_with_line_search(lbfgs)
    behind = losses_with_line_search(optax.chain(stablegrad(), lbfgs))
    assert np.all(np.isfinite(behind))
    assert behind[-1] > 3 * alone[-1]


@pytest.mark.skipif(not hasattr(optax, "snapshot"), reason="no optax.snapshot in this optax")
def test_snapshots_in_front_and_behind_show_the_gradient_and_the_update() -> None:
    size = lambda tree: {k: jnp.sqrt(jnp.mean(x**2)) for k, x in tree.items()}  # noqa: E731
    tx = optax.chain(
        optax.snapshot("before", size), stablegrad(), optax.snapshot("after", size), optax.sgd(0.1)
    )
    _, state = run(tx, GRADS[:1])
    assert_close(optax.tree.get(state, "before"), size(GRADS[0]))
    assert_close(optax.tree.get(state, "after"), size(scaled(GRADS[:1])[0]))


def test_a_state_set_to_zeros_starts_as_new() -> None:
    tx = optax.chain(stablegrad(**OPTIONS), optax.sgd(0.1))
    _, state = run(tx, GRADS)
    names = ("grad_scale", "peak_scale", "reference_scale")
    zeros = {name: jnp.zeros_like(optax.tree.get(state, name)) for name in names}
    chex.assert_trees_all_equal(optax.tree.set(state, **zeros), tx.init(PARAMS))
