"""What came of an experiment: ranks, tables and pictures, from its records."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from benchmarks import json_lines, records
from benchmarks.arms import Arm
from benchmarks.experiment import Experiment
from benchmarks.pages import markdown
from benchmarks.records import Record
from benchmarks.training import Cell, Task, Training

NEAR, LEARNED = 1.5, 0.9
"""A learning rate works if its error is within the first factor of that of the best one, and within
the second of that of a network that learned nothing."""
GUESS = 0.995
"""From this share of the error of a network that learned nothing on, nothing was learned: guesses
differ by a test image or two."""
CELLS = """\
Cells: median error (quartiles), share of the seeds solved, decades of learning rates that work.
"""
LEGEND = f"""\
{CELLS}*Mean rank*: of the median error among all rows, 1 is the best; *with its base*: among the
rows with the same base optimizer. *State*: the optimizer's, in bytes per parameter.
"""
"""What stands above a table of results, and what of it is about its cells."""
FAMILIES = {"adam_eps": "adam", "adamw": "adam", "adamw_eps": "adam"}
"""Base optimizers that are compared with those of another name."""


@dataclass(frozen=True)
class Results:
    """What is recorded of an experiment.

    ``tasks`` are those on which every arm is recorded, and what is over all tasks is over them.
    """

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
        arms = list(self.experiment.arms)
        return [task for task, recorded in self.so_far.items() if recorded == arms]

    def part(self, tasks: Sequence[Task], arms: Sequence[Arm] = ()) -> "Results":
        """What came of some of the tasks, and of some of the arms; if none are given, of all."""
        chosen = tuple(arms) or self.experiment.arms
        return Results(replace(self.experiment, tasks=tuple(tasks), arms=chosen), self.folder)

    def recorded(self, task: Task) -> list[Arm]:
        """The arms that are recorded on a task, with their sweeps."""
        both = (self.experiment.tuning_seeds, self.experiment.reported_seeds)
        return [
            arm
            for arm in self.experiment.arms
            if all(self.of(task, arm, seeds) for seeds in both if seeds)
        ]

    @cached_property
    def so_far(self) -> dict[Task, list[Arm]]:
        """The tasks that are recorded for some arms, and these."""
        return {task: arms for task in self.experiment.tasks if (arms := self.recorded(task))}

    def among(self, task: Task, names: Sequence[str]) -> list[Arm]:
        """The arms of these names that are recorded on a task, in the order of the names."""
        found = {arm.name: arm for arm in self.recorded(task)}
        return [found[name] for name in names if name in found]

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

        Equal errors share a rank, and so do all that are no better than having learned nothing.
        """
        medians = np.array(
            [[np.median(self.errors(task, arm)) for arm in arms] for task in self.tasks]
        )
        unlearned = np.array([[task.unlearned] for task in self.tasks])
        ranks = rankdata(np.where(medians < GUESS * unlearned, medians, np.inf), axis=1)
        return dict(zip((arm.name for arm in arms), ranks.mean(axis=0), strict=True))

    def ranks_in_family(self) -> dict[str, float]:
        """The mean rank of each arm among those with the same base optimizer."""
        families: dict[str, list[Arm]] = {}
        for arm in self.experiment.arms:
            families.setdefault(family(arm), []).append(arm)
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


