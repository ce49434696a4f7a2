"""The transform inside Flax: TrainState, nnx.Optimizer, scanned layers, partitioned params."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stablegrad_optax import (
    ScaleHistory,
    activation_aware,
    layer_scales,
    per_leaf,
    plot_scales,
    prediction_value_and_grad,
    scale_metrics,
    scale_table,
    stablegrad,
    stablegrad_adam,
    stacked,
)

pytest.importorskip("flax")

from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any


def data() -> tuple[jax.Array, jax.Array]:
    inputs = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(np.sin(inputs.sum(1, keepdims=True)))


def squared(prediction: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    del inputs
    return jnp.mean((prediction - targets) ** 2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(16, kernel_init=activation_aware(jnp.tanh))(x))
        return nn.Dense(1)(x)


def test_train_state_apply_gradients_trains() -> None:
    inputs, targets = data()
    model = Net()
    params = model.init(jax.random.key(0), inputs)["params"]
    tx = optax.chain(stablegrad(), optax.adam(1e-2))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss(p: Tree) -> jax.Array:
            return squared(state.apply_fn({"params": p}, inputs), inputs, targets)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(150):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.25 * values[0]
    assert set(layer_scales(state.opt_state, state.params)) == {
        "Dense_0/bias",
        "Dense_0/kernel",
        "Dense_1/kernel",
    }


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.second = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("reference", [1.0, "prediction"])
def test_nnx_optimizer_trains(reference: Any) -> None:
    inputs, targets = data()
    model = Module(nnx.Rngs(0))
    learning_rate = 1e-2
    tx = stablegrad_adam(learning_rate, reference=reference)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Module, optimizer: nnx.Optimizer) -> jax.Array:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def predict(params: Tree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            del targets
            return nnx.merge(graph, params, rest)(inputs)

        value, (grads, prediction_grad) = prediction_value_and_grad(predict, squared)(
            params, inputs, targets
        )
        optimizer.update(model, grads, prediction_grad=prediction_grad)
        return value

    values = [float(step(model, optimizer)) for _ in range(150)]
    assert values[-1] < 0.25 * values[0]
    (scale,) = [
        np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(optimizer))
        if "grad_scale" in map(str, path)
    ]
    assert scale.shape == (3,)
    assert np.all(scale > 0)


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: tx,
        lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 1),
        lambda tx: optax.chain(optax.apply_if_finite(tx, 3), optax.adam(1e-3)),
    ],
    ids=["alone", "multi_steps", "chain"],
)
def test_diagnostics_of_an_nnx_optimizer(around: Any) -> None:
    inputs, targets = data()
    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, around(stablegrad()), wrt=nnx.Param)
    shapes = nnx.state(model, nnx.Param)

    @nnx.jit
    def step(model: Module, optimizer: nnx.Optimizer, history: ScaleHistory) -> Any:
        grads = nnx.grad(lambda model: squared(model(inputs), inputs, targets))(model)
        optimizer.update(model, grads)
        return grads, history.record(optimizer.opt_state)

    grads, history = step(model, optimizer, ScaleHistory.init(optimizer.opt_state, length=4))
    names = [f"{path}/value" for path in ("first/bias", "first/kernel", "second/kernel")]
    want = [jnp.sqrt(jnp.mean(grads["first"]["bias"][...] ** 2))]
    want += [jnp.std(grads[name]["kernel"][...]) for name in ("first", "second")]

    scales = layer_scales(optimizer.opt_state, shapes)
    assert list(scales) == names
    np.testing.assert_allclose(list(scales.values()), want, rtol=1e-5)
    metrics = scale_metrics(optimizer.opt_state, shapes, prefix="")
    np.testing.assert_allclose(list(metrics.values()), want, rtol=1e-5)
    np.testing.assert_allclose(history.in_order().grad_scale, [want], rtol=1e-5)
    rows = scale_table(optimizer.opt_state, shapes, grads=grads).rows
    assert [row.layer for row in rows] == names
    assert not any(row.notes for row in rows)
    assert len(plot_scales(history, shapes).axes) == 3


@pytest.mark.parametrize("is_pure", [False, True])
def test_nnx_optimizer_takes_a_tree_of_layers_like_its_state(is_pure: bool) -> None:
    inputs, targets = data()
    model = Module(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    layers = per_leaf(nnx.to_pure_dict(params) if is_pure else params)
    optimizer = nnx.Optimizer(model, stablegrad_adam(1e-2, layers=layers), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: squared(m(inputs), inputs, targets))(model))
    scales = layer_scales(optimizer.opt_state, nnx.state(model, nnx.Param), layers)
    assert len(scales) == 3
    assert np.all(np.asarray(list(scales.values())) > 0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + nn.tanh(nn.Dense(8)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(8)(x)
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
        x, _ = scan(name="blocks")(x, None)
        return nn.Dense(1)(x)


@pytest.mark.skipif(
    not hasattr(NamedSharding, "update"), reason="flax.linen.scan needs a newer JAX than this"
)
def test_scanned_layers_have_a_scale_each() -> None:
    inputs, targets = data()
    model = Scanned()
    params = model.init(jax.random.key(0), inputs)["params"]
    grads = jax.grad(lambda p: squared(model.apply({"params": p}, inputs), inputs, targets))(params)
    rule = stacked("^blocks/")
    tx = stablegrad(decay=0.0, layers=rule)
    updates, state = jax.jit(tx.update)(grads, tx.init(params))
    scales = layer_scales(state, params, rule)
    kernel = np.asarray(grads["blocks"]["Dense_0"]["kernel"])
    np.testing.assert_allclose(scales["blocks/Dense_0/kernel"], kernel.std((1, 2)), rtol=1e-4)
    rescaled = np.asarray(updates["blocks"]["Dense_0"]["kernel"])
    np.testing.assert_allclose(rescaled.std((1, 2)), 1.0, rtol=1e-4)
    assert scales["Dense_0/kernel"].shape == ()


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.tanh(nn.Dense(16, kernel_init=kernel)(x))
        return nn.Dense(1)(x)


def test_jit_init_with_out_shardings_on_partitioned_linen_params() -> None:
    inputs, targets = data()
    model = Partitioned()
    tx = optax.chain(stablegrad(), optax.adam(1e-2))

    def create() -> TrainState:
        params = model.init(jax.random.key(0), inputs)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    devices = mesh()
    shardings = nn.get_sharding(jax.eval_shape(create), devices)
    state = jax.jit(create, out_shardings=shardings)()
    kernel = state.params["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.value.sharding.spec == PartitionSpec(None, "model")
    assert optax.tree.get(state.opt_state, "grad_scale").shape == (3,)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        def loss(p: Tree) -> jax.Array:
            return squared(state.apply_fn({"params": p}, inputs), inputs, targets)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(state)
    assert optax.tree.get(state.opt_state, "grad_scale").sharding.is_fully_replicated
    assert np.all(np.asarray(optax.tree.get(state.opt_state, "grad_scale")) > 0)


def test_nnx_optimizer_on_a_partitioned_model() -> None:
    devices = mesh()

    class Sharded(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.first = nnx.Linear(3, 16, kernel_init=init, rngs=rngs)
            self.second = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(jnp.tanh(self.first(x)))

    inputs, targets = data()

    @nnx.jit
    def create() -> tuple[Sharded, nnx.Optimizer]:
        model = Sharded(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.chain(stablegrad(), optax.adam(1e-2)), wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        specs = nnx.get_partition_spec(state)
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, specs))
        return model, optimizer

    @nnx.jit
    def step(model: Sharded, optimizer: nnx.Optimizer) -> jax.Array:
        value, grads = nnx.value_and_grad(lambda m: squared(m(inputs), inputs, targets))(model)
        optimizer.update(model, grads)
        return value

    with jax.set_mesh(devices) if hasattr(jax, "set_mesh") else devices:
        model, optimizer = create()
        values = [float(step(model, optimizer)) for _ in range(60)]
    assert values[-1] < values[0]
    sharding = model.first.kernel[...].sharding
    assert isinstance(sharding, NamedSharding)
    assert sharding.spec == PartitionSpec(None, "model")
