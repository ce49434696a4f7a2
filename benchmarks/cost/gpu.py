"""Memory traffic of the compiled optimizer step on the GPU at hand; nothing where there is none.

What is counted is in ``programs.py``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.cost import programs
from benchmarks.cost.arms import FRONTS, WHOLE

PLATFORM = "gpu"


def cells() -> Iterator[dict[str, Any]]:
    """Every arm in front of Adam; ours also in front of AdamW and SGD, and for bfloat16."""
    chips = _chips()
    if not chips:
        return
    ours = ("alone", "stablegrad", "stablegrad, delayed")
    fronts = {"adam": (*FRONTS, *WHOLE), "adamw": ours, "sgd": ours}
    settings = [(base, front, "float32") for base in fronts for front in fronts[base]]
    settings += [("adam", front, "bfloat16") for front in ours]
    for base, front, dtype in settings:
        chip = chips[0].device_kind
        yield {"chip": chip, "devices": 1, "base": base, "arm": front, "grads": dtype}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compile one cell for the first GPU, and count."""
    return programs.measure(cell, np.array(_chips()[:1]))


def _chips() -> list[Any]:
    try:
        return jax.devices(PLATFORM)
    except RuntimeError:  # what JAX raises where it finds none
        return []
