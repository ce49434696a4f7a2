"""A fixed reference, and how it fades once every layer's gradient has all but vanished."""

import jax
import jax.numpy as jnp

from stablegrad_optax._arithmetic import quotient

Numeric = float | jax.Array


def faded(
    reference: Numeric, scale: jax.Array, peak: jax.Array | None, fade_below: Numeric
) -> jax.Array:
    """The reference, less in proportion where even the layer that fell least is below the limit.

    That layer tells how far the gradient of the loss has fallen: what the others fell by beyond it
    is due to the network between them, and their gains make up for it.
    """
    constant = jnp.asarray(reference, scale.dtype)
    if peak is None:
        return constant
    has_peak, limit = peak > 0, jnp.asarray(fade_below, scale.dtype)
    left = jnp.where(
        has_peak,
        quotient(jnp.minimum(scale, peak), jnp.where(has_peak, peak, 1)),
        jnp.where(scale > 0, 1, 0),
    )
    most = jnp.where(jnp.any(has_peak), jnp.max(left, initial=0), 1)
    is_low = most < limit
    return constant * jnp.where(is_low, quotient(most, jnp.where(is_low, limit, 1)), 1)
