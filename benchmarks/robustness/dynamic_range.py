"""Relative error of the layer statistic against float64 over the whole range, beside its peers'."""

import argparse
import math
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.transforms
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.robustness import tpu_accumulation
from benchmarks.versions import installed, versions
from stablegrad_optax import LayerAxes, stablegrad

RECORD = Path("docs/records/dynamic_range.txt")
SEED = 0
TARGET = 1e-3
TARGET_RATIO = 30  # of |mean| to std
CHUNK = 2**16

DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = math.inf  # stands for the magnitude at which the largest entry is the largest number
DECADES = [10.0**k for k in range(-44, 39)]
EDGES = [1.5e-38, 2e-38, 5e-38]  # normal numbers, but a layer of that RMS has subnormal entries
WIDE = [10.0**k for k in (-307, -250, -200, -150, -100, 100, 150, 200, 250, 307)]  # float64 alone

Grid = Mapping[int, Sequence[float]]
FULL: Grid = {
    **dict.fromkeys((2, 10, 10**3, 10**5), sorted([*DECADES, *EDGES, *WIDE, LARGEST])),
    10**7: [1e-200, 1e-37, 1e-22, 1.0, 1e22, 1e200, LARGEST],
    10**8: [1e-30, 1.0],
}
FAST: Grid = dict.fromkeys((2, 10, 10**3), sorted([*DECADES[::4], *EDGES, *WIDE, LARGEST]))


# --- Layers --------------------------------------------------------------------------------


def normal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Mean 0 and std 1 exactly, whatever the size."""
    entries = rng.standard_normal(size)
    entries -= entries.mean()
    entries /= math.sqrt(mean_square(entries))
    return entries


def log_normal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.exp(4 * rng.standard_normal(size))


def sparse(rng: np.random.Generator, size: int) -> np.ndarray:
    entries = np.zeros(size)
    count = max(1, size // 10**4)
    entries[rng.integers(size, size=count)] = rng.standard_normal(count)
    return entries


def outlier(rng: np.random.Generator, size: int) -> np.ndarray:
    entries = normal(rng, size)
    entries[size // 2] = 1e6
    return entries


def with_mean(ratio: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, size: ratio + normal(rng, size)


RATIOS = (1, 10, 30, 100, 300, 1e3, 1e4, 1e6)
FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": normal,
    "Cauchy": lambda rng, size: rng.standard_cauchy(size),
    "log-normal, sigma 4": log_normal,
    "99.99 % zeros": sparse,
    "one outlier, 1e6": outlier,
    "constant": lambda rng, size: np.ones(size),
    **{f"|mean| = {ratio:g} std": with_mean(ratio) for ratio in RATIOS},
}


def slices(size: int) -> Iterator[slice]:
    """Pieces whose float64 copies stay in the processor's cache."""
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))


def mean_square(entries: np.ndarray) -> float:
    return math.fsum(np.square(entries[part]).sum() for part in slices(entries.size)) / entries.size


def scaled(unit: np.ndarray, magnitude: float, dtype: str) -> np.ndarray:
    entries = np.empty(unit.size, jnp.dtype(dtype))
    for part in slices(unit.size):
        entries[part] = unit[part] * magnitude
    return entries


class Truth(NamedTuple):
    """Statistics in float64, by two passes over entries in units of their magnitude."""

    rms: float
    std: float
    ratio: float  # |mean| / std


def truth_of(entries: np.ndarray, magnitude: float, smallest: float = 0.0) -> Truth:
    """Entries below ``smallest`` count as 0."""
    unit = 2.0 ** math.floor(math.log2(magnitude))

    def wide(part: slice) -> np.ndarray:
        values = entries[part].astype(np.float64)
        if smallest:
            values[np.abs(values) < smallest] = 0
        return values / unit

    # Relative to an entry, so that the std of a constant is 0 and not the rounding of its mean.
    count, pivot = entries.size, float(wide(slice(1))[0])
    mean = math.fsum((wide(part) - pivot).sum() for part in slices(count)) / count
    variance = (
        math.fsum(np.square(wide(part) - pivot - mean).sum() for part in slices(count)) / count
    )
    std, mean = math.sqrt(variance), abs(pivot + mean)
    ratio = mean / std if std else math.inf if mean else 0.0
    return Truth(math.hypot(mean, std) * unit, std * unit, ratio)


