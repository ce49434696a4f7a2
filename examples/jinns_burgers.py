"""jinns: its own Burgers problem, solved by jinns.solve with stablegrad in front of Adam.

The one line to add is ``tx``, which ``jinns.solve`` takes as its ``optimizer``. For
``reference="prediction"`` the prediction is what enters the loss: the residuals at all points.
``jinns.solve`` takes the gradients itself, and gets what else ``tx.update`` needs from the
functions in ``extra_optax_args_and_kwargs``.

Run it: ``python examples/jinns_burgers.py``
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from jinns.loss import BurgersEquation, Dirichlet, LossPDENonStatio, LossWeightsPDENonStatio
from jinns.parameters import Params

from stablegrad_optax import layer_scales, stablegrad


def burgers() -> tuple[Params[Any], jinns.data.CubicMeshPDENonStatio, LossPDENonStatio]:
    key = jax.random.key(0)
    u, nn_params = jinns.nn.PINN_MLP.create(
        key=key,
        eq_type="PDENonStatio",
        eqx_list=(
            (eqx.nn.Linear, 2, 16),
            (jnp.tanh,),
            (eqx.nn.Linear, 16, 16),
            (jnp.tanh,),
            (eqx.nn.Linear, 16, 1),
        ),
    )
    params = Params(nn_params=nn_params, eq_params={"nu": jnp.array(0.01 / jnp.pi)})
    points = jinns.data.CubicMeshPDENonStatio(
        key=key, n=256, nb=64, ni=64, dim=1, min_pts=(-1.0,), max_pts=(1.0,), tmin=0.0, tmax=1.0
    )
    loss = LossPDENonStatio(
        u=u,
        params=params,
        dynamic_loss=BurgersEquation(),
        boundary_condition=Dirichlet(),
        initial_condition_fun=lambda x: -jnp.sin(jnp.pi * x),
        loss_weights=LossWeightsPDENonStatio(
            dyn_loss=jnp.array(1.0),
            initial_condition=jnp.array(10.0),
            boundary_loss=jnp.array(1.0),
        ),
    )
    return params, points, loss


def loss_of_residuals(residuals: Any, loss: LossPDENonStatio) -> jax.Array:
    """The weighted sum of mean squares that jinns minimizes."""

    def mean_square(parts: Any) -> Any:  # a part for each equation, or each side of the domain
        return sum(jnp.mean(jnp.sum(part**2, axis=-1)) for part in jax.tree.leaves(parts))

    weights = loss.loss_weights
    return (
        weights.dyn_loss * mean_square(residuals.dyn_loss)
        + weights.initial_condition * mean_square(residuals.initial_condition)
        + weights.boundary_loss * mean_square(residuals.boundary_loss)
    )


def get_prediction_grad(loss: LossPDENonStatio, params: Params[Any], batch: Any) -> Any:
    """What jinns calls in each step, by the names of its own variables; its name starts so."""
    return jax.grad(loss_of_residuals)(loss.evaluate_per_sample(params, batch), loss)


def train(tx: Any, steps: int, extra: Any = None) -> tuple[jax.Array, Any, Any]:
    init_params, points, loss = burgers()
    params, losses, _, _, _, opt_state, *_ = jinns.solve(
        n_iter=steps,
        init_params=init_params,
        data=points,
        loss=loss,
        optimizer=tx,
        extra_optax_args_and_kwargs=extra,
        verbose=False,
    )
    return losses, params, opt_state


def main(steps: int = 500) -> None:
    tx = optax.chain(stablegrad(balance=0.5), optax.adam(5e-3))
    losses, params, opt_state = train(tx, steps)
    print(f"stablegrad(balance=0.5): loss {losses[0]:.2g} -> {losses[-1]:.2g}")
    for path, scale in layer_scales(opt_state, params).items():
        print(f"  {path}: gradient scale {scale:.2g}")

    tx = optax.chain(stablegrad("prediction"), optax.adam(5e-3))
    losses, _, _ = train(tx, steps, {"prediction_grad": get_prediction_grad})
    print(f"stablegrad('prediction'): loss {losses[0]:.2g} -> {losses[-1]:.2g}")


if __name__ == "__main__":
    main()
