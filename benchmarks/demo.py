"""Train a deep plain tanh network on a PDE with several optimizers, and show what each one did."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from benchmarks import records
from benchmarks.arguments import whole_number
from benchmarks.history import History, train
from benchmarks.interrupts import deferred_interrupt
from benchmarks.pinn.experiments import DEMO
from benchmarks.pinn.networks import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.task import PinnTask

ARMS = {arm.name: arm for arm in DEMO.arms}
TASKS = {task.problem.name: task for task in DEMO.tasks if isinstance(task, PinnTask)}
DEFAULT_TASK = TASKS["burgers"]
DEFAULT_SEEDS = 6
PICTURE_SUFFIXES = (".png", ".pdf", ".svg")

# Okabe and Ito's colours, which colour-blind readers can tell apart, with dashes for print.
Style = dict[str, Any]
STYLES: tuple[tuple[str, Any], ...] = (
    ("#000000", "-"),
    ("#E69F00", (0, (6, 1))),
    ("#009E73", (0, (4, 1, 1, 1))),
    ("#0072B2", "-"),
    ("#D55E00", (0, (6, 1))),
    ("#CC79A7", "-"),
    ("#999999", (0, (4, 1, 1, 1))),
    ("#56B4E9", "-"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 130 if it was interrupted."""
    options = parse(arguments)
    network = Network(options.depth, options.width)
    task = PinnTask(PROBLEMS[options.problem], network, DEFAULT_TASK.points)
    console = Console(highlight=False)
    console.print(introduction(task, options.seeds, options.steps), end="\n\n")
    histories: dict[str, History] = {}
    interrupted = False
    with deferred_interrupt() as check_interrupt:
        try:
            run(task, options, histories, console, check_interrupt)
        except KeyboardInterrupt:
            console.print("Interrupted. This is what there is so far.")
            interrupted = True
    if histories:
        finished = list(histories.values())
        console.print(table(finished))
        console.print(f"\n{notes(finished)}")
        picture(finished).savefig(options.out, dpi=150)
        console.print(f"\nPicture: {options.out}\nAgain: {command(options)}", soft_wrap=True)
    return 130 if interrupted else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage in front of it."""
        self.exit(2, f"demo: error: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, or a one-line error that names the choices."""
    parser = _Parser(
        prog="python -m benchmarks.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def whole(name: str, default: int, lowest: int, highest: int, what: str) -> None:
        parser.add_argument(
            name,
            type=whole_number(lowest, highest),
            default=default,
            metavar="N",
            help=f"{what}, {lowest} to {highest}",
        )

    names = list(ARMS)
    task = DEFAULT_TASK
    parser.add_argument("--problem", choices=PROBLEMS, default=task.problem.name, help="PDE")
    whole("--depth", task.network.depth, 2, 99, "hidden layers")
    whole("--width", task.network.width, 1, 1024, "units per hidden layer")
    whole("--seeds", DEFAULT_SEEDS, 1, 64, "seeds, trained at once")
    whole("--steps", DEMO.steps, 1, 1_000_000, "optimizer steps")
    parser.add_argument(
        "--arms",
        choices=ARMS,
        nargs="+",
        default=names,
        metavar="ARM",
        help=f"optimizers, of {', '.join(names)}",
    )
    parser.add_argument(
        "--out",
        type=_picture_path,
        default="out/demo.png",
        metavar="FILE",
        help=f"where the picture goes, a {' or '.join(PICTURE_SUFFIXES)} file",
    )
    options = parser.parse_args(arguments)
    options.arms = list(dict.fromkeys(options.arms))
    return options


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"invalid file: {text!r} (choose a name that ends in {', '.join(PICTURE_SUFFIXES)})"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"invalid folder: {str(path.parent)!r} (choose another: {error.strerror})"
        ) from None
    return path


