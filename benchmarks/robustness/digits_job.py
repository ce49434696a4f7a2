"""A training job that goes on from its last checkpoint, for ``kill_and_resume`` to kill.

A Flax network on scikit-learn's digits. The batch of a step is drawn from the step's number, so
that what is left to do depends on the checkpoint alone. Prints the step it starts from, then every
step it has done, a line each, and leaves its last state in ``final.npz``.
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
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from stablegrad_optax import prediction_value_and_grad, stablegrad

OPTIONS: dict[str, dict[str, Any]] = {
    "running": {"decay": 0.9},
    "delayed": {"decay": 0.9, "delayed": True},
    "prediction": {"decay": 0.9, "reference": "prediction"},
}
"""Options of the transform by the name of the job."""

SAVE_EVERY = 10
BATCH_SIZE = 64


class Classifier(nn.Module):
    """Logits of ten digits, [n, 10], at images, [n, 64]."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = images
        for _ in range(4):
            hidden = nn.tanh(nn.Dense(64)(hidden))
        return nn.Dense(10)(hidden)


def create_state(options: dict[str, Any]) -> TrainState:
    """The state before the first step."""
    model = Classifier()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    tx = optax.chain(stablegrad(**options), optax.adam(1e-3))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return state.replace(step=jnp.int32(0))  # an array from the start, as it is once restored


def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """One step on a batch that depends on nothing but the step's number."""
    key = jax.random.fold_in(jax.random.key(1), state.step)
    rows = jax.random.choice(key, len(images), (BATCH_SIZE,), replace=False)

    def predict(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        del labels
        return state.apply_fn({"params": params}, images)

    def loss(logits: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        del images
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value_and_grad = prediction_value_and_grad(predict, loss)
    _, (grads, prediction_grad) = value_and_grad(state.params, images[rows], labels[rows])
    tx = optax.with_extra_args_support(state.tx)
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, prediction_grad=prediction_grad
    )
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def train(directory: Path, options: dict[str, Any], steps: int) -> None:
    """Train to the given step, from the last checkpoint in the directory if there is one."""
    digits: Any = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    state, step = create_state(options), jax.jit(train_step)
    manager_options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY,
        max_to_keep=2,
        cleanup_tmp_directories=True,  # what a killed job left half written
    )
    # Saves are asynchronous: the next steps run while a checkpoint is being written.
    with ocp.CheckpointManager(directory / "checkpoints", options=manager_options) as manager:
        last = manager.latest_step()
        if last is not None:
            state = manager.restore(last, args=ocp.args.StandardRestore(state))
        done = int(state.step)
        print(done, flush=True)
        while done < steps:
            state = step(state, images, labels)
            done = int(state.step)
            manager.save(done, args=ocp.args.StandardSave(state))
            print(done, flush=True)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays: dict[str, Any] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(directory / "final.npz", **arrays)


def main() -> None:
    """Run the job that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.digits_job", description=__doc__
    )
    parser.add_argument("directory", type=lambda path: Path(path).absolute())
    parser.add_argument("--options", choices=OPTIONS, default="running")
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    train(given.directory, OPTIONS[given.options], given.steps)


if __name__ == "__main__":
    main()
