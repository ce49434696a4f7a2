"""Arms, the training of many cells in one program, the runner and its records."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import json_lines, records, runner
from benchmarks.arms import (
    ARMS,
    Arm,
    changed,
    compressor_arm,
    stablegrad_arm,
    variant_arm,
)
from benchmarks.cost.training import ALL
from benchmarks.demo import tuned_learning_rate
from benchmarks.experiment import Experiment, with_settings
from benchmarks.experiments import EXPERIMENTS
from benchmarks.history import History, train
from benchmarks.interrupts import deferred_interrupt
from benchmarks.normfree import report as normfree_report
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.pictures import draw_curves
from benchmarks.normfree.task import ClassificationTask
from benchmarks.peers import (
    block_normalized,
    block_normalized_in_range,
    clip_in_range,
    gradient_stabilizer,
    on_each_layer,
    z_normalized,
)
from benchmarks.pinn import report
from benchmarks.pinn.experiments import BY_DEPTH, DEMO, tasks
from benchmarks.pinn.networks import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.task import PinnTask
from benchmarks.results import (
    Results,
    bases,
    draw_depths,
    learning_rate_width,
    quartiles,
    results_table,
    state_bytes,
)
from benchmarks.training import Cell, Training
from benchmarks.variants import compressor

# optax.adam mixes float and int32, which strict promotion refuses.
pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("compiled_quickly")]

TINY = PinnTask(PROBLEMS["poisson"], Network(depth=3, width=8), points=32)
# One program for both, and one that compiles quickly.
ALIKE = tuple(
    compressor_arm("sgd", attack=0.0, release=release, balance=1.0) for release in (0.0, 0.9)
)
SHOWN = [
    ARMS["adam"],
    replace(stablegrad_arm("adam", decay=0.9, balance=1.0), name="stablegrad_adam"),
    replace(stablegrad_arm("sgd", "prediction", decay=0.9, balance=1.0), name="stablegrad_sgd"),
]


@dataclass(frozen=True)
class Parabola:
    """Kernels and biases that are to become 0, seen with noise: quick to compile."""

    name: str = "parabola"
    stacked = ("hidden",)
    solved_below = 0.1
    unlearned = 1.0
    title = "parabola, depth 3"

    def describe(self) -> dict[str, Any]:
        return {"problem": self.name}

    def init(self, key: jax.Array) -> Any:
        # Waves of a random phase; a normal draw for each kernel takes long to compile.
        phase = 6 * jax.random.uniform(key)

        def layer(*shape: int) -> dict[str, jax.Array]:
            places = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
            return {"kernel": jnp.cos(phase + places), "bias": jnp.ones(shape[:-2] + shape[-1:])}

        return {"first": layer(2, 4), "hidden": layer(3, 4, 4), "last": layer(4, 1)}

    def gradients(self, params: Any, key: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            noise = 1 + 0.1 * jax.random.uniform(key)
            return noise * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

        value, grads = jax.value_and_grad(loss)(params)
        return value, (grads, jnp.ones(3))

    def evaluate(self, params: Any) -> tuple[jax.Array, jax.Array]:
        error = optax.tree.norm(params)
        return error, error


def tiny_experiment(**changes: Any) -> Experiment:
    experiment = Experiment(
        "tiny",
        "for tests",
        (Parabola("one"), Parabola("two")),
        (ARMS["sgd"], *ALIKE),
        steps=4,
        num_rates=2,
        rates_per_decade=1,
        tuning_seeds=(100, 101),
        reported_seeds=(0, 1, 2, 3),
    )
    return replace(experiment, **changes)


# Peers.


def test_peers_do_what_their_papers_say():
    grad = jnp.array([[3.0, 4.0], [0.0, 12.0]])
    done, _ = block_normalized().update({"w": grad}, optax.EmptyState())
    np.testing.assert_allclose(done["w"], grad / 13, rtol=1e-6)
    done, _ = z_normalized().update({"w": grad}, optax.EmptyState())
    np.testing.assert_allclose(done["w"], (grad - 4.75) / np.std(grad), rtol=1e-6)
    tx = gradient_stabilizer()
    state = tx.init({"w": grad})
    first, state = tx.update({"w": grad}, state)
    np.testing.assert_allclose(first["w"], grad / 13, rtol=1e-6)  # m / sqrt(v) starts at 1
    second, _ = tx.update({"w": 10 * grad}, state)
    m, v = 0.7 * 0.3 * 13 + 0.3 * 130, 0.9 * 0.1 * 13**2 + 0.1 * 130**2
    length = (m / (1 - 0.7**2)) / np.sqrt(v / (1 - 0.9**2))
    np.testing.assert_allclose(second["w"], grad / 13 * length, rtol=1e-5)


@pytest.mark.parametrize("biases", [True, False])
def test_an_arm_without_biases_leaves_them_alone(biases: bool):
    arm = stablegrad_arm("sgd", decay=0.0, balance=1.0, biases=biases)
    scaling, _ = arm.stages(1.0, ["hidden"])
    layers = {"kernel": jnp.array([[3.0, 5.0]]), "bias": jnp.array([30.0, 50.0])}
    grads = {"first": layers, "hidden": jax.tree.map(lambda g: jnp.stack([g, 7 * g]), layers)}
    scaled, _ = scaling.update(grads, scaling.init(grads), grads)
    for part in ("first", "hidden"):
        kernel, bias = scaled[part]["kernel"], scaled[part]["bias"]
        np.testing.assert_allclose(np.ptp(kernel, axis=-1), 2, rtol=1e-6)  # of a std of 1
        want = 1 if biases else np.sqrt(np.mean(grads[part]["bias"] ** 2, axis=-1))
        np.testing.assert_allclose(np.sqrt(np.mean(bias**2, axis=-1)), want, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_norms_in_range_do_not_overflow(size: float):
    grads = {"w": jnp.array([[3.0, 4.0], [0.0, 12.0]]) * size, "b": jnp.array([84.0]) * size}
    clipped, _ = clip_in_range(1.0).update(grads, optax.EmptyState())
    normalized, _ = block_normalized_in_range().update(grads, optax.EmptyState())
    for name, norm in (("w", 13), ("b", 84)):
        unit = grads[name] / np.float32(size)
        np.testing.assert_allclose(clipped[name], unit * min(1 / 85, size), rtol=1e-6)
        np.testing.assert_allclose(normalized[name], unit / norm, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        block_normalized,
        block_normalized_in_range,
        z_normalized,
        gradient_stabilizer,
        partial(clip_in_range, 1.0),
    ],
)
def test_peers_leave_a_zero_gradient_zero(make):
    zero = {"w": jnp.zeros((3, 3))}
    done, _ = make().update(zero, make().init(zero), zero)
    assert not done["w"].any()


@pytest.mark.parametrize("name", ["lamb", "novograd", "muon", "agc_adam", "z_normalized_sgd"])
def test_stacked_layers_are_treated_as_the_layers_they_are(name: str):
    key = jax.random.key(0)
    stacked_grads = {"hidden": {"kernel": jax.random.normal(key, (3, 4, 4))}}
    scale = jnp.array([1.0, 10.0, 100.0])[:, None, None]
    stacked_grads = jax.tree.map(lambda g: g * scale, stacked_grads)
    params = jax.tree.map(lambda g: jnp.cos(g) * scale, stacked_grads)

    def steps(stacked: tuple[str, ...], params: Any, grads: Any) -> Any:
        tx = optax.chain(*ARMS[name].stages(0.1, stacked))
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return updates

    together = steps(("hidden",), params, stacked_grads)["hidden"]["kernel"]
    for index in range(3):
        one_params, one_grads = jax.tree.map(lambda a, i=index: a[i], (params, stacked_grads))
        alone = steps((), one_params, one_grads)["hidden"]["kernel"]
        np.testing.assert_allclose(together[index], alone, rtol=1e-4, atol=1e-7)


def test_on_each_layer_passes_other_parts_whole():
    tx = on_each_layer(block_normalized, ["hidden"])
    grads = {"first": {"kernel": jnp.ones((2, 8))}, "hidden": {"kernel": jnp.ones((3, 4, 4))}}
    done, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(done["first"]["kernel"], 0.25)
    np.testing.assert_allclose(done["hidden"]["kernel"], 0.25)


def test_the_compressor_rises_at_once_and_falls_slowly():
    tx = compressor((), attack=0.0, release=0.5, balance=1.0)
    grad = jnp.array([[1.0, -1.0]])
    state = tx.init({"w": grad})
    scales = []
    for factor in (1.0, 8.0, 1.0, 1.0):
        _, state = tx.update({"w": factor * grad}, state)
        scales.append(float(state.scale["w"]))
    assert scales == [1.0, 8.0, 4.5, 2.75]


def test_the_compressor_without_memory_is_stablegrad():
    params = Network(depth=4, width=8).init(jax.random.key(0))
    grads = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    for balance in (0.0, 0.5, 1.0):
        ours = stablegrad_arm("sgd", decay=0.0, balance=balance)
        other = compressor_arm("sgd", attack=0.0, release=0.0, balance=balance)
        done = []
        for arm in (ours, other):
            scaling, _ = arm.stages(1.0, ("hidden",))
            done.append(scaling.update(grads, scaling.init(params), params)[0])
        done = [jax.tree.map(lambda g: g if g.size > 1 else 0 * g, d) for d in done]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05), *done)


def scaled_by(arm: Arm, params: Any, steps: int = 1) -> Any:
    """What an arm's transform makes of the same gradient in the last of some steps, and that."""
    grads = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    scaling, _ = arm.stages(1.0, ("hidden",))
    state = scaling.init(params)
    for _ in range(steps):
        done, state = scaling.update(grads, state, params)
    return done, grads


