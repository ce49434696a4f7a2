"""The recorded runs of the experiments, and what is read off them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import json_lines
from benchmarks.arms import Arm
from benchmarks.experiment import Experiment
from benchmarks.training import Task

FOLDER = Path(__file__).parent / "records"

Record = dict[str, Any]
"""One arm on one task: ``learning_rates`` [rates], ``seeds`` [seeds], ``errors`` [rates][seeds].

What is not finite is null. Runs on the reported seeds also have medians of these over the run:
``error_curve`` and ``loss_curve``, the error after each chunk of steps and the mean loss in it;
``scale_curve`` and ``update_curve``, the std of each layer's gradient and update, learning rate
included, at ``scale_steps``. Records made before there were two of them lack ``loss_curve`` and
``update_curve``.
"""


def path_of(experiment: Experiment, folder: Path = FOLDER) -> Path:
    """Where an experiment's records are."""
    return folder / f"{experiment.name}.jsonl"


def read(experiment: Experiment, folder: Path = FOLDER) -> list[Record]:
    """All records of an experiment."""
    return json_lines.read(path_of(experiment, folder))


def progress(experiment: Experiment, folder: Path = FOLDER) -> tuple[int, int]:
    """How many of an experiment's sweeps and reports are recorded, and how many there are."""
    known = read(experiment, folder)
    wanted = [
        cell(experiment, task, arm, seeds)
        for task in experiment.tasks
        for arm in experiment.arms
        for seeds in (experiment.tuning_seeds, experiment.reported_seeds)
        if seeds
    ]
    return sum(json_lines.find(known, one) is not None for one in wanted), len(wanted)


def hours(experiment: Experiment, folder: Path = FOLDER) -> float:
    """How long the training of all that is recorded took, compilation apart.

    What was trained together has the same time in each of its records, and counts once.
    """
    batches = {
        (str(record["task"]), str(record["seeds"]), record.get("command"), record.get("seconds", 0))
        for record in read(experiment, folder)
        if "seeds" in record
    }
    return sum(seconds for *_, seconds in batches) / 3600


def cell(experiment: Experiment, task: Task, arm: Arm, seeds: Sequence[int]) -> Record:
    """What identifies a record; that of a sweep has its learning rates."""
    identity = {
        "task": task.describe(),
        "steps": experiment.steps,
        "arm": arm.name,
        "seeds": list(seeds),
    }
    is_sweep = tuple(seeds) == experiment.tuning_seeds
    return identity | ({"learning_rates": experiment.rates(arm)} if is_sweep else {})


def settings(arm: Arm) -> Record:
    """All that an arm is made of, for its record."""
    return {"base": arm.base, "scaling": arm.scaling, **dict(arm.options), **dict(arm.numbers)}


def errors(record: Record) -> np.ndarray:
    """The errors of a record, [rates, seeds]; a diverged seed counts as inf."""
    return np.array([[np.inf if e is None else e for e in row] for row in record["errors"]])


def tuned_rate(found: Sequence[Record], experiment: Experiment, task: Task, arm: Arm) -> float:
    """The best learning rate of an arm's sweep on a task, among the records of an experiment.

    Raises:
        LookupError: The sweep is not recorded.
    """
    wanted = cell(experiment, task, arm, experiment.tuning_seeds)
    record = json_lines.find(found, wanted)
    if record is None:
        raise LookupError(
            f"no learning rate is recorded for {arm.name} on {wanted['task']}: "
            f"run python -m benchmarks run {experiment.name}"
        )
    return best_rate(record)


def best_rate(record: Record) -> float:
    """The learning rate with the lowest median error over the seeds of a sweep."""
    return float(record["learning_rates"][int(np.argmin(np.median(errors(record), axis=1)))])
