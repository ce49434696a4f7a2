"""Operations whose derivatives hold over the whole floating range, for meta-gradients."""

import jax
import jax.numpy as jnp


def root(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0, so that that of a dead layer is finite."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient, whose own derivative has a y^2 that is 0 or infinite long before y is."""
    return x / y


@quotient.defjvp
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, y), (x_dot, y_dot) = primals, tangents
    result = quotient(x, y)
    return result, x_dot / y - result * (y_dot / y)
