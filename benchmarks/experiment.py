"""An experiment, as data: which tasks, which arms, how many steps, which seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from benchmarks.arms import Arm
from benchmarks.training import Task


@dataclass(frozen=True)
class Experiment:
    """Every arm on every task: a sweep of learning rates, then the best of them on other seeds.

    Attributes:
        name: What it is called on the command line; its records have that name.
        about: What it asks, in one line.
        tasks: What is trained.
        arms: The optimizers.
        steps: Steps of each run.
        num_rates: Learning rates of a sweep, the same number for every arm, up from the arm's own
            lowest.
        rates_per_decade: How many of them there are in a decade.
        tuning_seeds: The seeds of the sweep.
        reported_seeds: The seeds on which the best learning rate is run; none if the sweep is all.
    """

    name: str
    about: str
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    steps: int
    num_rates: int
    rates_per_decade: int
    tuning_seeds: tuple[int, ...]
    reported_seeds: tuple[int, ...] = ()

    def rates(self, arm: Arm) -> list[float]:
        """The learning rates of an arm's sweep."""
        powers = np.arange(self.num_rates) / self.rates_per_decade
        return [float(f"{rate:.3g}") for rate in arm.first_rate * 10.0**powers]


def with_settings(experiment: Experiment, settings: Mapping[str, str]) -> Experiment:
    """The experiment with other settings of its tasks and their networks, such as ``width``.

    Args:
        experiment: The experiment.
        settings: Values as text, by the name of the task's or the network's attribute.

    Raises:
        ValueError: A task has no such setting, or the value is none for it.
    """

    def changed(owner: Any) -> Any:
        mine = [field.name for field in fields(owner) if field.name in settings]
        return replace(
            owner, **{name: _parsed(name, getattr(owner, name), settings[name]) for name in mine}
        )

    def task(old: Any) -> Any:
        known = {
            field.name
            for owner in (old, old.network)
            for field in fields(owner)
            if isinstance(getattr(owner, field.name), int | float | str)
        }
        # What tells the tasks of an experiment apart, and what follows from the problem.
        known -= {"name", "inputs"}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f"{old.title} has no {', '.join(unknown)}: set one of {', '.join(sorted(known))}"
            )
        return replace(changed(old), network=changed(old.network))

    if not settings:
        return experiment
    # Tasks that differed in these settings alone are one now.
    return replace(experiment, tasks=tuple(dict.fromkeys(map(task, experiment.tasks))))


def part_of(experiment: Experiment, arms: Sequence[str] = (), title: str = "") -> Experiment:
    """The experiment with some of its arms and tasks alone.

    Args:
        experiment: The experiment.
        arms: Names of its arms; if none are given, all.
        title: Text that the titles of the tasks have in them.

    Raises:
        ValueError: An arm has none of the names, or no task has the text.
    """
    known = [arm.name for arm in experiment.arms]
    if unknown := [name for name in arms if name not in known]:
        raise ValueError(
            f"{experiment.name} has no arm {', '.join(unknown)}: choose of {', '.join(known)}"
        )
    found = tuple(task for task in experiment.tasks if title in task.title)
    if not found:
        titles = "; ".join(task.title for task in experiment.tasks)
        raise ValueError(f"{experiment.name} has no task with {title!r} in its title: {titles}")
    chosen = tuple(arm for arm in experiment.arms if not arms or arm.name in arms)
    return replace(experiment, arms=chosen, tasks=found)


def _parsed(name: str, old: Any, text: str) -> Any:
    """The text as a value of the same type; numbers are above 0."""
    if isinstance(old, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{name}={text} is neither True nor False")
        return text == "True"
    if isinstance(old, str):
        return text
    what = "a whole number" if isinstance(old, int) else "a number"
    try:
        value = type(old)(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text} is not {what} above 0")
    return value