# --- Statistics ----------------------------------------------------------------------------

OURS = ("ours: std", "ours: RMS")
PEERS = ("jnp.std", "clip_by_block_rms", "adaptive_grad_clip", "scale_by_trust_ratio")
COLUMNS = OURS + PEERS
OF_STD = ("ours: std", "jnp.std")
OF_NORM = ("adaptive_grad_clip", "scale_by_trust_ratio")

TRANSFORM = stablegrad(
    decay=0.0, layers={"rms": LayerAxes(0, centered=False), "std": LayerAxes(0, centered=True)}
)


@jax.jit
def ours(entries: jax.Array) -> dict[str, jax.Array]:
    """With decay 0 the state after one update is the statistic."""
    grads = {"rms": entries, "std": entries}
    _, state = TRANSFORM.update(grads, TRANSFORM.init(grads))
    rms, std = optax.tree.get(state, "grad_scale")  # in tree order
    return {"ours: std": std, "ours: RMS": rms}


@jax.jit
def peers(entries: jax.Array, threshold: jax.Array) -> dict[str, jax.Array]:
    """The functions that the transforms call; the RMS, which has none, from the transform itself.

    ``clip_by_block_rms`` divides by RMS / threshold where that is above 1, in the wider one of the
    two dtypes: a threshold in float32 shows the RMS of float16 entries without rounding it again.
    An RMS below the threshold shows as the threshold, which is nearer to the truth than it was.
    """
    clipped, _ = optax.clip_by_block_rms(threshold).update(entries, optax.EmptyState())
    largest = jnp.max(jnp.abs(entries)).astype(threshold.dtype)
    return {
        "jnp.std": jnp.std(entries),
        "clip_by_block_rms": largest / jnp.max(jnp.abs(jnp.asarray(clipped))) * threshold,
        "adaptive_grad_clip": optax.transforms.unitwise_norm(entries)[0],
        "scale_by_trust_ratio": optax.safe_norm(entries, 0.0),
    }


# --- Measurement ---------------------------------------------------------------------------


class Result(NamedTuple):
    """One statistic of one layer.

    ``region`` says what can be asked of it: "target"; "beyond", a mean of more than 30 std;
    "flushed", a normal number of which subnormal entries make up more than 1e-3; "outside", not a
    normal number at all.
    """

    dtype: str
    family: str
    size: int
    magnitude: float
    ratio: float
    column: str
    region: str
    truth: float
    got: float
    error: float
    seen_error: float  # with subnormal entries as 0 and the smallest normal number for a result
    within: bool


def measure(grid: Grid, report: Callable[[str], None] = lambda line: None) -> list[Result]:
    """Every layer of the grid in every dtype that can hold it."""
    flushes = flushes_inputs()
    results: list[Result] = []
    for size, magnitudes in grid.items():
        start = time.perf_counter()
        for family, make in FAMILIES.items():
            unit = make(np.random.default_rng(SEED), size)
            unit /= math.sqrt(mean_square(unit))
            peak = float(max(unit.max(), -unit.min()))
            for dtype in DTYPES:
                with jax.enable_x64(dtype == "float64"):
                    for magnitude in fitting(magnitudes, peak, dtype):
                        entries = scaled(unit, magnitude, dtype)
                        results += compare(entries, family, magnitude, flushes)
        report(f"{size:g} entries: {time.perf_counter() - start:.0f} s")
    return results


def fitting(magnitudes: Sequence[float], peak: float, dtype: str) -> list[float]:
    """The magnitudes at which no entry overflows and not all are 0."""
    limits = jnp.finfo(dtype)
    largest = float(limits.max) / peak * (1 - 2**-20)
    lowest = float(limits.smallest_subnormal) / peak
    fit = [m for m in magnitudes if lowest <= m < largest]
    return [*fit, largest] if LARGEST in magnitudes else fit


