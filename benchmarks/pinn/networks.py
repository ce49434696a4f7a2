"""Plain multilayer perceptrons: no normalization, no skip connections, nothing that helps depth."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.layers import Layer, Params, affine, init_layers
from benchmarks.pinn.derivatives import Jet, along_axes, taylor, taylor_elementwise
from stablegrad_optax import activation_aware

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "silu": jax.nn.silu,
}
INITIALIZATIONS = ("glorot", "activation_aware")


@dataclass(frozen=True)
class Network:
    """``depth`` hidden layers of ``width`` units, then a linear output of one unit.

    The hidden layers after the first are stacked, kernels ``[depth - 1, width, width]``, and
    applied by ``lax.scan``. Optimizers that act on each layer have to be told, as with the layers
    of ``nn.scan``: see ``benchmarks.arms``.

    Attributes:
        depth: Number of hidden layers, at least 2.
        width: Units per hidden layer.
        activation: Name of the activation, one of ``ACTIVATIONS``.
        initialization: Of the kernels: ``"glorot"`` (normal) or ``"activation_aware"``. Biases
            start at zero.
        inputs: Number of coordinates of a point.
    """

    depth: int = 16
    width: int = 32
    activation: str = "tanh"
    initialization: str = "glorot"
    inputs: int = 2

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"no network has a depth of {self.depth}: 2 is the least")
        if self.activation not in ACTIVATIONS or self.initialization not in INITIALIZATIONS:
            raise ValueError(
                f"no network has activation {self.activation!r} and initialization "
                f"{self.initialization!r}: choose of {tuple(ACTIVATIONS)} and of {INITIALIZATIONS}"
            )

    def init(self, key: jax.Array) -> Params:
        """Parameters under ``first``, ``hidden`` (stacked) and ``last``."""
        activation = ACTIVATIONS[self.activation]
        initializer: Any = (
            jax.nn.initializers.glorot_normal()
            if self.initialization == "glorot"
            else activation_aware(activation)
        )
        return init_layers(key, initializer, self.depth, self.inputs, self.width, 1)

    def apply(self, params: Params, points: jax.Array) -> jax.Array:
        """The output, [n], at points, [n, inputs]."""
        activation = ACTIVATIONS[self.activation]
        hidden, _ = jax.lax.scan(
            lambda values, layer: (activation(affine(layer, values)), None),
            activation(affine(params["first"], points)),
            params["hidden"],
            unroll=_unroll(),
        )
        return affine(params["last"], hidden)[:, 0]

    def jet(self, params: Params, points: jax.Array) -> Jet:
        """The output and its derivatives along each coordinate, layer by layer.

        The same as differentiating ``apply`` twice, which would carry the first derivatives through
        the layers twice: a loop cannot tell that they are equal.
        """
        activation = ACTIVATIONS[self.activation]

        def through(jet: Jet, layer: Layer) -> tuple[Jet, None]:
            return taylor_elementwise(activation, taylor(partial(affine, layer), jet)), None

        jet, _ = through(along_axes(points), params["first"])
        jet, _ = jax.lax.scan(through, jet, params["hidden"], unroll=_unroll())
        return taylor(lambda values: affine(params["last"], values)[:, 0], jet)


def _unroll() -> bool:
    """Whether loops over layers are unrolled: compiles slower, but CPUs run it twice as fast."""
    return jax.default_backend() == "cpu"
