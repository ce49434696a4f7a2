"""What many leaves cost: tracing, compilation and size of the program, beside the base optimizer.

Each arm is compiled after a first one that is thrown away, which loads the compiler.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.cost.arms import arm, step_of
from stablegrad_optax import stablegrad, stacked

PyTree = Any

LEAVES = (10, 100, 1000)
SHAPE = (64, 64)
FRONTS = ("alone", "stablegrad", "stablegrad, delayed", "clip_by_global_norm", "adaptive_grad_clip")


def cells() -> Iterator[dict[str, Any]]:
    """One for each number of leaves and arm, and one leaf that holds 1,000 layers."""
    for leaves in LEAVES:
        for front in FRONTS:
            yield {"backend": jax.default_backend(), "leaves": leaves, "arm": front}
    for front in ("alone", "stablegrad", "stablegrad, delayed"):
        yield {"backend": jax.default_backend(), "leaves": 1, "layers": 1000, "arm": front}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Trace, lower and compile once."""
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
    params = {f"kernel_{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)
    start = time.perf_counter()
    traced = jax.jit(step_of(tx)).trace(params, state, params)
    traced_at = time.perf_counter()
    lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    return {
        "trace_seconds": round(traced_at - start, 3),
        "lower_seconds": round(lowered_at - traced_at, 3),
        "compile_seconds": round(compiled_at - lowered_at, 3),
        "instructions": (compiled.as_text() or "").count(" = "),
    }
