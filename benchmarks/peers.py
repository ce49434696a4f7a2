"""Published gradient transforms that optax does not have, each as its paper states it.

All of them act on one leaf at a time. ``on_each_layer`` gives them, and optax's own, the layers of
stacked leaves one by one.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def block_normalized() -> optax.GradientTransformation:
    """Each leaf's gradient divided by its norm (block-normalized gradient, arXiv:1707.04822)."""
    return _stateless_by_leaf(lambda g: g / _nonzero(jnp.linalg.norm(g)))


def z_normalized() -> optax.GradientTransformation:
    """Each leaf's gradient less its mean, over its standard deviation (ZNorm, arXiv:2408.01215)."""
    return _stateless_by_leaf(
        lambda g: (g - jnp.mean(g)) / _nonzero(jnp.std(g)) if g.size > 1 else g
    )


def clip_in_range(max_norm: float) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm`` with a norm that overflows nowhere: a control, not a peer."""

    def clip(updates: Any, params: Any) -> Any:
        norm = _norm_in_range(jax.tree.leaves(updates))
        return jax.tree.map(lambda g: g * jnp.minimum(max_norm / _nonzero(norm), 1.0), updates)

    return optax.stateless(clip)


def block_normalized_in_range() -> optax.GradientTransformation:
    """``block_normalized`` with such a norm."""
    return _stateless_by_leaf(lambda g: g / _nonzero(_norm_in_range([g])))


class GradientStabilizerState(NamedTuple):
    """Running moments of each leaf's norm."""

    steps: jax.Array
    mean: Any
    mean_square: Any


def gradient_stabilizer(first: float = 0.7, second: float = 0.9) -> optax.GradientTransformation:
    r"""Each leaf's direction, times a length from running moments of its norm (arXiv:2502.17055).

    .. math:: g' = \frac{g}{\|g\|} \cdot \frac{\hat m}{\sqrt{\hat v}}

    where m and v are running means of the norm and its square, divided by ``1 - decay^t``.
    """

    def init(params: Any) -> GradientStabilizerState:
        zeros = jax.tree.map(lambda p: jnp.zeros(()), params)
        return GradientStabilizerState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, GradientStabilizerState]:
        count = state.steps + 1
        steps = count.astype(jnp.float32)
        norms = jax.tree.map(jnp.linalg.norm, updates)
        mean = jax.tree.map(lambda m, n: first * m + (1 - first) * n, state.mean, norms)
        square = jax.tree.map(
            lambda v, n: second * v + (1 - second) * n**2, state.mean_square, norms
        )

        def stabilize(g: jax.Array, norm: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            length = (m / (1 - first**steps)) / _nonzero(jnp.sqrt(v / (1 - second**steps)))
            return g / _nonzero(norm) * length

        updates = jax.tree.map(stabilize, updates, norms, mean, square)
        return updates, GradientStabilizerState(count, mean, square)

    return optax.GradientTransformation(init, update)


def on_each_layer(
    make: Callable[[], optax.GradientTransformation], stacked: Collection[str]
) -> optax.GradientTransformation:
    """A transform that acts leaf by leaf, on each layer of stacked leaves by itself.

    Args:
        make: Makes the transform; it must not combine leaves.
        stacked: The keys of the params, a dict, under which axis 0 of every leaf counts layers.

    Returns:
        The transform for such params.
    """
    transform = make()

    def init(params: Any) -> dict[str, Any]:
        return {
            key: (jax.vmap(transform.init) if key in stacked else transform.init)(part)
            for key, part in params.items()
        }

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        done = {
            key: (jax.vmap(transform.update) if key in stacked else transform.update)(
                part, state[key], params[key]
            )
            for key, part in updates.items()
        }
        return (
            {key: part for key, (part, _) in done.items()},
            {key: part_state for key, (_, part_state) in done.items()},
        )

    return optax.GradientTransformation(init, update)


def _stateless_by_leaf(
    function: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates))


def _norm_in_range(leaves: list[jax.Array]) -> jax.Array:
    """The norm of all leaves together, of multiples of the largest entry."""
    unit = _nonzero(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves])))
    return unit * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / unit)) for leaf in leaves))


def _nonzero(value: jax.Array) -> jax.Array:
    return jnp.where(value > 0, value, 1.0)
