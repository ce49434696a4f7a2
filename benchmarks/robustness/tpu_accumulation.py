"""The order in which a TPU adds up the sums of the statistic, and what that order does to them.

XLA's TPU compiler runs without a TPU (package libtpu), but optimized HLO leaves the order of a
reduction open. It is in the low-level program, which libtpu writes to a folder when it is asked to,
and additions in that order can be repeated in NumPy.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_compiler import devices, entry_of

LANES = 8 * 128  # of a vector register, for float32
TARGETS = (
    ("v5p", "v5p:2x2x1", (10_000, 10_000), "float32"),
    ("v5p", "v5p:2x2x1", (100_000_000,), "bfloat16"),
    ("v5p", "v5p:2x2x1", (1_000, 1_000), "float32"),
    ("v5e", "v5e:2x2", (10_000, 10_000), "float32"),
    ("v6e", "v6e:2x2", (10_000, 10_000), "float32"),
)
CONSTANT_EPSILONS = 512  # where the package takes the RMS for a std lost in rounding
# After it nothing reorders additions, and values still have names.
LAST_STAGE = "post-llo-dependency-graph-optimizations"


class Accumulation(NamedTuple):
    """How one compiled program adds; ``chain`` counts the additions of a lane for each window."""

    chip: str
    shape: tuple[int, ...]
    dtype: str
    sums: tuple[str, ...]
    additions: tuple[str, ...]
    buffers: int
    windows: int
    cores: int
    chain: int

    @property
    def depth(self) -> int:
        """Additions from an entry to its sum: lanes are added by rotations, in pairs."""
        return self.chain + self.windows + round(math.log2(LANES * self.cores))


def programs(statistic: Callable[[jax.Array], jax.Array]) -> Iterator[Accumulation]:
    """What the compiler makes of ``statistic`` on each of the targets."""
    with tempfile.TemporaryDirectory() as folder:
        # Read when the compiler is loaded, by the first of the topologies.
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = dump
        for chip, topology, shape, dtype in TARGETS:
            before = set(Path(folder).iterdir())
            mesh = jax.sharding.Mesh(devices(topology)[:1], ("x",))
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            entries = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
            hlo = jax.jit(statistic).lower(entries).compile().as_text() or ""
            written = sorted(set(Path(folder).iterdir()) - before)
            yield _accumulation(chip, shape, dtype, hlo, written)


def _accumulation(
    chip: str, shape: tuple[int, ...], dtype: str, hlo: str, written: list[Path]
) -> Accumulation:
    """Put together from the HLO text and from the low-level text of the pass over the entries."""
    entry = entry_of(hlo)
    parameter = re.search(r"%(\S+) = \S+ parameter\(0\)", entry)
    assert parameter
    readers = re.findall(rf"\n  %(\S+) = (.*) fusion\(%{re.escape(parameter[1])}\), (.*)", entry)
    assert len(readers) == 1, "the gradient is read more than once"
    [(name, sums, rest)] = readers
    bounds = re.search(r'"iteration_bounds":\[([^]]*)\]', rest)
    assert bounds
    steps = math.prod(int(bound.strip('"')) for bound in bounds[1].split(","))
    cores = 2 if "megacore_split_dim" in rest else 1

    [path] = [path for path in written if f"-{name}-" in path.name and LAST_STAGE in path.name]
    text = path.read_text()
    return Accumulation(
        chip,
        shape,
        dtype,
        tuple(re.findall(r"\w+(?=\[\])", sums)),
        tuple(sorted(set(re.findall(r"= (v(?:add|sub)\.(?:f32|bf16)|vadd\.xlane\.\w+)", text)))),
        len(re.findall(r"size = 0x1000, scoped, tag = 'reduce buffer'", text)),
        steps // cores,
        cores,
        _longest_chain(text),
    )


def _longest_chain(text: str) -> int:
    """The most vector additions that depend on each other, along named values."""
    depth: dict[str, int] = {}
    for name, operation, rest in re.findall(r"^\s*(%\w+) = ([\w.]+) ?(.*)$", text, re.MULTILINE):
        above = max((depth.get(operand, 0) for operand in re.findall(r"%\w+", rest)), default=0)
        depth[name] = above + operation.startswith("vadd.f32")
    return max(depth.values())


class Drift(NamedTuple):
    """Errors of a statistic whose sums were added in a program's order, and nothing else."""

    layer: str
    entries: int
    rms: float
    std: float


def drift(program: Accumulation, windows: int) -> Iterator[Drift]:
    """Layers of order 1, as large as ``windows`` windows on each core."""
    rng = np.random.default_rng(0)
    shape = (program.chain, LANES)
    layers: dict[str, Callable[[], np.ndarray]] = {
        "uniform(0, 1)": lambda: rng.random(shape, np.float32),
        "normal": lambda: rng.standard_normal(shape, np.float32),
        "|mean| = 10 std": lambda: 10 + rng.standard_normal(shape, np.float32),
        "|mean| = 30 std": lambda: 30 + rng.standard_normal(shape, np.float32),
    }
    for layer, draw in layers.items():
        exact = np.zeros(2)

        def window(draw: Callable[[], np.ndarray] = draw, exact: np.ndarray = exact) -> np.ndarray:
            values = draw().astype(jnp.dtype(program.dtype)).astype(np.float32)
            wide = values.astype(np.float64)
            exact += wide.sum(), np.square(wide).sum()
            return values

        cores = [lane_sums(window() for _ in range(windows)) for _ in range(program.cores)]
        sums = np.sum([added_in_pairs(lanes) for lanes in cores], axis=0)
        entries = math.prod(shape) * windows * program.cores
        got, want = rms_and_std(sums, entries), rms_and_std(exact, entries)
        yield Drift(layer, entries, *(got / want - 1).tolist())


def constant_layers(program: Accumulation, windows: int) -> np.ndarray:
    """Errors of the std of layers that repeat one of 2000 random values, against their RMS."""
    values = np.random.default_rng(0).uniform(1, 4, 2000)
    values = values.astype(jnp.dtype(program.dtype)).astype(np.float32)
    window = np.broadcast_to(values, (program.chain, values.size))  # all lanes are alike
    sums = lane_sums(window for _ in range(windows))
    return rms_and_std(sums, program.chain * windows)[1] / values - 1


def lane_sums(windows: Iterable[np.ndarray]) -> np.ndarray:
    """Sum and sum of squares of each lane, float32[2, lanes]; windows are float32[chain, lanes].

    Entries of order 1 are all middle entries, so that one accumulator stands for the three.
    """
    buffer = np.zeros((2, 1), np.float32)
    for values in windows:
        partial = np.zeros((2, values.shape[1]), np.float32)
        for row in values:
            partial += row, row * row
        buffer = buffer + partial
    return buffer


def added_in_pairs(lanes: np.ndarray) -> np.ndarray:
    """The lanes' sums as one; nothing tells how the hardware adds across lanes."""
    while lanes.shape[1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    return lanes[:, 0]


def rms_and_std(sums: np.ndarray, entries: int) -> np.ndarray:
    """As the package defines them, in float64, from the sum and the sum of squares."""
    mean, mean_square = sums.astype(np.float64) / entries
    rms = np.sqrt(mean_square)
    variance_fraction = 1 - np.minimum(np.abs(mean) / rms, 1) ** 2
    is_lost = variance_fraction <= CONSTANT_EPSILONS * np.finfo(np.float32).eps
    return np.stack([rms, np.where(is_lost, rms, rms * np.sqrt(variance_fraction))])
