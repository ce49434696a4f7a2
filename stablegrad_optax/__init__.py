"""StableGrad as an optax gradient transformation: per-layer gradient scale control.

Source of the method: Mestre et al., *StableGrad: Backward Scale Control without Batch
Normalization*, 2026, arXiv:2605.19856.
"""

from stablegrad_optax._diagnostics import layer_scales, scale_metrics
from stablegrad_optax._history import ScaleHistory
from stablegrad_optax._initializers import activation_aware, activation_gain
from stablegrad_optax._layers import LayerAxes, per_leaf, stacked, weights_only
from stablegrad_optax._optimizers import stablegrad_adam, stablegrad_adamw, stablegrad_sgd
from stablegrad_optax._plot import plot_scales
from stablegrad_optax._prediction import prediction_value_and_grad
from stablegrad_optax._stablegrad import StableGradState, stablegrad
from stablegrad_optax._table import scale_table

__version__ = "0.1.0"

__all__ = [
    "LayerAxes",
    "ScaleHistory",
    "StableGradState",
    "activation_aware",
    "activation_gain",
    "layer_scales",
    "per_leaf",
    "plot_scales",
    "prediction_value_and_grad",
    "scale_metrics",
    "scale_table",
    "stablegrad",
    "stablegrad_adam",
    "stablegrad_adamw",
    "stablegrad_sgd",
    "stacked",
    "weights_only",
]
