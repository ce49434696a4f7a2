"""The StableGrad transform: gradient, statistic, running scale, gain, update."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax._checks import check_options, check_prediction_grad, check_state
from stablegrad_optax._gain import apply_gain, gain_of
from stablegrad_optax._layers import LayerRule, layout_of, per_leaf
from stablegrad_optax._reference import faded
from stablegrad_optax._running import known, peak, running
from stablegrad_optax._statistics import layer_statistic, population_statistic, statistic_dtype

PyTree = Any
Numeric = float | jax.Array


class StableGradState(NamedTuple):
    r"""State of :func:`stablegrad`: the running scales, and all that a checkpoint holds of it.

    The vectors :math:`s_{l,t}` and :math:`p_{l,t}` in units of the gradient, and the scalar
    :math:`r_t` in units of the reference. All are 0 before anything has been seen.

    Args:
      grad_scale: float32[num_layers] (float64 for float64 params), the running scale of each layer,
        in tree order and, within a leaf, row-major over the axes that index its layers.
      reference_scale: The same dtype, shape [], the reference of the last step.
      peak_scale: Like ``grad_scale``, the largest scale of each layer so far that two steps in a
        row agree on. None, as with ``reference="prediction"``: no peaks are kept and the reference
        does not fade.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> state = sg.stablegrad().init({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      >>> state.grad_scale
      Array([0., 0.], dtype=float32)

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_; the peaks are ours.
    """

    grad_scale: jax.Array
    reference_scale: jax.Array
    peak_scale: PyTree = None  # an array or None, which optax's type of a state has no place for


def stablegrad(
    reference: Numeric | Literal["prediction"] = 1.0,
    *,
    decay: Numeric = 0.0,
    attack: Numeric | None = None,
    balance: Numeric = 1.0,
    equalize: Literal["std", "norm"] = "std",
    fade_below: Numeric = 2**-23,
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

    with :math:`d` = ``decay`` and :math:`b` = ``balance``. The reference :math:`r_t` is
    ``reference`` until the gradients of all layers have fallen below :math:`f` = ``fade_below`` of
    their peaks :math:`p_l`; from there on it fades with the layer that fell least:

    .. math::
        p_{l,t} &= \max\bigl(p_{l,t-1},\, \min(s_{l,t-1}, \sigma_{l,t})\bigr) \\
        r_t &= \texttt{reference} \cdot \min\bigl(1,\; \max_l s_{l,t} / p_{l,t-1} \,/\, f\bigr)

    There is no eps: a layer whose scale is 0 has an all-zero gradient, and its gain is 1. A
    gradient that is not finite leaves its layer's scale as it was and shows in that layer's update,
    for ``optax.apply_if_finite`` or another guard around it.

    What this can do for Adam: a gain that is constant in time only rescales Adam's eps. It is the
    *movement* of the gains that counts, the common decay and the spikes they take out. With SGD
    every gain counts.

    Args:
      reference: What every layer's scale is brought to. A positive number (default 1.0), or
        ``"prediction"`` for the running scale, by the same recurrence, of the prediction gradient:
        then ``update`` takes ``prediction_grad``, a pytree whose entries are pooled into one
        standard deviation, as :func:`prediction_value_and_grad` gives it. With a fixed reference
        the update does not shrink with the loss: ``fade_below`` or the learning rate must see to
        it.
      decay: :math:`d` in [0, 1), how much of the running scale each step keeps. The default 0 takes
        every gradient by its own scale, as the paper does, so that none is larger than the others;
        with a memory a spike still is. ``docs/pinn.md`` has both measured.
      attack: :math:`d` where :math:`\sigma_{l,t} > s_{l,t-1}`, in [0, 1); None for ``decay``. With
        ``decay=0.9, attack=0`` a scale rises at once and falls slowly, as in an audio compressor:
        with ``balance=1``, and not ``delayed``, no update's scale is above :math:`r_t`, and after a
        spike updates are small. With ``decay=0``, ``attack=0`` changes nothing.
      balance: :math:`b` in [0, 1]. 1 gives every layer its own scale, as the paper does; 0 gives
        all layers the pooled scale and keeps their proportions.
      equalize: What the layers' updates have alike with ``balance=1``: ``"std"``, the scale of
        their entries, or ``"norm"``, for which :math:`r_t` is multiplied by
        :math:`(\bar n / n_l)^{b/2}` with the mean :math:`\bar n` of the layers' :math:`n_l`. A clip
        behind ``delayed`` must then leave room for the small layers, which are that much larger.
      fade_below: :math:`f` in [0, 1]. The default :math:`2^{-23}`, the rounding of float32, keeps
        the gains from blowing up rounding errors once there is nothing left to learn; for a network
        that computes in bfloat16 that is :math:`2^{-8}`. 1 lets the reference fall with the
        gradient from the start, as SGD needs to settle; 0 keeps it. The cost: what all gradients
        fall by below the limit is not made up for. ``"prediction"`` falls by itself and ignores
        it.
      delayed: If True, the gains come from :math:`s_{l,t-1}`, so that this step's statistic can be
        taken in the same pass over the gradient as the base optimizer's work. A layer seen for the
        first time uses its own statistic; as long as there is one that was never seen, every step
        takes the statistic twice, so leave alone (None) what never gets a gradient. All-zero
        gradients leave the scale as it was. A gradient that grows by some factor in one step leaves
        that much larger, and with SGD grows on: put ``optax.clip(10.0)``, 10 times the reference,
        between :func:`stablegrad` and the base optimizer, and give it a memory, ``decay=0.9``.
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
    check_options(reference, decay, attack, balance, equalize, fade_below, delayed, layers)

    def init_fn(params: PyTree) -> StableGradState:
        dtype = statistic_dtype(params)
        num_layers = layout_of(layers, params).num_layers
        peak_scale = None if isinstance(reference, str) else jnp.zeros(num_layers, dtype)
        return StableGradState(jnp.zeros(num_layers, dtype), jnp.zeros((), dtype), peak_scale)

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

        def take_scale() -> tuple[jax.Array, jax.Array]:
            statistic = layer_statistic(updates, layout)
            before = state.grad_scale
            after = running(before, statistic, decay, attack, keep_through_zeros=delayed)
            return statistic, after

        statistic, grad_scale = take_scale()
        scale = grad_scale
        if delayed:
            scale = known(state.grad_scale, grad_scale, lambda: take_scale()[1])

        if isinstance(reference, str):
            check_prediction_grad(prediction_grad)
            seen = population_statistic(prediction_grad)
            reference_scale = running(state.reference_scale, seen, decay, attack)
        else:
            reference_scale = faded(reference, scale, state.peak_scale, fade_below)

        gain = gain_of(scale, layout.entries, balance, reference_scale, equalize)
        peak_scale = peak(state.peak_scale, state.grad_scale, statistic)
        new_state = StableGradState(grad_scale, reference_scale, peak_scale)
        return apply_gain(gain, updates, layout), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
