"""The training loop: all seeds of an arm at once, a chunk of steps at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.pinn.arms import Arm, Stages
from benchmarks.pinn.networks import Params, TanhNetwork
from benchmarks.pinn.problems import Problem
from stablegrad_optax import prediction_value_and_grad

NUM_CHUNKS = 25
LONGEST_CHUNK = 200


@dataclass(frozen=True)
class Setup:
    """What a run is, apart from its arm, learning rate and seeds.

    The defaults are sized for the demo: all its arms within its four minutes on two CPU cores.

    Attributes:
        problem: The PDE.
        network: The network that solves it.
        steps: Optimizer steps.
        points: Collocation points of a step, drawn afresh for each.
    """

    problem: Problem
    network: TanhNetwork = field(default_factory=TanhNetwork)
    steps: int = 2000
    points: int = 256


@dataclass(frozen=True)
class History:
    """What an arm did, so far or in all.

    Attributes:
        setup: What was run.
        arm: The arm.
        learning_rate: The learning rate at the first step; it falls to 0 along a cosine.
        seeds: The seeds.
        num_params: Parameters of one network.
        state_bytes: Bytes of the optimizer state of one network.
        loss: Mean squared residual, [steps, seeds].
        scale_before: Std of each layer's kernel gradient, [steps, seeds, layers].
        scale_after: The same after the arm's transform, as the base optimizer gets it.
        error_steps: Steps done at each evaluation, [evaluations].
        error: Relative L2 error of the field, [evaluations, seeds].
        fields: The fields at the last evaluation, [seeds, *grid_shape].
        compile_seconds: Time spent compiling.
        train_seconds: Time spent training and evaluating.
        processor_seconds: The same, summed over the processor cores that were at work.
    """

    setup: Setup
    arm: Arm
    learning_rate: float
    seeds: tuple[int, ...]
    num_params: int
    state_bytes: int
    loss: np.ndarray
    scale_before: np.ndarray
    scale_after: np.ndarray
    error_steps: np.ndarray
    error: np.ndarray
    fields: np.ndarray
    compile_seconds: float = 0.0
    train_seconds: float = 0.0
    processor_seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.loss)

    @property
    def final_error(self) -> np.ndarray:
        """The last error of each seed; inf where it is not finite, so that no seed is dropped."""
        return np.where(np.isfinite(self.error[-1]), self.error[-1], np.inf)

    @property
    def median_error(self) -> float:
        """The median of the last errors over the seeds."""
        return float(np.median(self.final_error))

    @property
    def num_solved(self) -> int:
        """How many seeds ended below the problem's threshold."""
        return int(np.sum(self.final_error < self.setup.problem.solved_below))


class _State(NamedTuple):
    params: Any
    scaling_state: Any
    base_state: Any
    data_key: jax.Array


_Log = tuple[jax.Array, jax.Array, jax.Array]
"""Loss and kernel scales before and after the transform, of one step of one seed."""


class _Chunk(NamedTuple):
    """What a chunk of steps adds to the history, for one seed."""

    loss: Any
    scale_before: Any
    scale_after: Any
    error: Any
    fields: Any


class _Seconds(NamedTuple):
    compile: float
    train: float
    processor: float


def train(
    setup: Setup,
    arm: Arm,
    learning_rate: float,
    seeds: Sequence[int],
    on_chunk: Callable[[History], None] = lambda history: None,
) -> History:
    """Train one network per seed, all of them at once.

    A seed fixes the network's start and its collocation points, the same for every arm. The seeds
    are spread over as many of the devices as divide their number.

    Args:
        setup: Problem, network and budget.
        arm: The optimizer.
        learning_rate: Its learning rate at the first step of a cosine decay to 0.
        seeds: The seeds.
        on_chunk: Called with the history so far after each chunk of steps.

    Returns:
        The history of the whole run.
    """
    stages = arm.stages(optax.cosine_decay_schedule(learning_rate, setup.steps))
    history = _empty_history(setup, arm, stages, learning_rate, seeds)
    for chunk, seconds in _run_chunks(setup, stages, seeds):
        loss = np.concatenate([history.loss, chunk.loss])
        history = replace(
            history,
            loss=loss,
            scale_before=np.concatenate([history.scale_before, chunk.scale_before]),
            scale_after=np.concatenate([history.scale_after, chunk.scale_after]),
            error_steps=np.append(history.error_steps, len(loss)),
            error=np.concatenate([history.error, chunk.error[None]]),
            fields=chunk.fields,
            compile_seconds=history.compile_seconds + seconds.compile,
            train_seconds=history.train_seconds + seconds.train,
            processor_seconds=history.processor_seconds + seconds.processor,
        )
        on_chunk(history)
    return history