def introduction(task: PinnTask, num_seeds: int, steps: int) -> str:
    """What is about to be trained."""
    problem, network = task.problem, task.network
    return (
        f"{problem.name}: {problem.equation}\n"
        f"plain {network.activation} network, {network.depth} hidden layers of {network.width}, "
        f"{num_seeds} seeds at once, {steps} steps of {task.points} fresh points"
    )


def tuned_learning_rate(arm: str, problem: str) -> float:
    """The best learning rate of an arm in the recorded sweep on a problem."""
    return records.tuned_rate(records.read(DEMO), DEMO, TASKS[problem], ARMS[arm])


def run(
    pinn: PinnTask,
    options: argparse.Namespace,
    histories: dict[str, History],
    console: Console,
    check_interrupt: Callable[[], None],
) -> None:
    """Train the arms one after another; ``histories`` always has what there is so far."""
    rates = {arm: tuned_learning_rate(arm, pinn.problem.name) for arm in options.arms}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("rel. L2 {task.fields[error]}"),
        TimeElapsedColumn(),
    )
    # Bars need a terminal; a file or a pipe gets a line per arm.
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        labels = {arm: ARMS[arm].label for arm in options.arms}
        tasks = {
            arm: progress.add_task(label, start=False, total=options.steps, loss="-", error="-")
            for arm, label in labels.items()
        }
        for arm, task in tasks.items():

            def report(history: History, arm: str = arm, task: TaskID = task) -> None:
                histories[arm] = history
                loss, error = f"{np.median(history.loss[-1]):.1e}", f"{history.median_error:.3f}"
                progress.update(task, completed=history.steps, loss=loss, error=error)
                if history.steps == options.steps and not console.is_terminal:
                    console.print(f"{labels[arm]}: loss {loss}, rel. L2 {error}")
                check_interrupt()

            progress.start_task(task)
            try:
                train(pinn, ARMS[arm], rates[arm], range(options.seeds), options.steps, report)
            except KeyboardInterrupt:
                if not progress.tasks[task].finished:
                    progress.update(task, description=f"{labels[arm]}\ninterrupted")
                raise


def table(histories: Sequence[History]) -> Table:
    """One row per arm."""
    problem, num_seeds = _task(histories).problem, len(histories[0].seeds)
    # Narrow enough for a terminal of 80 columns.
    result = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=f"{problem.name}, {num_seeds} seeds",
    )
    result.add_column("optimizer")
    for heading in (
        "learn.\nrate",
        "rel. L2\nmedian",
        "lowest to\nhighest",
        f"solved\n< {problem.solved_below:g}",
        "memory\nB/param",
        "time\ns",
        "CPU\nx Adam",
    ):
        result.add_column(heading, justify="right")
    adam = next((history for history in histories if history.arm.name == "adam"), None)
    for history in histories:
        lowest, highest = history.final_error.min(), history.final_error.max()
        result.add_row(
            f"{history.arm.label}{_progress_note(history)}",
            f"{history.learning_rate:g}",
            f"{history.median_error:.4f}",
            f"{lowest:.2g}-{highest:.2g}",
            f"{history.num_solved / num_seeds:.0%}",
            f"{history.state_bytes / history.num_params:.2f}",
            f"{history.train_seconds:.1f}",
            f"{_processor_step(history) / _processor_step(adam):.2f}" if adam else "-",
        )
    return result


def _processor_step(history: History) -> float:
    return history.processor_seconds / history.steps


def _progress_note(history: History) -> str:
    done, total = history.steps, history.total_steps
    return "" if done == total else f"\nstep {done} of {total}"


