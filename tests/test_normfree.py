"""The classifiers without normalization: their data, networks and task."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.normfree import starts
from benchmarks.normfree.data import DATA, digits
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.task import ClassificationTask

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("compiled_quickly")]

TASK = ClassificationTask("digits", DeepNetwork(4, width=8), batch=16)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_no_image_is_both_for_training_and_for_testing(name: str):
    images = DATA[name].read()
    train, test = ({row.tobytes() for row in x} for x in (images.train_inputs, images.test_inputs))
    assert not train & test
    assert images.train_inputs.shape == (len(images.train_labels), images.pixels)
    assert images.test_inputs.shape == (len(images.test_labels), images.pixels)
    for labels in (images.train_labels, images.test_labels):
        assert set(labels.tolist()) == set(range(DATA[name].classes))
    assert np.prod(images.shape) == images.pixels
    assert images.shape[-1] == DATA[name].channels
    assert images.train_inputs.dtype == np.float32
    assert -0.5 <= images.train_inputs.min() < images.train_inputs.max() <= 0.5


@pytest.mark.parametrize("shape", ["plain", "residual"])
def test_the_network_is_its_formula(shape: str):
    network = DeepNetwork(3, width=5, shape=shape)
    params = network.init(jax.random.key(0), 7, 2)
    inputs = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)

    def layer(values, index):
        own = jax.tree.map(lambda leaf: np.asarray(leaf[index]), params["hidden"])
        return np.maximum(values @ own["kernel"] + own["bias"], 0)

    values = np.maximum(inputs @ params["first"]["kernel"] + params["first"]["bias"], 0)
    for index in range(2):
        values = layer(values, index) + (values if shape == "residual" else 0)
    want = values @ params["last"]["kernel"] + params["last"]["bias"]
    np.testing.assert_allclose(network.apply(params, inputs), want, rtol=1e-5)


def test_flax_s_default_lets_a_plain_network_vanish_and_a_residual_one_explode():
    inputs = jnp.asarray(digits().test_inputs)
    sizes = {}
    for shape in ("plain", "residual"):
        for initialization in ("lecun", "activation_aware"):
            network = DeepNetwork(50, shape=shape, initialization=initialization)
            logits = network.apply(network.init(jax.random.key(0), 64, 10), inputs)
            sizes[shape, initialization] = float(jnp.std(logits))
    assert sizes["plain", "lecun"] < 1e-4
    assert 1e-2 < sizes["plain", "activation_aware"] < 1e2
    assert 1e2 < sizes["residual", "lecun"] < sizes["residual", "activation_aware"]


def test_300_residual_layers_stay_within_float32_with_a_quarter_of_the_variance():
    for initialization, fits in (("lecun", False), ("quarter_variance", True)):
        task = ClassificationTask("digits", DeepNetwork(300, initialization=initialization))
        loss, (grads, _) = jax.jit(task.gradients)(task.init(jax.random.key(0)), jax.random.key(1))
        finite = [bool(jnp.all(jnp.isfinite(leaf))) for leaf in (loss, *jax.tree.leaves(grads))]
        assert all(finite) == fits


def test_what_is_zero_or_not_finite_at_the_start_is_told_from_what_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def network(depth: int, **options: str) -> ClassificationTask:
        return replace(TASK, network=DeepNetwork(depth, width=8, **options))

    some = [network(3), network(300, shape="plain"), network(400)]
    monkeypatch.setattr(starts, "tasks", lambda: iter(some))
    (tmp_path / starts.NAME).write_text("not a record\n")  # of before, and written anew
    starts.main(tmp_path)
    *_, shallow, zero, overflown = starts.table(tmp_path).splitlines()
    # Nothing of an image is left: a guess, which no kernel can change.
    assert zero == "| digits, plain relu, depth 300 | 2.3 | 0 | 0 |"
    assert overflown.count("not finite") == 3

    _, loss, smallest, largest = shallow.strip("| ").split(" | ")
    assert 1 < float(loss) < 10
    assert 0 < float(smallest) < float(largest) < 1


def test_the_gradient_of_gelu_is_no_number_where_the_square_of_its_input_overflows():
    assert jax.grad(jax.nn.gelu)(1e19) == 1
    assert np.isnan(jax.grad(jax.nn.gelu)(2e19))


def test_gradients_are_those_of_the_cross_entropy_of_a_batch():
    params = TASK.init(jax.random.key(0))
    loss, (grads, prediction_grad) = TASK.gradients(params, jax.random.key(1))
    chosen = jax.random.randint(jax.random.key(1), (16,), 0, len(digits().train_labels))

    def by_hand(params):
        logits = TASK.network.apply(params, jnp.asarray(digits().train_inputs)[chosen])
        labels = jax.nn.one_hot(digits().train_labels[np.asarray(chosen)], 10)
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))

    value, want = jax.value_and_grad(by_hand)(params)
    assert float(loss) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, want)
    assert prediction_grad.shape == (16, 10)
    np.testing.assert_allclose(jnp.sum(prediction_grad, axis=1), 0, atol=1e-6)


def test_the_error_is_the_share_of_wrong_test_images_and_nan_where_a_logit_is():
    params = jax.tree.map(jnp.zeros_like, TASK.init(jax.random.key(0)))
    error, _ = TASK.evaluate(params)  # the first class for all
    assert float(error) == pytest.approx(1 - np.mean(digits().test_labels == 0))
    assert TASK.unlearned == pytest.approx(0.9)
    params["last"]["bias"] = params["last"]["bias"].at[3].set(jnp.inf)
    assert jnp.isnan(TASK.evaluate(params)[0])


def test_a_small_network_learns():
    params = TASK.init(jax.random.key(0))
    tx = optax.adam(1e-2)

    def step(carry, key):
        params, state = carry
        _, (grads, _) = TASK.gradients(params, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 300)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    assert float(TASK.evaluate(params)[0]) < TASK.solved_below + 0.1


@pytest.mark.parametrize(
    "change", [{"shape": "dense"}, {"activation": "tanh"}, {"initialization": "zero"}]
)
def test_what_is_not_there_is_an_error_that_names_what_is(change: dict[str, str]):
    with pytest.raises(ValueError, match="choose of"):
        DeepNetwork(3, **change)
    with pytest.raises(ValueError, match="digits"):
        ClassificationTask("letters", DeepNetwork(3))