@pytest.fixture(scope="module")
def params() -> Any:
    params = Network(depth=4, width=8).init(jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.3, params)


def test_a_statistic_per_module_is_that_of_kernel_and_bias(params: Any):
    done, grads = scaled_by(variant_arm("sgd", "of_modules", balance=1.0), params)
    for layer in range(3):
        both = [
            np.append(t["hidden"]["kernel"][layer], t["hidden"]["bias"][layer])
            for t in (done, grads)
        ]
        np.testing.assert_allclose(both[0], both[1] / both[1].std(), rtol=1e-5)
    both = [np.append(t["last"]["kernel"], t["last"]["bias"]) for t in (done, grads)]
    np.testing.assert_allclose(both[0], both[1] / both[1].std(), rtol=1e-5)


def test_the_weights_scale_as_the_reference(params: Any):
    done, _ = scaled_by(variant_arm("sgd", "of_weights", balance=0.5), params)
    plain, _ = scaled_by(stablegrad_arm("sgd", decay=0.0, balance=0.5), params)
    for layer in range(3):
        rms = np.sqrt(np.mean(np.square(params["hidden"]["kernel"][layer])))
        for name in ("kernel", "bias"):
            expected = rms * plain["hidden"][name][layer]
            np.testing.assert_allclose(done["hidden"][name][layer], expected, rtol=1e-5)
    rms = np.sqrt(np.mean(np.square(params["first"]["kernel"])))
    np.testing.assert_allclose(done["first"]["kernel"], rms * plain["first"]["kernel"], rtol=1e-5)


