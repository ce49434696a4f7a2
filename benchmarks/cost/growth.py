"""What many leaves cost: tracing, compilation, size and time of a step, beside the base optimizer.

Each arm is compiled after a first one that is thrown away, which loads the compiler. Beyond
``COMPILED`` leaves, where Adam alone takes XLA longer than anybody waits, a program is traced and
lowered only.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cost.arms import OURS, arm, step_of
from stablegrad_optax import stablegrad, stacked

PyTree = Any

LEAVES = (10, 100, 1000, 10_000)
COMPILED = 1000
STEPS = 11
SHAPE = (64, 64)
FRONTS = (*OURS, "clip_by_global_norm", "adaptive_grad_clip")


def cells() -> Iterator[dict[str, Any]]:
    """One for each number of leaves and arm, and one leaf that holds 1,000 layers."""
    for leaves in LEAVES:
        for front in FRONTS:
            yield {"backend": jax.default_backend(), "leaves": leaves, "arm": front}
    for front in OURS:
        yield {"backend": jax.default_backend(), "leaves": 1, "layers": 1000, "arm": front}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Trace, lower and compile once, then step a few times."""
    _compiled(arm("alone", "adam"), 1, SHAPE)
    if "layers" not in cell:
        return _compiled(arm(cell["arm"], "adam"), cell["leaves"], SHAPE)
    return _compiled(_of_stacked_layers(cell["arm"]), cell["leaves"], (cell["layers"], *SHAPE))


def _of_stacked_layers(front: str) -> optax.GradientTransformation:
    base = arm("alone", "adam")
    if front == "alone":
        return base
    layers = stacked("kernel")
    return optax.chain(stablegrad(delayed=front.endswith("delayed"), layers=layers), base)


def _compiled(tx: Any, leaves: int, shape: tuple[int, ...]) -> dict[str, Any]:
    params = {f"kernel_{i}": jnp.ones(shape) for i in range(leaves)}
    state = tx.init(params)
    start = time.perf_counter()
    traced = jax.jit(step_of(tx)).trace(params, state, params)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    measured = {
        "trace_seconds": round(traced_at - start, 3),
        "lower_seconds": round(lowered_at - traced_at, 3),
        "operations": lowered.as_text().count(" = "),
    }
    if leaves > COMPILED:
        return measured
    compiling = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    steps: list[float] = []
    for _ in range(STEPS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, state, params))
        steps.append(time.perf_counter() - began)
    return measured | {
        "compile_seconds": round(compiled_at - compiling, 3),
        "step_seconds": float(f"{np.median(steps):.3g}"),
        "instructions": (compiled.as_text() or "").count(" = "),
    }
