"""The tables and pictures of docs/normfree.md, from the records of the experiments."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.experiments import EXPERIMENTS, NORMFREE
from benchmarks.pages import fill
from benchmarks.records import FOLDER
from benchmarks.results import Results, draw_errors, results_table, style
from benchmarks.training import Task

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "normfree.md"
IMAGES = ROOT / "docs" / "images"
SHOWN = (
    *("adamw", "clip_adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
    *("sgd", "clip_sgd", "stablegrad-sgd-fixed-d0.0-b1.0"),
)
"""The arms whose layers are pictured."""


def write(page: Path = PAGE, images: Path = IMAGES, folder: Path = FOLDER) -> None:
    """Put the tables into the page, and draw the pictures."""
    results = Results(NORMFREE, folder)
    tables: dict[str, str] = {}
    for shape, tasks in _by_shape(results).items():
        # A table and a picture for the networks of a shape.
        part = Results(replace(NORMFREE, tasks=tuple(tasks)), folder)
        tables[shape] = results_table(part)
        draw_errors(part, images / f"normfree_{shape}.png")
        draw_scales(part, images / f"normfree_{shape}_scales.png")
    for name in ("variants", "confirm"):
        tables[name] = results_table(Results(EXPERIMENTS[f"normfree-{name}"], folder))
    fill(page, tables)


def _by_shape(results: Results) -> dict[str, list[Task]]:
    tasks = sorted(results.tasks, key=lambda task: task.describe()["depth"])
    shapes = dict.fromkeys(task.describe()["shape"] for task in tasks)
    return {s: [task for task in tasks if task.describe()["shape"] == s] for s in shapes}


def draw_scales(results: Results, path: Path) -> None:
    """Std of the gradient by layer in the first step and in the last one, median of seeds."""
    arms = [arm for arm in results.experiment.arms if arm.name in SHOWN]
    figure, axes = plt.subplots(
        1,
        len(results.tasks),
        figsize=(4.2 * len(results.tasks), 3.6),
        squeeze=False,
        layout="constrained",
    )
    for ax, task in zip(axes[0], results.tasks, strict=True):
        curves = {arm: results.reported(task, arm)["scale_curve"] for arm in arms}
        first = np.array(curves[arms[0]][0], float)
        layers = np.arange(1, len(first) + 1)
        ax.plot(layers, first, color="grey", linewidth=3, alpha=0.5, label="first step, all alike")
        for arm, curve in curves.items():
            shown = {**style(arm), "linestyle": "-" if arm.base == "sgd" else "--"}
            ax.plot(layers, np.array(curve[-1], float), label=arm.label, **shown)
        ax.set(title=task.title, yscale="log", xlabel="layer")
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("gradient std, last step")
    axes[0, 0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)
