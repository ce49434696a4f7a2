"""Ready optimizers: :func:`stablegrad` in front of optax's own, with the options of both."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from stablegrad_optax._layers import LayerRule, per_leaf
from stablegrad_optax._stablegrad import stablegrad

PyTree = Any
Numeric = float | jax.Array


def stablegrad_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    reference: Numeric | Literal["prediction"] = 1.0,
    decay: Numeric = 0.0,
    attack: Numeric | None = None,
    balance: Numeric = 1.0,
    equalize: Literal["std", "norm"] = "std",
    fade_below: Numeric = 2**-23,
    delayed: bool = False,
    layers: PyTree | LayerRule = per_leaf,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.sgd`` on gradients scaled by :func:`stablegrad`.

    .. math::
        m_t = \mu\, m_{t-1} + g'_t,\qquad \theta_{t+1} = \theta_t - \alpha_t\, m_t

    with :math:`g'` the gradient after :func:`stablegrad`, and state of half of Adam's size. Every
    gain counts here. With a fixed reference the step does not shrink with the gradient: let the
    learning rate decay, give ``fade_below=1``, or use ``reference="prediction"``. With ``delayed``,
    chain ``stablegrad(delayed=True)``, ``optax.clip(10.0)`` and ``optax.sgd`` instead.

    Args:
      learning_rate: As ``optax.sgd``.
      momentum: As ``optax.sgd``.
      nesterov: As ``optax.sgd``.
      accumulator_dtype: As ``optax.sgd``.
      reference: As :func:`stablegrad`.
      decay: As :func:`stablegrad`.
      attack: As :func:`stablegrad`.
      balance: As :func:`stablegrad`.
      equalize: As :func:`stablegrad`.
      fade_below: As :func:`stablegrad`.
      delayed: As :func:`stablegrad`.
      layers: As :func:`stablegrad`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for params of any shape and floating or complex
      dtype.

    Raises:
      TypeError, ValueError: As :func:`stablegrad`.

    Example:
      >>> import jax.numpy as jnp, optax, stablegrad_optax as sg
      >>> tx = sg.stablegrad_sgd(optax.cosine_decay_schedule(0.1, 1000), momentum=0.9)
      >>> state = tx.init({"kernel": jnp.ones((3, 4))})

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    return optax.chain(
        stablegrad(
            reference,
            decay=decay,
            attack=attack,
            balance=balance,
            equalize=equalize,
            fade_below=fade_below,
            delayed=delayed,
            layers=layers,
        ),
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
    )


def stablegrad_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    reference: Numeric | Literal["prediction"] = 1.0,
    decay: Numeric = 0.0,
    attack: Numeric | None = None,
    balance: Numeric = 1.0,
    equalize: Literal["std", "norm"] = "std",
    fade_below: Numeric = 2**-23,
    delayed: bool = False,
    layers: PyTree | LayerRule = per_leaf,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.adam`` on gradients scaled by :func:`stablegrad`.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g'_t,\quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t'^2,\quad
        \theta_{t+1} = \theta_t - \alpha_t\, \hat m_t / (\sqrt{\hat v_t} + \varepsilon)

    with :math:`g'` the gradient after :func:`stablegrad`. Adam cancels any gain that is constant in
    time; what is left is how the gains move, and an eps that is small beside every gradient.

    Args:
      learning_rate: As ``optax.adam``.
      b1: As ``optax.adam``.
      b2: As ``optax.adam``.
      eps: As ``optax.adam``.
      eps_root: As ``optax.adam``.
      mu_dtype: As ``optax.adam``.
      nesterov: As ``optax.adam``.
      reference: As :func:`stablegrad`.
      decay: As :func:`stablegrad`.
      attack: As :func:`stablegrad`.
      balance: As :func:`stablegrad`.
      equalize: As :func:`stablegrad`.
      fade_below: As :func:`stablegrad`.
      delayed: As :func:`stablegrad`.
      layers: As :func:`stablegrad`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for params of any shape and floating or complex
      dtype.

    Raises:
      TypeError, ValueError: As :func:`stablegrad`.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> tx = sg.stablegrad_adam(1e-3, decay=0.5)
      >>> state = tx.init({"kernel": jnp.ones((3, 4))})

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_; Adam,
      `arXiv:1412.6980 <https://arxiv.org/abs/1412.6980>`_.
    """
    return optax.chain(
        stablegrad(
            reference,
            decay=decay,
            attack=attack,
            balance=balance,
            equalize=equalize,
            fade_below=fade_below,
            delayed=delayed,
            layers=layers,
        ),
        optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
    )


def stablegrad_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    nesterov: bool = False,
    reference: Numeric | Literal["prediction"] = 1.0,
    decay: Numeric = 0.0,
    attack: Numeric | None = None,
    balance: Numeric = 1.0,
    equalize: Literal["std", "norm"] = "std",
    fade_below: Numeric = 2**-23,
    delayed: bool = False,
    layers: PyTree | LayerRule = per_leaf,
) -> optax.GradientTransformationExtraArgs:
    r"""``optax.adamw`` on gradients scaled by :func:`stablegrad`.

    .. math::
        \theta_{t+1} = \theta_t
            - \alpha_t \left(\hat m_t / (\sqrt{\hat v_t} + \varepsilon) + \lambda\, \theta_t\right)

    with the moments :math:`m, v` of :math:`g'`, the gradient after :func:`stablegrad`. The weight
    decay is decoupled: no gain touches it.

    Args:
      learning_rate: As ``optax.adamw``.
      b1: As ``optax.adamw``.
      b2: As ``optax.adamw``.
      eps: As ``optax.adamw``.
      eps_root: As ``optax.adamw``.
      mu_dtype: As ``optax.adamw``.
      weight_decay: As ``optax.adamw``.
      mask: As ``optax.adamw``.
      nesterov: As ``optax.adamw``.
      reference: As :func:`stablegrad`.
      decay: As :func:`stablegrad`.
      attack: As :func:`stablegrad`.
      balance: As :func:`stablegrad`.
      equalize: As :func:`stablegrad`.
      fade_below: As :func:`stablegrad`.
      delayed: As :func:`stablegrad`.
      layers: As :func:`stablegrad`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for params of any shape and floating or complex
      dtype; its ``update`` needs ``params``.

    Raises:
      TypeError, ValueError: As :func:`stablegrad`.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> tx = sg.stablegrad_adamw(1e-3, weight_decay=1e-2, layers=sg.weights_only)
      >>> state = tx.init({"kernel": jnp.ones((3, 4))})

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_; AdamW,
      `arXiv:1711.05101 <https://arxiv.org/abs/1711.05101>`_.
    """
    return optax.chain(
        stablegrad(
            reference,
            decay=decay,
            attack=attack,
            balance=balance,
            equalize=equalize,
            fade_below=fade_below,
            delayed=delayed,
            layers=layers,
        ),
        optax.adamw(
            learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
        ),
    )
