"""What takes the places of optax's optimizers and transforms in optax's own tests.

No ``from __future__ import annotations`` here: optax reads the annotation of ``learning_rate`` as
an object, and skips a test where it is a string.
"""

from functools import partial
from typing import Any

import optax

from stablegrad_optax import (
    LayerAxes,
    stablegrad,
    stablegrad_adam,
    stablegrad_adamw,
    stablegrad_sgd,
)


def on_own_gradient(**options: Any) -> optax.GradientTransformationExtraArgs:
    """The paper's reference, with the gradient for the prediction gradient that optax lacks."""
    tx = stablegrad("prediction", **options)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return tx.update(updates, state, params, prediction_grad=updates, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def delayed() -> optax.GradientTransformationExtraArgs:
    return stablegrad(delayed=True)


def sgd_on_own_gradient(
    learning_rate: optax.ScalarOrSchedule, momentum: float, decay: float
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(on_own_gradient(decay=decay), optax.sgd(learning_rate, momentum))


# By the name under which a test looks them up in optax. Ours take all that optax's own take, so
# they also stand where a test calls optax.sgd, adam or adamw itself.
# With a memory: optax's problems are to be solved at a constant learning rate, and without one
# every step of SGD would be as long as that, and a delayed gain as wild as the gradient before.
OPTIMIZERS = {
    "sgd": partial(stablegrad_sgd, decay=0.9),
    "adam": partial(stablegrad_adam, decay=0.9),
    "adamw": partial(stablegrad_adamw, decay=0.9),
    "sgd_on_own_gradient": sgd_on_own_gradient,
}

# Rows for the tables of optimizers, beside optax's own for sgd, adam and adamw, whose options ours
# get as they are: a fixed reference keeps the steps of SGD at the learning rate to the end, and
# optax's 1e-3 is well below the 3e-2 to which it wants the optimum. With fade_below=1 a step is the
# gradient over the largest one so far, 13 on the parabola, times the learning rate, with which 1e-3
# does not arrive in optax's 10,000 steps. On its own gradient SGD is nearly plain SGD: it has
# optax's options for that.
ROWS = [
    {"opt_name": "sgd", "opt_kwargs": {"learning_rate": 1e-2, "fade_below": 1.0}},
    {
        "opt_name": "sgd_on_own_gradient",
        "opt_kwargs": {"learning_rate": 1e-3, "momentum": 0.9, "decay": 0.0},
    },
    {"opt_name": "adam", "opt_kwargs": {"learning_rate": 1e-1, "delayed": True, "balance": 0.5}},
]

# For the other tables, by the first parameter of the tests they are for.
TABLES: dict[str, list[tuple[Any, ...]]] = {
    "optimizer": [
        ("stablegrad", stablegrad()),
        ("delayed", delayed()),
        ("on_own_gradient", on_own_gradient()),
        # optax spreads axis 1 of its one parameter over the devices: here each has a layer of it.
        ("layers_over_devices", stablegrad(layers=LayerAxes((0, 2)))),
        ("sgd", stablegrad_sgd(1.0, momentum=0.9)),
        ("adam", stablegrad_adam(1.0)),
        ("adamw", stablegrad_adamw(1.0)),
    ],
    "scaler_constr": [
        ("stablegrad", stablegrad),
        ("delayed", delayed),
        ("on_own_gradient", on_own_gradient),
    ],
    "transform_constr": [
        ("stablegrad", stablegrad, {}),
        ("delayed", delayed, {}),
        ("on_own_gradient", on_own_gradient, {}),
        ("sgd", stablegrad_sgd, {"learning_rate": 0.1, "momentum": 0.9}),
        ("adam", stablegrad_adam, {"learning_rate": 0.1}),
        ("adamw", stablegrad_adamw, {"learning_rate": 0.1}),
    ],
}