def quartiles(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The quartiles of the last axis; each is a seed's error: none lies between one and inf."""
    low, high = np.quantile(errors, [0.25, 0.75], axis=-1, method="inverted_cdf")
    return low, high


def median_errors(results: Results, arm: Arm) -> list[str]:
    """An arm's median error on each task, as text."""
    return [f"{np.median(results.errors(task, arm)):.3g}" for task in results.tasks]


def outcome(results: Results, task: Task, arm: Arm) -> str:
    """Median error, quartiles, share of the seeds solved, and width in learning rates."""
    errors = results.errors(task, arm)
    low, high = quartiles(errors)
    median = np.median(errors)
    solved = np.mean(errors < task.solved_below)
    width = learning_rate_width(results, task, arm)
    return f"{median:.3g} ({low:.2g}-{high:.2g}), {solved:.0%}, {width:g}"


def results_table(results: Results) -> str:
    """Error, spread, share of seeds solved and width in learning rates of every arm; a legend."""
    ranks = results.mean_ranks(results.experiment.arms)
    in_family = results.ranks_in_family()
    head = [
        "optimizer",
        "mean rank",
        "with its base",
        "state",
        *(task.title for task in results.tasks),
    ]

    rows = (
        [
            arm.label,
            f"{ranks[arm.name]:.1f}",
            f"{in_family[arm.name]:.1f}",
            f"{state_bytes(results.tasks[0], arm):.1f}",
            *(outcome(results, task, arm) for task in results.tasks),
        ]
        for arm in results.by_rank()
    )
    return f"{LEGEND}\n{markdown(head, rows)}"


def learning_rate_width(results: Results, task: Task, arm: Arm) -> float:
    """Decades of learning rates that work, of those swept; each rate counts for its spacing."""
    medians = np.median(records.errors(results.sweep(task, arm)), axis=1)
    works = (medians <= NEAR * medians.min()) & (medians < LEARNED * task.unlearned)
    return float(np.sum(works)) / results.experiment.rates_per_decade


def state_bytes(task: Task, arm: Arm) -> float:
    """Bytes of optimizer state per parameter."""
    num_params, num_bytes = Training(task, (Cell(arm, 1.0, 0),), 1).count_bytes()
    return num_bytes / num_params


def colour(arm: Arm) -> str:
    """What tells StableGrad, its rivals and base optimizers alone apart."""
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
            ax.plot(errors, np.full(len(errors), row), ".", color=colour(arm), alpha=0.35)
            ax.plot(np.median(errors), row, "|", color=colour(arm), markersize=13, mew=2.5)
        ax.axvline(task.solved_below, color="grey", linewidth=1)
        ax.set(title=task.title, xscale="log", xlabel="error")
        ax.grid(axis="x", alpha=0.25)
    axes[0, 0].set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=8)
    for label, arm in zip(axes[0, 0].get_yticklabels(), arms, strict=True):
        label.set_color(colour(arm))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def layer_order(task: Task) -> list[int]:
    """The layers of ``scale_curve`` from the input to the output.

    A record has them kernel by kernel, so that those of a stack of blocks are not block by block.
    The names of a network's parts are in the order of the parts.
    """
    places = [
        (part, block, number)
        for number, (part, blocks) in enumerate(_kernels(task))
        for block in range(blocks)
    ]
    return sorted(range(len(places)), key=places.__getitem__)


def _kernels(task: Task) -> list[tuple[str, int]]:
    """Of each kernel the part of the network it is in, and how many blocks are stacked in it."""
    leaves = jax.tree.leaves_with_path(jax.eval_shape(task.init, jax.random.key(0)))
    return [
        (path[0].key, leaf.shape[0] if path[0].key in task.stacked else 1)
        for path, leaf in leaves
        if path[-1].key == "kernel"
    ]


def _has_blocks(task: Task) -> bool:
    """Whether a stack of the network has several kernels in each of its blocks."""
    parts = [part for part, _ in _kernels(task)]
    return any(parts.count(part) > 1 for part in task.stacked)


SCALES = {"scale_curve": "gradient", "update_curve": "update"}
"""What is recorded by layer over a run; records of before lack the second."""


