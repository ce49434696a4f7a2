"""The plain tanh network: no normalization, no skip connections, nothing that helps depth."""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class TanhNetwork:
    """``depth`` hidden tanh layers of ``width`` units, then a linear output of one unit.

    Every layer is a leaf of its own, so that per-layer optimizers see real layers. The layers are a
    Python loop, not a ``lax.scan`` over stacked ones, which would have to stack them in every step.

    Attributes:
        depth: Number of hidden layers.
        width: Units per hidden layer.
        inputs: Number of coordinates of a point.
    """

    depth: int = 16
    width: int = 32
    inputs: int = 2

    def init(self, key: jax.Array) -> Params:
        """Glorot-normal kernels and zero biases."""
        sizes = [self.inputs, *[self.width] * self.depth, 1]
        glorot = jax.nn.initializers.glorot_normal()
        return {
            f"layer_{index:02d}": {
                "kernel": glorot(jax.random.fold_in(key, index), shape, jnp.float32),
                "bias": jnp.zeros(shape[1]),
            }
            for index, shape in enumerate(pairwise(sizes))
        }

    def apply(self, params: Params, points: jax.Array) -> jax.Array:
        """The output, [n], at points, [n, inputs]."""
        *hidden, output = [params[name] for name in sorted(params)]
        for layer in hidden:
            points = jnp.tanh(points @ layer["kernel"] + layer["bias"])
        return (points @ output["kernel"] + output["bias"])[:, 0]
