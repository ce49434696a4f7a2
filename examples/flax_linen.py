"""Flax Linen: stablegrad in the optimizer of a TrainState.

The one line to add is ``tx = optax.chain(stablegrad(), optax.adam(1e-2))``: the TrainState and its
``apply_gradients`` stay as they are. ``reference="prediction"`` needs one argument more in
``tx.update``, which ``apply_gradients`` does not pass on, so ``prediction_step`` calls it itself.

Run it: ``python examples/flax_linen.py``
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from stablegrad_optax import layer_scales, prediction_value_and_grad, stablegrad

INPUTS = jnp.linspace(-1, 1, 64)[:, None]
TARGETS = jnp.sin(3 * INPUTS)


class Net(nn.Module):
    """Four tanh layers without normalization."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(1)(x)


def squared_error(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


@jax.jit
def step(state: TrainState) -> tuple[TrainState, jax.Array]:
    """A training step as in any Flax program."""

    def loss(params: Any) -> jax.Array:
        return squared_error(state.apply_fn({"params": params}, INPUTS))

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@jax.jit
def prediction_step(state: TrainState) -> tuple[TrainState, jax.Array]:
    """The same for ``stablegrad("prediction")``."""

    def predict(params: Any) -> jax.Array:
        return state.apply_fn({"params": params}, INPUTS)

    value_and_grad = prediction_value_and_grad(predict, squared_error)
    value, (grads, prediction_grad) = value_and_grad(state.params)
    updates, opt_state = optax.with_extra_args_support(state.tx).update(
        grads, state.opt_state, state.params, prediction_grad=prediction_grad
    )
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), value


def train(tx: Any, steps: int, step: Callable[..., Any] = step) -> tuple[list[float], Any, Any]:
    model = Net()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    losses: list[float] = []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    return losses, state.params, state.opt_state


def main(steps: int = 300) -> None:
    losses, params, opt_state = train(optax.chain(stablegrad(), optax.adam(1e-2)), steps)
    print(f"stablegrad(): loss {losses[0]:.2g} -> {losses[-1]:.2g}")
    for path, scale in layer_scales(opt_state, params).items():
        print(f"  {path}: gradient scale {scale:.2g}")

    tx = optax.chain(stablegrad("prediction"), optax.adam(1e-2))
    losses, _, _ = train(tx, steps, prediction_step)
    print(f"stablegrad('prediction'): loss {losses[0]:.2g} -> {losses[-1]:.2g}")


if __name__ == "__main__":
    main()
