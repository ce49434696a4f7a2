"""Initialization that keeps the forward pass well scaled: the other half of training norm-free."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Activation = Callable[[Any], Any]  # of an array; NumPy's functions will do

# Even, so that the nodes lie symmetric around 0 with none on it, and the halves of a function with
# a kink at 0 (relu, leaky relu, elu) are each integrated as the smooth functions they are.
_NODES = 128


def activation_gain(fn: Activation) -> float:
    r"""The factor that brings an activation's output back to unit second moment.

    .. math::
        G = 1 \big/ \sqrt{\mathbb{E}_{z \sim N(0, 1)}\left[\mathrm{fn}(z)^2\right]}

    by Gauss-Hermite quadrature with 128 nodes, which lie 0.28 apart near 0: exact to rounding for
    functions that are smooth on that scale and for piecewise polynomials that change at 0, less so
    for steeper ones such as ``sin(10 z)``. Weights of variance :math:`G^2 / \text{fan-in}` then
    keep the second moment of the pre-activations at 1 from layer to layer.

    Args:
      fn: An elementwise function, such as ``jnp.tanh``; it is called with a float array of shape
        ``[128]``.

    Returns:
      The gain, a dimensionless Python float. 1.4142 for relu, 1.5925 for tanh.

    Raises:
      TypeError: ``fn`` is not callable.
      ValueError: ``fn`` is not elementwise, or its second moment is 0 or not finite.

    Example:
      >>> import jax, stablegrad_optax as sg
      >>> round(sg.activation_gain(jax.nn.relu), 4)
      1.4142

    References:
      He et al., *Delving Deep into Rectifiers*, 2015,
      `arXiv:1502.01852 <https://arxiv.org/abs/1502.01852>`_, for relu; StableGrad,
      `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_, for its use here.
    """
    if not callable(fn):
        raise TypeError(f"activation_gain: fn must be a function such as jnp.tanh, got {fn!r}.")
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    points = nodes.astype(jnp.result_type(float))
    try:  # compiled apart, so that it is a number also under jit and vmap, as in a stacked init
        values = jax.jit(lambda z: fn(z)).lower(points).compile()(points)
    except jax.errors.TracerArrayConversionError:
        values = fn(points)  # NumPy's own
    values = np.asarray(values, np.float64)
    if values.shape != nodes.shape:
        raise ValueError(
            f"activation_gain: fn must be elementwise, but takes shape {nodes.shape} to "
            f"{values.shape}."
        )
    second_moment = float(np.sum(weights * values**2) / np.sum(weights))
    if not 0 < second_moment < np.inf:
        raise ValueError(
            f"activation_gain: E[fn(z)^2] is {second_moment} for {fn!r}; no factor brings it to 1."
        )
    return second_moment**-0.5


def activation_aware(
    fn: Activation,
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    dtype: Any = jnp.float32,
) -> jax.nn.initializers.Initializer:
    r"""Normal initializer for weights whose input went through ``fn``.

    .. math::
        W \sim N(0,\; G^2 / \text{fan-in}),\qquad
        G = 1 \big/ \sqrt{\mathbb{E}_{z \sim N(0, 1)}\left[\mathrm{fn}(z)^2\right]}

    It keeps the *forward* scale, which no treatment of gradients can repair. The variance of the
    gradient then changes by :math:`G^2\, \mathbb{E}[\mathrm{fn}'(z)^2]` a layer: by 1 for relu, by
    more than 1 for tanh, so that a deep tanh network starts with large gradients.

    Args:
      fn: The elementwise activation whose output the weights multiply.
      in_axis: Axis or axes of the input dimension, as in
        ``jax.nn.initializers.variance_scaling``; all axes that are not named are the receptive
        field.
      out_axis: Axis or axes of the output dimension.
      batch_axis: Axis or axes ignored in counting, such as the layer axis of stacked weights.
      dtype: Default dtype of the weights.

    Returns:
      An initializer: a function of ``(key, shape, dtype)`` that gives an array.

    Raises:
      TypeError: ``fn`` is not callable.
      ValueError: When called: as :func:`activation_gain`, or for a shape with less than two axes.

    Example:
      >>> import flax.linen as nn, jax, stablegrad_optax as sg
      >>> layer = nn.Dense(64, kernel_init=sg.activation_aware(jax.nn.gelu))
      >>> sg.activation_aware(jax.nn.gelu)(jax.random.key(0), (32, 64)).shape
      (32, 64)

    References:
      Used with StableGrad in `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    if not callable(fn):
        raise TypeError(f"activation_aware: fn must be a function such as jnp.tanh, got {fn!r}.")

    def init(
        key: jax.Array, shape: Sequence[int], dtype: Any = dtype, out_sharding: Any = None
    ) -> jax.Array:
        initializer = jax.nn.initializers.variance_scaling(
            activation_gain(fn) ** 2, "fan_in", "normal", in_axis, out_axis, batch_axis
        )
        if out_sharding is None:  # which older versions of JAX do not know
            return initializer(key, shape, dtype)
        return initializer(key, shape, dtype, out_sharding)

    return init
