"""Values of a function together with its first and second derivatives along each coordinate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Jet(NamedTuple):
    """A function of the points' coordinates, at the points; or a pytree of such functions.

    Attributes:
        value: The values, [n, ...].
        slopes: The first derivative along each coordinate, each like ``value``.
        curvatures: The second derivative along each coordinate, each like ``value``.
    """

    value: Any
    slopes: tuple[Any, ...]
    curvatures: tuple[Any, ...]


def along_axes(points: jax.Array) -> Jet:
    """The jet of the identity at points, [n, coordinates]."""
    axes = range(points.shape[1])
    slopes = tuple(jnp.zeros_like(points).at[:, axis].set(1.0) for axis in axes)
    return Jet(points, slopes, tuple(jnp.zeros_like(points) for _ in axes))


def taylor(function: Callable[[Any], Any], jet: Jet) -> Jet:
    """The jet of ``function`` of what ``jet`` is the jet of.

    Along each coordinate, with the argument ``x`` and its derivatives ``x'`` and ``x''``, the
    derivative of ``(f(x), f'(x) x')`` is ``(f'(x) x', f''(x)[x', x'] + f'(x) x'')``.
    """

    def value_and_slope(value: Any, slope: Any) -> tuple[Any, Any]:
        return jax.jvp(function, (value,), (slope,))

    derivatives = [
        jax.jvp(value_and_slope, (jet.value, slope), (slope, curvature))
        for slope, curvature in zip(jet.slopes, jet.curvatures, strict=True)
    ]
    # The compiler finds that the value and the slopes are computed more than once.
    return Jet(
        derivatives[0][0][0],
        tuple(slope for (_, slope), _ in derivatives),
        tuple(curvature for _, (_, curvature) in derivatives),
    )


def taylor_elementwise(function: Callable[[jax.Array], jax.Array], jet: Jet) -> Jet:
    """The same for a function of each number by itself, such as an activation.

    Its derivatives are computed once for all coordinates: ``f'(x) x'`` and
    ``f''(x) x'^2 + f'(x) x''``.
    """
    ones = jnp.ones_like(jet.value)

    def value_and_derivative(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(function, (x,), (ones,))

    (value, first), (_, second) = jax.jvp(value_and_derivative, (jet.value,), (ones,))
    return Jet(
        value,
        tuple(first * slope for slope in jet.slopes),
        tuple(
            first * curvature + second * slope**2
            for slope, curvature in zip(jet.slopes, jet.curvatures, strict=True)
        ),
    )


def jet_of(function: Callable[[jax.Array], jax.Array], points: jax.Array) -> Jet:
    """The jet of a function of points, [n, coordinates]."""
    return taylor(function, along_axes(points))
