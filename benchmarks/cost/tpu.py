"""Memory traffic of the compiled optimizer step, by XLA's TPU compiler; no TPU is needed.

The compiler is in the package libtpu. What is counted is in ``programs.py``.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.cost import programs
from benchmarks.cost.arms import FRONTS, WHOLE
from benchmarks.tpu_compiler import devices

TOPOLOGIES = {
    ("v5e", 1): "v5e:2x2",
    ("v5p", 1): "v5p:2x2x1",
    ("v6e", 1): "v6e:2x2",
    ("v5p", 4): "v5p:2x2x1",
    ("v5p", 256): "v5p:8x8x4",
}


def cells() -> Iterator[dict[str, Any]]:
    """Every measurement, the ones that matter most first."""

    def cell(chip: str, devices: int, base: str, front: str, dtype: str = "float32") -> Any:
        return {"chip": chip, "devices": devices, "base": base, "arm": front, "grads": dtype}

    ours = ("alone", "stablegrad", "stablegrad, delayed")
    for front in (*FRONTS, *WHOLE):
        yield cell("v5p", 1, "adam", front)
    for base in ("adamw", "sgd"):
        for front in ours:
            yield cell("v5p", 1, base, front)
    for chip, count in TOPOLOGIES:
        for front in (*ours, "clip_by_global_norm", "adaptive_grad_clip"):
            yield cell(chip, count, "adam", front)
    for front in ours:
        yield cell("v5p", 1, "adam", front, "bfloat16")
    for front in (*ours, "clip_by_global_norm"):
        yield {"chip": "v5p", "devices": 1, "base": "adam", "arm": front, "program": "transformer"}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compile one cell for its chips, and count."""
    chips = devices(TOPOLOGIES[cell["chip"], cell["devices"]])
    return programs.measure(cell, chips[: cell["devices"]])