def compare(entries: np.ndarray, family: str, magnitude: float, flushes: bool) -> Iterator[Result]:
    """All columns for one layer, each beside the truth of its own quantity."""
    dtype = entries.dtype.name
    limits = jnp.finfo("float64" if dtype == "float64" else "float32")
    tiny, highest = float(limits.tiny), float(limits.max)
    truth = seen = truth_of(entries, magnitude)
    # Float16 is computed in float32, where its subnormal numbers are normal.
    if flushes and dtype != "float16" and truth.std < 1e5 * tiny:
        seen = truth_of(entries, magnitude, tiny)

    array = jnp.asarray(entries)
    threshold = jnp.asarray(max(truth.rms / 1024, tiny), limits.dtype)
    got = {**ours(array), **peers(array, threshold)}
    for column in COLUMNS:
        value, statistic = float(got[column]), _quantity(column, entries.size)
        want, want_seen = statistic(truth), statistic(seen)
        unit = want or truth.rms  # the std of a constant is 0
        error, seen_error = (
            abs(value - w) / u if math.isfinite(value) and u else math.inf
            for w, u in ((want, unit), (max(want_seen, tiny), max(want_seen, tiny)))
        )
        if not tiny <= unit <= highest:
            region = "outside"
        elif abs(want_seen - want) > TARGET * unit:
            region = "flushed"
        elif column in OF_STD and TARGET_RATIO * 1.01 < truth.ratio < math.inf:
            region = "beyond"
        else:
            region = "target"
        # Peers answer in the dtype of the entries, whose rounding is no error of the method.
        tolerance = TARGET if column in OURS else max(TARGET, float(jnp.finfo(dtype).eps))
        yield Result(
            *(dtype, family, entries.size, magnitude, truth.ratio, column, region),
            *(want, value, error, seen_error, error <= tolerance),
        )


def _quantity(column: str, size: int) -> Callable[[Truth], float]:
    """What a column computes; ours documents the RMS for the std of a constant."""
    if column == "ours: std":
        return lambda truth: truth.std or truth.rms
    if column == "jnp.std":
        return lambda truth: truth.std
    root = math.sqrt(size) if column in OF_NORM else 1.0
    return lambda truth: truth.rms * root


# --- Subnormal numbers ---------------------------------------------------------------------


def subnormal_checks() -> dict[str, str]:
    """What compiled code on this backend makes of subnormal float32 inputs and results."""
    small, half = np.full(1000, 1e-40, np.float32), np.full(1000, 2.0**-100, np.float32)

    def single(compiled: Callable[[jax.Array], jax.Array], x: np.ndarray) -> float:
        return np.asarray(jax.jit(compiled)(x)).ravel()[-1].item()

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    float16 = np.full(1000, 2.0**-24, np.float16)
    bfloat16 = small.astype(jnp.bfloat16)
    checks = {
        "input 1e-40 * 2^100, true value 1.3e-10": single(lambda x: x * 2.0**100, small),
        "input |1e-40| > 0, true": single(lambda x: jnp.abs(x) > 0, small),
        "input bfloat16 1e-40 to float32 * 2^100": single(
            lambda x: x.astype(jnp.float32) * 2.0**100, bfloat16
        ),
        "input float16 2^-24 to float32, 6e-8": single(lambda x: x.astype(jnp.float32), float16),
        "result 2^-100 * 2^-30, true value 7.3e-40": single(lambda x: x * 2.0**-30, half),
        "select and copy 1e-40": single(lambda x: jnp.where(x < 1, x, 0), small),
        "bits of 1e-40 as int32, 71362": single(bits, small),
    }
    return {check: f"{value:g}" for check, value in checks.items()}


def flushes_inputs() -> bool:
    """Whether arithmetic of this backend takes a subnormal entry for 0."""
    return float(jax.jit(lambda x: x * 2.0**100)(np.float32(1e-40))) == 0.0


# --- Accumulation --------------------------------------------------------------------------


