"""Memory traffic of the compiled optimizer step on the GPU at hand; nothing where there is none.

What is counted is in ``programs.py``.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.cost import programs
from benchmarks.cost.arms import FRONTS, OURS, WHOLE
from benchmarks.cost.programs import cell_of

PLATFORM = "gpu"


def cells() -> Iterator[dict[str, Any]]:
    """Every arm in front of Adam; ours also in front of AdamW and SGD, and for bfloat16."""
    chips = _chips()
    if not chips:
        return
    chip = chips[0].device_kind
    for base, fronts in {"adam": (*FRONTS, *WHOLE), "adamw": OURS, "sgd": OURS}.items():
        for front in fronts:
            yield cell_of(chip, 1, base, front)
    for front in OURS:
        yield cell_of(chip, 1, "adam", front, "bfloat16")


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compile one cell for the first GPU, and count."""
    return programs.measure(cell, np.array(_chips()[:1]))


def _chips() -> list[Any]:
    try:
        return jax.devices(PLATFORM)
    except RuntimeError:  # what JAX raises where it finds none
        return []
