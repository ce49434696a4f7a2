"""The tables and pictures of docs/pinn.md, from the records of the PINN experiments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from benchmarks import json_lines, records
from benchmarks.arms import SCALINGS, Arm
from benchmarks.cost import records as cost_records
from benchmarks.cost.training import ALL
from benchmarks.experiments import EXPERIMENTS, Experiment
from benchmarks.pages import fill, markdown
from benchmarks.records import FOLDER, Record
from benchmarks.training import Cell, Task, Training

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pinn.md"
IMAGES = ROOT / "docs" / "images"
NEAR, LEARNED = 1.5, 0.9
"""A learning rate works if its error is within a factor of that of the best one, and if it is below
what a network has that learned next to nothing: u = 0 has an error of 1."""
PEER_SCALINGS = set(SCALINGS) - {"stablegrad", "compressor"}
FAMILIES = {"adam_eps": "adam", "adamw": "adam"}
"""Base optimizers that are compared with those of another name."""


@dataclass(frozen=True)
class Results:
    """What is recorded of an experiment: its tasks on which every arm is recorded."""

    experiment: Experiment
    folder: Path

    @cached_property
    def _records(self) -> list[Record]:
        return records.read(self.experiment, self.folder)

    def of(self, task: Task, arm: Arm, seeds: Sequence[int]) -> Record | None:
        """The record of an arm on a task, or None."""
        return json_lines.find(self._records, records.cell(self.experiment, task, arm, seeds))

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks that are recorded for every arm."""
        seeds = self.experiment.reported_seeds or self.experiment.tuning_seeds
        return [
            task
            for task in self.experiment.tasks
            if all(self.of(task, arm, seeds) for arm in self.experiment.arms)
        ]

    def sweep(self, task: Task, arm: Arm) -> Record:
        """The sweep of an arm on a task."""
        return _found(self.of(task, arm, self.experiment.tuning_seeds))

    def reported(self, task: Task, arm: Arm) -> Record:
        """The run on the reported seeds at the sweep's best learning rate."""
        return _found(self.of(task, arm, self.experiment.reported_seeds))

    def errors(self, task: Task, arm: Arm) -> np.ndarray:
        """The errors on the reported seeds, or without any those of the best rate of the sweep."""
        if self.experiment.reported_seeds:
            return records.errors(self.reported(task, arm))[0]
        swept = records.errors(self.sweep(task, arm))
        return swept[int(np.argmin(np.median(swept, axis=1)))]

    def mean_ranks(self, arms: Sequence[Arm]) -> dict[str, float]:
        """The rank of each arm's median error among them, the best is 1, averaged over tasks.

        Equal errors share a rank, and so do all that are no better than u = 0.
        """
        medians = np.array(
            [[np.median(self.errors(task, arm)) for arm in arms] for task in self.tasks]
        )
        ranks = rankdata(np.minimum(medians, 1.0), axis=1)
        return dict(zip((arm.name for arm in arms), ranks.mean(axis=0), strict=True))

    def ranks_in_family(self) -> dict[str, float]:
        """The mean rank of each arm among those with the same base optimizer."""
        families: dict[str, list[Arm]] = {}
        for arm in self.experiment.arms:
            families.setdefault(FAMILIES.get(arm.base, arm.base), []).append(arm)
        return {
            name: rank for arms in families.values() for name, rank in self.mean_ranks(arms).items()
        }

    def by_rank(self) -> list[Arm]:
        """All arms, the lowest mean rank first."""
        ranks = self.mean_ranks(self.experiment.arms)
        return sorted(self.experiment.arms, key=lambda arm: ranks[arm.name])


def _found(record: Record | None) -> Record:
    assert record is not None
    return record


