"""The scripts of examples/: each trains, and updates as the transform does on plain arrays."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest

from stablegrad_optax import layer_scales, per_leaf, prediction_value_and_grad, stablegrad

pytestmark = [
    pytest.mark.usefixtures("compiled_quickly"),
    # jinns ignores this warning of Equinox's itself, but pytest's filters come before its own.
    pytest.mark.filterwarnings(r"ignore:Using `field\(init=False\)`:UserWarning"),
]

# Of each example: the library, what stablegrad is given, and the paths that it has a scale for.
EXAMPLES: dict[str, tuple[str, dict[str, float], set[str]]] = {
    "flax_linen": (
        "flax",
        {},
        {f"Dense_{i}/{name}" for i in range(5) for name in ("kernel", "bias")} - {"Dense_4/bias"},
    ),
    "flax_nnx": (
        "flax",
        {},
        {
            f"{name}/value"
            for name in (
                "first/kernel",
                "first/bias",
                "blocks/kernel",
                "blocks/bias",
                "last/kernel",
            )
        },
    ),
    "equinox_mlp": (
        "equinox",
        {},
        {"first/weight", "first/bias", "blocks/weight", "blocks/bias", "last/weight"},
    ),
    "haiku_mlp": (
        "haiku",
        {},
        {"first/w", "first/b", "blocks/linear/w", "blocks/linear/b", "last/w"},
    ),
    "jinns_burgers": (
        "jinns",
        {"balance": 0.5},
        {f"nn_params/layers/{i}/{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
        - {"nn_params/layers/4/bias"},
    ),
}


@pytest.fixture(params=EXAMPLES)
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(EXAMPLES[request.param][0])
    return request.param


def load(name: str) -> ModuleType:
    return importlib.import_module(f"examples.{name}")


def test_main_prints_losses_that_fall_and_the_scales(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load(name).main(steps=100)
    printed = capsys.readouterr().out
    losses = re.findall(r"loss (\S+) -> (\S+)", printed)
    assert len(losses) == 2  # a fixed reference, and that of the paper
    for first, last in losses:
        assert float(last) < float(first) / 3
    assert set(re.findall(r"^  (\S+): gradient scale", printed, re.MULTILINE)) == EXAMPLES[name][2]


def recorded() -> optax.GradientTransformation:
    """What comes through here, as the state."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(lambda leaf: 0 * leaf, params),
        update=lambda updates, state, params=None: (updates, updates),
    )


def single_layers(tree: Any) -> list[np.ndarray]:
    """The tree's arrays as a list, each layer of a stack by itself."""
    return [
        array
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        for array in (
            np.asarray(leaf) if "blocks" in jax.tree_util.keystr(path) else np.asarray(leaf)[None]
        )
    ]


def test_the_update_is_that_of_the_plain_arrays(name: str) -> None:
    example, options = load(name), EXAMPLES[name][1]
    layers = getattr(example, "LAYERS", per_leaf)
    tx = optax.chain(recorded(), stablegrad(layers=layers, **options), recorded(), optax.sgd(1e-3))
    _, params, (grads, state, updates, _) = example.train(tx, steps=2)
    plain = stablegrad(**options)
    arrays = single_layers(grads)
    expected, plain_state = plain.update(arrays, plain.init(arrays))
    chex.assert_trees_all_close(single_layers(updates), expected, rtol=1e-5)
    scales = layer_scales(state, params, layers)
    np.testing.assert_allclose(
        np.concatenate([np.ravel(scale) for scale in scales.values()]),
        plain_state.grad_scale,
        rtol=1e-5,
    )


def test_the_prediction_of_jinns_is_the_residuals_that_its_loss_is_made_of() -> None:
    pytest.importorskip("jinns")
    example = load("jinns_burgers")
    params, points, loss = example.burgers()
    _, batch = points.get_batch()
    value_and_grad = prediction_value_and_grad(
        lambda params: loss.evaluate_per_sample(params, batch),
        lambda residuals: example.loss_of_residuals(residuals, loss),
    )
    value, (grads, prediction_grad) = jax.jit(value_and_grad)(params)
    expected = jax.jit(lambda params: loss.evaluate(params, batch)[0])(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(
        example.get_prediction_grad(loss, params, batch), prediction_grad, rtol=1e-4, atol=1e-7
    )
    _, terms = jax.jit(lambda params: loss.values_and_grads(params, batch))(params)
    of_jinns = loss.ponderate_and_sum_gradient(terms)
    chex.assert_trees_all_close(grads.nn_params, of_jinns.nn_params, rtol=1e-3, atol=1e-6)
