"""What faults in the gradients do to a training run, and what they must not do.

A Flax network learns scikit-learn's digits while entries, a layer or all layers of its gradient are
overwritten: NaN, infinities, a spike, zeros; in the first step, in the middle, many steps in a row.
Non-finite gradients are left to ``optax.apply_if_finite``. Around the chain it must make the run
equal, bit for bit, to one in which the faulty steps never were. Behind the transform, which then
sees every fault itself, it must do so where all layers are faulty; where some are not, those move
on. After that, and after faults that are finite, every number must be finite, the scales must come
back to those of a run without the fault, and the digits must be learned.

    python -m benchmarks.robustness.faults
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from benchmarks.versions import versions
from stablegrad_optax import stablegrad

PyTree = Any

STEPS = 2000
BATCH = 64
MIDDLE = 300
LAYER = "Dense_4"


class Network(nn.Module):
    """Eight hidden layers and nothing that normalizes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


class Fault(NamedTuple):
    """``value`` in place of the gradient ``where``, in ``repeats`` steps from ``start`` on."""

    value: float
    where: str  # "entry", "layer" or "all"
    start: int
    repeats: int = 1

    @property
    def name(self) -> str:
        steps = f"{self.repeats} steps from" if self.repeats > 1 else "step"
        return f"{self.value:g} in {self.where}, {steps} {self.start + 1}"

    @property
    def active(self) -> np.ndarray:
        step = np.arange(STEPS)
        return (self.start <= step) & (step < self.start + self.repeats)


NON_FINITE = [
    Fault(value, where, start, count)
    for value in (np.nan, np.inf, -np.inf)
    for where in ("entry", "layer", "all")
    for start, count in ((0, 1), (MIDDLE, 1), (0, 10), (MIDDLE, 10))
]
FINITE = [
    *(Fault(1e30, where, start) for where in ("entry", "layer", "all") for start in (0, MIDDLE)),
    *(Fault(0.0, "layer", start, 1000) for start in (0, MIDDLE)),
    *(Fault(0.0, "all", start, 10) for start in (0, MIDDLE)),
]
CLEAN = Fault(0.0, "entry", STEPS)


class Arm(NamedTuple):
    """A way to use the transform, with ``optax.apply_if_finite`` around it or behind it."""

    base: str
    delayed: bool
    guard: str

    @property
    def name(self) -> str:
        return f"{self.base}{', delayed' * self.delayed}, guard {self.guard}"

    @property
    def tx(self) -> optax.GradientTransformation:
        # With a memory that a fault could spoil.
        scaling = stablegrad(decay=0.9, delayed=self.delayed)
        base = BASES[self.base]()
        if self.delayed:
            # Its gains know nothing of this step's gradient, so something has to bound the update.
            base = optax.chain(optax.clip(10.0), base)
        guarded = partial(optax.apply_if_finite, max_consecutive_errors=100)
        if self.guard == "around":
            return guarded(optax.chain(scaling, base))
        return optax.chain(scaling, guarded(base))

    def leaves_out(self, fault: Fault) -> bool:
        """Whether steps with this fault must be as if they had not been."""
        return not np.isfinite(fault.value) and (self.guard == "around" or fault.where == "all")


BASES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": partial(optax.sgd, 3e-4, momentum=0.9),
    "adam": partial(optax.adam, 1e-3),
}
ARMS = [
    Arm(base, delayed, guard)
    for guard in ("around", "behind")
    for base in BASES
    for delayed in (False, True)
]


class Run(NamedTuple):
    """Where a run ended: parameters, optimizer state, and the accuracy on the training digits."""

    params: PyTree
    state: PyTree
    accuracy: jax.Array
    always_finite: jax.Array  # every number of every state and of every step's parameters
    scales: jax.Array  # [STEPS, num_layers]


