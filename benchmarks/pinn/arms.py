"""The optimizers that are compared, and the learning rate that the recorded sweep gives each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

from benchmarks import json_lines
from stablegrad_optax import stablegrad

SWEEP_RECORDS = Path(__file__).parents[1] / "records" / "demo_sweep.jsonl"

Stages = tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs]


@dataclass(frozen=True)
class Arm:
    """An optimizer in two stages: what is done to the gradient, and the base optimizer behind it.

    Attributes:
        name: What it is called on the command line and in records.
        label: What it is called in tables and pictures.
        base: The base optimizer for a learning rate or a schedule.
        scaling: The transform in front of it.
    """

    name: str
    label: str
    base: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    scaling: optax.GradientTransformationExtraArgs = field(
        default_factory=lambda: optax.with_extra_args_support(optax.identity())
    )

    def stages(self, learning_rate: optax.ScalarOrSchedule) -> Stages:
        """The two stages of the optimizer, which is their ``optax.chain``."""
        return self.scaling, optax.with_extra_args_support(self.base(learning_rate))


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("adam", "Adam", optax.adam),
        # Where gradients are near eps, Adam's step shrinks with them. This control tells what a
        # gradient scale of about 1 is worth for that reason alone.
        Arm("adam_eps", "Adam, eps 1e-16", partial(optax.adam, eps=1e-16)),
        Arm(
            "clip_adam",
            "clip 1.0 + Adam",
            optax.adam,
            optax.with_extra_args_support(optax.clip_by_global_norm(1.0)),
        ),
        Arm("stablegrad_adam", "StableGrad + Adam", optax.adam, stablegrad()),
        # With a fixed reference SGD's step would not shrink as the residual does.
        Arm(
            "stablegrad_sgd",
            "StableGrad + SGD",
            partial(optax.sgd, momentum=0.9),
            stablegrad(reference="prediction"),
        ),
    )
}


def read_records(path: Path = SWEEP_RECORDS) -> list[dict[str, Any]]:
    """The recorded runs, one dict per line of the file."""
    return json_lines.read(path)


def median_error(record: dict[str, Any]) -> float:
    """The median relative L2 error over the seeds of a record; a diverged seed counts as inf."""
    return float(np.median([np.inf if error is None else error for error in record["errors"]]))


def tuned_learning_rate(arm: str, problem: str, records: list[dict[str, Any]]) -> float:
    """The learning rate with the lowest median error among the records of an arm and a problem.

    Raises:
        LookupError: There is no such record.
    """
    found = [record for record in records if (record["arm"], record["problem"]) == (arm, problem)]
    if not found:
        raise LookupError(
            f"no learning rate is recorded for arm {arm} on {problem}: "
            f"run python -m benchmarks.pinn.sweep --problem {problem} --arms {arm}"
        )
    return float(min(found, key=median_error)["learning_rate"])