def write(page: Path = PAGE, images: Path = IMAGES, folder: Path = FOLDER) -> None:
    """Put the tables into the page, and draw the pictures."""
    screen, depth, by_depth, confirm, prediction, networks = (
        Results(EXPERIMENTS[f"pinn-{name}"], folder)
        for name in ("screen", "depth", "by-depth", "confirm", "prediction", "networks")
    )
    tables: dict[str, str] = {}
    if screen.tasks:
        tables["grid"] = grid_table(screen)
        for name, scalings in (("peers", PEER_SCALINGS), ("variants", {"compressor"})):
            arms = [arm for arm in screen.experiment.arms if arm.scaling in scalings]
            tables[f"screened {name}"] = errors_table(screen, arms)
    for results in (depth, by_depth, confirm, prediction, networks):
        name = results.experiment.name.removeprefix("pinn-")
        if results.tasks:
            tables[name] = results_table(results)
            draw_errors(results, images / f"pinn_{name}.png")
    if by_depth.tasks:
        draw_depths(by_depth, images / "pinn_depths.png")
        if (times := step_times(folder)) is not None:
            draw_time(by_depth, times, images / "pinn_time.png")
    if depth.tasks:
        draw_scales(depth, images / "pinn_scales.png")
        draw_memory(depth, images / "pinn_memory.png")
    fill(page, tables)


def title(task: Task) -> str:
    """A task in a few words."""
    of = task.describe()
    usual = {
        "boundary": "exact",
        "activation": "tanh",
        "initialization": "glorot",
        "prediction": "residual",
    }
    unusual = [f"{of[key]} {key}" for key, value in usual.items() if of[key] != value]
    return ", ".join([of["problem"], *unusual, f"depth {of['depth']}"])


def grid_table(results: Results) -> str:
    """StableGrad's settings: a row for each base, reference and balance; decays in columns."""
    grid = [arm for arm in results.experiment.arms if arm.name.startswith("stablegrad-")]
    by_row: dict[tuple[Any, ...], dict[float, Arm]] = {}
    for arm in grid:
        options, numbers = dict(arm.options), dict(arm.numbers)
        row = (arm.base, options["reference"], options["delayed"], numbers["balance"])
        by_row.setdefault(row, {})[numbers["decay"]] = arm
    decays = sorted({decay for row in by_row.values() for decay in row})

    def rows() -> Iterator[list[str]]:
        for (base, reference, delayed, balance), arms in by_row.items():
            cells = [" / ".join(_medians(results, arms[decay])) for decay in decays]
            yield [base, str(reference), "yes" if delayed else "", f"{balance:g}", *cells]

    head = ["base", "reference", "delayed", "balance", *(f"decay {decay:g}" for decay in decays)]
    return markdown(head, rows())


def errors_table(results: Results, arms: Sequence[Arm]) -> str:
    """Median errors of the arms, in the order of their mean rank."""
    chosen = [arm for arm in results.by_rank() if arm in arms]
    rows = [[arm.label, *_medians(results, arm)] for arm in chosen]
    return markdown(["optimizer", *map(title, results.tasks)], rows)


def _medians(results: Results, arm: Arm) -> list[str]:
    return [f"{np.median(results.errors(task, arm)):.3g}" for task in results.tasks]


def results_table(results: Results) -> str:
    """Error, spread, share of seeds solved and width in learning rates of every arm."""
    ranks = results.mean_ranks(results.experiment.arms)
    in_family = results.ranks_in_family()
    head = ["optimizer", "mean rank", "with its base", "state", *map(title, results.tasks)]

    def cell(task: Task, arm: Arm) -> str:
        errors = results.errors(task, arm)
        low, high = np.quantile(errors, [0.25, 0.75], method="inverted_cdf")
        median = np.median(errors)
        solved = np.mean(errors < task.solved_below)
        width = learning_rate_width(results, task, arm)
        return f"{median:.3g} ({low:.2g}-{high:.2g}), {solved:.0%}, {width:g}"

    rows = (
        [
            arm.label,
            f"{ranks[arm.name]:.1f}",
            f"{in_family[arm.name]:.1f}",
            f"{state_bytes(results.tasks[0], arm):.1f}",
            *(cell(task, arm) for task in results.tasks),
        ]
        for arm in results.by_rank()
    )
    return markdown(head, rows)


def learning_rate_width(results: Results, task: Task, arm: Arm) -> float:
    """Decades of learning rates that work, of those swept; each rate counts for its spacing."""
    medians = np.median(records.errors(results.sweep(task, arm)), axis=1)
    works = (medians <= NEAR * medians.min()) & (medians < LEARNED)
    return float(np.sum(works)) / results.experiment.rates_per_decade