def test_without_biases_the_kernels_are_scaled_as_before(params: Any):
    arm = stablegrad_arm("sgd", decay=0.0, balance=0.5)
    done, _ = scaled_by(changed(arm, "without_biases", "biases stay 0"), params)
    plain, _ = scaled_by(arm, params)
    for key, module in done.items():
        np.testing.assert_array_equal(module["kernel"], plain[key]["kernel"])
        np.testing.assert_array_equal(module["bias"], 0)


@pytest.mark.parametrize(("scaling", "axes"), [("per_unit", (-2,)), ("of_rms", (-2, -1))])
def test_other_layer_rules_make_the_rms_of_units_or_kernels_1(
    params: Any, scaling: str, axes: tuple[int, ...]
):
    arm = changed(stablegrad_arm("sgd", decay=0.0, balance=1.0), scaling, "")
    done, grads = scaled_by(arm, params)
    for key, module in done.items():
        for name, reduced in (("kernel", axes), ("bias", (-1,))):
            gradient, before = module[name], grads[key][name]
            if before.size > 1:  # one number is left alone
                rms = np.sqrt(np.mean(gradient**2, axis=reduced, keepdims=True))
                np.testing.assert_allclose(rms, 1, rtol=1e-5)
                rms = np.sqrt(np.mean(before**2, axis=reduced, keepdims=True))
                np.testing.assert_allclose(gradient, before / rms, rtol=1e-5)


def test_biases_of_zero_move_as_kernels_do_with_the_larger_eps_of_agc():
    zeros = Network(depth=3, width=4).init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, zeros)
    for scaling, norm in (("agc", 1e-5), ("agc_eps", 1e-2)):
        transform, _ = changed(ARMS["agc_sgd"], scaling, "").stages(1.0, ("hidden",))
        done, _ = transform.update(grads, transform.init(zeros), zeros)
        norms = np.linalg.norm(done["hidden"]["bias"], axis=-1)
        np.testing.assert_allclose(norms, norm, rtol=1e-5)


def test_gains_come_in_over_the_warm_up(params: Any):
    arm = variant_arm("sgd", "warmed_up", balance=0.5, warm_up=4)
    plain, grads = scaled_by(stablegrad_arm("sgd", decay=0.0, balance=0.5), params)
    gain = jax.tree.map(lambda a, b: a / b, plain, grads)
    for steps, share in ((1, 0.0), (3, 0.5), (5, 1.0), (8, 1.0)):
        done, _ = scaled_by(arm, params, steps)
        jax.tree.map(
            lambda d, g, k, share=share: np.testing.assert_allclose(d, g * k**share, rtol=1e-4),
            done,
            grads,
            gain,
        )


# Training.


@pytest.fixture(scope="module")
def histories() -> dict[str, History]:
    rates = {"adam": 0.04, "stablegrad_adam": 0.04, "stablegrad_sgd": 0.01}
    return {arm.name: train(TINY, arm, rates[arm.name], (0, 1), 100) for arm in SHOWN}


@pytest.mark.parametrize("arm", SHOWN, ids=lambda arm: arm.name)
def test_training_lowers_the_loss_and_the_error(arm: Arm, histories: dict[str, History]):
    history = histories[arm.name]
    assert np.all(history.loss[-10:].mean(axis=0) < 0.2 * history.loss[:3].mean(axis=0))
    assert np.all(history.final_error < 0.5)


def test_a_history_has_every_step_and_seed(histories: dict[str, History]):
    history = histories["adam"]
    assert history.steps == history.total_steps == 100
    assert history.loss.shape == (100, 2)
    assert history.scale_before.shape == history.scale_after.shape == (100, 2, 4)
    assert history.error.shape == (len(history.error_steps), 2)
    assert history.error_steps.tolist() == list(range(4, 101, 4))
    reference = PROBLEMS["poisson"].reference(PROBLEMS["poisson"].grid().reshape(-1, 2))
    distance = np.linalg.norm(history.shown.reshape(2, -1) - reference, axis=1)
    np.testing.assert_allclose(history.final_error, distance / np.linalg.norm(reference), rtol=1e-4)


def test_the_recorded_scales_are_those_of_the_transform(histories: dict[str, History]):
    untouched, scaled = histories["adam"], histories["stablegrad_adam"]
    np.testing.assert_array_equal(untouched.scale_before, untouched.scale_after)
    np.testing.assert_allclose(scaled.scale_before[0], untouched.scale_before[0], rtol=1e-4)
    np.testing.assert_allclose(scaled.scale_after[0], 1, rtol=1e-4)


@pytest.mark.parametrize("shape", ["plain", "residual"])
def test_scales_whose_squares_leave_float32_are_recorded(shape: str):
    task = ClassificationTask("digits", DeepNetwork(150, width=16, shape=shape), batch=8)
    (chunk, _), *_ = Training(task, (Cell(ARMS["sgd"], 1e-30, 0),), 1).chunks()
    scales = chunk.scale_before[0, 0]
    assert np.all(np.isfinite(scales))
    assert np.all(scales > 0)
    assert np.any(scales < 1e-23) if shape == "plain" else np.any(scales > 1e19)


