"""What float32 holds of deep networks at their start: python -m benchmarks.normfree.starts.

Measures, of fully connected networks before any step, how far the logits of the test images are
apart, and the gradient's standard deviation in the first and the last hidden kernel. Where these
are zero or not numbers, no scaling of gradients trains the network.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import json_lines
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.task import ClassificationTask
from benchmarks.pages import markdown
from benchmarks.records import FOLDER
from benchmarks.versions import installed

NAME = "normfree-starts.jsonl"
SEEDS = tuple(range(5))


def tasks() -> Iterator[ClassificationTask]:
    """The digits with every network, from the starts that the experiments have."""
    starts = (("plain", "lecun"), ("residual", "lecun"), ("residual", "quarter_variance"))
    for activation, (shape, start), depth in product(("relu", "gelu"), starts, (50, 150, 300)):
        network = DeepNetwork(depth, shape=shape, activation=activation, initialization=start)
        yield ClassificationTask("digits", network)


def measure(task: ClassificationTask) -> dict[str, Any]:
    """The medians over the seeds, null where a seed's value is not finite.

    Returns:
        ``logits``, the std over the test images, the classes' means taken off, and ``gradients``,
        the std of the first and of the last hidden kernel's.
    """
    inputs = jnp.asarray(task.images.test_inputs)

    @jax.jit
    @jax.vmap
    def at_start(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = task.init(key)
        _, (grads, _) = task.gradients(params, jax.random.fold_in(key, 1))
        kernels = grads["hidden"]["kernel"]
        return task.network.apply(params, inputs), kernels[jnp.array([0, -1])]

    logits, kernels = (
        np.asarray(values, np.float64)  # whose squares do not overflow
        for values in at_start(jnp.stack([jax.random.key(seed) for seed in SEEDS]))
    )
    with np.errstate(invalid="ignore"):  # of an infinity's distance to infinity
        spread = (logits - logits.mean(axis=1, keepdims=True)).std(axis=(1, 2))
        return {
            "logits": _finite(np.median(spread)),
            "gradients": [_finite(g) for g in np.median(kernels.std(axis=(2, 3)), axis=0)],
        }


def _finite(value: float) -> float | None:
    return float(f"{value:.2g}") if np.isfinite(value) else None


def table(folder: Path = FOLDER) -> str:
    """What is recorded, for the page."""

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2g}"

    head = ("network at its start", "std of logits", "of gradients, first hidden kernel", "last")
    found = json_lines.read(folder / NAME)
    rows: list[list[str]] = []
    for task in tasks():
        if record := json_lines.find(found, {"task": task.describe()}):
            values = (record["logits"], *record["gradients"])
            rows.append([task.title, *map(shown, values)])
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
