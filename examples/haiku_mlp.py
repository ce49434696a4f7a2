"""Haiku: stablegrad in front of Adam, with the layers of hk.layer_stack.

The one line to add is ``tx``. ``hk.layer_stack`` stacks the params of its layers along axis 0;
``stacked("^blocks/")`` says that each index of that axis is a layer. Give the stack a name to
match: without one its path starts with ``__layer_stack_no_per_layer``.

Run it: ``python examples/haiku_mlp.py``
"""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import layer_scales, prediction_value_and_grad, stablegrad, stacked

INPUTS = jnp.linspace(-1, 1, 64)[:, None]
TARGETS = jnp.sin(3 * INPUTS)
LAYERS = stacked("^blocks/")


def forward(x: jax.Array) -> jax.Array:
    """Eight tanh layers without normalization: the prediction at x, [batch, 1]."""

    def block(x: jax.Array) -> jax.Array:
        return jnp.tanh(hk.Linear(16, name="linear")(x))

    blocks: Any = hk.layer_stack(7, name="blocks")(block)
    return hk.Linear(1, name="last")(blocks(jnp.tanh(hk.Linear(16, name="first")(x))))


NET = hk.without_apply_rng(hk.transform(forward))


def predict(params: Any) -> jax.Array:
    return NET.apply(params, INPUTS)


def squared_error(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - TARGETS) ** 2)


def step(params: Any, opt_state: Any, tx: Any) -> tuple[Any, Any, jax.Array]:
    """A training step as in any Haiku program."""
    value, grads = jax.value_and_grad(lambda params: squared_error(predict(params)))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def prediction_step(params: Any, opt_state: Any, tx: Any) -> tuple[Any, Any, jax.Array]:
    """The same for ``stablegrad("prediction")``."""
    value, (grads, prediction_grad) = prediction_value_and_grad(predict, squared_error)(params)
    updates, opt_state = tx.update(grads, opt_state, params, prediction_grad=prediction_grad)
    return optax.apply_updates(params, updates), opt_state, value


def train(tx: Any, steps: int, step: Callable[..., Any] = step) -> tuple[list[float], Any, Any]:
    params = NET.init(jax.random.key(0), INPUTS)
    opt_state = tx.init(params)
    jitted_step = jax.jit(step, static_argnames="tx")
    losses: list[float] = []
    for _ in range(steps):
        params, opt_state, value = jitted_step(params, opt_state, tx)
        losses.append(float(value))
    return losses, params, opt_state


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
