"""Equinox: stablegrad in front of Adam, with stacked layers.

The one line to add is ``tx``; as for any optax optimizer, ``tx.init`` takes the model's arrays,
``eqx.filter(model, eqx.is_inexact_array)``. ``eqx.filter_vmap`` makes the blocks with all their
arrays stacked along axis 0; ``stacked("^blocks/")`` says that each index of that axis is a layer.

Run it: ``python examples/equinox_mlp.py``
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import layer_scales, prediction_value_and_grad, stablegrad, stacked

INPUTS = jnp.linspace(-1, 1, 64)[:, None]
TARGETS = jnp.sin(3 * INPUTS)
LAYERS = stacked("^blocks/")


class Net(eqx.Module):
    """Eight tanh layers without normalization."""

    first: eqx.nn.Linear
    blocks: eqx.nn.Linear
    last: eqx.nn.Linear
    activation: Callable[[jax.Array], jax.Array]

    def __init__(self, key: jax.Array) -> None:
        first, blocks, last = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(1, 16, key=first)
        self.blocks = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(
            jax.random.split(blocks, 7)
        )
        self.last = eqx.nn.Linear(16, 1, key=last)
        self.activation = jnp.tanh

    def __call__(self, x: jax.Array) -> jax.Array:
        arrays, static = eqx.partition(self.blocks, eqx.is_array)

        def through_block(x: jax.Array, arrays: Any) -> tuple[jax.Array, None]:
            return self.activation(eqx.combine(arrays, static)(x)), None

        x, _ = jax.lax.scan(through_block, self.activation(self.first(x)), arrays)
        return self.last(x)


def squared_error(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


@eqx.filter_jit
def step(model: Net, opt_state: Any, tx: Any) -> tuple[Net, Any, jax.Array]:
    """A training step as in any Equinox program."""
    loss = eqx.filter_value_and_grad(lambda model: squared_error(jax.vmap(model)(INPUTS)))
    value, grads = loss(model)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, value


@eqx.filter_jit
def prediction_step(model: Net, opt_state: Any, tx: Any) -> tuple[Net, Any, jax.Array]:
    """The same for ``stablegrad("prediction")``, whose params are the model's arrays."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def predict(params: Any) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(INPUTS)

    value, (grads, prediction_grad) = prediction_value_and_grad(predict, squared_error)(params)
    updates, opt_state = tx.update(grads, opt_state, params, prediction_grad=prediction_grad)
    return eqx.apply_updates(model, updates), opt_state, value


def train(tx: Any, steps: int, step: Callable[..., Any] = step) -> tuple[list[float], Any, Any]:
    model = Net(jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    losses: list[float] = []
    for _ in range(steps):
        model, opt_state, value = step(model, opt_state, tx)
        losses.append(float(value))
    return losses, eqx.filter(model, eqx.is_inexact_array), opt_state


def main(steps: int = 300) -> None:
    tx = optax.chain(stablegrad(layers=LAYERS), optax.adam(1e-2))
    losses, params, opt_state = train(tx, steps)
    print(f"stablegrad(): loss {losses[0]:.2g} -> {losses[-1]:.2g}")
    for path, scale in layer_scales(opt_state, params, LAYERS).items():
        print(f"  {path}: gradient scale {scale}")

    tx = optax.chain(stablegrad("prediction", layers=LAYERS), optax.adam(1e-2))
    losses, _, _ = train(tx, steps, prediction_step)
    print(f"stablegrad('prediction'): loss {losses[0]:.2g} -> {losses[-1]:.2g}")


if __name__ == "__main__":
    main()