def test_the_scale_of_an_update_is_that_of_the_step_that_sgd_takes():
    training = Training(Parabola(), (Cell(ARMS["sgd"], 1e-3, 0), Cell(ARMS["sgd"], 2e-3, 0)), 4)
    (first, _), *_ = training.chunks()
    for index, rate in enumerate((1e-3, 2e-3)):
        want = rate * first.scale_before[0, index]
        np.testing.assert_allclose(first.update_scale[0, index], want, rtol=1e-4)


def test_optimizer_memory_is_two_moments_for_adam_and_one_for_sgd(histories: dict[str, History]):
    num_params = histories["adam"].num_params
    assert num_params == 3 * 8 + 2 * 9 * 8 + 9
    # The output's bias is one number, which StableGrad leaves alone: seven scales and the
    # reference, and with a fixed reference seven peaks.
    counts, scales, peaks = 2 * 4, (7 + 1) * 4, 7 * 4
    assert histories["adam"].state_bytes == 8 * num_params + counts
    assert histories["stablegrad_adam"].state_bytes == 8 * num_params + counts + scales + peaks
    assert histories["stablegrad_sgd"].state_bytes == 4 * num_params + counts // 2 + scales


def test_a_seed_alone_does_what_it_does_among_others(histories: dict[str, History]):
    together = histories["adam"]
    reports: list[History] = []
    alone = train(TINY, ARMS["adam"], together.learning_rate, (1,), 100, reports.append)
    np.testing.assert_allclose(alone.loss[:20, 0], together.loss[:20, 1], rtol=1e-3)
    assert np.all(together.loss[:20, 0] != together.loss[:20, 1])
    assert [report.steps for report in reports] == alone.error_steps.tolist()
    np.testing.assert_array_equal(reports[2].loss, alone.loss[:12])


def test_cells_in_any_order_do_what_each_does_alone():
    arms = (
        stablegrad_arm("sgd", decay=0.0, balance=1.0),
        ARMS["adam"],
        stablegrad_arm("sgd", decay=0.9, balance=1.0),
    )
    # Neighbours, and so those on one device, differ in their seeds.
    cells = tuple(Cell(arm, rate, seed) for arm in arms for rate in (1e-3, 1e-4) for seed in (3, 4))
    together = Training(Parabola(), cells, 4)
    *_, (last, _) = together.chunks()
    for index in (1, 2, 5, 11):
        *_, (alone, _) = Training(Parabola(), (cells[index],), 4).chunks()
        np.testing.assert_allclose(last.loss[:, index], alone.loss[:, 0], rtol=2e-3)
        np.testing.assert_allclose(last.error[index], alone.error[0], rtol=2e-3)
        np.testing.assert_allclose(last.scale_after[:, index], alone.scale_after[:, 0], rtol=2e-2)


def test_a_diverged_seed_is_counted_as_unsolved_and_not_dropped():
    history = train(TINY, ARMS["sgd"], 1e30, (0, 1, 2), 10)
    assert not np.isfinite(history.error[-1]).any()
    assert history.final_error.tolist() == [np.inf] * 3
    assert history.median_error == np.inf
    assert history.num_solved == 0
    mixed = replace(history, error=np.array([[np.nan, 1e-3, 0.5]]))
    assert mixed.final_error.tolist() == [np.inf, 1e-3, 0.5]
    assert mixed.median_error == 0.5
    assert mixed.num_solved == 1


# Experiments and records.


def test_every_experiment_s_arms_and_tasks_have_names_of_their_own():
    for experiment in EXPERIMENTS.values():
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)
        described = {json.dumps(task.describe()) for task in experiment.tasks}
        assert len(described) == len(experiment.tasks)
        assert not set(experiment.tuning_seeds) & set(experiment.reported_seeds)


def test_every_sweep_of_an_experiment_has_as_many_rates_evenly_spaced():
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            rates = experiment.rates(arm)
            assert len(rates) == experiment.num_rates
            steps = [b / a for a, b in pairwise(rates)]
            np.testing.assert_allclose(steps, 10 ** (1 / experiment.rates_per_decade), rtol=0.01)


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_record_belongs_to_its_experiment(experiment: Experiment):
    wanted = [
        records.cell(experiment, task, arm, seeds)
        for task in experiment.tasks
        for arm in experiment.arms
        for seeds in (experiment.tuning_seeds, experiment.reported_seeds)
    ]
    found = records.read(experiment)
    of_records = [
        [place for place, cell in enumerate(wanted) if cell.items() <= record.items()]
        for record in found
    ]
    assert all(len(places) == 1 for places in of_records)
    assert len({places[0] for places in of_records}) == len(found)
    for record in found:
        arm = next(arm for arm in experiment.arms if arm.name == record["arm"])
        if record["seeds"] == list(experiment.tuning_seeds):
            assert record["learning_rates"] == experiment.rates(arm)
        else:
            same = {key: record[key] for key in ("task", "steps", "arm")}
            sweep = json_lines.find(found, same | {"seeds": list(experiment.tuning_seeds)})
            assert sweep is not None
            assert record["learning_rates"] == [records.best_rate(sweep)]
        assert len(record["errors"]) == len(record["learning_rates"])
        assert all(len(row) == len(record["seeds"]) for row in record["errors"])


