"""The tables and pictures of docs/normfree.md, from the records of the experiments."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.arms import Arm
from benchmarks.experiments import EXPERIMENTS
from benchmarks.normfree import starts
from benchmarks.normfree.pictures import Gathered, draw_by_depth, draw_curves, draw_scales, gather
from benchmarks.normfree.task import TextTask
from benchmarks.pages import fill, markdown
from benchmarks.records import FOLDER, errors
from benchmarks.results import (
    LEARNED,
    Results,
    draw_errors,
    draw_scales_over_time,
    learning_rate_width,
    quartiles,
    results_table,
    state_bytes,
)
from benchmarks.training import Task

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "normfree.md"
IMAGES = ROOT / "docs" / "images"
BY_LAYER = (
    *("adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
    *("sgd", "stablegrad-sgd-fixed-d0.0-b1.0"),
)
"""The arms whose layers are pictured over a run."""


def write(page: Path = PAGE, images: Path = IMAGES, folder: Path = FOLDER) -> None:
    """Put the tables into the page, and draw the pictures."""
    results, variants, confirm, memory, scaled, gelu, deeper, convnets, batchnorm = (
        Results(EXPERIMENTS[f"normfree-{name}"], folder)
        for name in (
            *("depth", "variants", "confirm", "memory", "scaled", "gelu", "deeper"),
            *("images", "images-batchnorm"),
        )
    )
    text, scaled_text, layernorm = (
        Results(EXPERIMENTS[f"normfree-transformer{name}"], folder)
        for name in ("", "-scaled", "-layernorm")
    )
    layernorm_12, layernorm_48 = (layernorm.part([task]) for task in layernorm.experiment.tasks)
    tables = {"variants": results_table(variants), "confirm": results_table(confirm)}
    tables["starts"] = starts.table(folder)
    for shape, tasks in _by_shape(results).items():
        # A table and a picture for the networks of a shape.
        part = results.part(tasks)
        tables[shape] = results_table(part)
        draw_errors(part, images / f"normfree_{shape}.png")
        draw_scales(part, images / f"normfree_{shape}_scales.png")
        first = min(tasks, key=results.tasks.index)  # of the experiment, which need not be shallow
        arms = results.among(first, BY_LAYER)
        draw_scales_over_time(results, first, arms, images / f"normfree_{shape}_layers.png")
    gathered = gather((results, confirm, memory, variants))
    draw_by_depth(gathered | gather((scaled, deeper)), images / "normfree_depths.png")
    if learned := _learned(gathered):
        draw_curves(learned, images / "normfree_curves.png")
    for name in (
        *("memory", "range", "muon", "like-agc", "per-unit", "images-he"),
        *("transformer-screen", "transformer-screen-scaled"),
    ):
        tables[name] = score_tables(Results(EXPERIMENTS[f"normfree-{name}"], folder))
    for name, of_name, normalized, norm in (
        ("scaled", scaled, None, ""),
        ("gelu", gelu, None, ""),
        ("deeper", deeper, None, ""),
        ("images", convnets, batchnorm, "BatchNorm"),
        ("transformer", text, layernorm_12, "LayerNorm"),
        ("scaled transformer", scaled_text, layernorm_48, "LayerNorm"),
    ):
        table = score_tables(of_name, normalized, norm)
        pictures = draw_networks(of_name, normalized, norm, images, name.replace(" ", "_"))
        tables[name] = "\n\n".join([table, *pictures])
    fill(page, tables)


def _by_shape(results: Results) -> dict[str, list[Task]]:
    tasks = sorted(results.tasks, key=lambda task: task.describe()["depth"])
    shapes = dict.fromkeys(task.describe()["shape"] for task in tasks)
    return {s: [task for task in tasks if task.describe()["shape"] == s] for s in shapes}


def _learned(gathered: Gathered) -> Gathered:
    """The tasks on which an arm learned something, by shape and depth."""

    def place(task: Task) -> tuple[str, int]:
        return task.describe()["shape"], task.describe()["depth"]

    return {
        task: gathered[task]
        for task in sorted(gathered, key=place)
        if any(np.median(errors(r)) < LEARNED * task.unlearned for r in gathered[task].values())
    }


def draw_networks(
    results: Results, normalized: Results | None, norm: str, images: Path, name: str
) -> list[str]:
    """Pictures of the networks of which something is recorded, for the page.

    Args:
        results: What came of an experiment.
        normalized: That of the same networks with normalization layers.
        norm: What these layers are called.
        images: The folder of the pictures.
        name: What their names start with, after ``normfree_``.
    """
    tasks, shown = results.experiment.tasks, gather([results])
    pictures: list[str] = []
    if shown:
        of_norm = gather([normalized]) if normalized else {}
        same = normalized.experiment.tasks if normalized else tasks
        references = {task: of_norm.get(one, {}) for task, one in zip(tasks, same, strict=True)}
        curves = f"normfree_{name}_curves.png"
        draw_curves(shown, images / curves, references, norm)
        pictures.append(f"![Test score and training loss over the run](images/{curves})")
    for task in shown:
        if arms := results.among(task, BY_LAYER):
            described = task.describe()
            kind = described.get("network") or f"{described['shape']}_{described['activation']}"
            network = f"{kind}{described.get('depth', '')}"
            layers = f"normfree_{name}_{network}_layers.png"
            draw_scales_over_time(results, task, arms, images / layers)
            pictures.append(f"![Gradients and updates by layer, {task.title}](images/{layers})")
    return pictures


@dataclass(frozen=True)
class Row:
    """An arm on a task, which need not be recorded, and what it is called in the table."""

    results: Results
    task: Task
    arm: Arm
    label: str

    @property
    def is_recorded(self) -> bool:
        """Whether there is something to show."""
        return self.arm in self.results.recorded(self.task)

    @property
    def errors(self) -> np.ndarray:
        """The errors on the reported seeds."""
        return self.results.errors(self.task, self.arm)

    def cells(self) -> list[str]:
        """What the table shows."""
        low, high = sorted(quartiles(self.errors), reverse=not _is_text(self.task))
        median, low, high = (score(self.task, e) for e in (np.median(self.errors), low, high))
        return [
            self.label,
            f"{median} ({low}-{high})",
            f"{np.mean(self.errors < self.task.solved_below):.0%}",
            f"{state_bytes(self.task, self.arm):.1f}",
            f"{self.results.reported(self.task, self.arm)['learning_rates'][0]:g}",
            f"{learning_rate_width(self.results, self.task, self.arm):g}",
        ]


def score_tables(results: Results, normalized: Results | None = None, norm: str = "") -> str:
    """A table for each task of what is recorded, and under it what is not.

    Args:
        results: What came of an experiment.
        normalized: That of the same networks with normalization layers, whose rows come last.
        norm: What these layers are called.
    """
    tasks = results.experiment.tasks
    same = normalized.experiment.tasks if normalized else [None] * len(tasks)

    def rows(task: Task, reference: Task | None) -> Iterator[Row]:
        for arm in results.experiment.arms:
            yield Row(results, task, arm, arm.label)
        if normalized and reference:
            for arm in normalized.experiment.arms:
                yield Row(normalized, reference, arm, f"*with {norm}:* {arm.label}")

    def table(task: Task, reference: Task | None) -> str:
        every = list(rows(task, reference))
        found = [row for row in every if row.is_recorded]
        found.sort(key=lambda row: (row.task is reference, np.median(row.errors)))
        missing = [row.label for row in every if not row.is_recorded]
        name, better = ("loss", "below") if _is_text(task) else ("accuracy", "above")
        trained = f"trained ({better} {score(task, task.solved_below)})"
        head = ("optimizer", f"test {name}", trained, "state", "best rate", "rates that work")
        parts = [f"**{task.title}**"]
        if found:
            parts.append(markdown(head, (row.cells() for row in found)))
        if missing:
            parts.append(f"Not recorded yet: {'; '.join(missing) if found else 'all'}.")
        return "\n\n".join(parts)

    return "\n\n".join(table(*pair) for pair in zip(tasks, same, strict=True))


def score(task: Task, error: float) -> str:
    """The loss of a text, the accuracy of images."""
    if np.isinf(error):
        return "diverged"
    return f"{error:.3g}" if _is_text(task) else f"{1 - error:.1%}"


def _is_text(task: Task) -> bool:
    return isinstance(task, TextTask)
