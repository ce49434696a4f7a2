"""Errors that say what was given, what is needed, and the call that gives it."""

import math
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from stablegrad_optax._layers import Layout


def check_options(
    reference: Any,
    decay: Any,
    attack: Any,
    balance: Any,
    equalize: Any,
    fade_below: Any,
    delayed: Any,
    layers: Any,
) -> None:
    """Raise for options of the wrong kind or out of range; traced numbers pass."""
    if isinstance(reference, str):
        if reference != "prediction":
            raise ValueError(
                f"stablegrad: reference must be a positive number or 'prediction', "
                f"got {reference!r}."
            )
    elif not 0 < _concrete("reference", reference, 1.0) < math.inf:
        raise ValueError(
            f"stablegrad: reference must be positive and finite, got {reference}: it is the scale "
            "that every layer's gradient is brought to."
        )
    for name, value in (("decay", decay), ("attack", 0.0 if attack is None else attack)):
        if not 0 <= _concrete(name, value, 0.0) < 1:
            raise ValueError(
                f"stablegrad: {name} must be in [0, 1), got {value}: how much of the running scale "
                "a step keeps. (0.999 rounds to 1 in bfloat16: give optax.inject_hyperparams "
                "a hyperparam_dtype=jnp.float32.)"
            )
    check_gain_options(balance, equalize)
    if not 0 <= _concrete("fade_below", fade_below, 0.0) <= 1:
        raise ValueError(
            f"stablegrad: fade_below must be in [0, 1], got {fade_below}: it is the fraction of "
            "its peak that every layer's scale is below when the reference starts to fade; 0 keeps "
            "the reference, 1 lets it fall with the gradient from the start."
        )
    if not isinstance(delayed, bool):
        raise TypeError(f"stablegrad: delayed must be True or False, got {delayed!r}.")
    if layers is None or isinstance(layers, str | int | float | jax.Array):
        raise TypeError(
            f"stablegrad: layers must be a function of params or a pytree of LayerAxes | None that "
            f"matches them, got {layers!r}. (optax.inject_hyperparams takes any function for a "
            "schedule and calls it: give it static_args=('layers',).)"
        )


def check_gain_options(balance: Any, equalize: Any) -> None:
    """Raise for the options that a gain depends on, as ``check_options`` does."""
    if not 0 <= _concrete("balance", balance, 0.0) <= 1:
        raise ValueError(
            f"stablegrad: balance must be in [0, 1], got {balance}: 1 gives every layer its own "
            "scale, 0 gives all layers the pooled one."
        )
    if not isinstance(equalize, str) or equalize not in ("std", "norm"):
        raise ValueError(
            f"stablegrad: equalize must be 'std' or 'norm', got {equalize!r}: what every layer's "
            "gradient is brought to alike, the scale of its entries or its norm."
        )


def check_state(state: Any, layout: Layout) -> None:
    """Raise if a state is not one of this transform, or was made for other layers."""
    shape = getattr(getattr(state, "grad_scale", None), "shape", None)
    if shape is None:
        raise ValueError(
            f"stablegrad: the state must be a StableGradState, got {type(state).__name__}: make "
            "one with init(params) of this transform."
        )
    if shape != (layout.num_layers,):
        raise ValueError(
            f"stablegrad: the state has scales of shape {shape}, but the gradients have "
            f"{layout.num_layers} layers. The state was made for other params or other `layers`: "
            "make one with init(params) of this transform."
        )


def check_prediction_grad(prediction_grad: Any) -> None:
    """Raise if there is no prediction gradient to take the reference from."""
    if not any(np.size(leaf) for leaf in jax.tree.leaves(prediction_grad)):
        raise ValueError(
            f"stablegrad: reference='prediction' needs the prediction gradient, got "
            f"prediction_grad={prediction_grad!r}. Take it from "
            "stablegrad_optax.prediction_value_and_grad(predict, loss) and call "
            "tx.update(grads, state, params, prediction_grad=prediction_grad)."
        )


def _concrete(name: str, value: Any, valid: float) -> float:
    """The number to check, as the arithmetic will see it; ``valid`` in place of a traced one."""
    if isinstance(value, Tracer):
        return valid
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array)
    if not is_number or np.ndim(value) != 0 or np.asarray(value).dtype.kind not in "iufV":
        raise TypeError(
            f"stablegrad: {name} must be a real number, got {value!r}. (For a schedule, wrap the "
            "transform: optax.inject_hyperparams(stablegrad, static_args=('layers',)).)"
        )
    with np.errstate(over="ignore"):
        return float(np.asarray(value).astype(jax.dtypes.canonicalize_dtype(float)))