def test_a_run_records_every_cell_once_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    experiment = tiny_experiment()
    runner.run(experiment, tmp_path, console=Console(quiet=True))
    path = records.path_of(experiment, tmp_path)
    text = path.read_text()
    assert len(text.splitlines()) == 2 * 3 * 2
    found = records.read(experiment, tmp_path)
    for task in experiment.tasks:
        for arm in experiment.arms:
            sweep, report = (
                json_lines.find(found, records.cell(experiment, task, arm, seeds))
                for seeds in (experiment.tuning_seeds, experiment.reported_seeds)
            )
            assert sweep is not None
            assert report is not None
            assert sweep["learning_rates"] == experiment.rates(arm)
            assert report["learning_rates"] == [records.best_rate(sweep)]
            assert np.shape(report["errors"]) == (1, 4)
            assert len(report["error_curve"]) == len(report["loss_curve"]) == 4
            for curve in ("scale_curve", "update_curve"):
                assert np.shape(report[curve]) == (len(report["scale_steps"]), 5)
            assert {"device", "versions", "commit", "command"} <= sweep.keys()

    def instead_of_training(training: Training) -> Any:
        raise AssertionError(f"{training.cells} are trained again")

    monkeypatch.setattr(Training, "chunks", instead_of_training)
    runner.run(experiment, tmp_path, console=Console(quiet=True))
    assert path.read_text() == text


@pytest.mark.parametrize("stop_after", [0, 1])
def test_a_stopped_run_keeps_what_is_finished_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
):
    experiment = tiny_experiment(tasks=(Parabola(),), reported_seeds=())
    path = records.path_of(experiment, tmp_path)
    chunks_of = Training.chunks
    chunks_done = 0

    def counted(training: Training) -> Any:
        nonlocal chunks_done
        for chunk in chunks_of(training):
            chunks_done += 1
            yield chunk

    def stop() -> None:
        # Each batch is one arm; steps are as many as chunks here.
        if chunks_done >= experiment.steps + stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "chunks", counted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(
            experiment, tmp_path, together=1, console=Console(quiet=True), check_interrupt=stop
        )
    first = path.read_text()
    assert [record["arm"] for record in records.read(experiment, tmp_path)] == ["sgd"]
    with pytest.raises(runner.Stopped):
        runner.run(experiment, tmp_path, deadline=0, console=Console(quiet=True))
    assert path.read_text() == first
    runner.run(experiment, tmp_path, console=Console(quiet=True))
    assert path.read_text().startswith(first)
    arms = [record["arm"] for record in records.read(experiment, tmp_path)]
    assert arms == [arm.name for arm in experiment.arms]


def test_each_error_is_recorded_under_its_arm_rate_and_seed(tmp_path: Path):
    experiment = tiny_experiment(
        tasks=(Parabola(),),
        tuning_seeds=(100, 101, 102),
        reported_seeds=(0, 1),
    )
    runner.run(experiment, tmp_path, console=Console(quiet=True))
    sweep, *_, report_record = records.read(experiment, tmp_path)
    for record in (sweep, report_record):
        arm = next(arm for arm in experiment.arms if arm.name == record["arm"])
        last = (-1, -1) if len(record["learning_rates"]) > 1 else (0, -1)
        rate, seed = record["learning_rates"][last[0]], record["seeds"][last[1]]
        cell = Cell(arm, rate, seed)
        *_, (alone, _) = Training(experiment.tasks[0], (cell,), experiment.steps).chunks()
        np.testing.assert_allclose(record["errors"][last[0]][last[1]], alone.error[0], rtol=2e-3)
        if "error_curve" in record:
            assert record["error_curve"][-1] == pytest.approx(np.median(record["errors"]), rel=1e-3)


def test_a_line_that_was_cut_short_is_no_record_and_is_replaced(tmp_path: Path):
    path = tmp_path / "lines.jsonl"
    json_lines.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b"')
    assert json_lines.read(path) == [{"a": 1}]
    json_lines.append(path, {"a": 3})
    assert json_lines.read(path) == [{"a": 1}, {"a": 3}]


def test_records_that_are_appended_at_once_are_all_kept(tmp_path: Path):
    path, numbers = tmp_path / "records.jsonl", range(200)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: json_lines.append(path, {"number": number}), numbers))
    assert sorted(record["number"] for record in json_lines.read(path)) == list(numbers)


def test_a_record_has_null_for_a_diverged_run_and_counts_it_as_infinite(tmp_path: Path):
    wild = replace(ARMS["sgd"], first_rate=1e-3)
    experiment = tiny_experiment(arms=(wild,), num_rates=2, rates_per_decade=0.05)
    runner.run(replace(experiment, reported_seeds=()), tmp_path, console=Console(quiet=True))
    record = records.read(experiment, tmp_path)[0]
    json.loads(json.dumps(record), parse_constant=pytest.fail)
    assert record["errors"][1] == [None, None]
    assert records.errors(record)[1].tolist() == [np.inf, np.inf]
    assert records.best_rate(record) == 1e-3


def test_the_best_rate_has_the_lowest_median():
    record = {
        "learning_rates": [0.1, 0.2, 0.3],
        "errors": [[0.3, 0.2, 0.9], [0.1, None, None], [0.4, 0.4, 0.1]],
    }
    assert records.best_rate(record) == 0.1


# The report.


