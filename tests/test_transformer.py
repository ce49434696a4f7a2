"""The transformer, with LayerNorm and without: its text, network and task."""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("rich")

import flax.linen as nn
from rich.console import Console

from benchmarks import records, runner
from benchmarks.experiments import EXPERIMENTS
from benchmarks.normfree import report
from benchmarks.normfree import task as tasks
from benchmarks.normfree.task import TextTask
from benchmarks.normfree.text import VOCABULARY, Text, entropy, python_topics
from benchmarks.normfree.transformer import Transformer
from benchmarks.results import Results

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("compiled_quickly")]

KEY = jax.random.key(0)
TASK = TextTask(Transformer(2, width=16, heads=2, context=8), batch=8, evaluated=32)
INIT = jax.jit(TASK.init)
EVALUATE = jax.jit(TASK.evaluate)
NORMED_OR_NOT = pytest.mark.parametrize("layer_norm", [False, True])


def small(layer_norm: bool) -> Transformer:
    return Transformer(3, width=8, heads=2, context=6, layer_norm=layer_norm)


# The text.


def test_no_paragraph_is_both_for_training_and_for_testing():
    text = python_topics()
    train, test = (part.tobytes().split(b"\n\n") for part in text)
    # The paragraph that is cut in two is a part of each.
    assert len(train) > 1000
    assert len(test) > 100
    assert not set(train[:-1]) & set(test[1:])
    assert len(text.test) == pytest.approx(len(text.train) / 9, abs=1)
    for part in text:
        assert part.dtype == np.uint8
        assert part.max() < VOCABULARY


def test_entropy_is_that_of_the_frequencies():
    assert entropy(np.array([7, 7, 9, 9, 9, 9])) == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    assert entropy(np.array([5, 5])) == 0


# The network.


@NORMED_OR_NOT
def test_the_network_is_what_flax_s_layers_make(layer_norm: bool):
    network = small(layer_norm)
    characters = jax.random.randint(KEY, (2, 6), 0, 11)

    def norm(part: Any, name: str, h: Any) -> Any:
        return nn.LayerNorm().apply({"params": part[name]}, h) if layer_norm else h

    def dense(layer: Any, h: Any) -> Any:
        return nn.Dense(layer["bias"].shape[-1]).apply({"params": layer}, h)

    def attention(block: Any, h: Any) -> Any:
        params = {
            name: {
                "kernel": block[name]["kernel"].reshape(8, 2, 4),
                "bias": block[name]["bias"].reshape(2, 4),
            }
            for name in ("query", "key", "value")
        }
        out = {"kernel": block["out"]["kernel"].reshape(2, 4, 8), "bias": block["out"]["bias"]}
        layer = nn.MultiHeadDotProductAttention(num_heads=2)
        mask = nn.make_causal_mask(characters)
        return layer.apply({"params": {**params, "out": out}}, h, mask=mask)

    def by_flax(params: Any) -> Any:
        h = params["embedding"]["characters"][characters] + params["embedding"]["positions"]
        for index in range(3):
            block = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
            h = h + attention(block, norm(block, "attention_norm", h))
            expanded = nn.gelu(dense(block["expand"], norm(block, "mlp_norm", h)))
            h = h + dense(block["contract"], expanded)
        return dense(params["output"], norm(params, "norm", h))

    @jax.jit
    def both(key: jax.Array) -> Any:
        # Norms and biases that do something.
        params = jax.tree.map(
            lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
            network.init(key, 11),
        )
        return network.apply(params, characters), by_flax(params)

    ours, flax_s = both(KEY)
    np.testing.assert_allclose(ours, flax_s, rtol=1e-4, atol=1e-5)


def test_without_layer_norm_its_parameters_are_absent_and_nothing_else():
    def by_path(layer_norm: bool) -> dict[str, Any]:
        params = jax.jit(lambda key: small(layer_norm).init(key, 11))(KEY)
        leaves = jax.tree.leaves_with_path(params)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    with_norm, without = by_path(True), by_path(False)
    norms = {path for path in with_norm if "norm']" in path}
    assert len(norms) == 2 * 3
    assert without.keys() == with_norm.keys() - norms
    for path, leaf in without.items():
        np.testing.assert_array_equal(leaf, with_norm[path])


def test_the_start_is_flax_s_default():
    network = Transformer(4, width=32, context=64, layer_norm=True)
    params = jax.jit(lambda key: network.init(key, VOCABULARY))(KEY)
    for path, leaf in jax.tree.leaves_with_path(params):
        kind = path[-1].key
        if kind in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(kind == "scale"))
        else:
            fan_in = leaf.shape[-2] if kind == "kernel" else leaf.shape[-1]
            z = np.asarray(leaf) * np.sqrt(fan_in)
            assert np.mean(z**2) == pytest.approx(1, abs=4 * np.sqrt(2 / z.size))
            is_truncated = np.abs(z).max() <= 2 / 0.8796
            assert is_truncated == (kind == "kernel")
        assert path[0].key != "blocks" or leaf.shape[0] == 4


@NORMED_OR_NOT
def test_a_later_character_does_not_change_earlier_logits(layer_norm: bool):
    network = small(layer_norm)
    params = jax.jit(lambda key: network.init(key, 11))(KEY)
    characters = jnp.array([[1, 2, 3, 4, 5, 6]])
    apply = jax.jit(network.apply)
    before, after = (apply(params, c) for c in (characters, characters.at[0, 3].set(9)))
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6)
    assert np.all(np.max(np.abs(before - after)[0, 3:], axis=-1) > 1e-3)


