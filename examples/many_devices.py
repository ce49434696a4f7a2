"""One network on many devices: by ``jit`` on a mesh, by ``shard_map`` and by ``pmap``.

Data parallel, FSDP and tensor parallel are one program on meshes of different shapes. Wherever a
layer's entries are, it has one statistic, that of its whole gradient, and all ways give the same::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m examples.many_devices
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stablegrad_optax import stablegrad, stacked

PyTree = Any
Batch = tuple[jax.Array, jax.Array]
State = tuple[PyTree, PyTree]  # params and the optimizer's state
GradsOf = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]

AXES = ("data", "fsdp", "tensor")
MESHES = {
    "data parallel": (8, 1, 1),
    "FSDP": (1, 8, 1),
    "tensor parallel": (1, 1, 8),
    "FSDP x tensor parallel": (1, 4, 2),
}
BATCH = P(("data", "fsdp"))
SPECS = {
    "first": P(None, "fsdp"),
    "blocks": {
        "up": P(None, "fsdp", "tensor"),
        "bias": P(None, "tensor"),
        "down": P(None, "fsdp", "tensor"),
    },
    "last": P("fsdp", None),
}
LAYERS, INPUTS, WIDTH, HIDDEN = 3, 4, 16, 32

TX = optax.chain(
    stablegrad(decay=0.5, balance=0.5, layers=stacked("^blocks/")),
    optax.adam(1e-2),
)


def init_params(key: jax.Array) -> PyTree:
    """Residual blocks, which share their arrays, between two linear layers."""
    keys = jax.random.split(key, 4)
    return {
        "first": jax.random.normal(keys[0], (INPUTS, WIDTH)) / 2,
        "blocks": {
            "up": jax.random.normal(keys[1], (LAYERS, WIDTH, HIDDEN)) / 4,
            "bias": jnp.zeros((LAYERS, HIDDEN)),
            "down": jax.random.normal(keys[2], (LAYERS, WIDTH, HIDDEN)) / 8,
        },
        "last": jax.random.normal(keys[3], (WIDTH, 1)) / 4,
    }


def make_batch() -> Batch:
    """Inputs, [16, 4], and targets, [16, 1]."""
    inputs = jax.random.normal(jax.random.key(1), (16, INPUTS))
    return inputs, jnp.sin(inputs.sum(1, keepdims=True))


def loss(params: PyTree, batch: Batch) -> jax.Array:
    """Mean squared error; knows nothing of devices."""
    inputs, targets = batch

    def block(x: jax.Array, p: PyTree) -> tuple[jax.Array, None]:
        hidden = jnp.tanh(jnp.einsum("be,eh->bh", x, p["up"]) + p["bias"])
        return x + jnp.einsum("bh,eh->be", hidden, p["down"]), None

    x, _ = jax.lax.scan(block, inputs @ params["first"], params["blocks"])
    return jnp.mean((x @ params["last"] - targets) ** 2)


def take_step(grads_of: GradsOf, state: State, batch: Batch) -> tuple[State, jax.Array]:
    """The state after a step, and the loss before it."""
    params, opt_state = state
    value, grads = grads_of(params, batch)
    updates, opt_state = TX.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def train(step: Callable[..., Any], state: State, batch: Batch) -> tuple[State, list[float]]:
    """The state after five steps, and their losses."""
    losses: list[float] = []
    for _ in range(5):
        state, value = step(state, batch)
        losses.append(float(value))
    return state, losses


def mesh_of(shape: tuple[int, int, int], kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of the first devices."""
    devices = jax.devices()[: shape[0] * shape[1] * shape[2]]
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 3, devices=devices)


