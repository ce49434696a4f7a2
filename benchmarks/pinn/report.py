"""The tables and pictures of docs/pinn.md, from the records of the PINN experiments."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import json_lines, records
from benchmarks.arms import SCALINGS, Arm
from benchmarks.cost import records as cost_records
from benchmarks.cost.training import ALL
from benchmarks.experiments import EXPERIMENTS
from benchmarks.pages import fill, markdown
from benchmarks.pinn.task import PREDICTIONS, PinnTask
from benchmarks.records import FOLDER
from benchmarks.results import (
    CELLS,
    Results,
    bases,
    colour,
    draw_depths,
    draw_errors,
    draw_scales_over_time,
    family,
    median_errors,
    outcome,
    panels,
    problems,
    results_table,
    save,
    state_bytes,
    style,
)
from benchmarks.training import Task

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pinn.md"
IMAGES = ROOT / "docs" / "images"
PEER_SCALINGS = set(SCALINGS) - {"stablegrad", "compressor"}
SCALES_OF = (
    "adam",
    "clip_adam",
    "stablegrad-adam-fixed-d0.0-b0.5",
    "muon",
    "stablegrad-muon-fixed-d0.0-b0.0",
)
"""The arms whose layers are pictured."""
MORE_STEPS = ("by-depth-helmholtz", "by-depth-burgers")
"""The experiments by depth that have more steps than the others."""


def write(page: Path = PAGE, images: Path = IMAGES, folder: Path = FOLDER) -> None:
    """Put the tables into the page, and draw the pictures."""
    recorded = {
        name: Results(EXPERIMENTS[f"pinn-{name}"], folder)
        for name in (
            *("screen", "screen-helmholtz", "depth", "by-depth", "confirm"),
            *("prediction", "reference", "networks", "biases", "attack", "variants"),
            *MORE_STEPS,
        )
    }
    screen, helmholtz = recorded["screen"], recorded["screen-helmholtz"]
    depth, by_depth = recorded["depth"], recorded["by-depth"]
    tables: dict[str, str] = {}
    if screen.tasks:
        tables["grid"] = grid_table(screen)
        for name, scalings in (("peers", PEER_SCALINGS), ("variants", {"compressor"})):
            arms = [arm for arm in screen.experiment.arms if arm.scaling in scalings]
            tables[f"screened {name}"] = errors_table(screen, arms)
    if helmholtz.tasks:
        tables["screened helmholtz"] = errors_table(helmholtz, helmholtz.experiment.arms)
    for name in ("depth", "confirm"):
        if recorded[name].tasks:
            tables[name] = results_table(recorded[name])
            draw_errors(recorded[name], images / f"pinn_{name}.png")
    for name in ("reference", "networks", "biases", "attack", "variants", *MORE_STEPS):
        tables[name] = table_so_far(recorded[name])
    helmholtz_depths = recorded["by-depth-helmholtz"]
    if helmholtz_depths.tasks:
        draw_depths(helmholtz_depths, images / "pinn_helmholtz.png")
    tables["prediction"] = prediction_table(recorded["prediction"])
    if by_depth.tasks:
        tables["ranks"] = ranks_table(by_depth)
        for tasks in problems(by_depth.tasks).values():
            name = f"by-depth {tasks[0].describe()['problem']}"
            tables[name] = results_table(by_depth.part(tasks))
        draw_depths(by_depth, images / "pinn_depths.png")
        if (times := step_times(folder)) is not None:
            draw_time(by_depth, times, images / "pinn_time.png")
    if depth.tasks:
        task = depth.tasks[0]
        arms = depth.among(task, SCALES_OF)
        draw_scales_over_time(depth, task, arms, images / "pinn_scales.png")
        draw_memory(depth, images / "pinn_memory.png")
    fill(page, tables)


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
            cells = [" / ".join(median_errors(results, arms[decay])) for decay in decays]
            yield [base, str(reference), "yes" if delayed else "", f"{balance:g}", *cells]

    head = ["base", "reference", "delayed", "balance", *(f"decay {decay:g}" for decay in decays)]
    return markdown(head, rows())


def table_so_far(results: Results) -> str:
    """All results; until they are complete, what is recorded, without ranks, and how much it is."""
    found = results.so_far
    recorded = sum(map(len, found.values()))
    wanted = len(results.experiment.tasks) * len(results.experiment.arms)
    if recorded == wanted:
        return results_table(results)
    rows = (
        [arm.label, *(_outcome_so_far(results, task, arm) for task in found)]
        for arm in results.experiment.arms
        if any(arm in arms for arms in found.values())
    )
    table = markdown(["optimizer", *(task.title for task in found)], rows)
    return f"{CELLS}\n{table}\n\n{recorded} of {wanted} pairs of a task and an arm are recorded."


def prediction_table(results: Results) -> str:
    """A row for each arm on each problem; in the columns what counts as the prediction."""
    by_problem: dict[str, dict[str, Task]] = {}
    for task in results.experiment.tasks:
        if isinstance(task, PinnTask):
            usual = replace(task, prediction=PREDICTIONS[0])
            by_problem.setdefault(usual.title, {})[task.prediction] = task

    rows = (
        [
            title,
            arm.label,
            *(_outcome_so_far(results, of.get(prediction), arm) for prediction in PREDICTIONS),
        ]
        for title, of in by_problem.items()
        for arm in results.experiment.arms
    )
    return f"{CELLS}\n{markdown(['problem', 'optimizer', *PREDICTIONS], rows)}"


def _outcome_so_far(results: Results, task: Task | None, arm: Arm) -> str:
    """What came of an arm on a task, or a blank if that is not recorded."""
    return outcome(results, task, arm) if task and arm in results.so_far.get(task, []) else ""


def ranks_table(results: Results, deep: int = 16) -> str:
    """Mean ranks over all tasks and over the deep ones, among all and with the same base."""
    deep_tasks = [task for task in results.tasks if task.describe()["depth"] >= deep]
    columns: dict[str, dict[str, float]] = {}
    for depths, tasks in (("all depths", results.tasks), (f"{deep} layers and more", deep_tasks)):
        if tasks:
            of_tasks = results.part(tasks)
            columns[f"{depths}, of all"] = of_tasks.mean_ranks(results.experiment.arms)
            columns[f"{depths}, with its base"] = of_tasks.ranks_in_family()
    rows = (
        [arm.label, *(f"{ranks[arm.name]:.1f}" for ranks in columns.values())]
        for arm in results.by_rank()
    )
    return markdown(["mean rank", *columns], rows)


def errors_table(results: Results, arms: Sequence[Arm]) -> str:
    """Median errors of the arms, in the order of their mean rank."""
    chosen = [arm for arm in results.by_rank() if arm in arms]
    rows = [[arm.label, *median_errors(results, arm)] for arm in chosen]
    return markdown(["optimizer", *(task.title for task in results.tasks)], rows)


def step_times(folder: Path) -> dict[str, float] | None:
    """The time of a training step of each arm beside Adam's, as recorded on a CPU."""
    record = json_lines.find(cost_records.read("training", folder), {"base": ALL, "backend": "cpu"})
    return record and {name: median for name, (median, *_) in record["ratios"].items()}


def draw_time(results: Results, times: dict[str, float], path: Path) -> None:
    """Median error over the time of training at the largest depth of each problem."""
    by_problem, columns = problems(results.tasks), bases(results)
    figure, axes = panels(len(by_problem), len(columns))
    for row, tasks in zip(axes, by_problem.values(), strict=True):
        for arm in results.experiment.arms:
            curve = results.reported(tasks[-1], arm)["error_curve"]
            steps = np.linspace(0, results.experiment.steps, len(curve) + 1)[1:]
            ax = row[columns.index(family(arm))]
            ax.plot(steps * times[arm.name], np.array(curve, float), label=arm.label, **style(arm))
        for ax in row:
            ax.set(yscale="log", xlabel="time, in steps of Adam", title=tasks[-1].title)
        row[0].set_ylabel("median rel. L2 error")
    save(figure, axes, path)


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
            ax.plot(*point, "o", color=colour(arm), label=label, alpha=0.8)
            if kind == "none":
                ax.annotate(arm.label, point, (5, -2), textcoords="offset points", fontsize=7)
        ax.set(title=task.title, yscale="log", xlim=(3.5, 10.5))
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
