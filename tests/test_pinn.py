"""Problems, networks, arms and the training loop of the PINN benchmarks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.pinn import sweep as sweep_module
from benchmarks.pinn.arms import ARMS, Arm, median_error, read_records, tuned_learning_rate
from benchmarks.pinn.networks import TanhNetwork
from benchmarks.pinn.problems import (
    BURGERS_VISCOSITY,
    PROBLEMS,
    Field,
    Problem,
    burgers_reference,
)
from benchmarks.pinn.sweep import TUNING_SEEDS, cell, learning_rates, record_of, sweep
from benchmarks.pinn.training import History, Setup, train

# optax.adam mixes float and int32, which strict promotion refuses.
trains = pytest.mark.standard_promotion

SOLUTIONS: dict[str, Field] = {
    "poisson": lambda p: jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(jnp.pi * p[:, 1]),
    "helmholtz": lambda p: jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(4 * jnp.pi * p[:, 1]),
}


def tiny(problem: str = "poisson", steps: int = 10) -> Setup:
    return Setup(PROBLEMS[problem], TanhNetwork(depth=2, width=8), steps, points=32)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_analytic_solution_has_no_residual_and_is_the_reference(name: str):
    problem, solution = PROBLEMS[name], SOLUTIONS[name]
    points = problem.sample(jax.random.key(0), 100)
    source = jnp.max(jnp.abs(problem.residual(lambda p: jnp.zeros(len(p)), points)))
    residual = problem.residual(solution, points)
    assert jnp.max(jnp.abs(residual)) < 1e-5 * source
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
    residual = PROBLEMS["burgers"].residual(lambda p: jnp.sin(3 * p[:, 0]) * p[:, 1] ** 2, points)
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
    network = TanhNetwork(depth=2, width=8)
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


def test_the_network_is_a_plain_tanh_network_with_a_leaf_per_layer():
    network = TanhNetwork(depth=12, width=5)
    params = network.init(jax.random.key(0))
    assert sorted(params) == [f"layer_{index:02d}" for index in range(13)]
    shapes = [params[name]["kernel"].shape for name in sorted(params)]
    assert shapes == [(2, 5), *[(5, 5)] * 11, (5, 1)]
    points = np.random.default_rng(0).normal(size=(7, 2))
    values = points
    for index in range(13):
        kernel, bias = (np.asarray(params[f"layer_{index:02d}"][k]) for k in ("kernel", "bias"))
        values = values @ kernel + bias
        values = np.tanh(values) if index < 12 else values
    output = network.apply(params, jnp.asarray(points, jnp.float32))
    assert output.shape == (7,)
    np.testing.assert_allclose(output, values[:, 0], rtol=1e-5, atol=1e-6)


def test_kernels_are_glorot_normal_and_biases_zero():
    params = TanhNetwork(depth=2, width=400).init(jax.random.key(0))
    assert jnp.std(params["layer_01"]["kernel"]) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert not any(layer["bias"].any() for layer in params.values())


def test_the_learning_rate_is_the_one_with_the_lowest_recorded_median():
    def record(rate: float, *errors: float | None) -> dict[str, Any]:
        return {"problem": "burgers", "arm": "adam", "learning_rate": rate, "errors": errors}

    records = [record(1e-3, 0.3, 0.2, 0.9), record(2e-3, 0.1, None, None), record(4e-3, 0.4, 0.4)]
    assert median_error(records[1]) == np.inf
    assert tuned_learning_rate("adam", "burgers", records) == 1e-3
    with pytest.raises(LookupError, match=r"benchmarks\.pinn\.sweep --problem poisson --arms adam"):
        tuned_learning_rate("adam", "poisson", records)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_arm_was_swept_alike_and_its_best_rate_if_any_is_inside_the_grid(problem: str):
    records = [record for record in read_records() if record["problem"] == problem]
    for arm in ARMS.values():
        rates = learning_rates(arm.name, problem)
        wanted = [cell(Setup(PROBLEMS[problem]), arm, rate) for rate in rates]
        assert all(any(w.items() <= record.items() for record in records) for w in wanted)
        best = tuned_learning_rate(arm.name, problem, records)
        reached = min(median_error(record) for record in records if record["arm"] == arm.name)
        # u = 0 has error 1: where no rate does better, none of them is the best.
        assert rates[0] < best < rates[-1] or reached > 0.9
    assert len(records) == len(ARMS) * len(learning_rates("adam", problem))


@pytest.fixture(scope="module")
def histories() -> dict[str, History]:
    rates = dict.fromkeys(ARMS, 0.04) | {"stablegrad_sgd": 0.01}
    return {name: train(tiny(steps=100), arm, rates[name], (0, 1)) for name, arm in ARMS.items()}


@pytest.mark.parametrize("arm", ARMS)
def test_training_lowers_the_loss_and_the_error(arm: str, histories: dict[str, History]):
    history = histories[arm]
    assert np.all(history.loss[-10:].mean(axis=0) < 0.2 * history.loss[:3].mean(axis=0))
    assert np.all(history.final_error < 0.5)


@pytest.mark.parametrize("arm", ARMS)
def test_a_history_has_every_step_and_seed(arm: str, histories: dict[str, History]):
    history = histories[arm]
    assert history.steps == 100
    assert history.loss.shape == (100, 2)
    assert history.scale_before.shape == history.scale_after.shape == (100, 2, 3)
    assert history.error.shape == (len(history.error_steps), 2)
    assert history.error_steps.tolist() == list(range(4, 101, 4))
    reference = PROBLEMS["poisson"].reference(PROBLEMS["poisson"].grid().reshape(-1, 2))
    distance = np.linalg.norm(history.fields.reshape(2, -1) - reference, axis=1)
    np.testing.assert_allclose(history.final_error, distance / np.linalg.norm(reference), rtol=1e-4)


def test_the_recorded_scales_are_those_of_the_transform(histories: dict[str, History]):
    untouched, scaled = histories["adam"], histories["stablegrad_adam"]
    np.testing.assert_array_equal(untouched.scale_before, untouched.scale_after)
    np.testing.assert_allclose(scaled.scale_before[0], untouched.scale_before[0], rtol=1e-4)
    np.testing.assert_allclose(scaled.scale_after[0], 1, rtol=1e-4)


def test_optimizer_memory_is_two_moments_for_adam_and_one_for_sgd(histories: dict[str, History]):
    num_params = histories["adam"].num_params
    assert num_params == 3 * 8 + 9 * 8 + 9
    # The output's bias is one number, which StableGrad leaves alone: five scales and the reference,
    # and with a fixed reference five peaks.
    counts, scales, peaks = 2 * 4, (5 + 1) * 4, 5 * 4
    assert histories["adam"].state_bytes == 8 * num_params + counts
    assert histories["stablegrad_adam"].state_bytes == 8 * num_params + counts + scales + peaks
    assert histories["stablegrad_sgd"].state_bytes == 4 * num_params + counts // 2 + scales


@trains
def test_a_seed_alone_does_what_it_does_among_others(histories: dict[str, History]):
    together = histories["adam"]
    reports: list[History] = []
    alone = train(together.setup, ARMS["adam"], together.learning_rate, (1,), reports.append)
    np.testing.assert_allclose(alone.loss[:20, 0], together.loss[:20, 1], rtol=1e-3)
    assert np.all(together.loss[:20, 0] != together.loss[:20, 1])
    assert [report.steps for report in reports] == alone.error_steps.tolist()
    np.testing.assert_array_equal(reports[2].loss, alone.loss[:12])


@trains
def test_a_diverged_seed_is_counted_as_unsolved_and_not_dropped():
    history = train(tiny(), replace(ARMS["adam"], base=optax.sgd), 1e30, (0, 1, 2))
    assert not np.isfinite(history.error[-1]).any()
    assert history.final_error.tolist() == [np.inf] * 3
    assert history.median_error == np.inf
    assert history.num_solved == 0
    mixed = replace(history, error=np.array([[np.nan, 1e-3, 0.5]]))
    assert mixed.final_error.tolist() == [np.inf, 1e-3, 0.5]
    assert mixed.median_error == 0.5
    assert mixed.num_solved == 1


def test_a_sweep_records_every_cell_once_and_resumes(
    histories: dict[str, History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: list[float] = []

    def instead_of_training(setup: Setup, arm: Arm, learning_rate: float, seeds: Any) -> History:
        assert seeds == TUNING_SEEDS
        trained.append(learning_rate)
        return replace(histories[arm.name], setup=setup, learning_rate=learning_rate)

    monkeypatch.setattr(sweep_module, "train", instead_of_training)
    path = tmp_path / "records.jsonl"
    sweep(tiny(), [ARMS["adam"]], path)
    first = path.read_text()
    assert trained == learning_rates("adam", "poisson")
    assert [record["learning_rate"] for record in read_records(path)] == trained
    sweep(tiny(), [ARMS["adam"]], path)
    assert path.read_text() == first
    sweep(tiny(steps=3), [ARMS["adam"]], path)
    assert len(read_records(path)) == 2 * len(learning_rates("adam", "poisson"))


def test_a_record_has_null_for_a_diverged_seed(histories: dict[str, History]):
    diverged = replace(histories["adam"], error=np.array([[np.nan, 0.25]]))
    record = json.loads(json.dumps(record_of(diverged), allow_nan=False))
    assert record["errors"] == [None, 0.25]
    assert median_error(record) == np.inf