def state_bytes(task: Task, arm: Arm) -> float:
    """Bytes of optimizer state per parameter."""
    num_params, num_bytes = Training(task, (Cell(arm, 1.0, 0),), 1).count_bytes()
    return num_bytes / num_params


def _colour(arm: Arm) -> str:
    if arm.scaling == "stablegrad":
        return "#D55E00"
    return "#000000" if arm.scaling == "none" else "#0072B2"


def draw_errors(results: Results, path: Path) -> None:
    """Every seed of every arm, a panel for each task."""
    arms = list(reversed(results.by_rank()))
    size = (3.2 + 3.4 * len(results.tasks), 1.2 + 0.27 * len(arms))
    figure, axes = plt.subplots(
        1, len(results.tasks), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, task in zip(axes[0], results.tasks, strict=True):
        for row, arm in enumerate(arms):
            errors = np.minimum(results.errors(task, arm), 10.0)
            ax.plot(errors, np.full(len(errors), row), ".", color=_colour(arm), alpha=0.35)
            ax.plot(np.median(errors), row, "|", color=_colour(arm), markersize=13, mew=2.5)
        ax.axvline(task.solved_below, color="grey", linewidth=1)
        ax.set(title=title(task), xscale="log", xlabel="rel. L2 error")
        ax.grid(axis="x", alpha=0.25)
    axes[0, 0].set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=8)
    for label, arm in zip(axes[0, 0].get_yticklabels(), arms, strict=True):
        label.set_color(_colour(arm))
    figure.savefig(path, dpi=130)
    plt.close(figure)


STYLES = {"none": ("#000000", "-"), "clip": ("#0072B2", "-"), "stablegrad": ("#D55E00", "-")}


def _style(arm: Arm) -> dict[str, str]:
    """A colour for each kind of arm; StableGrad's default balance is dashed."""
    colour, line = STYLES[arm.scaling]
    return {"color": colour, "linestyle": "--" if dict(arm.numbers).get("balance") == 1 else line}


def draw_depths(results: Results, path: Path) -> None:
    """Median error against depth, with quartiles; rows of problems, columns of base optimizers."""
    problems, bases = _problems(results), _bases(results)
    figure, axes = _panels(len(problems), len(bases))
    for row, tasks in zip(axes, problems.values(), strict=True):
        depths = [task.describe()["depth"] for task in tasks]
        for arm in results.experiment.arms:
            errors = np.minimum([results.errors(task, arm) for task in tasks], 10.0)
            low, middle, high = np.quantile(errors, [0.25, 0.5, 0.75], axis=1)
            ax = row[bases.index(arm.base)]
            ax.plot(depths, middle, marker=".", label=arm.label, **_style(arm))
            ax.fill_between(depths, low, high, color=_style(arm)["color"], alpha=0.1)
        for ax in row:
            ax.axhline(tasks[0].solved_below, color="grey", linewidth=1)
            ax.set(xscale="log", yscale="log", xlabel="depth", title=_problem(tasks[0]))
            ax.set_xticks(depths, [str(depth) for depth in depths])
            ax.minorticks_off()
        row[0].set_ylabel("median rel. L2 error")
    _save(figure, axes, path)


def step_times(folder: Path) -> dict[str, float] | None:
    """The time of a training step of each arm beside Adam's, as recorded on a CPU."""
    record = json_lines.find(cost_records.read("training", folder), {"base": ALL, "backend": "cpu"})
    return record and {name: median for name, (median, *_) in record["ratios"].items()}


def draw_time(results: Results, times: dict[str, float], path: Path) -> None:
    """Median error over the time of training at the largest depth of each problem."""
    problems, bases = _problems(results), _bases(results)
    figure, axes = _panels(len(problems), len(bases))
    for row, tasks in zip(axes, problems.values(), strict=True):
        for arm in results.experiment.arms:
            curve = results.reported(tasks[-1], arm)["error_curve"]
            steps = np.linspace(0, results.experiment.steps, len(curve) + 1)[1:]
            ax = row[bases.index(arm.base)]
            ax.plot(steps * times[arm.name], np.array(curve, float), label=arm.label, **_style(arm))
        for ax in row:
            ax.set(yscale="log", xlabel="time, in steps of Adam", title=title(tasks[-1]))
        row[0].set_ylabel("median rel. L2 error")
    _save(figure, axes, path)


