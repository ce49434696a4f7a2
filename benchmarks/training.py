"""The training loop of all experiments: many cells in one program, a chunk of steps at a time.

A cell is an arm, a learning rate and a seed. Cells of one task share the computation of the
gradients; those whose arms are alike but for numbers share their optimizer's, too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.arms import Arm, Stages

NUM_CHUNKS = 25
LONGEST_CHUNK = 200


class Task(Protocol):
    """What is trained: a network, its data and its loss."""

    @property
    def stacked(self) -> Sequence[str]:
        """The keys of the params, a dict, under which axis 0 of every leaf counts layers."""
        ...

    @property
    def solved_below(self) -> float:
        """The error under which a run counts as solved."""
        ...

    @property
    def unlearned(self) -> float:
        """The error of a network that learned nothing."""
        ...

    @property
    def title(self) -> str:
        """The task in a few words; what grows with it is last, as in ``"burgers, depth 8"``."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the task in a record."""
        ...

    def init(self, key: jax.Array) -> Any:
        """The parameters at the start: dicts, the innermost of which may have a ``kernel``."""
        ...

    def gradients(self, params: Any, key: Any, /) -> tuple[jax.Array, tuple[Any, Any]]:
        """The loss of a step, and its gradients by the parameters and by the prediction.

        The step's data are drawn from the key; if the task is ``HostFed``, they are in its place.
        """
        ...

    def evaluate(self, params: Any) -> tuple[jax.Array, Any]:
        """The error, a number, and what is to be shown of the trained network."""
        ...


@runtime_checkable
class HostFed(Protocol):
    """A task whose data are made on the host."""

    def batches(self, seed: int, steps: Sequence[int]) -> Any:
        """A tree of arrays whose axis 0 counts the steps with the given numbers."""
        ...


@dataclass(frozen=True)
class Cell:
    """One run. The learning rate is that of the first step; it falls to 0 along a cosine.

    A seed fixes the network's start and its data, the same for every arm.
    """

    arm: Arm
    learning_rate: float
    seed: int


class Chunk(NamedTuple):
    """What a chunk of steps adds to the history of its cells.

    Attributes:
        loss: The loss, [steps, cells].
        scale_before: Std of each layer's kernel gradient, [steps, cells, layers].
        scale_after: The same after the arm's transform, as the base optimizer gets it.
        update_scale: The same of the update, with the learning rate in it.
        error: The error at the end, [cells].
        shown: What the task shows, [cells, ...].
    """

    loss: Any
    scale_before: Any
    scale_after: Any
    update_scale: Any
    error: Any
    shown: Any


class Seconds(NamedTuple):
    """The time that a chunk took; ``processor`` is summed over the cores that were at work."""

    compile: float
    train: float
    processor: float


class _State(NamedTuple):
    params: Any
    scaling_state: Any
    base_state: Any


class _Settings(NamedTuple):
    """What tells the cells of a group apart; ``stream`` is the index of what the host feeds."""

    learning_rate: Any
    numbers: dict[str, Any]
    seed: Any
    stream: Any