def shortened(experiment: Experiment) -> Experiment:
    """The same in two steps on a small task, with Adam, and SGD alone, clipped and StableGrad's.

    Where there is none of these, with what there is for SGD, or else for any. The sweep has as many
    runs as what is reported of it, so that one program does for both.
    """
    base = "sgd" if any(arm.base == "sgd" for arm in experiment.arms) else experiment.arms[0].base
    kinds = {arm.scaling: arm for arm in experiment.arms if arm.base == base}
    arms = [kinds[scaling] for scaling in ("none", "clip", "stablegrad") if scaling in kinds]
    arms = arms or list(kinds.values())
    task = experiment.tasks[0]
    size = "points" if isinstance(task, PinnTask) else "batch"
    small = replace(task, network=replace(task.network, depth=2, width=4), **{size: 8})
    # A row of the table of settings has all decays.
    row = [arm for arm in experiment.arms if arm.program == arms[-1].program]
    row = [
        arm
        for arm in row
        if dict(arm.numbers).get("balance") == dict(row[0].numbers).get("balance")
    ]
    adam = [arm for arm in experiment.arms if arm.name == "adam"]
    return replace(
        experiment,
        arms=(*adam, *arms[:-1], *row),
        tasks=(small,),
        steps=2,
        num_rates=2,
        tuning_seeds=experiment.tuning_seeds[:1],
        reported_seeds=experiment.reported_seeds[:2],
    )


# tests/test_convnets.py and tests/test_transformer.py run the others.
REPORTED = [
    name
    for name in EXPERIMENTS
    if name != "demo" and "images" not in name and "transformer" not in name
]


