"""Fully connected layers, the hidden ones stacked, of which the networks of all tasks are made."""

from typing import Any

import jax
import jax.numpy as jnp

Layer = dict[str, jax.Array]
Params = dict[str, Layer]


def init_layer(key: jax.Array, initializer: Any, inputs: int, outputs: int) -> Layer:
    """A layer whose biases are 0."""
    return {"kernel": initializer(key, (inputs, outputs), jnp.float32), "bias": jnp.zeros(outputs)}


def init_layers(
    key: jax.Array, initializer: Any, depth: int, inputs: int, width: int, outputs: int
) -> Params:
    """Layers ``first``, ``hidden`` (stacked, ``depth - 1`` of them) and ``last``; biases are 0."""

    def layer(index: int | jax.Array, inputs: int, outputs: int) -> Layer:
        return init_layer(jax.random.fold_in(key, index), initializer, inputs, outputs)

    return {
        "first": layer(0, inputs, width),
        "hidden": jax.vmap(lambda index: layer(index, width, width))(jnp.arange(1, depth)),
        "last": layer(depth, width, outputs),
    }


def affine(layer: Layer, values: jax.Array) -> jax.Array:
    """What a layer makes of values, [..., inputs], before the activation."""
    return values @ layer["kernel"] + layer["bias"]