def make_runner(arm: Arm) -> Callable[..., Run]:
    """One compiled run of ``STEPS`` steps, for any fault; or with its faulty steps left out."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(labels)
    network, tx = Network(), arm.tx
    params = network.init(jax.random.key(0), x[:1])
    batches = jax.random.randint(jax.random.key(1), (STEPS, BATCH), 0, len(y))

    def logits(params: PyTree, x: jax.Array) -> Any:
        return network.apply(params, x)

    def loss(params: PyTree, batch: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[batch]), y[batch])
        return losses.mean()

    def step(carry: PyTree, batch: jax.Array, put: PyTree, value: jax.Array) -> PyTree:
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        grads = jax.tree.map(lambda g, here: jnp.where(here, value, g), grads, put)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(places: PyTree, value: jax.Array, active: jax.Array, leave_out: jax.Array) -> Run:
        def one(carry: PyTree, inputs: Any) -> tuple[PyTree, Any]:
            batch, is_faulty = inputs
            put = jax.tree.map(lambda here: here & is_faulty, places)
            carry = jax.lax.cond(
                is_faulty & leave_out,
                lambda carry, *_: carry,
                step,
                carry,
                batch,
                put,
                value,
            )
            finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(carry)])
            return carry, (jnp.all(finite), optax.tree.get(carry[1], "grad_scale"))

        start = (params, tx.init(params))
        (last, state), (finite, scales) = jax.lax.scan(one, start, (batches, active))
        accuracy = jnp.mean(logits(last, x).argmax(-1) == y)
        # What the guard counted is all that may differ from a run without the fault.
        state = optax.tree.set(state, notfinite_count=0, total_notfinite=0, last_finite=True)
        return Run(last, state, accuracy, jnp.all(finite), scales)

    def runner(fault: Fault, leave_out: bool = False) -> Run:
        return run(places(params, fault.where), fault.value, fault.active, leave_out)

    return runner


def places(params: PyTree, where: str) -> PyTree:
    """True where the fault is put: an entry of one layer's kernel, that layer, or everywhere."""

    def of_leaf(path: Any, leaf: jax.Array) -> np.ndarray:
        in_layer = LAYER in jax.tree_util.keystr(path)
        here = np.full(leaf.shape, where == "all" or (where == "layer" and in_layer))
        if where == "entry" and in_layer and leaf.ndim == 2:
            here[3, 5] = True
        return here

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def equals_the_run_without(runner: Callable[..., Run], fault: Fault) -> bool:
    """Whether parameters and state end bit-equal to those of a run without the faulty steps."""
    with_fault, without = runner(fault), runner(fault, leave_out=True)
    pairs = zip(
        jax.tree.leaves(with_fault[:2]),
        jax.tree.leaves(without[:2]),
        strict=True,
    )
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


class Outcome(NamedTuple):
    """What is left of a fault at the end of a run."""

    finite: bool
    scale_ratio: float  # the largest factor between a scale and the same one without the fault
    accuracy: float


def outcome(runner: Callable[..., Run], fault: Fault, clean: Run) -> Outcome:
    """Scales compared as means of the logarithm over the last 200 steps, since they are noisy."""
    run = runner(fault)
    logs = [np.mean(np.log(np.maximum(r.scales[-200:], 1e-30)), axis=0) for r in (run, clean)]
    ratio = float(np.exp(np.max(np.abs(logs[0] - logs[1]))))
    return Outcome(bool(run.always_finite), ratio, float(run.accuracy))


def main(arguments: list[str] | None = None) -> None:
    """Run all faults with all arms and print what came of them."""
    argparse.ArgumentParser(prog="python -m benchmarks.robustness.faults").parse_args(arguments)
    print("command: python -m benchmarks.robustness.faults")
    print(versions("jax", "optax", "flax"))
    print(f"{STEPS} steps of {BATCH} digits")
    failures = 0
    for arm in ARMS:
        runner = make_runner(arm)
        clean = runner(CLEAN)
        print(f"\n{arm.name}: accuracy without a fault {clean.accuracy:.3f}")
        left_out = [fault for fault in NON_FINITE if arm.leaves_out(fault)]
        equal = [equals_the_run_without(runner, fault) for fault in left_out]
        failures += equal.count(False)
        print(f"  non-finite, equal to the run without those steps: {sum(equal)} of {len(equal)}")
        for fault, same in zip(left_out, equal, strict=True):
            if not same:
                print(f"    not equal: {fault.name}")
        for fault in [*(f for f in NON_FINITE if not arm.leaves_out(f)), *FINITE]:
            finite, ratio, accuracy = outcome(runner, fault, clean)
            failures += not finite
            verdict = "finite" if finite else "NOT FINITE"
            print(
                f"  {fault.name:<31} {verdict}, scales off by at most x{ratio:.3g}, "
                f"accuracy {accuracy:.3f}",
                flush=True,
            )
    print(f"\n{failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
