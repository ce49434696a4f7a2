"""Ideas beside the package's own rule, for experiments; what wins moves into the package."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class CompressorState(NamedTuple):
    """Running scales, one array of layers for each leaf."""

    scale: Any


def compressor(
    stacked_keys: Collection[str],
    *,
    attack: Any = 0.0,
    release: Any = 0.9,
    balance: Any = 1.0,
    largest_gain: Any = jnp.inf,
    norm_power: Any = 0.0,
    follow_imbalance: bool = False,
) -> optax.GradientTransformation:
    """StableGrad with a running scale that rises faster than it falls, as in an audio compressor.

    For layer l, with the statistic ``sigma`` and the scale ``s`` of the step before::

        d  = attack if sigma > s else release
        s' = d s + (1 - d) sigma
        g' = g min(largest_gain, 1 / (s'^b pooled(s')^(1 - b)) (mean(n) / n)^(p / 2))

    for the n entries of each layer.

    A plain float32 form for experiments: it does without the package's care for extreme magnitudes,
    NaN and constant layers.

    Args:
        stacked_keys: The keys of the params, a dict, under which axis 0 of leaves counts layers.
        attack: Decay while the statistic is above the scale.
        release: Decay while it is below.
        balance: The share b of the imbalance between layers that is removed.
        largest_gain: Upper bound of the gain.
        norm_power: The power p: 0 gives all layers the same standard deviation, 1 the same norm, as
            block normalization does.
        follow_imbalance: Take b from the imbalance itself, ``x / (1 + x)`` with the standard
            deviation x of the layers' log10 scales, in place of ``balance``.

    Returns:
        The transform.
    """

    def statistic(key: str, leaf: jax.Array) -> jax.Array:
        axes = tuple(range(1 if key in stacked_keys else 0, leaf.ndim))
        centered = len(axes) > 1
        square = jnp.var(leaf, axis=axes) if centered else jnp.mean(leaf**2, axis=axes)
        return jnp.sqrt(square)

    def by_leaf(params: dict[str, Any]) -> dict[str, Any]:
        return {
            key: jax.tree.map(lambda leaf, key=key: statistic(key, leaf), part)
            for key, part in params.items()
        }

    def init(params: Any) -> CompressorState:
        return CompressorState(jax.tree.map(jnp.zeros_like, by_leaf(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, CompressorState]:
        def run(scale: jax.Array, sigma: jax.Array) -> jax.Array:
            decay = jnp.where(sigma > scale, attack, release)
            return jnp.where(scale > 0, decay * scale + (1 - decay) * sigma, sigma)

        scales = jax.tree.map(run, state.scale, by_leaf(updates))
        flat = jax.tree.leaves(scales)
        # One number, such as the output's bias, has no scale and is left alone.
        scaled = [
            (leaf.size, scale)
            for leaf, scale in zip(jax.tree.leaves(updates), flat, strict=True)
            if leaf.size > 1
        ]
        square_sum = sum(size * jnp.mean(scale**2) for size, scale in scaled)
        entries = sum(size for size, _ in scaled)
        pooled = jnp.sqrt(square_sum / entries)
        mean_size = entries / sum(scale.size for _, scale in scaled)
        b = balance
        if follow_imbalance:
            logs = jnp.concatenate([jnp.log10(jnp.maximum(s, 1e-30)).ravel() for _, s in scaled])
            spread = jnp.std(logs)
            b = spread / (1 + spread)

        def scale_leaf(leaf: jax.Array, scale: jax.Array) -> jax.Array:
            if leaf.size == 1:
                return leaf
            level = scale**b * pooled ** (1 - b)
            by_size = (mean_size * scale.size / leaf.size) ** (norm_power / 2)
            gain = jnp.where(level > 0, jnp.minimum(largest_gain, by_size / level), 1.0)
            return leaf * gain.reshape(gain.shape + (1,) * (leaf.ndim - gain.ndim))

        return jax.tree.map(scale_leaf, updates, scales), CompressorState(scales)

    return optax.GradientTransformation(init, update)


def on_modules(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform with one statistic for a module: a bias is one more row of its kernel."""

    def whole(module: dict[str, jax.Array]) -> dict[str, jax.Array]:
        row = module["bias"][..., None, :]
        return {"kernel": jnp.concatenate([module["kernel"], row], axis=-2)}

    def parts(module: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"kernel": module["kernel"][..., :-1, :], "bias": module["kernel"][..., -1, :]}

    def of_each(change: Any, modules: Any) -> dict[str, Any]:
        return {key: change(module) for key, module in modules.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        done, state = inner.update(of_each(whole, updates), state)
        return of_each(parts, done), state

    return optax.GradientTransformation(lambda params: inner.init(of_each(whole, params)), update)


def times_weights() -> optax.GradientTransformation:
    """Multiply a module's updates by the RMS of its kernel: the reference of LARS."""

    def scaled(updates: Any, params: Any) -> Any:
        rms = jnp.sqrt(jnp.mean(params["kernel"] ** 2))
        return jax.tree.map(lambda leaf: rms * leaf, updates)

    return optax.stateless(scaled)


def without_biases() -> optax.GradientTransformation:
    """Leave the biases where they are."""

    def kept(updates: Any, params: Any) -> Any:
        return {**updates, "bias": jnp.zeros_like(updates["bias"])}

    return optax.stateless(kept)


class WarmUpState(NamedTuple):
    """How many steps were made, and the state of the transform within."""

    step: jax.Array
    inner: Any


def warmed_up(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """The transform with gains that come in over so many steps: ``gain^min(1, t / steps)``."""

    def init(params: Any) -> WarmUpState:
        return WarmUpState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, WarmUpState]:
        done, inner_state = inner.update(updates, state.inner)
        share = jnp.minimum(1.0, state.step / steps)

        def between(before: jax.Array, after: jax.Array) -> jax.Array:
            return jnp.sign(before) * jnp.abs(before) ** (1 - share) * jnp.abs(after) ** share

        return jax.tree.map(between, updates, done), WarmUpState(state.step + 1, inner_state)

    return optax.GradientTransformation(init, update)
