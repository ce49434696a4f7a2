"""One arm with several seeds, step by step: what the demo shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.arms import Arm
from benchmarks.training import Cell, Task, Training


@dataclass(frozen=True)
class History:
    """What an arm did, so far or in all.

    Attributes:
        task: What was trained.
        arm: The arm.
        learning_rate: The learning rate at the first step; it falls to 0 along a cosine.
        seeds: The seeds.
        total_steps: Steps that the whole run has.
        num_params: Parameters of one network.
        state_bytes: Bytes of the optimizer state of one network.
        loss: The loss, [steps, seeds].
        scale_before: Std of each layer's kernel gradient, [steps, seeds, layers].
        scale_after: The same after the arm's transform, as the base optimizer gets it.
        error_steps: Steps done at each evaluation, [evaluations].
        error: The task's error, [evaluations, seeds].
        shown: What the task shows of each seed, at the last evaluation.
        compile_seconds: Time spent compiling.
        train_seconds: Time spent training and evaluating.
        processor_seconds: The same, summed over the processor cores that were at work.
    """

    task: Task
    arm: Arm
    learning_rate: float
    seeds: tuple[int, ...]
    total_steps: int
    num_params: int
    state_bytes: int
    loss: np.ndarray
    scale_before: np.ndarray
    scale_after: np.ndarray
    error_steps: np.ndarray
    error: np.ndarray
    shown: np.ndarray
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
        """How many seeds ended below the task's threshold."""
        return int(np.sum(self.final_error < self.task.solved_below))


def train(
    task: Task,
    arm: Arm,
    learning_rate: float,
    seeds: Sequence[int],
    steps: int,
    on_chunk: Callable[[History], None] = lambda history: None,
) -> History:
    """Train one network per seed, all of them at once.

    Args:
        task: What is trained.
        arm: The optimizer.
        learning_rate: Its learning rate at the first step of a cosine decay to 0.
        seeds: The seeds.
        steps: Optimizer steps.
        on_chunk: Called with the history so far after each chunk of steps.

    Returns:
        The history of the whole run.
    """
    training = Training(task, tuple(Cell(arm, learning_rate, seed) for seed in seeds), steps)
    num_params, state_bytes = training.count_bytes()
    history = None
    for chunk, seconds in training.chunks():
        if history is None:
            history = History(
                task=task,
                arm=arm,
                learning_rate=learning_rate,
                seeds=tuple(seeds),
                total_steps=steps,
                num_params=num_params,
                state_bytes=state_bytes,
                loss=chunk.loss[:0],
                scale_before=chunk.scale_before[:0],
                scale_after=chunk.scale_after[:0],
                error_steps=np.zeros(0, int),
                error=chunk.error[None][:0],
                shown=chunk.shown,
            )
        loss = np.concatenate([history.loss, chunk.loss])
        history = replace(
            history,
            loss=loss,
            scale_before=np.concatenate([history.scale_before, chunk.scale_before]),
            scale_after=np.concatenate([history.scale_after, chunk.scale_after]),
            error_steps=np.append(history.error_steps, len(loss)),
            error=np.concatenate([history.error, chunk.error[None]]),
            shown=chunk.shown,
            compile_seconds=history.compile_seconds + seconds.compile,
            train_seconds=history.train_seconds + seconds.train,
            processor_seconds=history.processor_seconds + seconds.processor,
        )
        on_chunk(history)
    assert history is not None
    return history