def _run_chunks(
    setup: Setup, stages: Stages, seeds: Sequence[int]
) -> Iterator[tuple[_Chunk, _Seconds]]:
    """The chunks of a run, each with the time it took."""
    devices = jax.devices()[: gcd(len(jax.devices()), len(seeds))]
    by_seed = NamedSharding(Mesh(np.array(devices), ("seed",)), PartitionSpec("seed"))
    advance = jax.jit(
        jax.vmap(_advancer(setup, stages), in_axes=(0, None), out_axes=(0, _Chunk(1, 1, 1, 0, 0))),
        out_shardings=(by_seed, None),
    )
    # Not under jit: the few operations of a start compile once for all layers and all arms.
    states = jax.vmap(_starter(setup, stages))(jnp.asarray(seeds, jnp.uint32))
    states = jax.device_put(states, by_seed)
    compiled: dict[int, jax.stages.Compiled] = {}
    length = min(ceil(setup.steps / NUM_CHUNKS), LONGEST_CHUNK)
    for first in range(0, setup.steps, length):
        steps = np.arange(first, min(first + length, setup.steps), dtype=np.uint32)
        began = time.perf_counter()
        if len(steps) not in compiled:
            compiled[len(steps)] = advance.lower(states, steps).compile()
        ready, processor = time.perf_counter(), time.process_time()
        states, chunk = jax.block_until_ready(compiled[len(steps)](states, steps))
        seconds = _Seconds(
            compile=ready - began,
            train=time.perf_counter() - ready,
            processor=time.process_time() - processor,
        )
        yield jax.tree.map(np.asarray, chunk), seconds


def _starter(setup: Setup, stages: Stages) -> Callable[[jax.Array], _State]:
    """The state of one seed before the first step."""
    scaling, base = stages

    def start(seed: jax.Array) -> _State:
        init_key, data_key = jax.random.split(jax.random.key(seed))
        params = setup.network.init(init_key)
        return _State(params, scaling.init(params), base.init(params), data_key)

    return start


def _advancer(setup: Setup, stages: Stages) -> Callable[[_State, jax.Array], tuple[_State, _Chunk]]:
    """One seed's steps with the given numbers, then an evaluation."""
    scaling, base = stages
    problem, network = setup.problem, setup.network
    grid = problem.grid()
    grid_points = jnp.asarray(grid.reshape(-1, 2), jnp.float32)
    reference = jnp.asarray(problem.reference(grid.reshape(-1, 2)), jnp.float32)

    def field_at(params: Params, points: jax.Array) -> jax.Array:
        return problem.ansatz(points, network.apply(params, points))

    # The prediction of a PINN is what enters the loss: the residual at each point.
    def residual(params: Params, points: jax.Array) -> jax.Array:
        return problem.residual(lambda points: field_at(params, points), points)

    def mean_square(residual: jax.Array, points: jax.Array) -> jax.Array:
        return jnp.mean(residual**2)

    value_and_grad = prediction_value_and_grad(residual, mean_square)

    def step(state: _State, number: jax.Array) -> tuple[_State, _Log]:
        params, scaling_state, base_state, data_key = state
        points = problem.sample(jax.random.fold_in(data_key, number), setup.points)
        loss, (grads, prediction_grad) = value_and_grad(params, points)
        scaled, scaling_state = scaling.update(
            grads, scaling_state, params, prediction_grad=prediction_grad
        )
        updates, base_state = base.update(
            scaled, base_state, params, prediction_grad=prediction_grad
        )
        state = _State(optax.apply_updates(params, updates), scaling_state, base_state, data_key)
        return state, (loss, _kernel_scales(grads), _kernel_scales(scaled))

    def advance(state: _State, numbers: jax.Array) -> tuple[_State, _Chunk]:
        state, log = jax.lax.scan(step, state, numbers)
        values = field_at(state.params, grid_points)
        error = jnp.linalg.norm(values - reference) / jnp.linalg.norm(reference)
        return state, _Chunk(*log, error, values.reshape(problem.grid_shape))

    return advance


def _kernel_scales(grads: Any) -> jax.Array:
    return jnp.stack([jnp.std(grads[name]["kernel"]) for name in sorted(grads)])


def _empty_history(
    setup: Setup,
    arm: Arm,
    stages: Stages,
    learning_rate: float,
    seeds: Sequence[int],
) -> History:
    shapes = jax.eval_shape(_starter(setup, stages), jax.ShapeDtypeStruct((), np.uint32))
    no_scales = np.zeros((0, len(seeds), len(shapes.params)))
    return History(
        setup=setup,
        arm=arm,
        learning_rate=learning_rate,
        seeds=tuple(seeds),
        num_params=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        state_bytes=sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((shapes.scaling_state, shapes.base_state))
        ),
        loss=np.zeros((0, len(seeds))),
        scale_before=no_scales,
        scale_after=no_scales,
        error_steps=np.zeros(0, int),
        error=np.zeros((0, len(seeds))),
        fields=np.zeros((len(seeds), *setup.problem.grid_shape)),
    )
