"""Every way JAX can run the transform: jit, scan, vmap, meshes, and without making an array."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import OPTIONS, SMALL, Tree, normal, small_run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablegrad_optax import per_leaf, stablegrad, stacked


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


@pytest.mark.parametrize("delayed", [False, True])
def test_shard_map_on_each_devices_own_gradients_equals_one_update_a_device(delayed: bool) -> None:
    tx = stablegrad(decay=0.5, balance=0.5, delayed=delayed)
    per_device = [normal(SMALL, seed) for seed in range(4)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *per_device)
    spec = PartitionSpec(("data", "model"))

    def two_steps(grads: Tree) -> Any:
        own = jax.tree.map(lambda g: g[0], grads)
        _, state = tx.update(own, tx.init(own))  # the state does not vary over devices yet
        return jax.tree.map(lambda x: x[None], tx.update(own, state))

    mapped = jax.jit(jax.shard_map(two_steps, mesh=mesh(), in_specs=spec, out_specs=spec))
    got, want = mapped(stack), [two_steps(jax.tree.map(lambda g: g[None], g)) for g in per_device]
    want = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *want)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("delayed", [False, True])
def test_lowers_for_every_platform(platform: str, delayed: bool) -> None:
    tx, grads = stablegrad(balance=0.5, delayed=delayed), normal(SMALL)
    exported = jax.export.export(jax.jit(tx.update), platforms=[platform])
    assert exported(grads, tx.init(grads)).platforms == (platform,)


def test_no_rank_is_promoted_silently() -> None:
    tx, grads = stablegrad("prediction", balance=0.5, delayed=True), normal(SMALL)
    with jax.numpy_rank_promotion("raise"):
        jax.jit(tx.update)(grads, tx.init(grads), prediction_grad=grads["stack"])


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize("delayed", [False, True])
def test_healthy_and_dead_layers_make_no_passing_nan_or_inf(flag: str, delayed: bool) -> None:
    tx = stablegrad("prediction", decay=0.5, balance=0.5, delayed=delayed)
    grads = normal(SMALL)
    grads["bias"] *= 0
    grads["kernel"] *= 1e30
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        state = tx.init(grads)
        for _ in range(2):
            updates, state = tx.update(grads, state, prediction_grad=grads["stack"])
    finally:
        jax.config.update(flag, before)
    chex.assert_tree_all_finite(updates)


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