@dataclass(frozen=True)
class Training:
    """Cells of one task, trained together.

    The cells are spread over as many of the devices as divide the number of cells of each program.

    Attributes:
        task: What is trained.
        cells: The runs.
        steps: Optimizer steps of each.
    """

    task: Task
    cells: tuple[Cell, ...]
    steps: int

    @property
    def chunk_length(self) -> int:
        """Steps of a chunk, but for the last."""
        return min(ceil(self.steps / NUM_CHUNKS), LONGEST_CHUNK)

    def compile(self) -> None:
        """Compile, so that the first chunk does not have to; may be called in a thread."""
        self._start_program()
        self._program(self.chunk_length)

    def sharing(self, other: "Training") -> "Training":
        """This training with the other's programs, if they are the same but for their numbers."""
        programs = [[cell.arm.program for cell in training.cells] for training in (self, other)]
        if programs[0] == programs[1] and len(self._streams) == len(other._streams):
            self._compiled.update(other._compiled)
        return self

    def chunks(self) -> Iterator[tuple[Chunk, Seconds]]:
        """Train, a chunk of steps at a time; the cells are in the order they were given in."""
        settings = jax.device_put(self._settings, self._by_cell)
        states = self._start_program()(settings)
        back = np.argsort(self._order)
        for first in range(0, self.steps, self.chunk_length):
            numbers = np.arange(first, min(first + self.chunk_length, self.steps), dtype=np.uint32)
            began = time.perf_counter()
            program = self._program(len(numbers))
            ready, processor = time.perf_counter(), time.process_time()
            inputs = (states, settings, numbers, self._batches(numbers))
            states, chunk = jax.block_until_ready(program(*inputs))
            seconds = Seconds(
                compile=ready - began,
                train=time.perf_counter() - ready,
                processor=time.process_time() - processor,
            )
            *of_steps, error, shown = jax.tree.map(np.asarray, chunk)
            yield (
                Chunk(*(log[:, back] for log in of_steps), error=error[back], shown=shown[back]),
                seconds,
            )

    def count_bytes(self) -> tuple[int, int]:
        """Parameters of one network, and bytes of the first cell's optimizer state."""
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1,), leaf.dtype), self._settings[:1])
        (state,) = jax.eval_shape(self._start, one)
        return (
            sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state[1:])),
        )

    @cached_property
    def _groups(self) -> list[list[int]]:
        """The cells whose arms share a program, by index."""
        groups: dict[Any, list[int]] = {}
        for index, cell in enumerate(self.cells):
            groups.setdefault(cell.arm.program, []).append(index)
        return list(groups.values())

    @property
    def _order(self) -> np.ndarray:
        """The cells in the order of the output: on each device, its share of every group."""
        shares = [np.split(np.array(group), self._by_cell.mesh.size) for group in self._groups]
        return np.concatenate([share for device in zip(*shares, strict=True) for share in device])

    @cached_property
    def _streams(self) -> list[int]:
        """The seeds whose data the host makes, which their cells share."""
        return sorted({cell.seed for cell in self.cells}) if isinstance(self.task, HostFed) else []

    def _batches(self, numbers: np.ndarray) -> Any:
        """What the host feeds to the steps with the given numbers, [steps, streams, ...]."""
        if not isinstance(self.task, HostFed):
            return ()
        made = [self.task.batches(seed, numbers.tolist()) for seed in self._streams]
        return jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *made)

    @cached_property
    def _settings(self) -> tuple[_Settings, ...]:
        def of(cells: list[Cell]) -> _Settings:
            names = [name for name, _ in cells[0].arm.numbers]
            return _Settings(
                np.array([cell.learning_rate for cell in cells], np.float32),
                {
                    name: np.array([dict(cell.arm.numbers)[name] for cell in cells], np.float32)
                    for name in names
                },
                np.array([cell.seed for cell in cells], np.uint32),
                np.array([streams.get(cell.seed, 0) for cell in cells], np.uint32),
            )

        streams = {seed: index for index, seed in enumerate(self._streams)}

        return tuple(of([self.cells[index] for index in group]) for group in self._groups)

    @cached_property
    def _by_cell(self) -> NamedSharding:
        devices = jax.devices()
        count = gcd(len(devices), *map(len, self._groups))
        return NamedSharding(Mesh(np.array(devices[:count]), ("cell",)), PartitionSpec("cell"))

    @cached_property
    def _compiled(self) -> dict[int | None, jax.stages.Compiled]:
        """Programs by the number of steps; under None the one that makes the first states."""
        return {}

    def _start_program(self) -> jax.stages.Compiled:
        if None not in self._compiled:
            settings = jax.tree.map(self._of_cells, self._settings)
            cells = self._by_cell.spec
            self._compiled[None] = self._lower(self._start, (cells,), cells, settings).compile()
        return self._compiled[None]

    def _program(self, length: int) -> jax.stages.Compiled:
        """The compiled program of a chunk of so many steps."""
        if length not in self._compiled:
            cells, everywhere = self._by_cell.spec, PartitionSpec()
            of_steps = PartitionSpec(None, "cell")
            settings = jax.tree.map(self._of_cells, self._settings)
            states = jax.tree.map(self._of_cells, jax.eval_shape(self._start, settings))
            numbers = jax.ShapeDtypeStruct((length,), np.uint32)
            batches = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype),
                self._batches(np.arange(1)),
            )
            lowered = self._lower(
                self._advance,
                (cells, cells, everywhere, everywhere),
                (cells, Chunk(of_steps, of_steps, of_steps, of_steps, cells, cells)),
                *(states, settings, numbers, batches),
            )
            self._compiled[length] = lowered.compile()
        return self._compiled[length]

    def _lower(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any
    ) -> jax.stages.Lowered:
        """A function of the cells, each device's share by itself."""
        mesh = self._by_cell.mesh
        by_device = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        # GPUs and TPUs would round the factors of a product to fewer bits.
        with jax.default_matmul_precision("highest"):
            return jax.jit(by_device).lower(*arguments)

    def _of_cells(self, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._by_cell)

    def _stages(self, group: int, settings: _Settings) -> Stages:
        arm = self.cells[self._groups[group][0]].arm
        schedule = optax.cosine_decay_schedule(settings.learning_rate, self.steps)
        return arm.stages(schedule, self.task.stacked, settings.numbers)

    def _start(self, settings: tuple[_Settings, ...]) -> tuple[_State, ...]:
        """The states of all groups before the first step."""
        sizes = [len(group.seed) for group in settings]
        init_keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[0])(
            _seeds(settings)
        )
        params = _split(jax.vmap(self.task.init)(init_keys), sizes)

        def start(group: int, settings: _Settings, params: Any) -> _State:
            scaling, base = self._stages(group, settings)
            return _State(params, scaling.init(params), base.init(params))

        return tuple(
            jax.vmap(lambda *arguments, group=group: start(group, *arguments))(*of_group)
            for group, of_group in enumerate(zip(settings, params, strict=True))
        )

    def _advance(
        self,
        states: tuple[_State, ...],
        settings: tuple[_Settings, ...],
        numbers: jax.Array,
        batches: Any,
    ) -> tuple[tuple[_State, ...], Chunk]:
        """The steps with the given numbers, on what the host feeds to them; then an evaluation."""
        sizes = [len(group.seed) for group in settings]
        data_keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed))[1])(
            _seeds(settings)
        )

        def update(
            group: int, settings: _Settings, state: _State, grads: Any, prediction_grad: Any
        ) -> tuple[_State, Any, Any]:
            scaling, base = self._stages(group, settings)
            extra = {"prediction_grad": prediction_grad}
            scaled, scaling_state = scaling.update(
                grads, state.scaling_state, state.params, **extra
            )
            updates, base_state = base.update(scaled, state.base_state, state.params, **extra)
            params = optax.apply_updates(state.params, updates)
            return _State(params, scaling_state, base_state), scaled, updates

        streams = jnp.concatenate([group.stream for group in settings])

        def step(
            states: tuple[_State, ...], given: tuple[jax.Array, Any]
        ) -> tuple[tuple[_State, ...], tuple[jax.Array, ...]]:
            number, batch = given
            if isinstance(self.task, HostFed):
                data = jax.tree.map(lambda leaf: leaf[streams], batch)
            else:
                data = jax.vmap(lambda key: jax.random.fold_in(key, number))(data_keys)
            params = _join([state.params for state in states])
            loss, gradients = _gradients(self.task, params, data)
            done = [
                jax.vmap(lambda *arguments, group=group: update(group, *arguments))(
                    settings[group], states[group], *of_group
                )
                for group, of_group in enumerate(_split(gradients, sizes))
            ]
            states, scaled, updates = zip(*done, strict=True)
            steered = (gradients[0], _join(scaled), _join(updates))
            return states, (loss, *map(self._scales, steered))

        states, log = jax.lax.scan(step, states, (numbers, batches))
        error, shown = jax.vmap(self.task.evaluate)(_join([state.params for state in states]))
        return states, Chunk(*log, error=error, shown=shown)

    def _scales(self, grads: Any) -> jax.Array:
        """The std of each layer's kernel gradient, [cells, layers]."""

        def scale(part: str, kernel: jax.Array) -> jax.Array:
            if part not in self.task.stacked:
                kernel = kernel[:, None]
            within = tuple(range(2, kernel.ndim))
            # Of the largest entry, for the squares of large and small ones leave float32's range.
            peak = jnp.max(jnp.abs(kernel), axis=within, keepdims=True)
            unit = jnp.where(peak > 0, peak, 1)
            return jnp.std(kernel / unit, axis=within) * jnp.squeeze(unit, within)

        leaves = jax.tree.leaves_with_path(grads)
        return jnp.concatenate(
            [scale(path[0].key, leaf) for path, leaf in leaves if path[-1].key == "kernel"], axis=1
        )


def _gradients(task: Task, params: Any, data: Any) -> tuple[jax.Array, tuple[Any, Any]]:
    """The gradients of each cell; on CPUs one by one, since the layers of one fit the cache."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda cell: task.gradients(*cell), (params, data))
    return jax.vmap(task.gradients)(params, data)


def _seeds(settings: tuple[_Settings, ...]) -> jax.Array:
    """The seeds of all cells."""
    return jnp.concatenate([group.seed for group in settings])


def _join(trees: Sequence[Any]) -> Any:
    """Trees of arrays, joined along the first axis."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *trees)


def _split(tree: Any, sizes: Sequence[int]) -> list[Any]:
    """Pieces of a tree of arrays along the first axis."""
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda a, end=end, size=size: a[end - size : end], tree)
        for end, size in zip(ends, sizes, strict=True)
    ]