def _problems(results: Results) -> dict[str, list[Task]]:
    """The tasks of each problem, the shallow ones first."""
    tasks = sorted(results.tasks, key=lambda task: task.describe()["depth"])
    return {name: [t for t in tasks if _problem(t) == name] for name in map(_problem, tasks)}


def _bases(results: Results) -> list[str]:
    return list(dict.fromkeys(arm.base for arm in results.experiment.arms))


def _problem(task: Task) -> str:
    return title(task).rpartition(", ")[0]


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    return plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 3.4 * rows),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )


def _save(figure: Figure, axes: np.ndarray, path: Path) -> None:
    """With a legend in the first row, every panel its own."""
    for ax in axes[0]:
        ax.legend(fontsize=6)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


SCALES_OF = (
    "adam",
    "clip_adam",
    "stablegrad-adam-fixed-d0.0-b0.5",
    "muon",
    "stablegrad-muon-fixed-d0.0-b0.0",
)


def draw_scales(results: Results, path: Path) -> None:
    """The gradient's std by layer at several steps, before any transform, on the first task."""
    task = results.tasks[0]
    arms = [arm for name in SCALES_OF for arm in results.experiment.arms if arm.name == name]
    size = (3.3 * len(arms), 3.6)
    figure, axes = plt.subplots(
        1, len(arms), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(f"gradient std by layer, before the transform: {title(task)}, median of seeds")
    for ax, arm in zip(axes[0], arms, strict=True):
        record = results.reported(task, arm)
        colours = plt.colormaps["viridis"](np.linspace(0, 0.9, len(record["scale_steps"])))
        for step, scales, colour in zip(
            record["scale_steps"], record["scale_curve"], colours, strict=True
        ):
            layers = np.arange(1, len(scales) + 1)
            ax.plot(layers, np.array(scales, float), color=colour, label=f"step {step + 1}")
        median = np.median(results.errors(task, arm))
        ax.set(title=f"{arm.label}\nerror {median:.3g}", yscale="log", xlabel="layer")
        ax.title.set_fontsize(8)
        ax.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_memory(results: Results, path: Path) -> None:
    """Median error against the optimizer's state: of each kind of arm the best in the sweep."""
    count = len(results.tasks)
    figure, axes = plt.subplots(
        1, count, figsize=(3.6 * count, 3.6), squeeze=False, layout="constrained"
    )
    kinds = {"none": "alone", "clip": "clip 1.0", "stablegrad": "StableGrad"}
    for ax, task in zip(axes[0], results.tasks, strict=True):
        named = set[str]()
        for kind, arms in _by_kind(results.experiment.arms, list(kinds)):
            arm = min(arms, key=lambda arm: _swept_error(results, task, arm))
            point = (state_bytes(task, arm), float(np.median(results.errors(task, arm))))
            label = kinds[kind] if kind not in named else None
            named.add(kind)
            ax.plot(*point, "o", color=_colour(arm), label=label, alpha=0.8)
            if kind == "none":
                ax.annotate(arm.label, point, (5, -2), textcoords="offset points", fontsize=7)
        ax.set(title=title(task), yscale="log", xlim=(3.5, 10.5))
        ax.set_xlabel("state, bytes per parameter")
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("median rel. L2 error")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _swept_error(results: Results, task: Task, arm: Arm) -> float:
    return float(np.median(records.errors(results.sweep(task, arm)), axis=1).min())


def _by_kind(arms: Sequence[Arm], kinds: Sequence[str]) -> list[tuple[str, list[Arm]]]:
    """The arms of each base and kind, the bases one after another."""
    found: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        if arm.scaling in kinds:
            found.setdefault((arm.base, arm.scaling), []).append(arm)
    return [(kind, group) for (_, kind), group in sorted(found.items())]
