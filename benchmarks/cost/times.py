"""Time of the compiled optimizer step on the CPU or GPU at hand, paired with the base optimizer's.

Every arm makes one step in turn, so that what else the machine does falls on all alike. A ratio is
taken within each turn; the record has the median and the quartiles of these ratios.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cost.arms import BASES, FRONTS, arm, step_of

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)
WARMUP, TURNS = 3, {10**4: 500, 10**5: 300, 10**6: 100, 10**7: 40, 10**8: 20}


def cells() -> Iterator[dict[str, Any]]:
    """One for each size; all arms are measured together."""
    for base in BASES:
        for size in SIZES:
            yield {"backend": jax.default_backend(), "base": base, "parameters": size}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """The time of each front's step as a ratio to the base optimizer alone."""
    side = round(np.sqrt(cell["parameters"]))
    grads = jax.random.normal(jax.random.key(0), (side, side))
    running = {}
    for front in FRONTS:
        tx = arm(front, cell["base"])
        params = jnp.zeros_like(grads)
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        running[front] = (step, params, tx.init(params))

    seconds: dict[str, list[float]] = {front: [] for front in running}
    for turn in range(WARMUP + TURNS[cell["parameters"]]):
        for front, (step, params, state) in running.items():
            start = time.perf_counter()
            params, state = jax.block_until_ready(step(params, state, grads))
            if turn >= WARMUP:
                seconds[front].append(time.perf_counter() - start)
            running[front] = (step, params, state)
    ratios = quartiles_beside(seconds["alone"], seconds)
    return {"device": jax.devices()[0].device_kind, "ratios": ratios}


def quartiles_beside(alone: list[float], seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Median and quartiles of the ratios within a turn, by arm."""
    return {
        name: np.quantile(np.array(times) / np.array(alone), [0.5, 0.25, 0.75]).round(3).tolist()
        for name, times in seconds.items()
    }
