"""The optimizer states that each version saved, and the step that it took from them.

A job may go on with a later version than the one that wrote its checkpoint. ``tests/fixtures`` has
a directory for every version: ``states`` is an Orbax checkpoint with a state for each of ``CASES``,
and ``step.npz`` holds the same states as plain arrays, the gradients of the step after them and the
updates that it gave. ``python -m tests.saved_state`` writes the directory of this version.

What a released version wrote must load in every later one: those may add cases and options to
``CASES``, and change none that are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from stablegrad_optax import __version__, per_leaf, stablegrad, stacked, weights_only

FIXTURES = Path(__file__).parent / "fixtures"
STEPS_BEFORE = 3

Tree = Any

# Every option is given, since a later version may have other defaults.
OPTIONS: dict[str, Any] = {
    "reference": 1.0,
    "decay": 0.9,
    "balance": 1.0,
    "fade_below": 2**-23,
    "delayed": False,
    "layers": per_leaf,
}
CASES: dict[str, optax.GradientTransformationExtraArgs] = {
    "chain": optax.chain(stablegrad(**OPTIONS), optax.adam(1e-3)),
    "delayed": stablegrad(**OPTIONS | {"delayed": True, "balance": 0.5}),
    "fading": stablegrad(**OPTIONS | {"decay": 0.0, "fade_below": 1.0}),
    "prediction": stablegrad(**OPTIONS | {"reference": "prediction", "layers": weights_only}),
    "stacked": stablegrad(**OPTIONS | {"reference": 0.5, "layers": stacked("^blocks")}),
}


def params() -> Tree:
    """Params like a small network's with scanned layers; the values do not matter."""
    shapes = {"blocks": (3, 4, 4), "head": {"bias": (2,), "kernel": (4, 2)}, "temperature": ()}
    return jax.tree.map(
        lambda shape: np.ones(shape, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def gradients(step: int) -> Tree:
    """Gradients, and a prediction gradient, that fall from step to step."""
    rng = np.random.default_rng(step)
    like = {"grads": params(), "prediction_grad": np.ones((5, 2), np.float32)}
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * 0.1**step), like)


def update(name: str, state: Tree, given: Tree) -> tuple[Tree, Tree]:
    """One step of a case, compiled."""
    step = jax.jit(CASES[name].update)
    return step(given["grads"], state, params(), prediction_grad=given["prediction_grad"])


def write(fixtures: Path = FIXTURES) -> Path:
    """Write the directory of this version; an error if there is one already."""
    directory = fixtures / __version__
    if directory.exists():
        raise FileExistsError(
            f"{directory} exists, and what a version wrote is never written again. If version "
            f"{__version__} is not released yet, remove it first."
        )
    states = {name: tx.init(params()) for name, tx in CASES.items()}
    for step in range(STEPS_BEFORE):
        states = {name: update(name, state, gradients(step))[1] for name, state in states.items()}
    given = gradients(STEPS_BEFORE)
    updates = {name: update(name, state, given)[0] for name, state in states.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / "states").absolute(), states)
    # Names the folders of this machine; only stores that cannot rename need it.
    (directory / "states" / "commit_success.txt").unlink(missing_ok=True)
    step = {"given": given, "states": states, "updates": updates}
    leaves = jax.tree_util.tree_flatten_with_path(step)[0]
    arrays: dict[str, Any] = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    np.savez_compressed(directory / "step.npz", **arrays)
    return directory


def read(directory: Path) -> tuple[Tree, Tree]:
    """The states as Orbax restores them, and what ``step.npz`` holds: given, states, updates."""
    with np.load(directory / "step.npz") as file:
        arrays = dict(file)
    # Without the cases that came after this directory.
    old = {name: tx for name, tx in CASES.items() if any(f"['{name}']" in key for key in arrays)}
    like = {name: tx.init(params()) for name, tx in old.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        states = checkpointer.restore((directory / "states").absolute(), like)
    updates = {name: params() for name in old}
    step = {"given": gradients(0), "states": like, "updates": updates}
    return states, jax.tree_util.tree_map_with_path(
        lambda path, _: arrays.pop(jax.tree_util.keystr(path)), step
    )


if __name__ == "__main__":
    print(write())