def draw_scales_over_time(results: Results, task: Task, arms: Sequence[Arm], path: Path) -> None:
    """The std of gradients, before any transform, and of updates by layer, at several steps.

    Lines where layers are alike, and dots where a block has several kinds of them. The last step's
    update, at a learning rate of nearly 0, is left out.
    """
    found = [results.reported(task, arm) for arm in arms]
    rows = [name for name in SCALES if all(name in record for record in found)]
    figure, axes = plt.subplots(
        len(rows),
        len(arms),
        figsize=(3.3 * len(arms), 0.3 + 3.3 * len(rows)),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    what = "std by layer, of gradients before any transform, median of seeds"
    figure.suptitle(f"{task.title}\n{what}", fontsize=10)
    order = layer_order(task)
    line = {"linestyle": "", "marker": ".", "markersize": 3} if _has_blocks(task) else {}
    for column, arm, record in zip(axes.T, arms, found, strict=True):
        shades = plt.colormaps["viridis"](np.linspace(0, 0.9, len(record["scale_steps"])))
        for ax, name in zip(column, rows, strict=True):
            curves = np.array(record[name], float)[:, order]
            shown = list(zip(record["scale_steps"], curves, shades, strict=True))
            for step, scales, shade in shown[:-1] if name == "update_curve" else shown:
                layers = np.arange(1, len(scales) + 1)
                ax.plot(layers, scales, color=shade, label=f"step {step + 1}", **line)
            ax.set(yscale="log")
            ax.grid(alpha=0.25)
        median = np.median(results.errors(task, arm))
        column[0].set_title(f"{arm.label}\nerror {median:.3g}", fontsize=8)
        column[-1].set_xlabel("layer")
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"{SCALES[name]} std")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def style(arm: Arm) -> dict[str, str]:
    """An arm's line: dashed for StableGrad's default balance, dotted for another's control."""
    is_default = dict(arm.numbers).get("balance") == 1
    line = "--" if is_default else ":" if arm.base in FAMILIES else "-"
    return {"color": colour(arm), "linestyle": line}


def draw_depths(results: Results, path: Path) -> None:
    """Median error against depth, with quartiles; rows of problems, columns of base optimizers.

    Of an experiment that is not complete, what is recorded.
    """
    by_problem = problems(list(results.so_far))
    columns = bases(results)
    figure, axes = panels(len(by_problem), len(columns))
    for row, tasks in zip(axes, by_problem.values(), strict=True):
        for arm in results.experiment.arms:
            found = [task for task in tasks if arm in results.so_far[task]]
            if not found:
                continue
            depths = [task.describe()["depth"] for task in found]
            errors = np.minimum([results.errors(task, arm) for task in found], 10.0)
            ax = row[columns.index(family(arm))]
            ax.plot(depths, np.median(errors, axis=1), marker=".", label=arm.label, **style(arm))
            ax.fill_between(depths, *quartiles(errors), color=colour(arm), alpha=0.1)
        depths = [task.describe()["depth"] for task in tasks]
        for ax in row:
            ax.axhline(tasks[0].solved_below, color="grey", linewidth=1)
            ax.set(xscale="log", yscale="log", xlabel="depth", title=problem(tasks[0]))
            ax.set_xticks(depths, [str(depth) for depth in depths])
            ax.minorticks_off()
        row[0].set_ylabel("median error")
    save(figure, axes, path)


def problems(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """The tasks of each problem, the shallow ones first."""
    by_depth = sorted(tasks, key=lambda task: task.describe()["depth"])
    return {name: [t for t in by_depth if problem(t) == name] for name in map(problem, by_depth)}


def bases(results: Results) -> list[str]:
    """The base optimizers of the arms, without those that are compared with another's."""
    return list(dict.fromkeys(map(family, results.experiment.arms)))


def family(arm: Arm) -> str:
    """The base optimizer with whose arms an arm is compared."""
    return FAMILIES.get(arm.base, arm.base)


def problem(task: Task) -> str:
    """A task's title without its depth."""
    return task.title.rpartition(", depth")[0]


def panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of panels, those of a row with the same axis of errors."""
    return plt.subplots(
        rows,
        columns,
        figsize=(3.6 * columns, 3.4 * rows),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )


def save(figure: Figure, axes: np.ndarray, path: Path) -> None:
    """With a legend in the first row, every panel its own."""
    for ax in axes[0]:
        ax.legend(fontsize=6)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)
