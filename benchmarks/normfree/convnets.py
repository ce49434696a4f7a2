"""Deep convolutional networks of any width, with BatchNorm or without, as functions of params."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NETWORKS = ("resnet50", "efficientnetv2s")
INITIALIZATIONS = ("lecun", "he_fan_out")
TRUNCATED_STD = 0.87962566103423978
"""Of a standard normal variable that is cut off at -2 and 2."""

Params = dict[str, Any]


@dataclass(frozen=True)
class ConvNet:
    """A published network at full depth.

    Attributes:
        name: One of ``NETWORKS``.
        width: Factor of the width of every layer; 1 is the published network.
        batch_norm: Whether it has its BatchNorm layers. They are what it lacks otherwise, and all
            it lacks.
        initialization: Of the kernels, cut-off normals: ``"lecun"``, Flax's default, with a
            variance of 1 / fan_in, or ``"he_fan_out"``, torchvision's, of 2 / fan_out for
            convolutions.
    """

    name: str
    width: float = 0.125
    batch_norm: bool = False
    initialization: str = "lecun"

    def __post_init__(self) -> None:
        for given, known in (
            (self.name, NETWORKS),
            (self.initialization, INITIALIZATIONS),
        ):
            if given not in known:
                raise ValueError(f"there is no network {given!r}: choose of {known}")

    def init(self, key: jax.Array, channels: int, classes: int) -> Params:
        """Kernels as named, biases 0 and the scales of norms 1.

        All kernels are cut from one draw: a draw for each takes a minute to compile.
        """
        _, shapes, _ = _structure(self, channels, classes)
        leaves = jax.tree.leaves_with_path(shapes)
        sizes = [leaf.size for path, leaf in leaves if path[-1].key == "kernel"]
        draw = jax.random.truncated_normal(key, -2, 2, (sum(sizes),)) / TRUNCATED_STD
        pieces = iter(jnp.split(draw, np.cumsum(sizes)[:-1]))

        def start(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            if path[-1].key != "kernel":
                return jnp.full(leaf.shape, float(path[-1].key == "scale"))
            *window, inputs, outputs = leaf.shape[is_stacked(path[0].key) :]
            variance = 1 / math.prod((*window, inputs))
            if window and self.initialization == "he_fan_out":
                variance = 2 / math.prod((*window, outputs))
            return next(pieces).reshape(leaf.shape) * math.sqrt(variance)

        return jax.tree.map_with_path(start, shapes)

    def stacked(self, channels: int, classes: int) -> tuple[str, ...]:
        """The keys of the params under which axis 0 of every leaf counts blocks."""
        return tuple(filter(is_stacked, _structure(self, channels, classes)[1]))

    def apply(
        self, params: Params, images: jax.Array, classes: int, measured: jax.Array | None = None
    ) -> jax.Array:
        """The logits, [n, classes], of images, [n, height, width, channels].

        Args:
            params: The parameters.
            images: The images.
            classes: How many there are.
            measured: The images whose statistics BatchNorm takes; if not given, ``images``.
        """
        # Here, as in _structure: the demo lists all experiments and does not install Flax.
        from flax import nnx

        graph, _, statistics = _structure(self, images.shape[-1], classes)
        statistics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics)
        model = nnx.merge(graph, params, statistics)
        if self.batch_norm and measured is not None:
            model(measured)
            model.eval()
        return model(images)


def is_stacked(name: str) -> bool:
    """Whether a part of a network is a stack of blocks."""
    return name.endswith("_rest")


@cache
def _structure(network: ConvNet, channels: int, classes: int) -> tuple[Any, Params, Params]:
    """The network's graph, and the shapes of its parameters and of BatchNorm's statistics."""
    from flax import nnx

    from benchmarks.normfree.efficientnet import EfficientNetV2S
    from benchmarks.normfree.resnet import ResNet50

    kinds: dict[str, Any] = {"resnet50": ResNet50, "efficientnetv2s": EfficientNetV2S}

    def make() -> nnx.Module:
        return kinds[network.name](
            channels, classes, network.width, batch_norm=network.batch_norm, rngs=nnx.Rngs(0)
        )

    graph, *states = nnx.split(nnx.eval_shape(make), nnx.Param, nnx.BatchStat)
    params, statistics = map(nnx.to_pure_dict, states)
    return graph, params, statistics
