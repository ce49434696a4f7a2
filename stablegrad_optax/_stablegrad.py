"""The StableGrad transform: gradient, statistic, running scale, gain, update."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax._checks import check_options, check_prediction_grad, check_state
from stablegrad_optax._gain import apply_gain, gain_of
from stablegrad_optax._layers import LayerRule, layout_of, per_leaf
from stablegrad_optax._statistics import layer_statistic, population_statistic, statistic_dtype

PyTree = Any
Numeric = float | jax.Array


class StableGradState(NamedTuple):
    r"""State of :func:`stablegrad`: the running scales, and all that a checkpoint holds of it.

    One vector of :math:`s_{l,t}` and the scalar :math:`r_t`, in units of the gradient and of the
    reference. Both are 0 before anything has been seen.

    Args:
      grad_scale: float32[num_layers] (float64 for float64 params), the running scale of each layer,
        in tree order and, within a leaf, row-major over the axes that index its layers.
      reference_scale: The same dtype, shape [], the reference of the last step.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> state = sg.stablegrad().init({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      >>> state.grad_scale
      Array([0., 0.], dtype=float32)

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """

    grad_scale: jax.Array
    reference_scale: jax.Array


def stablegrad(
    reference: Numeric | Literal["prediction"] = 1.0,
    *,
    decay: Numeric = 0.9,
    balance: Numeric = 1.0,
    delayed: bool = False,
    layers: PyTree | LayerRule = per_leaf,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide each layer's gradient by its running scale and multiply by one shared reference.

    For layer :math:`l` at step :math:`t` with gradient :math:`g_{l,t}` of :math:`n_l` entries:

    .. math::
        \sigma_{l,t} &= \operatorname{std}(g_{l,t})
            \quad\text{(or RMS: see LayerAxes)} \\
        s_{l,t} &= \begin{cases} \sigma_{l,t} & s_{l,t-1} = 0 \\
            d\, s_{l,t-1} + (1 - d)\, \sigma_{l,t} & \text{otherwise} \end{cases} \\
        \bar s_t &= \sqrt{\textstyle\sum_l n_l s_{l,t}^2 \big/ \sum_l n_l} \\
        g'_{l,t} &= g_{l,t} \,\big/\, (s_{l,t}^{\,b}\; \bar s_t^{\,1-b}) \cdot r_t

    with :math:`d` = ``decay``, :math:`b` = ``balance`` and :math:`r_t` = ``reference``. There is no
    eps: a layer whose scale is 0 has an all-zero gradient, and its gain is 1. A gradient that is
    not finite leaves its layer's scale as it was and shows in that layer's update, for
    ``optax.apply_if_finite`` or another guard behind it.

    What this can do for Adam: a gain that is constant in time only rescales Adam's eps. It is the
    *movement* of the gains that counts, the common decay and the spikes they take out. With SGD
    every gain counts.

    Args:
      reference: What every layer's scale is brought to. A positive number (default 1.0), or
        ``"prediction"`` for the running scale, by the same recurrence, of the prediction gradient:
        then ``update`` takes ``prediction_grad``, a pytree whose entries are pooled into one
        standard deviation, as :func:`prediction_value_and_grad` gives it. With a fixed reference
        the update does not shrink with the loss: the learning rate must.
      decay: :math:`d` in [0, 1), how much of the running scale each step keeps. 0 takes every
        gradient by its own scale, as the paper does.
      balance: :math:`b` in [0, 1]. 1 gives every layer its own scale, as the paper does; 0 gives
        all layers the pooled scale and keeps their proportions.
      delayed: If True, the gains come from :math:`s_{l,t-1}`, so that this step's statistic can be
        taken in the same pass over the gradient as the base optimizer's work. A layer seen for the
        first time uses its own statistic; as long as there is one that was never seen, every step
        takes the statistic twice, so leave alone (None) what never gets a gradient. A gradient that
        grows by some factor in one step leaves that much larger; one that comes back after many
        all-zero steps, by which the scale has decayed, can be large without bound.
      layers: What a layer is: a function of params such as :func:`per_leaf`, :func:`weights_only`
        or :func:`stacked`, or a pytree of ``LayerAxes | None`` that matches the params. A function
        is also called on the gradients, so it may look at paths, shapes and dtypes only.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with a :class:`StableGradState`. Statistics are
      float32 (float64 for float64 gradients) and updates have their gradient's shape and dtype.
      ``None`` and ``optax.MaskedNode`` in the tree pass through. In ``optax.inject_hyperparams``
      give ``static_args=("layers",)`` and, for bfloat16 params, ``hyperparam_dtype=jnp.float32``,
      since 0.999 is 1 in bfloat16. ``optax.MultiSteps`` around the chain scales the accumulated
      gradient; ``prediction_grad`` is then that of the last mini-step.

    Raises:
      TypeError: An argument is of the wrong kind.
      ValueError: An argument is out of range (traced numbers are not checked); ``layers`` does not
        fit the params; ``update`` is missing ``prediction_grad``, or its state was made for another
        tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from stablegrad_optax import stablegrad
      >>> tx = optax.chain(stablegrad(), optax.adam(1e-3))
      >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
      >>> loss = lambda p: jnp.sum((jnp.arange(3.0) @ p["kernel"] + p["bias"]) ** 2)
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Mestre et al., *StableGrad: Backward Scale Control without Batch Normalization*, 2026,
      `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_; its form is ``decay=0``,
      ``reference="prediction"``, ``layers=weights_only``.
    """
    check_options(reference, decay, balance, delayed, layers)

    def init_fn(params: PyTree) -> StableGradState:
        dtype = statistic_dtype(params)
        num_layers = layout_of(layers, params).num_layers
        return StableGradState(jnp.zeros(num_layers, dtype), jnp.zeros((), dtype))

    def update_fn(
        updates: PyTree,
        state: Any,  # a StableGradState; optax types every state as any tree
        params: PyTree | None = None,
        *,
        prediction_grad: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, StableGradState]:
        del params, extra
        layout = layout_of(layers, updates)
        check_state(state, layout)

        def next_grad_scale() -> jax.Array:
            return _running(state.grad_scale, layer_statistic(updates, layout), decay)

        grad_scale = next_grad_scale()
        if isinstance(reference, str):
            check_prediction_grad(prediction_grad)
            statistic = population_statistic(prediction_grad)
            reference_scale = _running(state.reference_scale, statistic, decay)
        else:
            reference_scale = jnp.asarray(reference, state.reference_scale.dtype)

        scale = grad_scale
        if delayed:
            scale = _known(state.grad_scale, grad_scale, next_grad_scale)
        gain = gain_of(scale, layout.entries, balance, reference_scale)
        return apply_gain(gain, updates, layout), StableGradState(grad_scale, reference_scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _running(scale: jax.Array, statistic: jax.Array, decay: Numeric) -> jax.Array:
    """The running scale after a step; as it was where the statistic is not finite."""
    d, statistic = jnp.asarray(decay, scale.dtype), statistic.astype(scale.dtype)
    # At the low end of the range (1 - d) * statistic would be flushed to 0; at the high end the sum
    # may overflow, since XLA adds before it multiplies where d is 1 - d.
    larger = jnp.maximum(scale, statistic)
    unit = jnp.where(larger < 2**-60, 2**-60, 1).astype(scale.dtype)
    mean = (d * (scale / unit) + (1 - d) * (statistic / unit)) * unit
    moved = jnp.where(scale == 0, statistic, jnp.where(mean > larger, larger, mean))
    return jnp.where(jnp.isfinite(statistic), moved, scale)


def _known(before: jax.Array, after: jax.Array, take_after: Callable[[], jax.Array]) -> jax.Array:
    """The scales before this step, and those after it for layers seen for the first time.

    A branch that takes the statistic once more, not a select: past the first step no gain then
    waits for this step's statistic, which can ride in the pass that applies the gains.
    """
    before = before + jnp.zeros_like(after)  # under shard_map both branches must vary alike
    return jax.lax.cond(
        jnp.all(before > 0), lambda: before, lambda: jnp.where(before > 0, before, take_after())
    )
