"""A transformer as MaxText builds them on a TPU pod: scanned blocks, FSDP x tensor parallel.

Parameters name their axes (``embed``, ``mlp``, ...), ``RULES`` maps the names to axes of the mesh,
and ``jit(init, out_shardings=...)`` makes every array where it is to stay. What StableGrad needs of
this is one line: ``layers=stacked("^blocks/")``, since scanned blocks share their arrays. Trains
its small form on the devices at hand::

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m examples.tpu_pod --steps 20

``python -m benchmarks.cost.pod`` compiles the large form for 256 chips, without a TPU.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.linen import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stablegrad_optax import stablegrad_adamw, stacked

PyTree = Any


class Config(NamedTuple):
    """The sizes of a model and of its batch."""

    layers: int
    embed: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    batch: int
    length: int


SMALL = Config(layers=3, embed=64, heads=4, head_dim=16, mlp=256, vocab=128, batch=16, length=32)
LARGE = Config(
    layers=32,
    embed=4096,
    heads=32,
    head_dim=128,
    mlp=16384,
    vocab=32768,
    batch=512,
    length=2048,
)

RULES = (
    ("batch", "fsdp"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)
"""Axes with a name that is not here, such as ``layers``, are not sharded."""
ACTIVATIONS = ("batch", "length", "embed_of_activations")


class Block(nn.Module):
    """Causal attention and two dense layers, each behind a norm."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Of activations, [batch, length, embed]; ``nn.scan`` asks for a second result."""
        c = self.config
        heads = ("heads", c.heads), ("head_dim", c.head_dim)
        h = norm("attention_norm")(x)
        query, key, value = (
            jnp.einsum("ble,ehd->blhd", h, self.kernel(name, c.embed, *heads))
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += jnp.einsum("blhd,ehd->ble", h, self.kernel("out", c.heads * c.head_dim, *heads))
        h = norm("mlp_norm")(x)
        h = nn.gelu(jnp.einsum("ble,em->blm", h, self.kernel("up", c.embed, ("mlp", c.mlp))))
        x += jnp.einsum("blm,em->ble", h, self.kernel("down", c.mlp, ("mlp", c.mlp)))
        return spmd.with_logical_constraint(x, ACTIVATIONS), None

    def kernel(self, name: str, fan_in: int, *axes: tuple[str, int]) -> jax.Array:
        """A parameter with names for its axes; bfloat16 where it is used.

        ``embed`` comes first in all of them, so that all are sharded over the same axes of the mesh
        in the same order: then the statistics of all layers are summed in one all-reduce.
        """
        names, shape = zip(("embed", self.config.embed), *axes, strict=True)
        init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), names)
        return jnp.asarray(self.param(name, init, shape), jnp.bfloat16)


class Decoder(nn.Module):
    """Logits, [batch, length, vocab], of the token that follows each of tokens, [batch, length]."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """See the class."""
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", "vocab"))
        embedding = self.param("embedding", init, (c.embed, c.vocab))
        embedding = jnp.asarray(embedding, jnp.bfloat16)
        x = spmd.with_logical_constraint(embedding.T[tokens], ACTIVATIONS)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(c, name="blocks")(x, None)
        return norm("norm")(x) @ embedding * c.embed**-0.5


def norm(name: str) -> nn.RMSNorm:
    """Its scale is replicated; sharded, it would need an all-reduce over axes of its own."""
    return nn.RMSNorm(dtype=jnp.bfloat16, name=name)


def optimizer() -> optax.GradientTransformationExtraArgs:
    """AdamW behind StableGrad with the scales of the steps before, which cost no read."""
    return stablegrad_adamw(1e-3, decay=0.9, delayed=True, layers=stacked("^blocks/"))


class Job(NamedTuple):
    """A training job on a mesh: functions to be jitted, and where their arrays are to be."""

    init: Callable[[jax.Array], PyTree]
    step: Callable[[PyTree, jax.Array], tuple[PyTree, jax.Array]]
    state: PyTree  # of shardings
    batch: NamedSharding


def mesh_of(devices: np.ndarray, tensor: int) -> Mesh:
    """FSDP x tensor parallel, with ``tensor`` neighbours along the second axis."""
    return Mesh(devices.reshape(-1, tensor), ("fsdp", "tensor"))


def job(config: Config, tx: optax.GradientTransformation, mesh: Mesh) -> Job:
    """The job of a model; ``init(key)`` makes the state, ``step(state, tokens)`` the next one."""
    model = Decoder(config)

    def boxed(key: jax.Array) -> PyTree:
        return model.init(key, jnp.zeros((config.batch, config.length), jnp.int32))["params"]

    def init(key: jax.Array) -> PyTree:
        params = nn.unbox(boxed(key))
        return {"params": params, "opt_state": tx.init(params)}

    def loss(params: PyTree, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        assert isinstance(logits, jax.Array)
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: PyTree, tokens: jax.Array) -> tuple[PyTree, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state["params"], tokens)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, value

    key = jax.eval_shape(lambda: jax.random.key(0))
    specs = nn.get_partition_spec(jax.eval_shape(boxed, key))
    params = spmd.logical_to_mesh_sharding(specs, mesh, RULES)
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,  # moments lie where their parameters do
        jax.eval_shape(init, key)["opt_state"],
        params,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    batch = NamedSharding(mesh, PartitionSpec("fsdp"))
    return Job(init, step, {"params": params, "opt_state": opt_state}, batch)


def train(config: Config, steps: int, mesh: Mesh) -> list[float]:
    """Train on sequences that count up from a random token; the loss of every step."""
    init, step, shardings, batch = job(config, optimizer(), mesh)
    losses: list[float] = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        for seed in range(steps):
            first = np.random.default_rng(seed).integers(config.vocab, size=(config.batch, 1))
            tokens = (first + np.arange(config.length + 1)) % config.vocab
            state, value = step(state, jax.device_put(tokens.astype(np.int32), batch))
            losses.append(float(value))
    return losses


def main() -> None:
    """Train the small form."""
    parser = argparse.ArgumentParser(prog="python -m examples.tpu_pod")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tensor", type=int, default=2, help="devices along the tensor axis")
    given = parser.parse_args()
    mesh = mesh_of(np.array(jax.devices()), given.tensor)
    for number, value in enumerate(train(SMALL, given.steps, mesh), start=1):
        print(f"step {number}: loss {value:.4f}")


if __name__ == "__main__":
    main()