def drift(sizes: Sequence[int]) -> list[list[Any]]:
    """Rows of errors for layers whose sums grow with every entry, in float32."""
    rows: list[list[Any]] = []
    layers: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "uniform(0, 1)": lambda rng, size: rng.random(size, np.float32),
        "|mean| = 30 std": lambda rng, size: 30 + rng.standard_normal(size, np.float32),
        "constant 0.1": lambda rng, size: np.full(size, 0.1, np.float32),
    }
    for layer, make in layers.items():
        for size in sizes:
            entries = make(np.random.default_rng(SEED), size)
            errors = {r.column: r.error for r in compare(entries, layer, 1.0, flushes=False)}
            rms = truth_of(entries, 1.0).rms
            one_sum = abs(math.sqrt(sequential_squares(entries) / size) - rms) / rms
            rows.append([layer, f"{size:g}", *(errors[c] for c in COLUMNS), one_sum])
    return rows


def sequential_squares(entries: np.ndarray) -> float:
    """The sum of squares as one float32 accumulator adds it, entry after entry."""
    total = np.zeros(1, np.float32)
    for part in slices(entries.size):
        total = np.cumsum(np.concatenate([total, np.square(entries[part])]), dtype=np.float32)[-1:]
    return total.item()


def constant_layers(size: int, count: int) -> list[float]:
    """Errors of our std, which is the RMS, for layers that repeat one random value."""
    values = np.random.default_rng(SEED).uniform(1, 4, count).astype(np.float32)
    got = [float(ours(jnp.full(size, value))["ours: std"]) for value in values]
    return [abs(g / float(value) - 1) for g, value in zip(got, values, strict=True)]


def compiled_sums(dtype: str, size: int) -> list[Any]:
    """Of this backend's optimized program: the accumulators of the sums, and who adds them."""
    with jax.enable_x64(dtype == "float64"):
        text = ours.lower(jax.ShapeDtypeStruct((size,), jnp.dtype(dtype))).compile().as_text() or ""
    accumulators = Counter(re.findall(r"= (\w+)\[\] reduce\(", text))
    by = Counter(re.findall(r" fusion\(.*kind=(\w+), calls=%\S*fused", text))
    library = "YNNPACK" if "ynn_fusion" in text else "-"
    found = ", ".join(f"{count} x {name}" for name, count in accumulators.items())
    return [dtype, found or "other", f"{by['kCustom']} ({library})"]


# --- Tables --------------------------------------------------------------------------------


def table(
    title: str, text: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[Any]]
) -> Table:
    """Columns of text, then columns of numbers."""
    result = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=title,
        title_justify="left",
    )
    for heading in text:
        result.add_column(heading, no_wrap=True)
    for heading in numbers:
        result.add_column(_broken(heading), justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*(cell if isinstance(cell, str) else _number(cell) for cell in row))
    return result


def _broken(heading: str) -> str:
    for long in ("clip_by_", "adaptive_", "scale_by_"):
        heading = heading.replace(long, f"{long}\n")
    return heading


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def worst_and_share(results: Sequence[Result], dtype: str, column: str) -> str:
    """The largest error where the target is asked, and the share of cells within it."""
    asked = [
        result
        for result in results
        if (result.dtype, result.column, result.region) == (dtype, column, "target")
    ]
    if not asked:
        return "-"
    share = sum(result.within for result in asked) / len(asked)
    return f"{_number(max(result.error for result in asked))} {math.floor(100 * share):3d} %"


def by_column(results: Sequence[Result]) -> Table:
    rows: list[list[Any]] = []
    for column in COLUMNS:
        everywhere = [result for result in results if result.column == column]
        asked = [result for result in everywhere if result.region == "target"]
        not_finite = [sum(not math.isfinite(r.got) for r in part) for part in (asked, everywhere)]
        share = sum(result.within for result in asked) / len(asked)
        rows.append(
            [
                *(column, str(len(asked)), f"{math.floor(share * 1e4) / 100:.2f} %"),
                *(
                    max(r.error for r in asked),
                    str(not_finite[0]),
                    f"{not_finite[1]} of {len(everywhere)}",
                ),
            ]
        )
    headings = ("cells", f"within {TARGET:g}", "worst error", "not finite", "not finite anywhere")
    return table("Every cell in which the target is asked, by column", [""], headings, rows)


