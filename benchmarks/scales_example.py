"""Draw the picture of docs/diagnostics.md: the gradient scales of a deep tanh network."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stablegrad_optax import ScaleHistory, plot_scales, stablegrad_adam

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scales_example.png"
DEPTH, WIDTH, STEPS = 24, 32, 3000


def main() -> None:
    x = jnp.linspace(-1, 1, 64)[:, None]
    keys = jax.random.split(jax.random.key(0), DEPTH)
    sizes = [1, *[WIDTH] * (DEPTH - 1), 1]
    params = {
        f"Dense_{i}": {
            "kernel": jax.random.normal(keys[i], (sizes[i], sizes[i + 1])) / sizes[i] ** 0.5,
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(DEPTH)
    }
    tx = stablegrad_adam(optax.cosine_decay_schedule(1e-3, STEPS))

    def loss(params: Any) -> jax.Array:
        h = x
        for i in range(DEPTH):
            z = h @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            h = jnp.tanh(z) if i < DEPTH - 1 else z
        return jnp.mean((h - jnp.sin(6 * x)) ** 2)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, opt_state, history = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, history.record(opt_state)), value

    opt_state = tx.init(params)
    start = (params, opt_state, ScaleHistory.init(opt_state))
    (_, _, history), losses = jax.lax.scan(step, start, length=STEPS)
    print(f"loss {losses[0]:.2g} at the first step, {losses[-1]:.2g} at the last")
    plot_scales(history, params, pattern="kernel").savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
