"""The running scales by layer, as arrays and as a logger's floats."""

from typing import Any

import jax
import numpy as np

from stablegrad_optax._inspect import layer_names, state_and_layout
from stablegrad_optax._layers import LayerRule, per_leaf

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
    state, layout = state_and_layout(opt_state, params, layers)
    return {
        leaf.path: scale.reshape(leaf.layer_shape)
        for leaf, scale in zip(layout.scaled, layout.split(state.grad_scale), strict=True)
    }


def scale_metrics(
    opt_state: PyTree,
    params: PyTree,
    layers: PyTree | LayerRule = per_leaf,
    *,
    prefix: str = "grad_scale/",
) -> dict[str, float]:
    r"""The running gradient scale of each layer as a flat dict of floats, as loggers take it.

    The numbers are the :math:`s_{l,t}` of :func:`layer_scales`, fetched from the device in one
    piece.

    Args:
      opt_state: Any pytree with one :class:`StableGradState` in it, outside of ``jax.jit``.
      params: The params, or anything with their paths, shapes and dtypes.
      layers: The ``layers`` that were given to :func:`stablegrad`.
      prefix: What each name starts with. Loggers make one group of what is before the first "/".

    Returns:
      ``{name: float}`` in tree order. A name is the layer's path, followed by its indices for a
      leaf that holds several layers: ``"grad_scale/blocks/kernel/0"``.

    Raises:
      ValueError: As :func:`layer_scales`.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> params = {"blocks": jnp.ones((2, 3, 4)), "head": jnp.ones(4)}
      >>> layers = sg.stacked("blocks")
      >>> tx = sg.stablegrad(layers=layers)
      >>> _, opt_state = tx.update(params, tx.init(params))
      >>> sg.scale_metrics(opt_state, params, layers)
      {'grad_scale/blocks/0': 1.0, 'grad_scale/blocks/1': 1.0, 'grad_scale/head': 1.0}

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    state, layout = state_and_layout(opt_state, params, layers)
    names = [f"{prefix}{name}" for name in layer_names(layout)]
    return dict(zip(names, np.asarray(state.grad_scale).tolist(), strict=True))
