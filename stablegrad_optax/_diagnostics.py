"""What the running scales say about a network."""

from typing import Any

import jax

from stablegrad_optax._layers import LayerRule, layout_of, per_leaf
from stablegrad_optax._stablegrad import StableGradState

PyTree = Any


def layer_scales(
    opt_state: PyTree, params: PyTree, layers: PyTree | LayerRule = per_leaf
) -> dict[str, jax.Array]:
    r"""The running gradient scale of each layer by its path, from any optimizer state.

    For layer :math:`l` at step :math:`t` it is :math:`s_{l,t}` of :func:`stablegrad`, in units of
    the gradient,

    .. math::
        s_{l,t} = d\, s_{l,t-1} + (1 - d)\, \sigma_{l,t},

    with 0 for a layer whose gradient has been all zeros.

    Args:
      opt_state: Any pytree with one :class:`StableGradState` in it, such as the state of a chain.
      params: The params, or anything with their paths, shapes and dtypes.
      layers: The ``layers`` that were given to :func:`stablegrad`.

    Returns:
      ``{path: scale}`` with "/"-joined paths in tree order. A scale has shape ``[]``, or the shape
      of the axes that index layers for a leaf that holds several, and the dtype of the state.
      Leaves that are left alone are not in it.

    Raises:
      ValueError: There is no ``StableGradState`` in ``opt_state`` or more than one, or it does not
        fit ``params`` and ``layers``.

    Example:
      >>> import jax.numpy as jnp, optax, stablegrad_optax as sg
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
      >>> tx = optax.chain(sg.stablegrad(), optax.adam(1e-3))
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> {path: float(scale) for path, scale in sg.layer_scales(opt_state, params).items()}
      {'dense/bias': 1.0, 'dense/kernel': 1.0}

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_stablegrad_state)
    states = [node for node in nodes if _is_stablegrad_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"layer_scales: opt_state has {len(states)} StableGradState in it, and needs exactly "
            "one: give it the state of a chain with one stablegrad, or the part that holds it."
        )
    (state,) = states
    layout = layout_of(layers, params)
    if state.grad_scale.shape != (layout.num_layers,):
        raise ValueError(
            f"layer_scales: opt_state has scales of shape {state.grad_scale.shape}, but params and "
            f"layers make {layout.num_layers} layers. Give the same layers as stablegrad got; for "
            "optax.masked or optax.partition, params with None in place of the leaves that are not "
            "its own; for a batch of states, jax.vmap(lambda s: layer_scales(s, params)).",
        )
    return {
        leaf.path: scale.reshape(leaf.layer_shape)
        for leaf, scale in zip(layout.scaled, layout.split(state.grad_scale), strict=True)
    }


def _is_stablegrad_state(node: Any) -> bool:
    return isinstance(node, StableGradState)