def by_region(results: Sequence[Result]) -> Table:
    rows: list[list[Any]] = []
    for region in ("target", "beyond", "flushed", "outside"):
        row: list[Any] = [region]
        for column in OURS:
            found = [r for r in results if r.region == region and r.column == column]
            errors, seen = [r.error for r in found], [r.seen_error for r in found]
            row += [str(len(found)), max(errors, default=None), max(seen, default=None)]
        rows.append(row)
    of_each = [
        f"{column}\n{what}" for column in OURS for what in ("cells", "worst error", "as seen")
    ]
    return table("Ours by region", ["region"], of_each, rows)


def by_family(results: Sequence[Result]) -> Table:
    rows = [
        [dtype, family, *(worst_and_share(part, dtype, column) for column in COLUMNS)]
        for family in FAMILIES
        for part in [[result for result in results if result.family == family]]
        for dtype in DTYPES
    ]
    rows.sort(key=lambda row: DTYPES.index(str(row[0])))
    title = "Worst error, and share of cells within the target, by dtype and distribution"
    return table(title, ["dtype", "distribution"], COLUMNS, rows)


def by_size(results: Sequence[Result]) -> Table:
    rows = [
        [dtype, f"{size:g}", *(worst_and_share(part, dtype, column) for column in COLUMNS)]
        for size in sorted({result.size for result in results})
        for part in [[result for result in results if result.size == size]]
        for dtype in DTYPES
    ]
    rows.sort(key=lambda row: DTYPES.index(str(row[0])))
    title = "Worst error, and share of cells within the target, by dtype and number of entries"
    return table(title, ["dtype", "entries"], COLUMNS, rows)


def by_magnitude(results: Sequence[Result], size: int) -> Table:
    layers: dict[float, dict[str, Result]] = {}
    for result in results:
        if (result.dtype, result.family, result.size) == ("float32", "normal", size):
            layers.setdefault(result.magnitude, {})[result.column] = result
    rows = [
        [f"{m:.3g}", layer[OURS[0]].region, *(layer[column].error for column in COLUMNS)]
        for m, layer in layers.items()
    ]
    title = f"Error by magnitude: float32, normal, {size} entries"
    return table(title, ["std", "region of ours"], COLUMNS, rows)


def by_ratio(results: Sequence[Result], size: int) -> Table:
    rows: list[list[Any]] = []
    for dtype in DTYPES:
        for ratio in RATIOS:
            layer = {
                result.column: result
                for result in results
                if (result.dtype, result.family) == (dtype, f"|mean| = {ratio:g} std")
                and (result.size, result.magnitude) == (size, 1.0)
            }
            std, peer = layer["ours: std"], layer["jnp.std"]
            rms = std.truth if math.isinf(std.ratio) else std.truth * math.hypot(1, std.ratio)
            is_rms = ratio > TARGET_RATIO and abs(std.got / rms - 1) < 1e-4
            rows.append(
                [
                    *(dtype, f"{ratio:g}", f"{std.ratio:.4g}", "RMS" if is_rms else "std"),
                    *(std.error, layer["ours: RMS"].error, peer.error),
                ]
            )
    title = f"Error by |mean| / std, {size} entries of RMS 1"
    text = ["dtype", "asked for", "after rounding", "ours is the"]
    return table(title, text, ("ours: std", "ours: RMS", "jnp.std"), rows)


# --- Program -------------------------------------------------------------------------------


def introduction(command: str) -> str:
    libtpu = installed("libtpu").get("libtpu", "not installed")
    made_with = f"{versions('jax', 'jaxlib', 'optax', 'numpy')}, libtpu {libtpu}"
    return (
        f"{command}\n{made_with}; backend {jax.default_backend()}, seed {SEED}\n\n"
        "Error: |statistic - truth| / truth, the truth in float64 from the entries as the dtype "
        "holds them, and each column against its own quantity: std, RMS or norm. The std of a "
        "constant is 0: ours documents the RMS for it, jnp.std counts in units of the RMS. "
        "Magnitude: the RMS of the layer; the largest is the one whose largest entry is the "
        "largest number of the dtype. Every statistic is computed by compiled code. Columns of "
        f"peers may also be off by the rounding of the dtype they answer in. Target: {TARGET:g} "
        "where the truth is a normal number of float32 (float64 for float64) and |mean| <= "
        f"{TARGET_RATIO} std."
    )


