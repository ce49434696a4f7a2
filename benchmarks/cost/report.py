"""The tables of docs/cost.md and of the README, and their picture, from the records."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.cost.arms import OURS, WHOLE
from benchmarks.cost.records import RECORDS, read
from benchmarks.cost.training import ALL
from benchmarks.pages import fill, markdown

PAGE = Path("docs/cost.md")
README = Path("README.md")
PICTURE = Path("docs/images/cost.png")
SUMMARY = (
    *(*OURS, "clip_by_global_norm", "adaptive_grad_clip"),
    *("stablegrad_adam, delayed, bfloat16 mu", "stablegrad_sgd, delayed, momentum"),
)
"""The arms of the README's table, beside Adam alone."""


def write(
    page: Path = PAGE, readme: Path = README, picture: Path = PICTURE, folder: Path = RECORDS
) -> None:
    """Put the tables between the pages' markers, and draw the picture."""
    fill(page, {name: table for name, table in tables(folder).items() if read(name, folder)})
    fill(readme, {"cost": summary(folder)})
    draw(picture, folder)


def tables(folder: Path = RECORDS) -> dict[str, str]:
    """Each table as Markdown, by the name of its marker."""
    return {
        **{
            kind: markdown(
                ["chip", "chips", "base", "gradients", "arm", "bytes", "later steps",
                 "HBM, later steps", "passes", "all-reduces", "temporary"],
                traffic_rows(kind, folder),
            )
            for kind in ("tpu", "gpu")
        },
        "time": markdown(
            ["device", "base", "parameters", *_fronts("time", folder)],
            ratio_rows("time", folder, lambda record: f"{record['parameters']:.0e}"),
        ),
        "training": markdown(
            ["device", "base", "network", *_fronts("training", folder)],
            ratio_rows("training", folder, _network),
        ),
        "growth": markdown(
            ["backend", "leaves", "arm", "tracing", "compilation", "step", "lowered", "compiled"],
            growth_rows(folder),
        ),
    }  # fmt: skip


def summary(folder: Path = RECORDS) -> str:
    """What an arm costs beside Adam alone, in one line each; what was not measured is a dash."""
    keys = ("chip", "devices", "base", "grads", "program")
    traffic = _grouped(read("tpu", folder), keys)
    step = traffic["v5p", 1, "adam", "float32", None]
    transformer = traffic["v5p", 1, "adam", None, "transformer"]
    times = {r["backend"]: r["ratios"] for r in read("time", folder) if _is_large(r)}
    (training,) = (r["ratios"] for r in read("training", folder) if r["base"] == "adam")

    def of_alone(records: dict[str, dict[str, Any]], arm: str, field: str) -> str:
        return f"{records[arm][field] / records['alone'][field]:.3f}" if arm in records else "-"

    def time(ratios: dict[str, list[float]], arm: str) -> str:
        return f"{ratios[arm][0]:.2f}" if arm in ratios else "-"

    return markdown(
        ["", "TPU: optimizer step", "transformer step", "state", "CPU: optimizer step",
         "PINN step", "GPU: optimizer step"],
        (
            [
                "Adam alone" if arm == "alone" else f"`{arm}`",
                of_alone(step, arm, "later_hbm_bytes"),
                of_alone(transformer, arm, "later_hbm_bytes"),
                of_alone(step, arm, "state_bytes"),
                time(times["cpu"], arm),
                time(training, arm),
                time(times["gpu"], arm),
            ]
            for arm in SUMMARY
        ),
    )  # fmt: skip


def _is_large(record: dict[str, Any]) -> bool:
    return record["base"] == "adam" and record["parameters"] == 10**8


def traffic_rows(kind: str, folder: Path) -> Iterator[list[str]]:
    """Ratios of bytes to the base optimizer alone on the same chips."""
    keys = ("chip", "devices", "base", "grads", "program")
    for key, records in _grouped(read(kind, folder), keys).items():
        alone = records["alone"]
        for arm, record in records.items():
            if arm == "alone":
                continue
            yield [
                str(key[0]),
                str(key[1]),
                "-" if arm in WHOLE else str(key[2]),
                str(key[3] or key[4]),
                arm,
                f"{record['bytes'] / alone['bytes']:.4f}",
                f"{record['later_bytes'] / alone['bytes']:.4f}",
                f"{record['later_hbm_bytes'] / alone['hbm_bytes']:.4f}",
                str(record.get("passes", "")),
                _counts(record),
                f"{(record['temporary_bytes'] - alone['temporary_bytes']) / 2**20:+.1f} MiB",
            ]


def _counts(record: dict[str, Any]) -> str:
    count, numbers = record["all_reduces"], record["all_reduced_numbers"]
    return f"{count} of {numbers}" if count else "0"


def ratio_rows(
    kind: str, folder: Path, size: Callable[[dict[str, Any]], str]
) -> Iterator[list[str]]:
    """Medians and quartiles of the ratios of times."""
    for record in read(kind, folder):
        if record["base"] == ALL:  # for benchmarks.pinn.report
            continue
        cells: list[str] = []
        for front in _fronts(kind, folder):
            median, low, high = record["ratios"][front]
            cells.append(f"{median:.2f} ({low:.2f}-{high:.2f})")
        yield [record["device"], record["base"], size(record), *cells]


def _network(record: dict[str, Any]) -> str:
    task = record["task"]
    return f"{task['problem']}, {task['depth']} layers of {task['width']}, {task['points']} points"


def _fronts(kind: str, folder: Path) -> list[str]:
    records = read(kind, folder)
    return [front for front in records[0]["ratios"] if front != "alone"] if records else []


def growth_rows(folder: Path) -> Iterator[list[str]]:
    """Ratios to the base optimizer alone."""
    keys = ("backend", "leaves", "layers")
    for (backend, leaves, layers), records in _grouped(read("growth", folder), keys).items():
        alone = records["alone"]
        for arm, record in records.items():
            if arm != "alone":
                trace = _sum(record, "trace", "lower") / _sum(alone, "trace", "lower")
                fields = ("compile_seconds", "step_seconds", "operations", "instructions")
                yield [
                    backend,
                    f"{leaves} of {layers} layers" if layers else str(leaves),
                    arm,
                    f"{trace:.2f}",
                    *(f"{record[f] / alone[f]:.2f}" if f in record else "-" for f in fields),
                ]


def _sum(record: dict[str, Any], *phases: str) -> float:
    return sum(record[f"{phase}_seconds"] for phase in phases)


def _grouped(
    records: Sequence[dict[str, Any]], keys: Sequence[str]
) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        groups[tuple(record.get(key) for key in keys)][record["arm"]] = record
    return groups


def draw(path: Path, folder: Path) -> None:
    """Memory traffic of every arm beside Adam's, on one TPU v5p."""
    keys = ("chip", "devices", "base", "grads", "program")
    records = _grouped(read("tpu", folder), keys)["v5p", 1, "adam", "float32", None]
    shown = {arm: record for arm, record in records.items() if arm != "muon"}  # off the scale
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = list(reversed(shown))
    alone = records["alone"]["hbm_bytes"]
    ratios = [shown[name]["later_hbm_bytes"] / alone for name in names]
    colors = ["tab:orange" if "stablegrad" in name else "tab:gray" for name in names]
    bars = axes.barh([n.replace("alone", "adam alone") for n in names], ratios, color=colors)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("HBM traffic of a later step beside optax.adam, TPU v5p")
    axes.set_xlim(0, max(ratios) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