def start(mesh: Mesh) -> tuple[State, Batch]:
    """Params and optimizer state, made where they are to stay, and the batch."""
    replicated = NamedSharding(mesh, P())
    shardings = jax.tree.map(partial(NamedSharding, mesh), SPECS, is_leaf=is_spec)
    params = jax.jit(init_params, out_shardings=shardings)(jax.random.key(0))
    state_shardings = optax.tree.map_params(
        TX,
        lambda _, sharding: sharding,  # moments lie where their parameters do
        jax.eval_shape(TX.init, params),
        shardings,
        transform_non_params=lambda _: replicated,  # the scales: two numbers for each layer
    )
    opt_state = jax.jit(TX.init, out_shardings=state_shardings)(params)
    return (params, opt_state), jax.device_put(make_batch(), NamedSharding(mesh, BATCH))


def is_spec(tree: PyTree) -> bool:
    """In some versions of JAX a ``PartitionSpec`` is a tuple."""
    return isinstance(tree, P)


def by_jit(mesh: Mesh) -> tuple[State, list[float]]:
    """``jit`` on a mesh: the compiler sees to the devices."""
    with jax.set_mesh(mesh):
        return train(jax.jit(partial(take_step, jax.value_and_grad(loss))), *start(mesh))


def by_explicit_jit(mesh: Mesh) -> tuple[State, list[float]]:
    """``jit`` on a mesh with explicit axes: the type of a gradient says how it is sharded.

    The network above does not speak of shardings, so ``auto_axes`` leaves those within it to the
    compiler. The optimizer needs no such help.
    """
    grads_of = jax.value_and_grad(jax.sharding.auto_axes(loss, out_sharding=P()))
    with jax.set_mesh(mesh):
        return train(jax.jit(partial(take_step, grads_of)), *start(mesh))


def by_shard_map(mesh: Mesh) -> tuple[State, list[float]]:
    """FSDP by hand. What ``shard_map`` sees of a gradient is a shard: scale it outside."""
    specs = jax.tree.map(
        lambda spec: P(*(axis if axis == "fsdp" else None for axis in spec)), SPECS, is_leaf=is_spec
    )

    def whole(spec: P, shard: jax.Array) -> jax.Array:
        if "fsdp" not in spec:
            return shard
        return jax.lax.all_gather(shard, "fsdp", axis=spec.index("fsdp"), tiled=True)

    def mean_loss(params: PyTree, batch: Batch) -> jax.Array:
        params = jax.tree.map(whole, specs, params, is_leaf=is_spec)
        return jax.lax.pmean(loss(params, batch), ("data", "fsdp"))

    grads_of = jax.shard_map(
        jax.value_and_grad(mean_loss), mesh=mesh, in_specs=(specs, BATCH), out_specs=(P(), specs)
    )
    with jax.set_mesh(mesh):
        return train(jax.jit(partial(take_step, grads_of)), *start(mesh))


def by_pmap() -> tuple[State, list[float]]:
    """``pmap``, for data parallel alone: average the gradients, then scale them."""

    def grads_of(params: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        return jax.lax.pmean(jax.value_and_grad(loss)(params, batch), "data")

    step = jax.pmap(
        partial(take_step, grads_of), axis_name="data", in_axes=(None, 0), out_axes=None
    )
    params = init_params(jax.random.key(0))
    split = lambda x: x.reshape(jax.device_count(), -1, *x.shape[1:])  # noqa: E731
    return train(step, (params, TX.init(params)), jax.tree.map(split, make_batch()))


def main() -> None:
    """Train in every way; the last loss of each."""
    one_device = by_jit(mesh_of((1, 1, 1)))
    print(f"{one_device[1][-1]:.6f}  one device")
    for name, shape in MESHES.items():
        print(f"{by_jit(mesh_of(shape))[1][-1]:.6f}  {name}")
        explicit = by_explicit_jit(mesh_of(shape, AxisType.Explicit))
        print(f"{explicit[1][-1]:.6f}  {name}, explicit axes")
    print(f"{by_shard_map(mesh_of((2, 4, 1)))[1][-1]:.6f}  data x FSDP, shard_map")
    print(f"{by_pmap()[1][-1]:.6f}  data parallel, pmap")


if __name__ == "__main__":
    main()
