"""The PDEs: each one a residual, an ansatz that is exact on the boundary, and a reference."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pinn.derivatives import Jet


@dataclass(frozen=True)
class Problem:
    """A PDE on a rectangle, with the values of its solution on some of the sides.

    Attributes:
        name: What it is called on the command line.
        equation: The PDE, for people.
        coordinates: Names of the two coordinates.
        lower: Lower corner of the rectangle.
        upper: Upper corner of the rectangle.
        sides: The sides on which the solution is given, each as (coordinate, at its upper end).
        residual: ``residual(points, jet)`` is [n], zero where the field with that jet solves the
            PDE.
        ansatz: ``ansatz(points, output)``, both [n], is a field that has the given values on the
            sides whatever the output is.
        soft_weight: Weight of the mean squared error on the sides, beside a weight of 1 of the mean
            squared residual, where the network itself is the field.
        reference: The solution in float64 NumPy, [n] at points [n, 2].
        grid_shape: Points of the evaluation grid along each coordinate.
        solved_below: The relative L2 error under which a run counts as solved.
    """

    name: str
    equation: str
    coordinates: tuple[str, str]
    lower: tuple[float, float]
    upper: tuple[float, float]
    sides: tuple[tuple[int, bool], ...]
    residual: Callable[[jax.Array, Jet], jax.Array]
    ansatz: Callable[[jax.Array, jax.Array], jax.Array]
    soft_weight: float
    reference: Callable[[np.ndarray], np.ndarray]
    grid_shape: tuple[int, int]
    solved_below: float

    def sample(self, key: jax.Array, count: int) -> jax.Array:
        """Uniform collocation points, [count, 2]."""
        lower, upper = jnp.array(self.lower), jnp.array(self.upper)
        return jax.random.uniform(key, (count, 2), minval=lower, maxval=upper)

    def sample_sides(self, key: jax.Array, count: int) -> jax.Array:
        """Uniform points on the sides on which the solution is given, [count, 2]."""
        points_key, side_key = jax.random.split(key)
        points = self.sample(points_key, count)
        ends = jnp.array([(self.lower, self.upper)[upper][axis] for axis, upper in self.sides])
        axes = jnp.array([axis for axis, _ in self.sides])
        side = jax.random.randint(side_key, (count,), 0, len(self.sides))
        return points.at[jnp.arange(count), axes[side]].set(ends[side])

    def given(self, points: jax.Array) -> jax.Array:
        """The given values at points on the sides, [n]."""
        return self.ansatz(points, jnp.zeros(len(points)))

    def grid(self) -> np.ndarray:
        """The evaluation grid with its boundary, [*grid_shape, 2], in float64."""
        axes = [
            np.linspace(*ends) for ends in zip(self.lower, self.upper, self.grid_shape, strict=True)
        ]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


BURGERS_VISCOSITY = 0.01 / np.pi


def burgers_residual(points: jax.Array, u: Jet) -> jax.Array:
    """``u_t + u u_x - nu u_xx``."""
    (u_x, u_t), (u_xx, _) = u.slopes, u.curvatures
    return u_t + u.value * u_x - BURGERS_VISCOSITY * u_xx


def burgers_ansatz(points: jax.Array, output: jax.Array) -> jax.Array:
    """Is ``-sin(pi x)`` at t = 0 and 0 at x = -1 and x = 1."""
    x, t = points[:, 0], points[:, 1]
    return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * output


def burgers_reference(points: np.ndarray, nodes: int = 150) -> np.ndarray:
    """Cole-Hopf transform, its heat-kernel integral by Gauss-Hermite quadrature.

    The largest exponent is subtracted before ``exp``, which would overflow at this viscosity.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * BURGERS_VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * BURGERS_VISCOSITY)
    density = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -np.sum(density * np.sin(np.pi * y), axis=1) / np.sum(density, axis=1)


def square_ansatz(points: jax.Array, output: jax.Array) -> jax.Array:
    """Is 0 on the boundary of (-1, 1)^2."""
    return (1 - points[:, 0] ** 2) * (1 - points[:, 1] ** 2) * output


def poisson_residual(points: jax.Array, u: Jet) -> jax.Array:
    """``u_xx + u_yy + 2 pi^2 sin(pi x) sin(pi y)``."""
    source = 2 * jnp.pi**2 * jnp.sin(jnp.pi * points[:, 0]) * jnp.sin(jnp.pi * points[:, 1])
    return u.curvatures[0] + u.curvatures[1] + source


def poisson_reference(points: np.ndarray) -> np.ndarray:
    """``sin(pi x) sin(pi y)``."""
    return np.prod(np.sin(np.pi * points), axis=1)


HELMHOLTZ_WAVES = (1, 4)
HELMHOLTZ_WAVENUMBER = 1.0


def helmholtz_residual(points: jax.Array, u: Jet) -> jax.Array:
    """``u_xx + u_yy + k^2 u - q`` with the q of the solution ``sin(pi x) sin(4 pi y)``."""
    a, b = HELMHOLTZ_WAVES
    waves = jnp.sin(a * jnp.pi * points[:, 0]) * jnp.sin(b * jnp.pi * points[:, 1])
    source = (HELMHOLTZ_WAVENUMBER**2 - (a**2 + b**2) * jnp.pi**2) * waves
    laplacian = u.curvatures[0] + u.curvatures[1]
    return laplacian + HELMHOLTZ_WAVENUMBER**2 * u.value - source


def helmholtz_reference(points: np.ndarray) -> np.ndarray:
    """``sin(pi x) sin(4 pi y)``."""
    return np.prod(np.sin(np.pi * np.array(HELMHOLTZ_WAVES) * points), axis=1)


SQUARE_SIDES = ((0, False), (0, True), (1, False), (1, True))

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            name="burgers",
            equation="u_t + u u_x = (0.01/π) u_xx,  u(x, 0) = -sin πx,  u(±1, t) = 0",
            coordinates=("x", "t"),
            lower=(-1.0, 0.0),
            upper=(1.0, 1.0),
            sides=((0, False), (0, True), (1, False)),
            residual=burgers_residual,
            ansatz=burgers_ansatz,
            soft_weight=10.0,
            reference=burgers_reference,
            grid_shape=(201, 51),
            solved_below=0.1,
        ),
        Problem(
            name="poisson",
            equation="-Δu = 2π² sin πx sin πy,  u = 0 on the boundary",
            coordinates=("x", "y"),
            lower=(-1.0, -1.0),
            upper=(1.0, 1.0),
            sides=SQUARE_SIDES,
            residual=poisson_residual,
            ansatz=square_ansatz,
            soft_weight=100.0,
            reference=poisson_reference,
            grid_shape=(101, 101),
            solved_below=0.01,
        ),
        Problem(
            name="helmholtz",
            equation="Δu + u = q,  u = sin πx sin 4πy,  u = 0 on the boundary",
            coordinates=("x", "y"),
            lower=(-1.0, -1.0),
            upper=(1.0, 1.0),
            sides=SQUARE_SIDES,
            residual=helmholtz_residual,
            ansatz=square_ansatz,
            soft_weight=100.0,
            reference=helmholtz_reference,
            grid_shape=(101, 101),
            solved_below=0.1,
        ),
    )
}