@pytest.fixture(scope="module")
def few_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every experiment, run for a few steps."""
    folder = tmp_path_factory.mktemp("records")
    for name in REPORTED:
        runner.run(shortened(EXPERIMENTS[name]), folder, together=9, console=Console(quiet=True))
    times = {"base": ALL, "backend": "cpu", "ratios": {arm.name: [1.0] * 3 for arm in BY_DEPTH}}
    json_lines.append(folder / "cost_training.jsonl", times)
    return folder


def test_every_experiment_runs_and_its_report_builds(few_steps: Path, tmp_path: Path, monkeypatch):
    for name in REPORTED:
        monkeypatch.setitem(EXPERIMENTS, name, shortened(EXPERIMENTS[name]))
    for module in (report, normfree_report):
        page = tmp_path / module.PAGE.name
        page.write_text(module.PAGE.read_text())
        module.write(page, tmp_path, few_steps)
    text = (tmp_path / "pinn.md").read_text()
    results = Results(EXPERIMENTS["pinn-depth"], few_steps)
    assert len(results.tasks) == 1
    for arm in results.experiment.arms:
        assert f"| {arm.label} |" in text
    grid = next(line for line in text.splitlines() if line.startswith("| sgd |"))
    assert grid.count("|") == 4 + 1 + 4
    for picture in ("depth", "depths", "helmholtz", "time", "confirm", "scales", "memory"):
        assert imread(tmp_path / f"pinn_{picture}.png").shape[1] > 300
    assert "digits, residual relu, depth 2 |" in (tmp_path / "normfree.md").read_text()
    for picture in ("residual", "residual_scales", "residual_layers", "depths"):
        assert imread(tmp_path / f"normfree_{picture}.png").shape[1] > 300


def test_curves_that_a_task_has_none_of_are_no_row_of_the_picture(tmp_path: Path):
    tasks = EXPERIMENTS["normfree-variants"].tasks
    whole = {"steps": 2, "error_curve": [0.9, 0.1], "loss_curve": [2.0, 1.0]}
    before = {"steps": 2, "error_curve": [0.9, 0.2]}

    def height(*of_tasks: dict[str, Any]) -> int:
        gathered = {task: {ARMS["adamw"]: r} for task, r in zip(tasks, of_tasks, strict=True)}
        draw_curves(gathered, tmp_path / "curves.png")
        return imread(tmp_path / "curves.png").shape[0]

    assert height(whole, before) == height(before, before) < height(whole, whole)


def recorded(tmp_path: Path, medians: dict[str, list[float]]) -> Results:
    """Results on one task with given errors, the same for every seed, of the rates of each arm."""
    experiment = tiny_experiment(
        tasks=tasks("poisson", (2,), points=8, width=4),
        arms=tuple(ARMS[name] for name in medians),
    )
    for arm in experiment.arms:
        errors = medians[arm.name]
        for seeds, rows in (
            (experiment.tuning_seeds, errors),
            (experiment.reported_seeds, [min(errors)]),
        ):
            record = {
                **records.cell(experiment, experiment.tasks[0], arm, seeds),
                "learning_rates": experiment.rates(arm)[: len(rows)],
                "errors": [[e if e < np.inf else None] * len(seeds) for e in rows],
            }
            json_lines.append(records.path_of(experiment, tmp_path), record)
    return Results(experiment, tmp_path)


def test_ranks_widths_and_states_are_those_of_the_records(tmp_path: Path):
    results = recorded(tmp_path, {"adam": [0.3, 0.2], "sgd": [0.8, 0.1], "clip_sgd": [0.9, 0.9]})
    task, (adam, sgd, _) = results.tasks[0], results.experiment.arms
    ranks = results.mean_ranks(results.experiment.arms)
    assert ranks == {"adam": 2, "sgd": 1, "clip_sgd": 3}
    assert results.ranks_in_family() == {"adam": 1, "sgd": 1, "clip_sgd": 2}
    assert [arm.name for arm in results.by_rank()] == ["sgd", "adam", "clip_sgd"]
    assert learning_rate_width(results, task, adam) == 2
    assert learning_rate_width(results, task, sgd) == 1
    assert state_bytes(task, adam) > 1.9 * state_bytes(task, sgd)
    assert "0.2 (0.2-0.2), 0%, 2" in results_table(results)


def test_runs_that_learned_nothing_share_a_rank_and_have_no_width(tmp_path: Path):
    medians = {"adam": [0.998, 3.0], "sgd": [np.inf, 1.2], "clip_sgd": [0.8, 0.1]}
    results = recorded(tmp_path, medians)
    ranks = results.mean_ranks(results.experiment.arms)
    assert ranks == {"adam": 2.5, "sgd": 2.5, "clip_sgd": 1}
    task, (adam, sgd, clip) = results.tasks[0], results.experiment.arms
    widths = [learning_rate_width(results, task, arm) for arm in (adam, sgd, clip)]
    assert widths == [0, 0, 1]


def test_quartiles_are_errors_of_seeds_also_beside_a_diverged_one():
    low, high = quartiles(np.array([[0.4, 0.1, np.inf, 0.2], [1, 2, 3, 4]]))
    assert (low.tolist(), high.tolist()) == ([0.1, 1], [0.4, 3])


def test_a_task_is_reported_once_every_arm_is_recorded(tmp_path: Path):
    results = recorded(tmp_path, {"adam": [0.3, 0.2], "sgd": [0.8, 0.1]})
    lines = records.path_of(results.experiment, tmp_path)
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-1]))
    assert Results(results.experiment, tmp_path).tasks == []


def test_what_is_recorded_so_far_has_a_blank_for_what_is_not(tmp_path: Path, monkeypatch):
    results = recorded(tmp_path, {"adam": [0.3, 0.2], "sgd": [0.8, 0.1]})
    assert "mean rank" in report.table_so_far(results)
    other = replace(ARMS["clip_sgd"], name="other")
    shallow, deep = tasks("poisson", (2, 3), points=8, width=4)
    both = replace(
        results.experiment, tasks=(shallow, deep), arms=(*results.experiment.arms, other)
    )
    lines = records.path_of(both, tmp_path)
    of_adam = json.loads(lines.read_text().splitlines()[0])
    for seeds in (both.tuning_seeds, both.reported_seeds):
        cell = records.cell(both, deep, both.arms[0], seeds)
        errors = [[0.5] * len(seeds)] * len(of_adam["learning_rates"])
        json_lines.append(lines, {**of_adam, **cell, "errors": errors})
    table = report.table_so_far(Results(both, tmp_path))
    assert "mean rank" not in table
    adam, sgd = (line for line in table.splitlines() if line.startswith(("| Adam", "| SGD")))
    assert adam.split(" | ")[1:] == ["0.2 (0.2-0.2), 0%, 2", "0.5 (0.5-0.5), 0%, 2 |"]
    assert sgd.split(" | ")[1:] == ["0.1 (0.1-0.1), 0%, 1", " |"]
    assert "3 of 6 pairs" in table
    monkeypatch.setattr("benchmarks.results.save", lambda figure, axes, path: drawn.extend(axes[0]))
    drawn: list[Axes] = []
    draw_depths(Results(both, tmp_path), tmp_path / "unused.png")
    lines = [line for ax in drawn for line in ax.get_lines()]
    depths = {str(line.get_label()): list(line.get_xdata()) for line in lines}
    assert depths["Adam"] == [2, 3]
    assert depths["SGD"] == [2]
    assert other.label not in depths


def test_a_control_of_a_base_optimizer_is_pictured_beside_it(tmp_path: Path):
    experiment = tiny_experiment(arms=tuple(ARMS[name] for name in ("adam", "sgd", "adam_eps")))
    assert bases(Results(experiment, tmp_path)) == ["adam", "sgd"]


# The command line.


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    experiment = tiny_experiment(tasks=(Parabola(),))
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    return experiment


def test_the_command_lists_runs_and_goes_on(tiny_is_known, tmp_path, capsys):
    def command(*arguments: str) -> tuple[int, str]:
        code = program.main([*arguments, "--records", str(tmp_path)])
        return code, capsys.readouterr().out

    assert any(
        line.split()[:4] == ["tiny", "0", "of", "6"] for line in command("list")[1].split("\n")
    )
    code, text = command("run", "tiny", "--minutes", "0")
    assert code == 0
    assert "goes on" in text
    code, text = command("run", "tiny", "--together", "2")
    assert code == 0
    assert "tiny: parabola" in text
    assert "nothing lacks" not in text
    assert "tiny: nothing lacks, all 6 are recorded" in command("run", "tiny")[1]
    # Arms that were trained together, twice for a sweep and once for what is reported of it.
    for took in ({"seconds": 1800.0}, {"seconds": 1800.0}, {"seconds": 900.0}):
        other = {"task": {"problem": "other"}, "seeds": [0], **took}
        json_lines.append(records.path_of(tiny_is_known, tmp_path), other)
    (line,) = (line for line in command("list")[1].split("\n") if line.startswith("tiny "))
    assert line.split()[4:6] == ["0.8", "h"]
    # Of another setting, and not part of the experiment as it is.
    json_lines.append(records.path_of(tiny_is_known, tmp_path), {"task": {"problem": "other"}})
    assert any(
        line.split()[:4] == ["tiny", "6", "of", "6"] for line in command("list")[1].split("\n")
    )


def test_another_sweep_is_not_the_recorded_one(tmp_path: Path):
    experiment = tiny_experiment(tasks=(Parabola("one"),), arms=(ARMS["sgd"],))
    runner.run(experiment, tmp_path, console=Console(quiet=True))
    assert records.progress(experiment, tmp_path) == (2, 2)
    for changes in ({"num_rates": 3}, {"arms": (replace(ARMS["sgd"], first_rate=1e-3),)}):
        other = replace(experiment, **changes)
        assert records.progress(other, tmp_path) == (1, 2)
        assert Results(other, tmp_path).tasks == []


def test_the_experiments_of_a_command_name_one_commit(tiny_is_known, monkeypatch, tmp_path):
    commits = iter(["first", "second"])
    named = []
    monkeypatch.setattr(runner, "current_commit", lambda: next(commits))
    monkeypatch.setattr(runner, "run", lambda *_, commit, **options: named.append(commit))
    assert program.main(["run", "tiny", "tiny", "--records", str(tmp_path)]) == 0
    assert named == ["first", "first"]


def test_tasks_that_a_setting_makes_alike_are_run_once():
    experiment = tiny_experiment(tasks=tasks("poisson burgers", (2, 3), points=8))
    assert with_settings(experiment, {"depth": "4"}).tasks == tasks("poisson burgers", (4,), 8)


def test_an_interrupted_command_says_how_to_go_on(tiny_is_known, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments: Any, check_interrupt: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        check_interrupt()

    monkeypatch.setattr(runner, "run", interrupted)
    assert program.main(["run", "tiny", "--records", str(tmp_path)]) == 130
    assert "goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", ["--together=0", "--together=two", "--minutes=-1", "--minutes=nan"]
)
def test_an_option_out_of_range_is_an_error_that_names_it(wrong, tiny_is_known, tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["run", "tiny", wrong, "--records", str(tmp_path)])
    name, _, value = wrong.partition("=")
    _, _, said = capsys.readouterr().err.partition("error: ")  # before it, all options are named
    assert name in said
    assert repr(value) in said


def test_a_file_for_a_folder_is_an_error_that_says_so(tiny_is_known, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        program.main(["run", "tiny", "--records", str(tmp_path / "file")])
    assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err


def test_a_line_that_is_no_record_is_an_error_that_names_it(tiny_is_known, tmp_path, capsys):
    path = records.path_of(tiny_experiment(), tmp_path)
    for damaged in (b'{"arm"', b"null", b"[1]", b"\xff\xfe", b""):
        path.write_bytes(b'{"arm": "sgd"}\n' + damaged + b"\n")
        for command in (["list"], ["run", "tiny"]):
            assert program.main([*command, "--records", str(tmp_path)]) == 2
            assert f"{path}, line 2 is not a record" in capsys.readouterr().out


def test_without_records_the_report_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys):
    for module in (report, normfree_report):
        monkeypatch.setattr(module, "write", lambda **_: pytest.fail("it wrote a page"))
    assert program.main(["report", "--records", str(tmp_path)]) == 2
    assert "no records of demo, pinn-screen" in capsys.readouterr().out


def test_an_unknown_experiment_is_an_error_that_names_the_known(capsys):
    with pytest.raises(SystemExit):
        program.main(["run", "everything"])
    assert "pinn-depth" in capsys.readouterr().err


def test_the_command_runs_the_named_arms_on_the_tasks_with_a_text(monkeypatch, tmp_path):
    experiment = tiny_experiment(tasks=(Parabola("one"), TINY))
    monkeypatch.setitem(EXPERIMENTS, "tiny", experiment)
    command = ["run", "tiny", "--tasks", "parabola", "--records", str(tmp_path), "--arms"]
    for arms in (["sgd"], [ALIKE[1].name, "sgd"]):
        assert program.main([*command, *arms]) == 0
    found = records.read(experiment, tmp_path)
    assert [record["arm"] for record in found] == ["sgd"] * 2 + [ALIKE[1].name] * 2
    assert all(record["task"] == Parabola("one").describe() for record in found)


@pytest.mark.parametrize(
    ("wrong", "known"),
    [(["--arms", "sgd", "adma"], "no arm adma: choose of sgd, comp"), (["--tasks", "x"], "parab")],
)
def test_an_arm_or_a_task_that_is_not_there_is_an_error_that_names_what_is(
    wrong: list[str], known: str, tiny_is_known, capsys
):
    with pytest.raises(SystemExit):
        program.main(["run", "tiny", *wrong])
    assert known in capsys.readouterr().err


def test_records_of_other_settings_are_not_put_among_those_of_the_experiment(
    tiny_is_known, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for folder in ([], ["--records", str(tmp_path)]):
        with pytest.raises(SystemExit):
            program.main(["run", "tiny", "--set", "width=1", *folder])
        assert "--set needs --records FOLDER" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_first_interrupt_says_what_it_does_and_the_second_does_not_wait(capfd):
    with deferred_interrupt() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_rate_is_recorded_for_each_arm_and_problem_of_the_demo():
    for problem in PROBLEMS:
        for arm in DEMO.arms:
            assert tuned_learning_rate(arm.name, problem) in DEMO.rates(arm)


def test_a_misspelt_task_is_an_error():
    for name in ("poisson-sfot", "poison"):
        with pytest.raises((ValueError, KeyError)):
            tasks(name, (2,))
    with pytest.raises(ValueError, match="silu"):
        Network(activation="relu")
    for network in (Network, DeepNetwork):
        with pytest.raises(ValueError, match="no network has a depth of 1: 2 is the least"):
            network(depth=1)
