"""ResNet-50 and EfficientNetV2-S, with BatchNorm and without, their images and their training."""

import gzip
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("grain")
pytest.importorskip("flax")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import json_lines, records, runner
from benchmarks.arms import ARMS
from benchmarks.experiment import Experiment, with_settings
from benchmarks.experiments import EXPERIMENTS
from benchmarks.normfree import report
from benchmarks.normfree.batches import batches, moved
from benchmarks.normfree.convnets import INITIALIZATIONS, NETWORKS, ConvNet, is_stacked
from benchmarks.normfree.convolutions import convolve
from benchmarks.normfree.data import CIFAR100, DATA, FASHION_MNIST, cifar100, digits, fashion_mnist
from benchmarks.normfree.task import ConvolutionTask
from benchmarks.results import Results, layer_order
from benchmarks.training import Cell, Training

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("compiled_quickly")]

IMAGES = EXPERIMENTS["normfree-images"]
BATCHNORM = EXPERIMENTS["normfree-images-batchnorm"]
PICTURES = ("normfree_images_curves.png", "normfree_images_resnet50_layers.png")
EACH_NETWORK = pytest.mark.parametrize("name", NETWORKS)
KEY = jax.random.key(0)


def shapes(network: ConvNet, channels: int = 3, classes: int = 1000) -> Any:
    return jax.eval_shape(lambda key: network.init(key, channels, classes), KEY)


# The networks.


@pytest.mark.parametrize(
    ("name", "published"), [("resnet50", 25_557_032), ("efficientnetv2s", 21_458_488)]
)
def test_the_full_network_with_batch_norm_has_the_published_number_of_parameters(
    name: str, published: int
):
    full = ConvNet(name, width=1.0, batch_norm=True)
    params = shapes(full)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    logits = jax.eval_shape(lambda params, images: full.apply(params, images, 1000), params, images)
    assert logits.shape == (2, 1000)


@EACH_NETWORK
def test_the_network_without_batch_norm_lacks_its_layers_and_nothing_else(name: str):
    def by_path(batch_norm: bool) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(shapes(ConvNet(name, 0.125, batch_norm)))
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    with_norm, without = by_path(True), by_path(False)
    norms = {path for path in with_norm if "['norm']" in path}
    assert {path.rsplit("[", 1)[1] for path in norms} == {"'scale']", "'bias']"}
    assert without == {path: shape for path, shape in with_norm.items() if path not in norms}


@EACH_NETWORK
@pytest.mark.parametrize("start", INITIALIZATIONS)
def test_the_start_is_flax_s_default_or_torchvision_s(name: str, start: str):
    network = ConvNet(name, 0.25, batch_norm=True, initialization=start)
    params = jax.jit(lambda key: network.init(key, 3, 100))(KEY)
    for path, leaf in jax.tree.leaves_with_path(params):
        kind = path[-1].key
        if kind == "kernel":
            *window, inputs, outputs = leaf.shape[is_stacked(path[0].key) :]
            of_outputs = window and start == "he_fan_out"
            variance = (2 / outputs if of_outputs else 1 / inputs) / np.prod(window)
            z = np.asarray(leaf) / np.sqrt(variance)
            assert np.mean(z**2) == pytest.approx(1, abs=4 * np.sqrt(2 / z.size))
            assert np.abs(z).max() <= 2 / 0.8796
        else:
            np.testing.assert_array_equal(leaf, {"bias": 0, "scale": 1}[kind])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("length", [7, 8])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (3, 6), (7, 1)])
