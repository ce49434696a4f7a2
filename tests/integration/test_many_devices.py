"""Training on many devices in every way JAX has: the numbers of one device, to rounding.

The network and the ways are those of ``examples/many_devices.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples import many_devices as example
from examples import tpu_pod
from stablegrad_optax import stablegrad

pytestmark = pytest.mark.usefixtures("compiled_quickly")

Tree = Any

WAYS: dict[str, Callable[[], Any]] = {
    **{
        name: lambda shape=shape: example.by_jit(example.mesh_of(shape))
        for name, shape in example.MESHES.items()
    },
    **{
        f"{name}, explicit axes": lambda shape=shape: example.by_explicit_jit(
            example.mesh_of(shape, AxisType.Explicit)
        )
        for name, shape in example.MESHES.items()
        if name in ("FSDP", "FSDP x tensor parallel")
    },
    "data x FSDP, shard_map": lambda: example.by_shard_map(example.mesh_of((2, 4, 1))),
    "data parallel, pmap": example.by_pmap,
}


@pytest.fixture(scope="module")
def one_device() -> Any:
    return example.by_jit(example.mesh_of((1, 1, 1)))


@pytest.mark.parametrize("way", WAYS)
def test_many_devices_give_the_numbers_of_one(way: str, one_device: Any) -> None:
    state, losses = WAYS[way]()
    want, want_losses = one_device
    assert jax.tree.leaves(state[0])[0].sharding.num_devices == 8
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert losses[-1] < losses[0]
    # Adam's step is the same for gradients of any size, so that of an entry with next to no
    # gradient is rounding.
    chex.assert_trees_all_close(jax.device_get(state), jax.device_get(want), rtol=1e-3, atol=1e-5)
    assert optax.tree.get(state, "grad_scale").sharding.is_fully_replicated
    assert optax.tree.get(state, "grad_scale").shape == (3 * example.LAYERS + 2,)


merges_all_reduces = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the CPU's compiler merged no all-reduces then"
)


def sharded(mesh: Mesh, **specs: P) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }


def collectives(tx: optax.GradientTransformation, grads: Tree) -> list[str]:
    """Those that every update runs, by the CPU's compiler; a branch stands outside of the entry.

    It sums over one axis of a mesh after the other where a layer is sharded along two of its own.
    The TPU's compiler does not: tests/test_cost.py.
    """
    state = jax.eval_shape(tx.init, grads)
    shardings = jax.tree.map(lambda g: g.sharding, grads)
    update = jax.jit(tx.update, out_shardings=(shardings, None))
    text = update.lower(grads, state).compile().as_text() or ""
    entry = text[text.index("\nENTRY") :]
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf" ({kinds})(?:-start)?\(", entry)


@merges_all_reduces
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "tensor"), P(("fsdp", "tensor"))], ids=str)
def test_a_sharded_layer_takes_one_all_reduce(spec: P, delayed: bool) -> None:
    grads = sharded(example.mesh_of((1, 4, 2)), kernel=spec)
    assert collectives(stablegrad(delayed=delayed), grads) == ["all-reduce"]


def test_replicated_layers_take_none() -> None:
    grads = sharded(example.mesh_of((8, 1, 1)), kernel=P(), other=P())
    assert collectives(stablegrad(), grads) == []


@merges_all_reduces
@pytest.mark.parametrize(
    ("other", "count"), [(P("fsdp"), 1), (P(None, "fsdp"), 1), (P("tensor"), 2)]
)
def test_layers_sharded_over_the_same_axes_share_their_all_reduce(other: P, count: int) -> None:
    grads = sharded(example.mesh_of((1, 4, 2)), one=P("fsdp"), other=other)
    assert collectives(stablegrad(), grads) == ["all-reduce"] * count


def test_within_shard_map_a_shard_is_a_layer_of_its_own_and_the_state_no_longer_replicated() -> (
    None
):
    """What docs/many_devices.md warns of."""
    kernel = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    kernel *= np.arange(1, 17)[:, None]
    tx = stablegrad()

    def update(grad: jax.Array) -> Any:
        updates, state = tx.update(grad, tx.init(grad))
        return updates, state.grad_scale

    def mapped(*out_specs: P) -> Any:
        mesh = example.mesh_of((8, 1, 1))
        return jax.jit(jax.shard_map(update, mesh=mesh, in_specs=P("data"), out_specs=out_specs))

    updates, scales = mapped(P("data"), P("data"))(kernel)
    np.testing.assert_allclose(scales, [shard.std() for shard in np.split(kernel, 8)], rtol=1e-4)
    np.testing.assert_allclose([u.std() for u in np.split(updates, 8)], 1, rtol=1e-4)
    with pytest.raises(ValueError, match="require replication"):
        mapped(P("data"), P())(kernel)


@pytest.mark.parametrize("platforms", [["tpu"], ["cuda"], ["rocm"], ["tpu", "cuda", "rocm", "cpu"]])
def test_a_training_step_on_a_mesh_lowers_for(
    platforms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    delayed = optax.chain(stablegrad(decay=0.9, delayed=True), optax.adam(1e-2))
    monkeypatch.setattr(example, "TX", delayed)
    mesh = example.mesh_of((1, 4, 2))
    with jax.set_mesh(mesh):
        state, batch = example.start(mesh)
        step = jax.jit(partial(example.take_step, jax.value_and_grad(example.loss)))
        exported = jax.export.export(step, platforms=platforms)(state, batch)
    assert exported.platforms == tuple(platforms)
    assert exported.nr_devices == 8


@pytest.mark.skipif(
    not hasattr(NamedSharding, "update"), reason="flax.linen.scan needs a newer JAX than this"
)
def test_the_recipe_for_a_pod_trains() -> None:
    sizes = {"layers": 2, "embed": 16, "heads": 2, "head_dim": 8, "mlp": 32}
    config = tpu_pod.Config(**sizes, vocab=16, batch=8, length=8)
    losses = tpu_pod.train(config, 20, tpu_pod.mesh_of(np.array(jax.devices()), tensor=2))
    assert losses[-1] < losses[0]
