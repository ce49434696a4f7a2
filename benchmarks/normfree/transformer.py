"""A decoder of any depth, with LayerNorm or without."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.layers import Layer, affine, init_layer

Params = dict[str, Any]

INITIALIZATIONS = ("lecun", "scaled_residual")


@dataclass(frozen=True)
class Transformer:
    r"""A causal transformer of ``depth`` blocks, each of attention and an MLP, and a linear output.

    .. math:: h' = h + A(N(h)), \quad h'' = h' + M(N(h'))

    where A is the attention, M the MLP, and N LayerNorm or nothing. It starts as Flax's layers do
    by default: kernels are ``lecun_normal``, embeddings normal with variance 1 / width, biases 0
    and the scales of norms 1. There is no dropout.

    Attributes:
        depth: Number of blocks.
        width: Entries of the vector of a character.
        heads: Heads of an attention, which share the width.
        context: The most characters that it reads at once.
        layer_norm: Whether it has its LayerNorms. They are what it lacks otherwise, and all it
            lacks.
        initialization: ``"lecun"``, or ``"scaled_residual"``, as in GPT-2 (Radford et al., 2019):
            kernels whose output is added to h are divided by the root of the number of such
            additions, twice the depth.
    """

    depth: int
    width: int = 32
    heads: int = 2
    context: int = 16
    layer_norm: bool = False
    initialization: str = "lecun"

    def __post_init__(self) -> None:
        if self.initialization not in INITIALIZATIONS:
            raise ValueError(
                f"no transformer has {self.initialization!r}: choose of {INITIALIZATIONS}"
            )
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads cannot share a width of {self.width} evenly")

    def init(self, key: jax.Array, vocabulary: int) -> Params:
        """Parameters under ``embedding``, ``blocks`` (stacked), ``norm`` if any, and ``output``."""
        width = self.width
        kernel = jax.nn.initializers.lecun_normal()
        embedding = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        sizes = {
            **dict.fromkeys(("query", "key", "value", "out"), (width, width)),
            "expand": (width, 4 * width),
            "contract": (4 * width, width),
        }

        def norms(*names: str) -> Params:
            scale_and_bias = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
            return dict.fromkeys(names, scale_and_bias) if self.layer_norm else {}

        def block(key: jax.Array) -> Params:
            keys = jax.random.split(key, len(sizes))
            layers = {
                name: init_layer(key, kernel, *size)
                for key, (name, size) in zip(keys, sizes.items(), strict=True)
            }
            if self.initialization == "scaled_residual":
                for name in ("out", "contract"):
                    layers[name]["kernel"] /= math.sqrt(2 * self.depth)
            return layers | norms("attention_norm", "mlp_norm")

        keys = jax.random.split(key, 4)
        return {
            "embedding": {
                "characters": embedding(keys[0], (vocabulary, width), jnp.float32),
                "positions": embedding(keys[1], (self.context, width), jnp.float32),
            },
            "blocks": jax.vmap(block)(jax.random.split(keys[2], self.depth)),
            **norms("norm"),
            "output": init_layer(keys[3], kernel, width, vocabulary),
        }

    def apply(self, params: Params, characters: jax.Array) -> jax.Array:
        """Each next character's logits, [n, length, vocabulary], for characters, [n, length]."""

        def block(h: jax.Array, layers: Params) -> tuple[jax.Array, None]:
            h = h + self._attention(layers, self._normed(layers, "attention_norm", h))
            expanded = jax.nn.gelu(affine(layers["expand"], self._normed(layers, "mlp_norm", h)))
            return h + affine(layers["contract"], expanded), None

        embedding = params["embedding"]
        positions = embedding["positions"][: characters.shape[1]]
        h = embedding["characters"][characters] + positions
        # Blocks run again for their gradients: that is faster than to read what they would keep.
        h, _ = jax.lax.scan(jax.checkpoint(block), h, params["blocks"])
        return affine(params["output"], self._normed(params, "norm", h))

    def _attention(self, layers: Params, h: jax.Array) -> jax.Array:
        """Causal attention, [n, length, width]."""
        query, key, value = (
            affine(layers[name], h).reshape(*h.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        read = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return affine(layers["out"], read.reshape(h.shape))

    def _normed(self, layers: Params, name: str, h: jax.Array) -> jax.Array:
        """What the norm of that name makes of h; h itself where there are no norms."""
        if not self.layer_norm:
            return h
        norm: Layer = layers[name]
        return jax.nn.standardize(h, epsilon=1e-6) * norm["scale"] + norm["bias"]