def notes(histories: Sequence[History]) -> str:
    """What the numbers of the table mean."""
    first = histories[0]
    problem = _task(histories).problem
    tuned = TASKS[problem.name].network
    points = " x ".join(str(size) for size in problem.grid_shape)
    compiling = sum(history.compile_seconds for history in histories)
    lines = [
        f"rel. L2: |u - reference| / |reference| on {points} points, over seeds "
        f"{first.seeds[0]} to {first.seeds[-1]}; a diverged seed counts as inf. Solved: the "
        f"share of seeds with rel. L2 < {problem.solved_below:g}.",
        f"Learning rate: falls to 0 along a cosine. Each is the best of {DEMO.num_rates} rates on "
        f"seeds {DEMO.tuning_seeds[0]} to {DEMO.tuning_seeds[-1]} at depth {tuned.depth}, width "
        f"{tuned.width}, {DEMO.steps} steps (benchmarks/records/{DEMO.name}.jsonl).",
        "Memory: the optimizer's state in bytes per parameter; a network has "
        f"{first.num_params} parameters.",
        f"Time: of all seeds, without compilation (another {compiling:.0f} s in all). CPU: the "
        "same summed over cores, per step, which other programs disturb less.",
    ]
    complete = all(history.steps == history.total_steps for history in histories)
    if complete and not any(history.num_solved for history in histories):
        lines.append("No seed solved it: this budget is too small; --steps gives it more.")
    return "\n".join(lines)


def command(options: argparse.Namespace) -> str:
    """The command that does the same again, with this folder's environment if it is the one."""
    python, here = Path(sys.executable), Path.cwd()
    words = [
        python.relative_to(here) if python.is_relative_to(here) else "python",
        *("-m", "benchmarks.demo", "--problem", options.problem),
        *("--depth", options.depth, "--width", options.width, "--seeds", options.seeds),
        *("--steps", options.steps, "--arms", *options.arms, "--out", options.out),
    ]
    return shlex.join(str(word) for word in words)


def picture(histories: Sequence[History]) -> Figure:
    """Fields and their errors above, curves and gradient scales below."""
    first = histories[0]
    figure = Figure(figsize=(max(15.0, 2.6 * (1 + len(histories))), 10.5), layout="constrained")
    title = introduction(_task(histories), len(first.seeds), first.total_steps)
    figure.suptitle(title, fontsize=12)
    halves = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.15, 1.0), hspace=0.04)
    draw_fields(halves[0, 0], histories)
    draw_curves(halves[1, 0], histories)
    return figure


def draw_fields(figure: SubFigure, histories: Sequence[History]) -> None:
    """The reference, then the field of each arm's median seed with its error below."""
    problem = _task(histories).problem
    reference = problem.reference(problem.grid().reshape(-1, 2)).reshape(problem.grid_shape)
    num_seeds = len(histories[0].seeds)
    rank = num_seeds // 2 + 1
    seeds = [int(np.argsort(history.final_error)[rank - 1]) for history in histories]
    fields = [history.shown[seed] for history, seed in zip(histories, seeds, strict=True)]
    errors = [np.abs(field - reference) for field in fields]
    # A quantile, so that a few points at a shock do not hide the rest. Diverged fields stay blank.
    finite = np.ravel(errors)[np.isfinite(np.ravel(errors))]
    highest = np.quantile(finite, 0.995) if finite.size else 1.0

    axes = figure.subplots(2, 1 + len(histories), sharex=True, sharey=True)
    extent = (problem.lower[0], problem.upper[0], problem.lower[1], problem.upper[1])

    def show(ax: Axes, values: np.ndarray, title: str, **colours: Any) -> Any:
        ax.set_title(title, fontsize=11)
        return ax.imshow(values.T, origin="lower", extent=extent, aspect="auto", **colours)

    field_colours = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0}
    error_colours = {"cmap": "viridis", "vmin": 0.0, "vmax": highest}
    images = [show(axes[0, 0], reference, "reference", **field_colours)]
    for column, (history, seed) in enumerate(zip(histories, seeds, strict=True)):
        name = f"{history.arm.label}{_progress_note(history)}"
        error = f"seed {history.seeds[seed]}: rel. L2 {history.final_error[seed]:.2g}"
        show(axes[0, column + 1], fields[column], name, **field_colours)
        images.append(show(axes[1, column + 1], errors[column], error, **error_colours))

    for ax in axes[:, 0]:
        ax.set_ylabel(problem.coordinates[1])
    for ax in axes[1]:
        ax.set_xlabel(problem.coordinates[0])
    axes[1, 0].set_axis_off()
    axes[1, 0].text(
        *(0.0, 0.5),
        f"above: the field of each\noptimizer's median seed\n(number {rank} of {num_seeds} "
        "by error)\n\nright: its distance\nto the reference",
        transform=axes[1, 0].transAxes,
        va="center",
    )
    figure.colorbar(images[0], ax=axes[0].tolist(), label="u", pad=0.01)
    figure.colorbar(
        images[-1], ax=axes[1].tolist(), label="|u - reference|", pad=0.01, extend="max"
    )


