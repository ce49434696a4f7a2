"""Runs an experiment: what its records lack, batch by batch, each recorded as it finishes."""

import contextlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import json_lines, records
from benchmarks.arms import Arm
from benchmarks.experiment import Experiment
from benchmarks.training import Cell, Chunk, Task, Training
from benchmarks.versions import installed

ROOT = Path(__file__).parents[1]
SCALE_ROWS = 6


@dataclass(frozen=True)
class Batch:
    """Arms that are trained together on one task."""

    experiment: Experiment
    task: Task
    arms: tuple[Arm, ...]

    def sweep(self) -> Training:
        """All learning rates of the sweep, on the tuning seeds."""
        rates = {arm.name: self.experiment.rates(arm) for arm in self.arms}
        return self._training(rates, self.experiment.tuning_seeds)

    def report(self, rates: dict[str, float]) -> Training:
        """One learning rate for each arm, on the reported seeds."""
        chosen = {arm.name: [rates[arm.name]] for arm in self.arms}
        return self._training(chosen, self.experiment.reported_seeds)

    def _training(self, rates: dict[str, list[float]], seeds: Sequence[int]) -> Training:
        cells = tuple(
            Cell(arm, rate, seed) for arm in self.arms for rate in rates[arm.name] for seed in seeds
        )
        return Training(self.task, cells, self.experiment.steps)


class Stopped(Exception):
    """The time that the command was given is over."""


def run(
    experiment: Experiment,
    folder: Path = records.FOLDER,
    *,
    together: int | None = None,
    deadline: float = np.inf,
    commit: str | None = None,
    console: Console | None = None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Run what the records of an experiment lack, and append it to them.

    Args:
        experiment: The experiment.
        folder: Where its records are.
        together: How many arms are trained in one program, and recorded together. If not given, a
            few on CPUs, and all on GPUs, which they fill better.
        deadline: The ``time.monotonic()`` after which a batch that is not finished is given up.
        commit: What the records name as the commit; git's if not given.
        console: Where progress is shown.
        check_interrupt: Called between chunks of steps; may raise.

    Raises:
        Stopped: The time was over before all was done.
    """
    console = console or Console()
    path = records.path_of(experiment, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_with = {
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **installed("jax", "jaxlib", "optax"),
        },
        "commit": commit or current_commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }

    def check() -> None:
        check_interrupt()
        if time.monotonic() > deadline:
            raise Stopped

    together = together or (4 if jax.default_backend() == "cpu" else len(experiment.arms))
    batches = _batches(experiment, together)
    seeds = (experiment.tuning_seeds, experiment.reported_seeds)
    known = records.read(experiment, folder)

    def lacking(batch: Batch, seeds: Sequence[int]) -> Batch:
        return Batch(
            experiment,
            batch.task,
            tuple(
                arm
                for arm in batch.arms
                if not json_lines.find(known, records.cell(experiment, batch.task, arm, seeds))
            ),
        )

    jobs = [(lacking(batch, seeds[0]), lacking(batch, seeds[1])) for batch in batches]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    total = sum(
        len(sweep.arms) * experiment.num_rates * len(seeds[0]) + len(report.arms) * len(seeds[1])
        for sweep, report in jobs
    )
    pool = ThreadPoolExecutor(max_workers=_compilers())
    hour = 3600.0  # A chunk of steps can take minutes, and what is left follows from several.
    with Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=hour,
    ) as progress:
        shown = progress.add_task(experiment.name, total=total * experiment.steps)

        def train(training: Training) -> _Outcome:
            name = ", ".join(str(value) for value in training.task.describe().values())
            progress.update(shown, description=f"{experiment.name}: {name}")
            chunks: list[Chunk] = []
            seconds = 0.0
            check()
            for chunk, took in training.chunks():
                chunks.append(chunk)
                seconds += took.train
                progress.advance(shown, len(chunk.loss) * len(training.cells))
                if sum(len(chunk.loss) for chunk in chunks) < experiment.steps:
                    check()
            if not console.is_terminal:
                console.print(
                    f"{experiment.name}: {name}: {len(training.cells)} runs, {seconds:.1f} s"
                )
            return _Outcome(training, chunks, seconds)

        def record(outcome: _Outcome, batch: Batch, reported: bool) -> None:
            for arm in batch.arms:
                line = {
                    **records.cell(experiment, batch.task, arm, seeds[reported]),
                    "settings": records.settings(arm),
                    **outcome.of(arm, with_curves=reported),
                    **made_with,
                }
                json_lines.append(path, line)
                known.append(line)

        try:
            sweeps = [_compiled(pool, sweep.sweep()) if sweep.arms else None for sweep, _ in jobs]
            for (sweep, report), future in zip(jobs, sweeps, strict=True):
                training = _wait_for(future, check) if future else None
                if training:
                    record(train(training), sweep, reported=False)
                if seeds[1] and report.arms:
                    rates = {
                        arm.name: records.tuned_rate(known, experiment, report.task, arm)
                        for arm in report.arms
                    }
                    again = report.report(rates)
                    record(train(again.sharing(training) if training else again), report, True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True)
class _Outcome:
    """What a batch came to."""

    training: Training
    chunks: list[Chunk]
    seconds: float

    def of(self, arm: Arm, with_curves: bool) -> dict[str, Any]:
        """The part of a record that was measured."""
        cells = self.training.cells
        mine = [index for index, cell in enumerate(cells) if cell.arm.name == arm.name]
        rates = list(dict.fromkeys(cells[index].learning_rate for index in mine))
        final = self.chunks[-1].error[mine].reshape(len(rates), -1)
        measured: dict[str, Any] = {
            "learning_rates": rates,
            "errors": [_numbers(row) for row in final],
            "runs_together": len(cells),
            "seconds": round(self.seconds, 1),
        }
        if with_curves:
            for name, points in (
                ("error_curve", [chunk.error[mine] for chunk in self.chunks]),
                ("loss_curve", [chunk.loss[:, mine].mean(axis=0) for chunk in self.chunks]),
            ):
                measured[name] = _numbers(_median(np.stack(points), axis=1))
            rows = np.linspace(0, self.training.steps - 1, SCALE_ROWS).astype(int)
            measured["scale_steps"] = rows.tolist()
            for name, logs in (
                ("scale_curve", [chunk.scale_before[:, mine] for chunk in self.chunks]),
                ("update_curve", [chunk.update_scale[:, mine] for chunk in self.chunks]),
            ):
                medians = _median(np.concatenate(logs)[rows], axis=1)
                measured[name] = [_numbers(row) for row in medians]
        return measured


def current_commit() -> str | None:
    """Git's short name of the commit, with a plus sign if files differ; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "stablegrad_optax", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _batches(experiment: Experiment, together: int) -> list[Batch]:
    return [
        Batch(experiment, task, experiment.arms[first : first + together])
        for task in experiment.tasks
        for first in range(0, len(experiment.arms), together)
    ]


def _compilers() -> int:
    """Programs compiled at once, ahead of their use; on CPUs training needs the cores."""
    return 1 if jax.default_backend() == "cpu" else 8


def _compiled(pool: ThreadPoolExecutor, training: Training) -> Future[Training]:
    def compiled() -> Training:
        training.compile()
        return training

    return pool.submit(compiled)


def _wait_for(future: Future[Training], check: Callable[[], None]) -> Training:
    while True:
        check()
        with contextlib.suppress(TimeoutError):
            return future.result(timeout=1)


def _median(values: np.ndarray, axis: int) -> np.ndarray:
    return np.median(np.where(np.isfinite(values), values, np.inf), axis=axis)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]
