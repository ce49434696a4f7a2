"""Time of a whole training step of the demo's PINN, paired with that of the base optimizer alone.

Every arm makes a few steps of one network in turn, as in ``times.py``. Another cell has the
optimizers of the experiment by depth beside Adam, whatever their base.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from benchmarks.arms import ARMS, Arm, stablegrad_arm
from benchmarks.cost.times import in_turn
from benchmarks.demo import DEFAULT_TASK
from benchmarks.pinn.experiments import BY_DEPTH
from benchmarks.pinn.task import PinnTask

STEPS, WARMUP, TURNS = 20, 2, 40
BASES = ("adam", "sgd")
ALL = "all"


def cells() -> Iterator[dict[str, Any]]:
    """One for each base optimizer, and one for all; the arms of a cell are measured together."""
    for base in (*BASES, ALL):
        yield {"backend": jax.default_backend(), "base": base, "task": DEFAULT_TASK.describe()}


def measure(cell: dict[str, Any], task: PinnTask = DEFAULT_TASK) -> dict[str, Any]:
    """The time of each arm's steps as a ratio to those of the base optimizer alone."""
    running = {name: _start(task, arm) for name, arm in _arms(cell["base"]).items()}
    return in_turn(running, WARMUP, TURNS)


def _arms(base: str) -> dict[str, Arm]:
    if base == ALL:
        return {"alone": ARMS["adam"], **{arm.name: arm for arm in BY_DEPTH}}
    return {
        "alone": ARMS[base],
        "stablegrad": stablegrad_arm(base, decay=0.0, balance=1.0),
        "stablegrad, delayed": stablegrad_arm(base, decay=0.0, balance=1.0, delayed=True),
        "clip_by_global_norm": ARMS[f"clip_{base}"],
        "adaptive_grad_clip": ARMS[f"agc_{base}"],
    }


def _start(task: PinnTask, arm: Arm) -> tuple[Callable[[Any], Any], Any]:
    """Some training steps as one compiled function, and what it starts from."""
    scaling, base = arm.stages(1e-3, task.stacked)
    tx = optax.chain(scaling, base)
    params = task.init(jax.random.key(0))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state, number = carry
        key = jax.random.fold_in(jax.random.key(1), number)
        _, (grads, prediction_grad) = task.gradients(params, key)
        updates, state = tx.update(grads, state, params, prediction_grad=prediction_grad)
        return (optax.apply_updates(params, updates), state, number + 1), None

    def steps(carry: Any) -> Any:
        return jax.lax.scan(step, carry, length=STEPS)[0]

    return jax.jit(steps, donate_argnums=0), (params, tx.init(params), jax.numpy.int32(0))
