"""A Flax job of several processes, one a host, that goes on from its last checkpoint.

Every host runs the same script. All of them see all devices; each makes its own part of a batch
and writes its own part of a checkpoint. Two hosts of four devices each, on one machine::

    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
    python -m examples.many_hosts /tmp/job --coordinator localhost:8476 --hosts 2 --host 0 &
    python -m examples.many_hosts /tmp/job --coordinator localhost:8476 --hosts 2 --host 1

If one is lost, stop the others and start all again: they go on from the last checkpoint. On a TPU
pod or under Slurm leave out all but the directory: JAX finds out about the rest.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stablegrad_optax import stablegrad

PyTree = Any

BATCH, FEATURES, SAVE_EVERY = 64, 8, 5
TX = optax.chain(stablegrad(decay=0.9, delayed=True), optax.clip(10.0), optax.adam(1e-2))


class Net(nn.Module):
    """A network whose kernels are sharded over all devices of all hosts."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Predictions, [n, 1], at inputs, [n, 8]."""
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "fsdp"))
        for _ in range(3):
            x = nn.tanh(nn.Dense(32, kernel_init=init)(x))
        return nn.Dense(1)(x)


def init(key: jax.Array) -> PyTree:
    """Params, with their shardings written on them, and the optimizer's state."""
    params = Net().init(key, jnp.zeros((1, FEATURES)))["params"]
    return {"params": params, "opt_state": TX.init(params)}


def loss(params: PyTree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error over the batches of all hosts."""
    prediction = Net().apply({"params": params}, inputs)
    assert isinstance(prediction, jax.Array)
    return jnp.mean((prediction - targets) ** 2)


@jax.jit
def step(job: PyTree, inputs: jax.Array, targets: jax.Array) -> tuple[PyTree, jax.Array]:
    """The job after a step, and the loss before it."""
    value, grads = jax.value_and_grad(loss)(job["params"], inputs, targets)
    updates, opt_state = TX.update(grads, job["opt_state"], job["params"])
    return {"params": optax.apply_updates(job["params"], updates), "opt_state": opt_state}, value


def global_batch(number: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """The batch of a step, of which every host makes its own rows."""
    rows = np.split(np.arange(BATCH), jax.process_count())[jax.process_index()]
    inputs = np.random.default_rng(number).normal(size=(BATCH, FEATURES)).astype(np.float32)[rows]
    targets = np.sin(inputs.sum(1, keepdims=True))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    return (
        jax.make_array_from_process_local_data(sharding, inputs),
        jax.make_array_from_process_local_data(sharding, targets),
    )


def shardings_on(mesh: Mesh) -> PyTree:
    """Where each array of the job is to be: moments with their parameters, scales everywhere."""
    return nn.get_sharding(jax.eval_shape(init, jax.random.key(0)), mesh)


def train(directory: Path, steps: int) -> None:
    """Train to the given step, from the last checkpoint in the directory if there is one."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY,
        max_to_keep=2,
        cleanup_tmp_directories=True,  # what a lost host left half written
    )
    with ocp.CheckpointManager(directory, options=options) as manager:
        job, done = jax.jit(init, out_shardings=shardings_on(mesh))(jax.random.key(0)), 0
        last = manager.latest_step()
        if last is not None:
            job, done = manager.restore(last, args=ocp.args.StandardRestore(job)), last
        for number in range(done, steps):
            job, value = step(job, *global_batch(number, mesh))
            print(f"step {number + 1}: loss {float(value):.6f}", flush=True)
            manager.save(number + 1, args=ocp.args.StandardSave(job), force=number + 1 == steps)


def main() -> None:
    """Run one host's process of the job."""
    parser = argparse.ArgumentParser(prog="python -m examples.many_hosts", description=__doc__)
    parser.add_argument("directory", type=lambda path: Path(path).absolute())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--coordinator", help="address of host 0, with a free port")
    parser.add_argument("--hosts", type=int)
    parser.add_argument("--host", type=int, help="the number of this one")
    given = parser.parse_args()
    if given.hosts != 1:
        jax.distributed.initialize(given.coordinator, given.hosts, given.host)
    train(given.directory, given.steps)


if __name__ == "__main__":
    main()
