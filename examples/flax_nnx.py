"""Flax NNX: stablegrad in an nnx.Optimizer, with scanned layers.

The one line to add is ``tx``. ``nnx.vmap`` makes the blocks with all their params stacked along
axis 0, ``nnx.scan`` runs through them; ``stacked("^blocks/")`` says that each index of that axis is
a layer. ``optimizer.update`` passes what ``reference="prediction"`` needs on to ``tx.update``.

Run it: ``python examples/flax_nnx.py``
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from stablegrad_optax import layer_scales, prediction_value_and_grad, stablegrad, stacked

INPUTS = jnp.linspace(-1, 1, 64)[:, None]
TARGETS = jnp.sin(3 * INPUTS)
LAYERS = stacked("^blocks/")


class Net(nnx.Module):
    """Eight tanh layers without normalization."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=7)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_blocks(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(16, 16, rngs=rngs)

        self.first = nnx.Linear(1, 16, rngs=rngs)
        self.blocks = make_blocks(rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through_blocks(x: jax.Array, block: nnx.Linear) -> jax.Array:
            return jnp.tanh(block(x))

        return self.last(through_blocks(jnp.tanh(self.first(x)), self.blocks))


def squared_error(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
    """A training step as in any Flax program."""
    value, grads = nnx.value_and_grad(lambda model: squared_error(model(INPUTS)))(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def prediction_step(model: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
    """The same for ``stablegrad("prediction")``."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params: Any) -> jax.Array:
        return nnx.merge(graph, params, rest)(INPUTS)

    value, (grads, prediction_grad) = prediction_value_and_grad(predict, squared_error)(params)
    optimizer.update(model, grads, prediction_grad=prediction_grad)
    return value


def train(tx: Any, steps: int, step: Callable[..., Any] = step) -> tuple[list[float], Any, Any]:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(steps)]
    return losses, nnx.state(model, nnx.Param), optimizer.opt_state


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
