"""The running scale of each layer, from the statistics of the steps so far."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Numeric = float | jax.Array


def running(
    scale: jax.Array,
    statistic: jax.Array,
    decay: Numeric,
    attack: Numeric | None = None,
    *,
    keep_through_zeros: bool = False,
) -> jax.Array:
    """The running scale after a step; as it was where what would move it is not finite."""
    d, statistic = jnp.asarray(decay, scale.dtype), statistic.astype(scale.dtype)
    if attack is not None:
        d = jnp.where(statistic > scale, jnp.asarray(attack, scale.dtype), d)
    # At the low end of the range (1 - d) * statistic would be flushed to 0; at the high end the sum
    # may overflow, since XLA adds before it multiplies where d is 1 - d.
    larger = jnp.maximum(scale, statistic)
    unit = jnp.where(larger < 2**-60, 2**-60, 1).astype(scale.dtype)
    mean = (d * (scale / unit) + (1 - d) * (statistic / unit)) * unit
    moved = jnp.where(scale == 0, statistic, jnp.where(mean > larger, larger, mean))
    is_news = jnp.isfinite(statistic) & ~jnp.isnan(moved)  # as with a decay that is not a number
    if keep_through_zeros:
        is_news &= statistic > 0
    return jnp.where(is_news, moved, scale)


def peak(before: jax.Array | None, scale: jax.Array, statistic: jax.Array) -> jax.Array | None:
    """The largest scale so far that the step after it confirmed: one spike alone is no peak."""
    if before is None:
        return None
    confirmed = jnp.minimum(scale, statistic.astype(scale.dtype))
    return jnp.where(confirmed > before, confirmed, before)  # a NaN is not greater


def known(before: jax.Array, after: jax.Array, take_after: Callable[[], jax.Array]) -> jax.Array:
    """The scales before this step, and those after it for layers seen for the first time.

    On a TPU or GPU a branch that takes the statistic once more, not a select: past the first step
    no gain then waits for this step's statistic, which can ride in the pass that applies the gains.
    On a CPU nothing rides along.
    """
    before = before + jnp.zeros_like(after)  # under shard_map both branches must vary alike

    def known_or(after: jax.Array) -> jax.Array:
        return jnp.where(before > 0, before, after)

    def without_waiting() -> jax.Array:
        return jax.lax.cond(jnp.all(before > 0), lambda: before, lambda: known_or(take_after()))

    return jax.lax.platform_dependent(cpu=lambda: known_or(after), default=without_waiting)
