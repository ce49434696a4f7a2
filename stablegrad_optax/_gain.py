"""The gain of each layer, and the update it makes of the gradient."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._arithmetic import quotient
from stablegrad_optax._layers import Layout, LeafLayout

PyTree = Any
Numeric = float | jax.Array


class Gain(NamedTuple):
    """The gain of each layer as a quotient: r / s may overflow where g / s * r does not."""

    multiplier: jax.Array
    divisor: jax.Array


def gain_of(
    scale: jax.Array,
    entries: np.ndarray,
    balance: Numeric,
    reference_scale: jax.Array,
    equalize: Literal["std", "norm"] = "std",
) -> Gain:
    """Gain r / (s^b pooled^(1-b)) of each layer, 1 where nothing was seen."""
    seen, b = scale > 0, jnp.asarray(balance, scale.dtype)
    own = jnp.where(seen, scale, 1)
    pooled = _pooled_scale(scale, entries)
    limits = jnp.finfo(scale.dtype)
    exact = jnp.minimum(jnp.where(seen, own**b * pooled ** (1 - b), 1), limits.max)
    # XLA may multiply by the reciprocal, and flushes one below the normal range to 0.
    largest = jnp.asarray(1 / limits.tiny, scale.dtype)
    beyond = exact > largest
    rest = jnp.where(beyond, largest / jnp.where(beyond, exact, largest), 1)
    target = reference_scale
    if equalize == "norm":  # entries of a large layer are to be smaller than those of a small one
        mean = np.sum(entries) / max(np.count_nonzero(entries), 1)
        growth = np.sqrt(np.maximum(mean, 1) / np.maximum(entries, 1))
        target = target * jnp.asarray(growth, scale.dtype) ** b
    return Gain(jnp.where(seen, target, 1) * rest, jnp.minimum(exact, largest))


def _pooled_scale(scale: jax.Array, entries: np.ndarray) -> jax.Array:
    """Root mean square of the scales over all entries, [], in units of the largest of them."""
    largest = jnp.max(scale, initial=0)
    seen = largest > 0
    unit = jax.lax.stop_gradient(jnp.where(seen, largest, 1))  # it cancels
    share = jnp.asarray(entries / max(entries.sum(), 1), scale.dtype)
    mean_square = jnp.sum(share * (scale / unit) ** 2)
    pooled = unit * jnp.sqrt(jnp.where(seen, mean_square, 1))
    return jnp.maximum(pooled, jnp.finfo(scale.dtype).tiny)  # many dead layers beside a small one


def apply_gain(gain: Gain, updates: PyTree, layout: Layout) -> PyTree:
    """Every gradient times the gain of its layer, in the gradient's dtype."""
    leaves, structure = jax.tree.flatten(updates)
    gains = zip(layout.split(gain.multiplier), layout.split(gain.divisor), strict=True)

    def scaled(gradient: jax.Array, leaf: LeafLayout) -> jax.Array:
        multiplier, divisor = (part.reshape(leaf.broadcast_shape) for part in next(gains))
        return _times(jnp.asarray(gradient), multiplier, divisor)

    return structure.unflatten(
        gradient if leaf is None else scaled(gradient, leaf)
        for gradient, leaf in zip(leaves, layout.leaves, strict=True)
    )


@jax.jit  # traced once for all leaves that are alike
def _times(gradient: jax.Array, multiplier: jax.Array, divisor: jax.Array) -> jax.Array:
    """The gradient, divided first; a complex one by its components."""
    if jnp.iscomplexobj(gradient):
        parts = (jnp.real(gradient), jnp.imag(gradient))
        return jax.lax.complex(*(_times(part, multiplier, divisor) for part in parts))
    wide = max(gradient.dtype, divisor.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    update = quotient(gradient.astype(wide), divisor.astype(wide)) * multiplier.astype(wide)
    return update.astype(gradient.dtype)