def test_products_of_shifted_images_are_a_convolution(
    stride: int, length: int, size: int, groups: int
):
    x = jax.random.normal(KEY, (2, length, length + 1, 6))
    kernel = jax.random.normal(KEY, (size, size, 6 // groups, 6))

    def with_gradients(convolution: Any) -> Any:
        def squares(x: jax.Array, kernel: jax.Array) -> Any:
            output = convolution(
                *(x, kernel, (stride, stride), [(size // 2, size // 2)] * 2),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return jnp.mean(output**2), output

        return jax.value_and_grad(squares, argnums=(0, 1), has_aux=True)(x, kernel)

    chex.assert_trees_all_close(
        with_gradients(convolve), with_gradients(jax.lax.conv_general_dilated), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "width", "batch_norm"),
    [
        ("resnet50", 1, False),
        ("resnet50", 0.125, True),
        ("efficientnetv2s", 1, False),
        ("efficientnetv2s", 0.125, True),
    ],
)
def test_steps_are_finite_and_move_every_parameter(name: str, width: float, batch_norm: bool):
    task = ConvolutionTask("digits", ConvNet(name, width, batch_norm), batch=8, evaluated=8)
    batches = task.batches(0, range(3))
    gradients = jax.jit(task.gradients)
    params = jax.tree.map(np.asarray, jax.jit(task.init)(KEY))
    for index in range(3):
        batch = jax.tree.map(lambda leaf, i=index: leaf[i], batches)
        loss, (grads, prediction_grad) = jax.tree.map(np.asarray, gradients(params, batch))
        assert 0 < loss < 10 * np.log(10)
        assert prediction_grad.shape == (8, 10)
        for leaf in jax.tree.leaves(grads):
            assert np.all(np.isfinite(leaf))
            assert np.any(leaf != 0)
        # The size of a gradient does not matter here: without norms it may be tiny.
        params = jax.tree.map(lambda p, g: p - np.float32(1e-3) * np.sign(g), params, grads)


@EACH_NETWORK
def test_batch_norm_is_evaluated_with_the_statistics_of_training_images(name: str):
    network = ConvNet(name, 0.125, batch_norm=True)
    params = jax.jit(lambda key: network.init(key, 1, 10))(KEY)
    measured = jax.random.normal(KEY, (4, 8, 8, 1))
    logits = jax.jit(lambda images: network.apply(params, images, 10, measured))
    one, other = np.random.default_rng(0).normal(size=(2, 4, 8, 8, 1)).astype(np.float32)
    together, beside_others = map(np.asarray, (logits(one), logits(np.r_[one[:1], other[1:]])))
    np.testing.assert_allclose(together[0], beside_others[0], rtol=1e-4, atol=1e-5)
    assert np.all(np.max(np.abs(together[1:] - beside_others[1:]), axis=1) > 1e-2)


def test_muon_takes_a_kernel_of_a_convolution_for_a_matrix():
    kernel, grad = jax.random.normal(KEY, (2, 3, 3, 4, 8))

    def updates(shape: tuple[int, ...]) -> jax.Array:
        tx = optax.chain(*ARMS["muon"].stages(0.1))
        params = {"conv": {"kernel": kernel.reshape(shape), "bias": jnp.ones(8)}}
        grads = {"conv": {"kernel": grad.reshape(shape), "bias": jnp.ones(8)}}
        done, _ = tx.update(grads, tx.init(params), params)
        return done["conv"]["kernel"].reshape(-1, 8)

    as_matrix = updates((36, 8))
    np.testing.assert_allclose(updates((3, 3, 4, 8)), as_matrix, rtol=1e-4, atol=1e-6)
    singular = np.linalg.svd(as_matrix, compute_uv=False)
    assert singular.max() / singular.min() < 2


def test_what_is_not_there_is_an_error_that_names_what_is():
    with pytest.raises(ValueError, match=r"choose of .*resnet50"):
        ConvNet("resnet18")
    with pytest.raises(ValueError, match=r"choose of .*fashion_mnist"):
        with_settings(IMAGES, {"data": "letters"})
    with pytest.raises(ValueError, match=r"set one of .*width"):
        with_settings(IMAGES, {"depth": "3"})


# The images.


def test_a_batch_is_fixed_by_its_seed_and_step():
    some = batches(digits(), 16, 3, [0, 5])
    assert some["image"].shape == (2, 16, 8, 8, 1)
    np.testing.assert_array_equal(batches(digits(), 16, 3, [5])["image"][0], some["image"][1])
    assert np.any(some["image"][0] != some["image"][1])
    assert np.any(batches(digits(), 16, 4, [0])["image"] != some["image"][0])


def test_an_epoch_has_every_image_once():
    images = digits()
    few = replace(images, train_inputs=images.train_inputs[:24], train_labels=np.arange(24))
    epochs = [batches(few, 8, 0, range(first, first + 3))["label"] for first in (0, 3)]
    for epoch in epochs:
        assert Counter(epoch.ravel().tolist()) == Counter(range(24))
    assert np.any(epochs[0] != epochs[1])


def test_an_image_is_moved_and_mirrored_only_if_it_may_be():
    image = np.full((16, 16, 1), -0.5, np.float32)
    image[6, 6:10, 0] = (0.1, 0.2, 0.3, 0.4)
    found = set()
    for seed in range(200):
        for flips in (False, True):
            new = moved(image, np.random.default_rng(seed), flips)
            assert new.shape == image.shape
            row, columns = np.argwhere(new[..., 0] > 0)[:, 0], np.argwhere(new[..., 0] > 0)[:, 1]
            values = new[row[0], columns, 0].tolist()
            mirrored = values[0] > values[-1]
            assert sorted(values) == image[6, 6:10, 0].tolist()
            assert flips or not mirrored
            found.add((int(row[0]) - 6, mirrored))
    assert found == {(rows, mirrored) for rows in range(-2, 3) for mirrored in (False, True)}


def write_idx(path: Path, values: np.ndarray, kind: int = 8) -> None:
    sizes = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(bytes([0, 0, kind, values.ndim]) + sizes + values.tobytes()))


def test_fashion_mnist_is_read_from_its_four_files(tmp_path: Path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = {part: rng.integers(0, 256, (5, 28, 28), np.uint8) for part in ("train", "t10k")}
    for part, values in pixels.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", values)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    monkeypatch.setenv(FASHION_MNIST, str(tmp_path))
    images = fashion_mnist.__wrapped__()
    assert images.shape == (28, 28, 1)
    for inputs, part in ((images.train_inputs, "train"), (images.test_inputs, "t10k")):
        want = pixels[part].reshape(5, -1) / 255 - 0.5
        np.testing.assert_allclose(inputs, want, atol=1e-6)
        assert inputs.dtype == np.float32
    assert images.shape[-1] == DATA["fashion_mnist"].channels
    for labels in (images.train_labels, images.test_labels):
        np.testing.assert_array_equal(labels, np.arange(5, dtype=np.int32), strict=True)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8), kind=9)
    with pytest.raises(ValueError, match="not an IDX file of bytes"):
        fashion_mnist.__wrapped__()


def test_cifar_100_is_read_from_its_pickles(tmp_path: Path, monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    for part, rows in (("train", slice(0, 3)), ("test", slice(3, 4))):
        fine = list(range(100))[rows]
        content = {b"data": data[rows], b"fine_labels": fine, b"coarse_labels": [0] * len(fine)}
        (tmp_path / part).write_bytes(pickle.dumps(content, protocol=2))
    monkeypatch.setenv(CIFAR100, str(tmp_path))
    images = cifar100.__wrapped__()
    assert images.shape == (32, 32, DATA["cifar100"].channels)
    np.testing.assert_array_equal(images.train_labels, np.arange(3, dtype=np.int32), strict=True)
    np.testing.assert_array_equal(images.test_labels, [3])
    # A file has all of red, row by row, then all of green, then all of blue.
    image = images.train_inputs[1].reshape(32, 32, 3)
    assert image[5, 7, 2] == pytest.approx(data[1, 2 * 1024 + 5 * 32 + 7] / 255 - 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("read", "variable", "remedy"),
    [
        (fashion_mnist, FASHION_MNIST, "apt install dataset-fashion-mnist"),
        (cifar100, CIFAR100, "cs.toronto.edu/~kriz/cifar.html"),
    ],
)
def test_images_that_are_not_there_are_an_error_that_says_how_to_get_them(
    read: Any, variable: str, remedy: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=remedy) as error:
        read.__wrapped__()
    assert variable in str(error.value)
    assert f"{tmp_path} has no train" in str(error.value)


# Their training.


@dataclass(frozen=True)
class Fed:
    """A task whose loss is what the host feeds: a hundred times the seed, plus the step."""

    stacked = ()
    solved_below = 0.1
    unlearned = 1.0
    title = "fed"

    def describe(self) -> dict[str, Any]:
        return {"data": "fed"}

    def init(self, key: jax.Array) -> Any:
        return {"layer": {"kernel": jnp.zeros((2, 2))}}

    def batches(self, seed: int, steps: Any) -> Any:
        return {"number": np.array([100 * seed + step for step in steps], np.float32)}

    def gradients(self, params: Any, batch: Any) -> Any:
        return batch["number"], (jax.tree.map(jnp.ones_like, params), jnp.ones(3))

    def evaluate(self, params: Any) -> tuple[jax.Array, jax.Array]:
        error = jnp.float32(0)
        return error, error


def losses(training: Training) -> np.ndarray:
    return np.concatenate([chunk.loss for chunk, _ in training.chunks()])


def test_every_cell_is_fed_its_seed_s_batches_in_order():
    arms = (ARMS["sgd"], ARMS["adamw"])
    cells = tuple(Cell(arm, rate, seed) for seed in (7, 3) for arm in arms for rate in (0.1, 0.2))
    together = losses(Training(Fed(), cells, 30))
    for index, cell in enumerate(cells):
        np.testing.assert_array_equal(together[:, index], 100 * cell.seed + np.arange(30))


@pytest.mark.parametrize("seeds", [(7, 3), (5, 5)])
def test_programs_are_shared_only_with_as_many_seeds(seeds: tuple[int, int]):
    first = Training(Fed(), tuple(Cell(ARMS["sgd"], 0.1, seed) for seed in (1, 2)), 5)
    first.compile()
    cells = tuple(Cell(ARMS["sgd"], rate, s) for rate, s in zip((0.1, 0.2), seeds, strict=True))
    shared = Training(Fed(), cells, 5).sharing(first)
    np.testing.assert_array_equal(losses(shared), 100 * np.array(seeds) + np.arange(5)[:, None])


def test_an_image_experiment_runs_with_other_settings(tmp_path: Path):
    settings = {"data": "digits", "width": "0.0625", "batch": "4", "evaluated": "8"}
    changed = with_settings(IMAGES, settings)
    arms = [arm for arm in changed.arms if arm.name == "stablegrad-sgd-fixed-d0.0-b1.0"]
    tiny = replace(
        changed,
        tasks=changed.tasks[:1],
        arms=tuple(arms),
        steps=2,
        num_rates=1,
        reported_seeds=(0,),
    )
    runner.run(tiny, tmp_path, console=Console(quiet=True))
    found = records.read(tiny, tmp_path)
    assert [record["arm"] for record in found] == [arm.name for arm in arms] * 2
    for record in found:
        assert record["task"] | {"width": 0.0625, "batch": 4, "evaluated": 8} == record["task"]
        assert 0 <= record["errors"][0][0] <= 1
    for curve in ("scale_curve", "update_curve"):
        assert np.all(np.array(found[-1][curve])[:-1] > 0)
        assert np.shape(found[-1][curve]) == (6, 54)
    batchnorm = replace(BATCHNORM, tasks=BATCHNORM.tasks[:1])
    links = report.draw_networks(
        Results(tiny, tmp_path), Results(batchnorm, tmp_path), "BatchNorm", tmp_path, "images"
    )
    assert all(f"images/{name}" in link for name, link in zip(PICTURES, links, strict=True))
    assert all(imread(tmp_path / name).shape[0] > 800 for name in PICTURES)  # two rows


def test_layers_are_pictured_block_by_block():
    order = layer_order(IMAGES.tasks[0])
    # The stem, the first block of a stage and its shortcut, then the two other blocks.
    assert order[:11] == [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10]
    assert sorted(order) == list(range(54))


def test_a_table_shows_what_is_recorded_and_names_what_is_not(tmp_path: Path):
    def record(experiment: Experiment, arm: str, rows: list[list[float | None]]) -> None:
        seeds = experiment.reported_seeds if len(rows) == 1 else experiment.tuning_seeds
        rates = experiment.rates(named[arm])[: len(rows)]
        cell = records.cell(experiment, experiment.tasks[0], named[arm], seeds)
        line = {**cell, "learning_rates": rates, "errors": rows}
        json_lines.append(records.path_of(experiment, tmp_path), line)

    named = {arm.name: arm for arm in IMAGES.arms}
    sweep = [[0.9], [0.4], *([[0.9]] * (IMAGES.num_rates - 2))]
    sgd = "stablegrad-sgd-fixed-d0.0-b1.0"
    for experiment, arm, errors in (
        (IMAGES, "adamw", [0.5, 0.24, 0.3]),
        (IMAGES, sgd, [0.26, 0.1, 0.2]),
        (IMAGES, "sgd", [None, None, 0.2]),
        (BATCHNORM, "adamw", [0.1, 0.1, 0.1]),
    ):
        record(experiment, arm, sweep)
        record(experiment, arm, [errors])
    record(IMAGES, "muon", sweep)  # swept, and no more

    text = report.score_tables(Results(IMAGES, tmp_path), Results(BATCHNORM, tmp_path), "BatchNorm")
    resnet, efficientnet = text.split("**fashion_mnist, efficientnetv2s, width 0.125**")
    rows = [line.split(" | ")[:3] for line in resnet.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        [f"| {named[sgd].label}", "80.0% (74.0%-90.0%)", "67%"],
        ["| AdamW", "70.0% (50.0%-76.0%)", "33%"],
        ["| SGD", "diverged (diverged-80.0%)", "33%"],
        ["| *with BatchNorm:* AdamW", "90.0% (90.0%-90.0%)", "100%"],
    ]
    assert "| 8.0 | 0.0001 | 0.5 |" in resnet  # AdamW's state, rate and width
    missing = resnet.rpartition("Not recorded yet: ")[2]
    assert "clip 1.0 + AdamW; " in missing
    assert "; Muon; " in missing
    assert missing.strip().endswith("; *with BatchNorm:* SGD.")
    assert efficientnet.strip() == "Not recorded yet: all."


def test_the_command_names_the_settings_that_there_are_and_the_images_that_are_not(
    tmp_path: Path, capsys, monkeypatch
):
    for wrong, message in (
        ("depth=3", "set one of batch"),
        ("width=wide", "width=wide is not a number above 0"),
        ("batch=0", "batch=0 is not a whole number above 0"),
        ("batch_norm=yes", "batch_norm=yes is neither True nor False"),
        ("width", "NAME=VALUE"),
    ):
        with pytest.raises(SystemExit):
            program.main(["run", "normfree-images", "--records", str(tmp_path), "--set", wrong])
        assert message in capsys.readouterr().err
    monkeypatch.setenv(CIFAR100, "")  # and put back what it is here
    monkeypatch.setenv(FASHION_MNIST, "")
    command = ["run", "normfree-images", "--set", "data=cifar100", "--records", str(tmp_path)]
    assert program.main([*command, "--images", str(tmp_path / "elsewhere")]) == 2
    text = capsys.readouterr().out
    assert CIFAR100 in text
    assert str(tmp_path / "elsewhere") in text
