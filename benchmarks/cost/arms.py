"""The optimizers whose cost is compared: base optimizers, what stands in front, and whole ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import stablegrad, stablegrad_adam, stablegrad_sgd

PyTree = Any
Transformation = optax.GradientTransformation


def _of_each_leaf(function: Callable[[jax.Array], jax.Array]) -> Transformation:
    return optax.stateless(lambda updates, params: jax.tree.map(function, updates))


BASES: dict[str, Callable[[], Transformation]] = {
    "adam": partial(optax.adam, 1e-3),
    "adamw": partial(optax.adamw, 1e-3),
    "sgd": partial(optax.sgd, 1e-3, momentum=0.9),
}
FRONTS: dict[str, Callable[[], Transformation]] = {
    "alone": optax.identity,
    "stablegrad": stablegrad,
    "stablegrad, delayed": partial(stablegrad, delayed=True),
    "clip_by_global_norm": partial(optax.clip_by_global_norm, 1.0),
    "clip_by_block_rms": partial(optax.clip_by_block_rms, 1.0),
    "adaptive_grad_clip": partial(optax.adaptive_grad_clip, 0.01),
    # arXiv:1707.04822 and arXiv:2408.01215
    "block-normalized": lambda: _of_each_leaf(lambda g: g / jnp.linalg.norm(g)),
    "ZNorm": lambda: _of_each_leaf(lambda g: (g - jnp.mean(g)) / jnp.std(g)),
}
OURS = ("alone", "stablegrad", "stablegrad, delayed")
"""Both forms of the transform, and what they are beside."""
WHOLE: dict[str, Callable[[], Transformation]] = {
    "lamb": partial(optax.lamb, 1e-3),
    "novograd": partial(optax.novograd, 1e-3),
    "muon": partial(optax.contrib.muon, 1e-3),
    "adam, bfloat16 mu": partial(optax.adam, 1e-3, mu_dtype=jnp.bfloat16),
    "stablegrad_adam, bfloat16 mu": partial(stablegrad_adam, 1e-3, mu_dtype=jnp.bfloat16),
    "stablegrad_adam, delayed, bfloat16 mu": partial(
        stablegrad_adam, 1e-3, delayed=True, mu_dtype=jnp.bfloat16
    ),
    "stablegrad_sgd, delayed, momentum": partial(stablegrad_sgd, 1e-3, momentum=0.9, delayed=True),
}


def arm(front: str, base: str) -> Transformation:
    """What is called ``front``, before the base optimizer where it is not a whole optimizer."""
    return WHOLE[front]() if front in WHOLE else optax.chain(FRONTS[front](), BASES[base]())


def step_of(tx: Transformation) -> Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]:
    """One optimizer step: new params and state from params, state and gradients."""

    def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step