def draw_curves(figure: SubFigure, histories: Sequence[History]) -> None:
    """Loss, error, and the gradient scale of each layer at the start and at the end."""
    loss, error, start, end = figure.subplots(1, 4)
    end_steps = min(50, histories[0].steps)
    for history in histories:
        style = _style(history)
        draw_seeds(loss, *_windows(history.loss), style)
        draw_seeds(error, history.error_steps, history.error, style)
        draw_scales(start, history, slice(0, 1), style)
        draw_scales(end, history, slice(-end_steps, None), style)

    threshold = histories[0].task.solved_below
    error.axhline(threshold, color="grey", linewidth=1)
    error.annotate(
        "solved below", (0.0, threshold), (2, 2), textcoords="offset points", color="grey"
    )
    for ax, title in (
        (loss, "loss (mean squared residual)"),
        (error, "rel. L2 error"),
        (start, "gradient std by layer, first step"),
        (end, f"gradient std by layer, last {end_steps} steps"),
    ):
        ax.set(title=title, yscale="log")
        ax.grid(alpha=0.25)
    for ax in (loss, error):
        ax.set_xlabel("step")
    for ax in (start, end):
        ax.set_xlabel("layer, input to output")
        ax.xaxis.get_major_locator().set_params(integer=True)
    handles = [
        *(
            loss.plot([], [], label=history.arm.label, **_style(history))[0]
            for history in histories
        ),
        start.plot([], [], color="grey", linestyle=":", label="before the transform")[0],
        start.plot([], [], color="grey", marker="o", label="after it")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def draw_seeds(ax: Axes, steps: np.ndarray, values: np.ndarray, style: Style) -> None:
    """Every seed thin, their median thick; a line ends where its seed diverges."""
    diverged = np.where(np.isfinite(values), values, np.inf)
    ax.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.35)
    ax.plot(steps, np.median(diverged, axis=1), linewidth=2.2, **style)


def draw_scales(ax: Axes, history: History, steps: slice, style: Style) -> None:
    """The median over steps and seeds, before the arm's transform and after it."""
    layers = np.arange(1, history.scale_before.shape[2] + 1)
    before, after = (
        np.median(scale[steps], axis=(0, 1))
        for scale in (history.scale_before, history.scale_after)
    )
    ax.plot(layers, before, color=style["color"], linestyle=":", linewidth=1.6)
    ax.plot(layers, after, marker="o", markersize=3, linewidth=1.6, **style)


def _task(histories: Sequence[History]) -> PinnTask:
    """What all of them were trained on."""
    task = histories[0].task
    assert isinstance(task, PinnTask)
    return task


def _style(history: History) -> Style:
    """An arm looks the same whatever it is compared with."""
    colour, dashes = STYLES[list(ARMS).index(history.arm.name) % len(STYLES)]
    return {"color": colour, "linestyle": dashes}


def _windows(loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over about 100 windows of steps, which a reader can tell from noise."""
    length = max(1, len(loss) // 100)
    count = len(loss) // length
    means = loss[: count * length].reshape(count, length, -1).mean(axis=1)
    return length * (np.arange(count) + 0.5), means


if __name__ == "__main__":
    # One device per core, so that the seeds share all cores. Read when JAX is first used.
    os.environ.setdefault(
        "XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count() or 1}"
    )
    sys.exit(main())
