"""What float32 holds of the networks at their start: python -m benchmarks.normfree.starts.

Measures, before any step, the loss of a batch and the gradient's standard deviation in the layers
with the smallest and the largest one. Where these are zero or not numbers, no scaling of gradients
trains the network; where they are below Adam's eps, its steps shrink with them.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import json_lines
from benchmarks.normfree.convnets import INITIALIZATIONS, NETWORKS, ConvNet
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.task import ClassificationTask, ConvolutionTask, TextTask
from benchmarks.normfree.transformer import Transformer
from benchmarks.pages import markdown
from benchmarks.records import FOLDER
from benchmarks.training import HostFed, Task
from benchmarks.versions import installed

NAME = "normfree-starts.jsonl"
SEEDS = tuple(range(5))


def tasks() -> Iterator[Task]:
    """Every network without normalization, from the starts that the experiments have."""
    starts = (("plain", "lecun"), ("residual", "lecun"), ("residual", "quarter_variance"))
    networks = [
        *product(("relu", "gelu"), starts, (50, 150, 300)),
        # Where the gradient of the approximation by tanh is not a number.
        *(("exact_gelu", *rest) for rest in zip(starts[1:], (150, 300), strict=True)),
    ]
    for activation, (shape, start), depth in networks:
        network = DeepNetwork(depth, shape=shape, activation=activation, initialization=start)
        yield ClassificationTask("digits", network)
    for name, start in product(NETWORKS, INITIALIZATIONS):
        yield ConvolutionTask("fashion_mnist", ConvNet(name, initialization=start), batch=32)
    for start, depth in product(("lecun", "scaled_residual"), (12, 48)):
        yield TextTask(Transformer(depth, initialization=start))


def measure(task: Task) -> dict[str, Any]:
    """The loss, and the smallest and the largest std of a layer's kernel gradient.

    They are the medians over the seeds, null where that is not finite.
    """
    init, gradients = jax.jit(task.init), jax.jit(task.gradients)

    def of_seed(seed: int) -> tuple[float, float, float]:
        key = jax.random.key(seed)
        data: Any = jax.random.fold_in(key, 1)
        if isinstance(task, HostFed):
            data = jax.tree.map(lambda leaf: leaf[0], task.batches(seed, [0]))
        loss, (grads, _) = gradients(init(key), data)
        scales = np.concatenate([*_scales(task, grads)])
        return float(loss), scales.min(), scales.max()

    loss, smallest, largest = np.median([of_seed(seed) for seed in SEEDS], axis=0)
    return {"loss": _finite(loss), "gradients": [_finite(smallest), _finite(largest)]}


def _scales(task: Task, grads: Any) -> Iterator[np.ndarray]:
    """The std of each layer's kernel gradient, an array for each kernel or stack of them."""
    for path, leaf in jax.tree.leaves_with_path(grads):
        if path[-1].key == "kernel":
            kernels = np.asarray(leaf, np.float64)  # in which squares do not overflow
            blocks = len(kernels) if path[0].key in task.stacked else 1
            yield kernels.reshape(blocks, -1).std(axis=1)


def _finite(value: float) -> float | None:
    return float(f"{value:.2g}") if np.isfinite(value) else None


def table(folder: Path = FOLDER) -> str:
    """What is recorded, for the page."""

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2g}"

    head = ("network at its start", "loss", "gradient std, smallest layer", "largest layer")
    found = json_lines.read(folder / NAME)
    rows: list[list[str]] = []
    for task in tasks():
        if record := json_lines.find(found, {"task": task.describe()}):
            rows.append([task.title, *map(shown, (record["loss"], *record["gradients"]))])
    return markdown(head, rows)


def main(folder: Path = FOLDER) -> None:
    """Measure every network and write the records anew."""
    path = folder / NAME
    path.unlink(missing_ok=True)
    for task in tasks():
        made_with = {
            "seeds": list(SEEDS),
            "device": jax.devices()[0].device_kind,
            "versions": installed("jax", "jaxlib"),
            "command": "python -m benchmarks.normfree.starts",
        }
        json_lines.append(path, {"task": task.describe(), **measure(task), **made_with})
    print(table(folder))


if __name__ == "__main__":
    main()
