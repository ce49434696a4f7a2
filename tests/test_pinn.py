"""Problems, networks and the task of the PINN benchmarks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.pinn.derivatives import jet_of
from benchmarks.pinn.experiments import tasks
from benchmarks.pinn.networks import ACTIVATIONS, Network
from benchmarks.pinn.problems import (
    BURGERS_VISCOSITY,
    PROBLEMS,
    Problem,
    burgers_reference,
)
from benchmarks.pinn.task import PREDICTIONS, PinnTask
from stablegrad_optax import activation_gain

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SOLUTIONS = {
    "poisson": lambda p: jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(jnp.pi * p[:, 1]),
    "helmholtz": lambda p: jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(4 * jnp.pi * p[:, 1]),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_analytic_solution_has_no_residual_and_is_the_reference(name: str):
    problem, solution = PROBLEMS[name], SOLUTIONS[name]
    points = problem.sample(jax.random.key(0), 100)
    source = problem.residual(points, jet_of(lambda p: 0.0 * p[:, 0], points))
    residual = problem.residual(points, jet_of(solution, points))
    assert jnp.max(jnp.abs(residual)) < 1e-5 * jnp.max(jnp.abs(source))
    np.testing.assert_allclose(
        problem.reference(np.asarray(points, np.float64)), solution(points), atol=2e-6
    )


def test_the_burgers_reference_solves_the_pde_in_float64():
    rng = np.random.default_rng(0)
    # Away from the shock at x = 0, where a difference quotient of this step cannot follow it.
    x = rng.uniform(0.1, 0.9, 200) * rng.choice([-1, 1], 200)
    t = rng.uniform(0.1, 0.9, 200)
    h = 1e-4

    def u(dx: float = 0.0, dt: float = 0.0) -> np.ndarray:
        return burgers_reference(np.stack([x + dx, t + dt], axis=1))

    u_t = (u(dt=h) - u(dt=-h)) / (2 * h)
    u_x = (u(dx=h) - u(dx=-h)) / (2 * h)
    u_xx = (u(dx=h) - 2 * u() + u(dx=-h)) / h**2
    assert np.max(np.abs(u_t + u() * u_x - BURGERS_VISCOSITY * u_xx)) < 1e-4


def test_the_burgers_residual_is_that_of_a_field_differentiated_by_hand():
    points = PROBLEMS["burgers"].sample(jax.random.key(0), 100)
    x, t = points[:, 0], points[:, 1]
    field = jet_of(lambda p: jnp.sin(3 * p[:, 0]) * p[:, 1] ** 2, points)
    residual = PROBLEMS["burgers"].residual(points, field)
    u, u_t, u_x = jnp.sin(3 * x) * t**2, 2 * t * jnp.sin(3 * x), 3 * jnp.cos(3 * x) * t**2
    by_hand = u_t + u * u_x + 9 * BURGERS_VISCOSITY * u
    np.testing.assert_allclose(residual, by_hand, atol=1e-5)


def test_the_burgers_reference_does_not_depend_on_the_quadrature_order():
    grid = PROBLEMS["burgers"].grid().reshape(-1, 2)
    difference = burgers_reference(grid) - burgers_reference(grid, nodes=200)
    assert np.linalg.norm(difference) < 1e-6 * np.linalg.norm(burgers_reference(grid))


def test_the_burgers_reference_meets_its_initial_and_boundary_values():
    x = np.linspace(-1, 1, 51)
    start = burgers_reference(np.stack([x, 0 * x], axis=1))
    np.testing.assert_allclose(start, -np.sin(np.pi * x), atol=1e-12)
    for side in (-1.0, 1.0):
        edge = burgers_reference(np.stack([0 * x + side, np.linspace(0, 1, 51)], axis=1))
        np.testing.assert_allclose(edge, 0, atol=1e-12)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_ansatz_meets_the_conditions_for_any_network(problem: Problem):
    grid = problem.grid()
    edges = [grid[0], grid[-1], grid[:, 0]]
    if problem.name != "burgers":  # its t = 1 is free
        edges.append(grid[:, -1])
    points = np.concatenate(edges)
    network = Network(depth=2, width=8)
    output = network.apply(network.init(jax.random.key(0)), jnp.asarray(points, jnp.float32))
    assert jnp.min(jnp.abs(output)) < 1e3
    field = problem.ansatz(jnp.asarray(points, jnp.float32), 100 * output + 1)
    np.testing.assert_allclose(field, problem.reference(points), atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_samples_fill_the_domain_that_the_grid_spans(problem: Problem):
    samples, grid = problem.sample(jax.random.key(0), 2000), problem.grid().reshape(-1, 2)
    np.testing.assert_array_equal(grid.min(axis=0), problem.lower)
    np.testing.assert_array_equal(grid.max(axis=0), problem.upper)
    assert (samples >= grid.min(axis=0)).all()
    assert (samples <= grid.max(axis=0)).all()
    np.testing.assert_allclose(samples.mean(axis=0), grid.mean(axis=0), atol=0.1)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_samples_of_the_sides_lie_on_all_of_them_and_have_the_solution_s_values(problem: Problem):
    points = np.asarray(problem.sample_sides(jax.random.key(0), 400))
    ends = np.array([problem.lower, problem.upper])
    counts = [np.sum(points[:, c] == np.float32(ends[int(up), c])) for c, up in problem.sides]
    assert sum(counts) == 400
    assert min(counts) > 0.7 * 400 / len(problem.sides)
    given = problem.given(jnp.asarray(points))
    np.testing.assert_allclose(given, problem.reference(points.astype(float)), atol=1e-6)


def test_the_network_is_a_plain_perceptron_with_stacked_hidden_layers():
    network = Network(depth=12, width=5)
    params = network.init(jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "first": {"kernel": (2, 5), "bias": (5,)},
        "hidden": {"kernel": (11, 5, 5), "bias": (11, 5)},
        "last": {"kernel": (5, 1), "bias": (1,)},
    }
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    points = np.random.default_rng(0).normal(size=(7, 2))
    first, hidden, last = (jax.tree.map(np.asarray, params[k]) for k in ("first", "hidden", "last"))
    values = np.tanh(points @ first["kernel"] + first["bias"])
    for kernel, bias in zip(hidden["kernel"], hidden["bias"], strict=True):
        values = np.tanh(values @ kernel + bias)
    values = values @ last["kernel"] + last["bias"]
    output = network.apply(params, jnp.asarray(points, jnp.float32))
    assert output.shape == (7,)
    np.testing.assert_allclose(output, values[:, 0], rtol=1e-5, atol=1e-6)


def test_initial_kernels_have_the_std_that_is_asked_for_and_biases_are_zero():
    wide = Network(depth=2, width=400, activation="silu")
    glorot = wide.init(jax.random.key(0))
    aware = replace(wide, initialization="activation_aware").init(jax.random.key(0))
    assert jnp.std(glorot["hidden"]["kernel"]) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    gain = activation_gain(jax.nn.silu)
    assert jnp.std(aware["hidden"]["kernel"]) == pytest.approx(gain / 20, rel=0.02)
    assert not any(layer["bias"].any() for layer in glorot.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_layerwise_jet_is_the_derivative_of_the_network(activation: str):
    network = Network(depth=3, width=8, activation=activation)
    params = jax.tree.map(lambda p: p + 0.1, network.init(jax.random.key(0)))
    points = jax.random.uniform(jax.random.key(1), (5, 2))

    def at(point: jax.Array) -> jax.Array:
        return network.apply(params, point[None])[0]

    value, slopes, curvatures = network.jet(params, points)
    np.testing.assert_allclose(value, jax.vmap(at)(points), rtol=1e-6)
    gradient, hessian = jax.vmap(jax.grad(at))(points), jax.vmap(jax.hessian(at))(points)
    for axis in range(2):
        np.testing.assert_allclose(slopes[axis], gradient[:, axis], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(curvatures[axis], hessian[:, axis, axis], rtol=1e-3, atol=1e-5)


def test_a_soft_boundary_has_a_point_however_few_there_are_inside():
    task = tasks("poisson-soft", (2,), points=3)[0]
    loss, _ = task.gradients(task.init(jax.random.key(0)), jax.random.key(1))
    assert np.isfinite(loss)


@pytest.mark.parametrize("boundary", ["exact", "soft"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_is_the_mean_square_of_the_residual_and_of_the_misses(problem: str, boundary: str):
    task = PinnTask(PROBLEMS[problem], Network(3, 8), points=32, boundary=boundary)
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    loss, (grads, prediction_grad) = task.gradients(params, key)
    inside_key, sides_key = jax.random.split(key)
    inside, sides = task.problem.sample(inside_key, 32), task.problem.sample_sides(sides_key, 8)

    def by_hand(params):
        field = jet_of(lambda points: task.field_at(params, points), inside)
        residual = task.problem.residual(inside, field)
        miss = task.field_at(params, sides) - task.problem.reference(np.asarray(sides, float))
        return jnp.mean(residual**2) + task.problem.soft_weight * jnp.mean(miss**2), residual

    (expected, residual), expected_grads = jax.value_and_grad(by_hand, has_aux=True)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-2, atol=1e-4 * np.abs(e).max()),
        *(grads, expected_grads),
    )
    np.testing.assert_allclose(prediction_grad["residual"], residual / 16, rtol=1e-3, atol=1e-4)
    assert ("sides" in prediction_grad) == (boundary == "soft")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_choice_of_the_prediction_changes_its_gradient_alone(prediction: str):
    task = PinnTask(PROBLEMS["burgers"], Network(3, 8), points=32, boundary="soft")
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    loss, (grads, of_residual) = task.gradients(params, key)
    other = replace(task, prediction=prediction)
    other_loss, (other_grads, prediction_grad) = other.gradients(params, key)
    assert loss == other_loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, other_grads)
    expected = {
        "residual": {"residual", "sides"},
        "field": {"field", "sides"},
        "both": {"residual", "field", "sides"},
    }
    assert set(prediction_grad) == expected[prediction]
    if "residual" in prediction_grad:
        np.testing.assert_array_equal(prediction_grad["residual"], of_residual["residual"])
    if "field" in prediction_grad:
        # Burgers: du_t enters the residual with a factor of 1, du_xx with minus the viscosity.
        jet = prediction_grad["field"]
        np.testing.assert_allclose(jet.slopes[1], of_residual["residual"], rtol=1e-5)
        viscous = -BURGERS_VISCOSITY * of_residual["residual"]
        np.testing.assert_allclose(jet.curvatures[0], viscous, rtol=1e-5)


def test_the_error_is_the_relative_distance_on_the_grid():
    task = PinnTask(PROBLEMS["poisson"], Network(2, 8))
    params = task.init(jax.random.key(0))
    error, field = task.evaluate(params)
    grid = task.problem.grid()
    assert field.shape == task.problem.grid_shape
    reference = task.problem.reference(grid.reshape(-1, 2))
    distance = np.linalg.norm(np.ravel(field) - reference) / np.linalg.norm(reference)
    np.testing.assert_allclose(error, distance, rtol=1e-4)
