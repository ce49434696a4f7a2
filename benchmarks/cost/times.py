"""Time of the compiled optimizer step on the CPU or GPU at hand, paired with the base optimizer's.

Every arm makes one step in turn, so that what else the machine does falls on all alike, and each
turn starts with another arm. A ratio is taken within each turn; the record has the median and the
quartiles of these ratios.
"""

import time
from collections.abc import Callable, Iterator, Mapping
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

    def start(front: str) -> tuple[Callable[[Any], Any], Any]:
        tx = arm(front, cell["base"])
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        params = jnp.zeros_like(grads)
        return lambda carry: step(*carry, grads), (params, tx.init(params))

    running = {front: start(front) for front in FRONTS}
    return in_turn(running, WARMUP, TURNS[cell["parameters"]])


def in_turn(
    running: Mapping[str, tuple[Callable[[Any], Any], Any]], warmup: int, turns: int
) -> dict[str, Any]:
    """Median and quartiles of the ratios within a turn to ``"alone"``, by arm.

    Args:
        running: By the arm's name, a function of what is carried from call to call, and its start.
        warmup: Turns whose times are not kept.
        turns: Turns whose times are.
    """
    steps = {name: step for name, (step, _) in running.items()}
    carried = {name: start for name, (_, start) in running.items()}
    names = list(running)
    seconds = np.empty((warmup + turns, len(names)))
    for turn, of_turn in enumerate(seconds):
        for index in np.roll(np.arange(len(names)), -turn):
            name = names[index]
            start = time.perf_counter()
            carried[name] = jax.block_until_ready(steps[name](carried[name]))
            of_turn[index] = time.perf_counter() - start
    kept = seconds[warmup:]
    ratios = kept / kept[:, names.index("alone"), None]
    quartiles = np.quantile(ratios, [0.5, 0.25, 0.75], axis=0).round(3).T
    return {
        "device": jax.devices()[0].device_kind,
        "ratios": dict(zip(names, quartiles.tolist(), strict=True)),
    }
