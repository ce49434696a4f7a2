"""The pictures of docs/normfree.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.arms import Arm
from benchmarks.normfree.task import TextTask
from benchmarks.records import Record, errors
from benchmarks.results import Results, style
from benchmarks.training import Task

SHOWN = (
    *("adamw", "clip_adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
    *("sgd", "clip_sgd", "stablegrad-sgd-fixed-d0.0-b1.0"),
)
"""The arms whose layers are pictured."""

HIGHLIGHTED = (
    *("clip_adamw", "gradient_stabilizer_adamw"),
    *("stablegrad-adamw-fixed-d0.0-b0.5", "stablegrad-adamw-fixed-d0.9-b0.5-a0.0"),
    *("clip_sgd", "gradient_stabilizer_sgd"),
    *("stablegrad-sgd-fixed-d0.0-b1.0", "stablegrad-sgd-fixed-d0.9-b1.0-a0.0-norm"),
    *("clip_muon", "stablegrad-muon-fixed-d0.0-b0.5"),
    *("stablegrad-adamw-fixed-d0.0-b1.0", "agc_sgd"),
    *("adamw", "sgd", "muon"),
)
"""The arms whose lines have a colour: of each base two rivals, and StableGrad without and with
attack; of Muon one each; the defaults; AGC with SGD; and the bases alone, which are dark. The lines
of others are pale."""
COLOURS = (
    *("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "navy", "C9", "gold", "magenta"),
    *["dimgrey"] * 3,
)

THE_SAME = {
    "compressor-adamw-a0-r0.9-b0.5-n0": "stablegrad-adamw-fixed-d0.9-b0.5-a0.0",
    "compressor-adamw-a0-r0.9-b1-n0": "stablegrad-adamw-fixed-d0.9-b1.0-a0.0",
    "compressor-sgd-a0-r0.9-b1-n0": "stablegrad-sgd-fixed-d0.9-b1.0-a0.0",
    "compressor-sgd-a0-r0.9-b1-n1": "stablegrad-sgd-fixed-d0.9-b1.0-a0.0-norm",
}
"""Variants that became options of StableGrad, by the names that they have now."""

Gathered = dict[Task, dict[Arm, Record]]
"""Records on the reported seeds."""
Line = tuple[np.ndarray, np.ndarray]


def gather(experiments: Sequence[Results]) -> Gathered:
    """What is recorded of each task, by arm; the first of the experiments that has it counts."""
    arms = {arm.name: arm for results in experiments for arm in results.experiment.arms}
    gathered: Gathered = {}
    for results in experiments:
        for task in results.experiment.tasks:
            for arm in results.recorded(task):
                of_task = gathered.setdefault(task, {})
                known_as = arms.get(THE_SAME.get(arm.name, arm.name), arm)
                of_task.setdefault(known_as, results.reported(task, arm))
    return gathered


def draw_by_depth(gathered: Gathered, path: Path) -> None:
    """Accuracy against depth, an axes for each kind of network that has more than one.

    What diverged counts as a guess.
    """
    lines: dict[str, dict[Arm, dict[int, float]]] = {}
    for task, found in gathered.items():
        kind = task.title.rpartition(", depth ")[0]
        of_kind = lines.setdefault(kind, {})
        for arm, record in found.items():
            error = np.median(np.minimum(errors(record), task.unlearned))
            of_kind.setdefault(arm, {})[task.describe()["depth"]] = 1 - float(error)
    depths_of = {
        kind: sorted({depth for line in of_kind.values() for depth in line})
        for kind, of_kind in lines.items()
    }
    kinds = [kind for kind, depths in depths_of.items() if len(depths) > 1] or list(lines)
    figure, axes = _axes(1, len(kinds))
    for ax, kind in zip(axes[0], kinds, strict=True):
        depths = depths_of[kind]
        _draw_lines(ax, {arm: _sorted(line) for arm, line in lines[kind].items()})
        ax.set(title=kind, xlabel="depth", xscale="log")
        ax.title.set_fontsize(9)
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("median test accuracy")
    _save(figure, axes, path)


CURVES = {"error_curve": "median test accuracy", "loss_curve": "median training loss"}
"""What is recorded over a run; records of before lack the second."""


def draw_curves(
    gathered: Gathered, path: Path, normalized: Gathered | None = None, norm: str = ""
) -> None:
    """Accuracy, or a text's loss, and training loss over a run, a column for each task.

    Args:
        gathered: What is drawn.
        path: The picture.
        normalized: Records of the same tasks with normalization layers, which are drawn in black.
        norm: What these layers are called.
    """
    names = [
        name
        for name in CURVES
        if all(any(name in record for record in found.values()) for found in gathered.values())
    ]
    figure, axes = _axes(len(names), len(gathered))
    for row, name in zip(axes, names, strict=True):
        for ax, (task, found) in zip(row, gathered.items(), strict=True):
            is_accuracy = name == "error_curve" and not isinstance(task, TextTask)
            _draw_lines(ax, _curves(found, name, is_accuracy))
            for arm, line in _curves((normalized or {}).get(task, {}), name, is_accuracy).items():
                label = f"{arm.label}, with {norm}"
                ax.plot(*line, color="black", linestyle=_dashes(arm), label=label)
            ax.set_title(task.title, fontsize=9)
            ax.set(xlabel="step", yscale="linear" if is_accuracy else "log")
        is_text = any(isinstance(task, TextTask) for task in gathered)
        row[0].set_ylabel(CURVES[name].replace("accuracy", "loss") if is_text else CURVES[name])
    _save(figure, axes, path)


def draw_scales(results: Results, path: Path) -> None:
    """Std of the gradient by layer in the first step and in the last one, median of seeds."""
    figure, axes = _axes(1, len(results.tasks))
    for ax, task in zip(axes[0], results.tasks, strict=True):
        arms = results.among(task, SHOWN)
        curves = {arm: results.reported(task, arm)["scale_curve"] for arm in arms}
        first = np.array(curves[arms[0]][0], float)
        layers = np.arange(1, len(first) + 1)
        ax.plot(layers, first, color="grey", linewidth=3, alpha=0.5, label="first step, all alike")
        for arm, curve in curves.items():
            shown = {**style(arm), "linestyle": _dashes(arm)}
            ax.plot(layers, np.array(curve[-1], float), label=arm.label, **shown)
        ax.set(title=task.title, yscale="log", xlabel="layer")
        ax.title.set_fontsize(9)
    axes[0, 0].set_ylabel("gradient std, last step")
    _save(figure, axes, path)


def _curves(found: Mapping[Arm, Record], name: str, is_accuracy: bool) -> dict[Arm, Line]:
    """A curve of each arm against the step."""
    lines: dict[Arm, Line] = {}
    for arm, record in found.items():
        if name in record:
            values = np.array(record[name], float)
            steps = np.linspace(0, record["steps"], len(values) + 1)[1:]
            lines[arm] = steps, (1 - values if is_accuracy else values)
    return lines


def _sorted(line: Mapping[int, float]) -> Line:
    depths = sorted(line)
    return np.array(depths), np.array([line[depth] for depth in depths])


def _draw_lines(ax: Axes, lines: Mapping[Arm, Line]) -> None:
    """Those that are highlighted in colours over the pale others."""
    for arm, line in lines.items():
        if arm.name not in HIGHLIGHTED:
            ax.plot(*line, color="lightgrey", linewidth=1, marker=".", markersize=3)
    by_name = {arm.name: arm for arm in lines}
    for name, colour in zip(HIGHLIGHTED, COLOURS, strict=True):
        if name in by_name:
            arm = by_name[name]
            shown: dict[str, Any] = {"color": colour, "linestyle": _dashes(arm)}
            ax.plot(*lines[arm], marker=".", markersize=4, label=arm.label, **shown)


def _dashes(arm: Arm) -> str:
    """The base optimizer, as the dashes of a line."""
    return {"sgd": "-", "adamw": "--"}.get(arm.base, ":")


def _axes(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    return plt.subplots(
        rows,
        columns,
        figsize=(4.4 * columns, 3.8 * rows),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )


def _save(figure: Any, axes: np.ndarray, path: Path) -> None:
    """With one legend, of all lines."""
    named: dict[str, Any] = {}
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": min(2, axes.shape[1])}
    figure.legend(named.values(), named.keys(), fontsize=7, **options)
    figure.savefig(path, dpi=130)
    plt.close(figure)
