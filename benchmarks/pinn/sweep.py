"""Learning rates of the demo's arms, swept on seeds of their own and recorded line by line."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import json_lines
from benchmarks.pinn.arms import ARMS, SWEEP_RECORDS, Arm, median_error
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.training import History, Setup, train
from benchmarks.versions import installed

TUNING_SEEDS = (100, 101, 102, 103)

# SGD's step is measured in prediction gradients, which are as large as the PDE's source.
CENTRES = {"stablegrad_sgd": {"burgers": 0.016, "poisson": 0.002, "helmholtz": 0.00025}}
CENTRE = 1e-3
NUM_RATES = 9


def learning_rates(arm: str, problem: str) -> list[float]:
    """The grid of an arm: factors of 2 around its centre."""
    centre = CENTRES.get(arm, {}).get(problem, CENTRE)
    return [centre * 2.0**power for power in range(-(NUM_RATES // 2), NUM_RATES // 2 + 1)]


def cell(setup: Setup, arm: Arm, learning_rate: float) -> dict[str, Any]:
    """What identifies a recorded run."""
    return {
        "problem": setup.problem.name,
        "depth": setup.network.depth,
        "width": setup.network.width,
        "steps": setup.steps,
        "points": setup.points,
        "arm": arm.name,
        "learning_rate": learning_rate,
        "seeds": list(TUNING_SEEDS),
    }


def record_of(history: History) -> dict[str, Any]:
    """The line that is recorded for a run; errors of diverged seeds are null."""
    return {
        **cell(history.setup, history.arm, history.learning_rate),
        "errors": [round(e, 6) if np.isfinite(e) else None for e in history.final_error.tolist()],
        "seconds": round(history.train_seconds, 1),
        "versions": installed("jax", "optax"),
        "command": shlex.join(["python", "-m", "benchmarks.pinn.sweep", *sys.argv[1:]]),
    }


def sweep(setup: Setup, arms: list[Arm], path: Path) -> None:
    """Run what the records do not have yet, and append it to them."""
    for arm in arms:
        for learning_rate in learning_rates(arm.name, setup.problem.name):
            if json_lines.find(path, cell(setup, arm, learning_rate)):
                continue
            record = record_of(train(setup, arm, learning_rate, TUNING_SEEDS))
            json_lines.append(path, record)
            print(f"{arm.name} {learning_rate:g}: median {median_error(record):.4f}", flush=True)


def main() -> None:
    """Run the sweep that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pinn.sweep", description=__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="burgers")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--records", type=Path, default=SWEEP_RECORDS)
    options = parser.parse_args()
    sweep(Setup(PROBLEMS[options.problem]), [ARMS[name] for name in options.arms], options.records)


if __name__ == "__main__":
    main()
