"""``plot_scales`` draws what the history holds, every layer with its name."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from stablegrad_optax import ScaleHistory, StableGradState, plot_scales, stablegrad, stacked

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PARAMS = {f"Dense_{i}": {"kernel": np.ones((2, 3)), "bias": np.ones(3)} for i in range(12)}
NUM_LAYERS = 24


def history_of(scales: Any, length: int = 8) -> ScaleHistory:
    """Of the scales of each step, [steps, num_layers]."""
    history = ScaleHistory.init(stablegrad().init(PARAMS), length)
    for scale in jnp.asarray(scales, jnp.float32):
        history = history.record(StableGradState(scale, jnp.float32(1)))
    return history


def scales(steps: int) -> np.ndarray:
    return np.exp(np.random.default_rng(0).normal(size=(steps, NUM_LAYERS)))


def labels(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_layers_go_down_from_the_first_with_numbers_by_size() -> None:
    figure = plot_scales(history_of(scales(3)), PARAMS, pattern="kernel")
    assert labels(figure) == [f"Dense_{i}/kernel" for i in range(12)]
    bottom, top = figure.axes[0].get_ylim()
    assert bottom > top


def test_the_map_and_the_profiles_show_the_scales_of_the_named_layers_at_their_steps() -> None:
    values = scales(5)
    figure = plot_scales(history_of(values), PARAMS)
    heat_map, profile = figure.axes[:2]
    (mesh,) = heat_map.collections
    order = [list(tree_names()).index(name) for name in labels(figure)]
    np.testing.assert_allclose(mesh.get_array(), values[:, order].T, rtol=1e-6)
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], range(6))
    assert [line.get_label() for line in profile.lines] == [f"step {t}" for t in (0, 1, 3, 4)]
    np.testing.assert_allclose(profile.lines[-1].get_xdata(), values[-1, order], rtol=1e-6)


def tree_names() -> list[str]:
    return [f"Dense_{i}/{leaf}" for i in sorted(range(12), key=str) for leaf in ("bias", "kernel")]


def test_colours_and_profile_are_logarithmic_and_dead_layers_left_out() -> None:
    values = scales(3)
    values[:, 0] = 0
    heat_map, profile = plot_scales(history_of(values), PARAMS).axes[:2]
    (mesh,) = heat_map.collections
    assert type(mesh.norm).__name__ == "LogNorm"
    assert profile.get_xscale() == "log"
    assert np.ma.getmaskarray(mesh.get_array())[0].all()
    assert not np.ma.getmaskarray(mesh.get_array())[1:].any()
    assert np.ma.getmaskarray(profile.lines[0].get_xdata())[0]


@pytest.mark.parametrize(
    "values",
    [scales(1), np.ones((3, NUM_LAYERS)), np.zeros((3, NUM_LAYERS)), np.full((1, 24), 1e-38)],
    ids=["one step", "all alike", "all dead", "smallest"],
)
def test_it_can_be_drawn_whatever_the_scales_are(values: np.ndarray) -> None:
    assert plot_scales(history_of(values), PARAMS)._repr_png_().startswith(b"\x89PNG")


def test_of_many_layers_some_are_named() -> None:
    params = {"blocks": np.ones((200, 2, 3))}
    state = stablegrad(layers=stacked("blocks")).init(params)
    figure = plot_scales(ScaleHistory.init(state).record(state), params, stacked("blocks"))
    assert labels(figure) == [f"blocks/{i}" for i in range(0, 200, 5)]


def test_an_empty_history_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"history is empty.*record"):
        plot_scales(history_of(scales(0).reshape(0, NUM_LAYERS)), PARAMS)


def test_params_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(24,\), but params and layers make 2 layers"):
        plot_scales(history_of(scales(1)), PARAMS["Dense_0"])


def test_a_pattern_that_matches_nothing_is_an_error_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"'conv' is in none of the layers' names.*Dense_0/bias"):
        plot_scales(history_of(scales(1)), PARAMS, pattern="conv")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "stablegrad_optax._picture", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'stablegrad_optax\[diagnostics\]'"):
        plot_scales(history_of(scales(1)), PARAMS)
