"""Gradients, layers and options that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental
import numpy as np
import optax
from oracle import Axes

from stablegrad_optax import LayerAxes

Tree = Any

# Newer versions of JAX have it at the top.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

SMALL = {"kernel": (4, 3), "bias": (3,), "stack": (2, 3, 2)}
SMALL_AXES: list[Axes] = [((0,), False), ((0, 1), True), ((1, 2), True)]
SMALL_LAYERS = {
    "bias": LayerAxes(0, centered=False),
    "kernel": LayerAxes((0, 1)),
    "stack": LayerAxes((1, 2)),
}

OPTIONS: list[dict[str, Any]] = [
    {"decay": 0.0},
    {"decay": 0.5, "balance": 0.5},
    {"decay": 0.5, "balance": 0.0, "delayed": True},
]


def normal(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in sorted(shapes.items())}


def small_run(
    tx: optax.GradientTransformationExtraArgs,
    update: Callable[..., Any] | None = None,
    steps: int = 3,
) -> tuple[Tree, Tree]:
    grads = [normal(SMALL, seed) for seed in range(steps)]
    state = tx.init(grads[0])
    for g in grads:
        updates, state = (update or tx.update)(g, state)
    return updates, state