def test_bad_settings_are_an_error():
    with pytest.raises(ValueError, match="3 heads cannot share a width of 8"):
        Transformer(2, width=8, heads=3)
    with pytest.raises(ValueError, match=r"no transformer has 'glorot': choose of \('lecun', "):
        Transformer(2, initialization="glorot")


def test_a_scaled_residual_start_divides_what_is_added_by_the_root_of_the_additions():
    usual, scaled = (
        jax.jit(Transformer(8, initialization=initialization).init, static_argnums=1)(KEY, 11)
        for initialization in ("lecun", "scaled_residual")
    )
    for (path, before), (_, after) in zip(
        *map(jax.tree.leaves_with_path, (usual, scaled)), strict=True
    ):
        factor = 1 / 4 if {"out", "contract"} & {key.key for key in path} else 1
        np.testing.assert_allclose(after, factor * before, rtol=1e-6)


# The task.


def cross_entropy(params: Any, window: np.ndarray) -> float:
    """Of a window's characters after the first, by hand."""
    logits = TASK.network.apply(params, window[None, :-1].astype(np.int32))[0]
    return float(-np.mean(jax.nn.log_softmax(logits)[np.arange(len(logits)), window[1:]]))


def test_a_step_s_windows_lie_in_the_text_for_training(monkeypatch: pytest.MonkeyPatch):
    # One character more than a window takes: two windows.
    text = np.arange(8 + 2, dtype=np.uint8) ** 2
    monkeypatch.setattr(tasks, "python_topics", lambda: Text(text, text[:0]))
    task = TextTask(TASK.network, batch=1)
    params, gradients = INIT(KEY), jax.jit(task.gradients)
    losses = {float(gradients(params, jax.random.key(seed))[0]) for seed in range(12)}
    want = [cross_entropy(params, window) for window in (text[:-1], text[1:])]
    np.testing.assert_allclose(sorted(losses), sorted(want), rtol=1e-5)


def test_test_windows_reach_from_the_start_of_the_text_to_its_end():
    params = INIT(KEY)
    text = python_topics().test
    error, _ = jax.jit(TextTask(TASK.network, evaluated=2).evaluate)(params)
    want = (cross_entropy(params, text[:9]) + cross_entropy(params, text[-9:])) / 2
    assert float(error) == pytest.approx(want, rel=1e-5)


def test_the_error_is_the_mean_cross_entropy_and_nan_where_a_logit_is_not_finite():
    params = jax.tree.map(jnp.zeros_like, INIT(KEY))
    assert float(EVALUATE(params)[0]) == pytest.approx(np.log(VOCABULARY), rel=1e-5)
    # A guess that knows the frequencies.
    counts = np.bincount(python_topics().train, minlength=VOCABULARY)
    params["output"]["bias"] = jnp.log(jnp.asarray(counts, jnp.float32) + 0.1)
    assert float(EVALUATE(params)[0]) == pytest.approx(TASK.unlearned, abs=0.2)
    params["output"]["bias"] = params["output"]["bias"].at[3].set(jnp.inf)
    assert jnp.isnan(EVALUATE(params)[0])


def test_a_small_network_learns_more_than_the_frequencies():
    tx = optax.adam(1e-2)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        _, (grads, _) = TASK.gradients(params, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = INIT(KEY)
    keys = jax.random.split(jax.random.key(1), 200)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    assert TASK.solved_below < float(EVALUATE(params)[0]) < TASK.unlearned - 0.3


# Their training.


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "transformer" in name])
def test_an_experiment_runs_and_records_every_layer(name: str, tmp_path: Path):
    experiment = EXPERIMENTS[name]
    task = experiment.tasks[0]
    assert isinstance(task, TextTask)
    with_sgd = [arm for arm in experiment.arms if arm.base == "sgd"]  # which compiles quickly
    tiny = replace(
        experiment,
        tasks=(replace(task, network=replace(task.network, depth=3, width=4), evaluated=2),),
        arms=tuple(with_sgd or experiment.arms)[-1:],
        steps=2,
        num_rates=1,
        tuning_seeds=(100,),
        reported_seeds=(0,),
    )
    runner.run(tiny, tmp_path, console=Console(quiet=True))
    sweep, report = records.read(tiny, tmp_path)
    for record in (sweep, report):
        assert np.isfinite(records.errors(record)).all()
        assert record["versions"]["python"] == platform.python_version()
    # Six kernels of each block, and the output's.
    assert np.shape(report["scale_curve"])[1] == 6 * 3 + 1
    assert np.all(np.array(report["scale_curve"]) > 0)


def test_a_text_is_scored_by_its_loss_and_images_by_their_accuracy():
    text, images = (EXPERIMENTS[f"normfree-{name}"].tasks[0] for name in ("transformer", "images"))
    assert (report.score(text, 2.2345), report.score(images, 0.25)) == ("2.23", "75.0%")
    assert report.score(text, np.inf) == report.score(images, np.inf) == "diverged"

    experiment = EXPERIMENTS["normfree-transformer-layernorm"]
    table = report.score_tables(Results(experiment, records.FOLDER))
    assert "| optimizer | test loss | trained (below 2.35) |" in table
    assert "| AdamW | 2.23 (2.22-2.24) | 100% |" in table
