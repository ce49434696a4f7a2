"""Memory traffic of the compiled optimizer step, by XLA's TPU compiler; no TPU is needed.

The compiler is in the package libtpu. What is counted is in ``programs.py``.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.cost import programs
from benchmarks.cost.arms import FRONTS, OURS, WHOLE
from benchmarks.cost.programs import cell_of
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
    for front in (*FRONTS, *WHOLE):
        yield cell_of("v5p", 1, "adam", front)
    for base in ("adamw", "sgd"):
        for front in OURS:
            yield cell_of("v5p", 1, base, front)
    for chip, count in TOPOLOGIES:
        for front in (*OURS, "clip_by_global_norm", "adaptive_grad_clip"):
            yield cell_of(chip, count, "adam", front)
    for front in OURS:
        yield cell_of("v5p", 1, "adam", front, "bfloat16")
    for front in (*OURS, "clip_by_global_norm"):
        yield {"chip": "v5p", "devices": 1, "base": "adam", "arm": front, "program": "transformer"}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Compile one cell for its chips, and count."""
    chips = devices(TOPOLOGIES[cell["chip"], cell["devices"]])
    return programs.measure(cell, chips[: cell["devices"]])
