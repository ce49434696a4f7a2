"""Fully connected networks of any depth, plain or residual, without normalization."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.nn.initializers import lecun_normal, variance_scaling

from benchmarks.layers import Layer, Params, affine, init_layers
from stablegrad_optax import activation_aware

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "exact_gelu": partial(jax.nn.gelu, approximate=False),
}
INITIALIZATIONS: dict[str, Callable[[Callable[[jax.Array], jax.Array]], Any]] = {
    "lecun": lambda activation: lecun_normal(),
    "activation_aware": activation_aware,
    "quarter_variance": lambda activation: variance_scaling(1 / 4, "fan_in", "normal"),
}
"""Initializers of the kernels, for an activation."""
SHAPES = ("plain", "residual")


@dataclass(frozen=True)
class DeepNetwork:
    r"""``depth`` hidden layers, of which all but the first may be residual, and a linear output.

    .. math:: h' = f(W h + b) \quad\text{or}\quad h' = h + f(W h + b)

    The hidden layers after the first are stacked, as those of ``benchmarks.pinn.networks`` are.

    Attributes:
        depth: Number of hidden layers, at least 2.
        width: Units of a hidden layer.
        shape: ``"plain"`` or ``"residual"``.
        activation: Name of f, one of ``ACTIVATIONS``.
        initialization: Of the kernels: ``"lecun"`` (normal, Flax's default),
            ``"activation_aware"`` or ``"quarter_variance"`` (of LeCun's, with which 300 residual
            layers stay within float32). Biases start at zero.
    """

    depth: int
    width: int = 32
    shape: str = "residual"
    activation: str = "relu"
    initialization: str = "lecun"

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise ValueError(f"no network has a depth of {self.depth}: 2 is the least")
        for given, known in (
            (self.shape, SHAPES),
            (self.activation, ACTIVATIONS),
            (self.initialization, INITIALIZATIONS),
        ):
            if given not in known:
                raise ValueError(f"no network has {given!r}: choose of {tuple(known)}")

    def init(self, key: jax.Array, inputs: int, outputs: int) -> Params:
        """Parameters under ``first``, ``hidden`` (stacked) and ``last``."""
        initializer = INITIALIZATIONS[self.initialization](ACTIVATIONS[self.activation])
        return init_layers(key, initializer, self.depth, inputs, self.width, outputs)

    def apply(self, params: Params, inputs: jax.Array) -> jax.Array:
        """The outputs, [n, outputs], for [n, inputs]."""
        activation = ACTIVATIONS[self.activation]

        def block(values: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            change = activation(affine(layer, values))
            return (values + change if self.shape == "residual" else change), None

        hidden, _ = jax.lax.scan(
            block, activation(affine(params["first"], inputs)), params["hidden"]
        )
        return affine(params["last"], hidden)