def verdicts(results: Sequence[Result]) -> dict[str, bool]:
    """The claims, each with whether it holds."""
    asked = [result for result in results if result.region == "target"]
    mine = [result for result in asked if result.column in OURS]
    missed = [result for result in mine if not result.within]
    everywhere = [result for result in results if result.column in OURS]
    broken = [result for result in everywhere if not math.isfinite(result.got)]
    share = {
        column: np.mean([result.within for result in asked if result.column == column]).item()
        for column in PEERS
    }
    best = max(PEERS, key=lambda column: share[column])
    return {
        f"ours is within {TARGET:g} in {len(mine) - len(missed)} of {len(mine)} cells": not missed,
        f"ours is finite in {len(everywhere) - len(broken)} of {len(everywhere)} cells, those "
        "outside the target too": not broken,
        f"no other column comes near: at best {share[best]:.1%} of its cells ({best})": (
            share[best] < 0.9
        ),
    }


def regions_note(results: Sequence[Result]) -> str:
    """What the regions are, and what is left out of the target by them."""
    flushed = [r for r in results if r.region == "flushed" and r.column in OURS]
    worst, seen = (
        max((getattr(r, name) for r in flushed), default=0.0) for name in ("error", "seen_error")
    )
    low = [r for r in results if r.region == "outside" and r.column in OURS]
    tiny = Counter("0" if r.got == 0 else "not 0" for r in low)
    return (
        f"Regions: target; beyond, |mean| > {TARGET_RATIO} std, where a std lost in rounding is "
        "the RMS; flushed, a normal number of which more than 1e-3 comes from subnormal entries, "
        "which this backend takes for 0; outside, a truth that is itself subnormal, for which the "
        "answer is 0 if all entries are, and at least the smallest normal number otherwise. As "
        "seen: against the truth of the entries with subnormal ones as 0. "
        f"NOT WITHIN {TARGET:g}: the {len(flushed)} flushed cells, by up to {worst:.1e} (as seen "
        f"{seen:.1e}). Outside: {tiny['0']} times 0, {tiny['not 0']} times a normal number."
    )


def tpu_report() -> Iterator[Table | str]:
    """What the TPU's compiler makes of the statistic of one layer."""
    if not installed("libtpu"):
        yield "TPU: skipped, libtpu is not installed (pip install libtpu)."
        return

    def statistic(entries: jax.Array) -> jax.Array:
        axes = tuple(range(entries.ndim))
        transform = stablegrad(decay=0.0, layers=LayerAxes(axes, centered=True))
        _, state = transform.update(entries, transform.init(entries))
        return optax.tree.get(state, "grad_scale")

    programs = list(tpu_accumulation.programs(statistic))
    rows: list[list[Any]] = [
        [
            *(program.chip, program.dtype, " x ".join(f"{n:g}" for n in program.shape)),
            ", ".join(f"{count} x {name}" for name, count in Counter(program.sums).items()),
            *(f"{program.buffers} x {tpu_accumulation.LANES}", ", ".join(program.additions)),
            *(str(program.cores), str(program.windows), str(program.chain), str(program.depth)),
        ]
        for program in programs
    ]
    text = ["chip", "dtype", "shape", "sums", "partial sums", "additions"]
    yield table("TPU: compiled, not run", text, ("cores", "windows", "chain", "depth"), rows)
    yield TPU_NOTE

    drifts = [
        (program, layer)
        for program in programs[:2]
        for windows in (1, 5, program.windows)
        for layer in tpu_accumulation.drift(program, windows)
    ]
    rows = [
        [program.chip, program.dtype, layer.layer, f"{layer.entries:.2g}", layer.rms, layer.std]
        for program, layer in drifts
    ]
    text = ["chip", "dtype", "distribution", "entries"]
    yield table("TPU: additions in that order, in NumPy", text, ("RMS", "std"), rows)
    worst = [max(abs(getattr(layer, name)) for _, layer in drifts) for name in ("rms", "std")]
    yield (
        f"{_verdict(worst[0] <= TARGET)}: RMS within {TARGET:g}, at worst {worst[0]:.1e}\n"
        f"{_verdict(worst[1] <= TARGET)}: std within {TARGET:g}, at worst {worst[1]:.1e}"
    )

    rows, shares = [], []
    for program in programs:
        errors = np.abs(tpu_accumulation.constant_layers(program, program.windows))
        shares.append(np.mean(errors > TARGET).item())
        size = " x ".join(f"{n:g}" for n in program.shape)
        share = f"{shares[-1]:.1%}"
        rows.append([program.chip, program.dtype, size, str(errors.size), share, errors.max()])
    headings = ("layers", "std is noise", "worst error")
    yield table("TPU: constant layers in that order", ["chip", "dtype", "shape"], headings, rows)
    yield f"{_verdict(not any(shares))}: the std of a constant layer is its RMS"


