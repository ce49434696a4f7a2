"""Gradients of the parameters and of the prediction from one forward and one backward pass."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def prediction_value_and_grad(
    predict: Callable[..., PyTree],
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    predict_has_aux: bool = False,
) -> Callable[..., tuple[Any, tuple[PyTree, PyTree]]]:
    r"""``jax.value_and_grad`` of ``loss(predict(params))`` that also gives the prediction gradient.

    With the prediction :math:`\hat y = \mathrm{predict}(\theta)` and the loss :math:`L(\hat y)`,
    the chain rule goes through the prediction gradient, so that it costs nothing to keep it:

    .. math::
        \nabla_{\hat y} L = \frac{\partial L}{\partial \hat y},\qquad
        \nabla_\theta L = \left(\frac{\partial \hat y}{\partial \theta}\right)^{\!\top}
            \nabla_{\hat y} L .

    The prediction is whatever enters the loss: the logits of a classifier; for a physics-informed
    network the residual at each collocation point and the boundary values.

    Args:
      predict: ``predict(params, *args, **kwargs)`` gives the prediction, a pytree of floating
        arrays of any shape. ``params`` is a pytree of floating arrays.
      loss: ``loss(prediction, *args, **kwargs)`` gives a real scalar. It takes the same arguments
        as ``predict``, such as a batch of inputs and targets.
      has_aux: If True, ``loss`` gives ``(scalar, aux)``.
      predict_has_aux: If True, ``predict`` gives ``(prediction, aux)``, such as updated batch
        statistics.

    Returns:
      A function of ``(params, *args, **kwargs)`` that gives ``(value, (grads, prediction_grad))``:
      ``grads`` like ``params``, ``prediction_grad`` like the prediction, in shape and dtype. With
      one of the aux options ``value`` is ``(value, aux)``, with both it is
      ``(value, (predict_aux, loss_aux))``.

    Raises:
      TypeError: ``predict`` or ``loss`` is not callable; the loss is not a real scalar, or the
        prediction has a part that is not floating (as it has if ``predict`` gives an aux and
        ``predict_has_aux`` is not set).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from stablegrad_optax import prediction_value_and_grad, stablegrad
      >>> value_and_grad = prediction_value_and_grad(
      ...     predict=lambda params, x, y: x @ params,
      ...     loss=lambda prediction, x, y: jnp.mean((prediction - y) ** 2),
      ... )
      >>> params, x, y = jnp.zeros((3, 1)), jnp.eye(3), jnp.ones((3, 1))
      >>> tx = optax.chain(stablegrad(reference="prediction"), optax.sgd(0.1, momentum=0.9))
      >>> value, (grads, prediction_grad) = value_and_grad(params, x, y)
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, prediction_grad=prediction_grad
      ... )

    References:
      The reference scale of StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    for name, function in (("predict", predict), ("loss", loss)):
        if not callable(function):
            raise TypeError(
                f"prediction_value_and_grad: {name} must be a function, got {function!r}."
            )

    def value_and_grad(
        params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[PyTree, PyTree]]:
        def prediction_and_aux(params: PyTree) -> tuple[PyTree, Any]:
            prediction = predict(params, *args, **kwargs)
            return prediction if predict_has_aux else (prediction, None)

        prediction, pullback, predict_aux = jax.vjp(prediction_and_aux, params, has_aux=True)
        value, prediction_grad = jax.value_and_grad(loss, has_aux=has_aux)(
            prediction, *args, **kwargs
        )
        (grads,) = pullback(prediction_grad)

        if predict_has_aux:
            value = (value[0], (predict_aux, value[1])) if has_aux else (value, predict_aux)
        return value, (grads, prediction_grad)

    return value_and_grad