def _verdict(holds: bool) -> str:
    return "HOLDS" if holds else "FAILS"


TPU_NOTE = """\
HLO has float32 reductions in one pass over the entries and leaves their order open. The low-level
program has float32 vector additions only: one accumulator of 8 x 128 lanes for each sum
and core; the vectors of a window are added to each other one after another (chain), then the window
to the accumulator; then lanes and cores. Depth: additions from an entry to its sum, at most; the
rounding of a sum of one sign is at most depth x 2^-24. Not visible: how the hardware rounds, what
it makes of subnormal numbers, and in which order it adds across 128 lanes (here in pairs)."""

SUBNORMAL_NOTE = """\
Not measured here: the JAX developers say that TPUs flush subnormal numbers and users that NVIDIA
GPUs do not (github.com/jax-ml/jax issues 19689 and 26658); Cloud TPU's documentation says that its
bfloat16 has no subnormal numbers (cloud.google.com/tpu/docs/bfloat16)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all tables and record them; the exit status is 0 if the claims hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.dynamic_range", description=__doc__
    )
    parser.add_argument("--fast", action="store_true", help="few sizes and magnitudes, no record")
    parser.add_argument("--tpu", action="store_true", help="compile for TPUs too; needs libtpu")
    parser.add_argument("--out", type=Path, help=f"the record (default: {RECORD})")
    options = parser.parse_args(arguments)
    if options.tpu:
        jax.config.update("jax_platforms", "cpu")  # libtpu is there, a TPU need not be
    words = ["python", "-m", "benchmarks.robustness.dynamic_range"]
    command = shlex.join(words + list(sys.argv[1:] if arguments is None else arguments))

    console = Console(width=118, highlight=False, record=True)
    progress = Console(stderr=True, highlight=False)

    def say(*parts: Table | str) -> None:
        for part in parts:
            console.print(part)
            console.print()

    grid, size = (FAST, 1000) if options.fast else (FULL, 10**5)

    say(introduction(command))
    checks = [[check, value] for check, value in subnormal_checks().items()]
    say(
        table(f"Subnormal float32 on {jax.default_backend()}", ["compiled code"], ["gives"], checks)
    )
    say(
        f"This backend {'flushes' if flushes_inputs() else 'keeps'} subnormal inputs.",
        SUBNORMAL_NOTE,
    )
    results = measure(grid, progress.print)
    claims = verdicts(results)
    say(by_column(results))
    say("\n".join(f"{_verdict(holds)}: {claim}" for claim, holds in claims.items()))
    say(by_region(results), regions_note(results), by_family(results), by_size(results))
    say(by_magnitude(results, 1000), by_ratio(results, size))
    if not options.fast:
        text, sizes = ["distribution", "entries"], (10**6, 10**7, 10**8)
        say(table("Drift", text, [*COLUMNS, "one float32\nsum: RMS"], drift(sizes)))
        errors = constant_layers(10**6, 200)
        say(f"{len(errors)} constant layers of 1e6 entries: worst error {max(errors):.1e}")
        compiled = [compiled_sums(dtype, 10**8) for dtype in DTYPES]
        text = ["dtype", "sums over 1e8 entries", "fusions run by a library"]
        say(table(f"Compiled for {jax.default_backend()}", text, [], compiled))
    if options.tpu:
        say(*tpu_report())
    path = options.out or (None if options.fast else RECORD)
    if path:
        lines = console.export_text().splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
