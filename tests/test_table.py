"""``scale_table`` says of each layer what the transform does to it, and what stands out."""

from __future__ import annotations

import io
import sys
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from stablegrad_optax import StableGradState, scale_table, stablegrad, stacked

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PARAMS = {f"layer_{i}": np.ones((2, 3), np.float32) for i in range(12)}
IN_TREE_ORDER = sorted(PARAMS)


def state_of(peaks: dict[str, float] | None = None, **scales: float) -> StableGradState:
    """All scales 1 but for some; no peaks but for some."""
    vector = lambda other, some: jnp.array([some.get(n, other) for n in IN_TREE_ORDER])  # noqa: E731
    return StableGradState(vector(1.0, scales), jnp.float32(1), vector(0.0, peaks or {}))


def notes(table: Any) -> dict[str, tuple[str, ...]]:
    return {row.layer: row.notes for row in table.rows if row.notes}


def test_rows_go_from_the_first_layer_to_the_last_with_numbers_by_size() -> None:
    rows = scale_table(state_of(layer_10=3.0), PARAMS).rows
    assert [row.layer for row in rows] == [f"layer_{i}" for i in range(12)]
    assert [row.grad_scale for row in rows] == [1.0] * 10 + [3.0, 1.0]


def test_a_layer_of_a_stacked_leaf_has_a_row_with_its_own_shape() -> None:
    params = {"blocks": np.ones((2, 5, 3)), "head": np.ones((3, 7))}
    layers = stacked("blocks")
    rows = scale_table(stablegrad(layers=layers).init(params), params, layers).rows
    shapes = {row.layer: row.shape for row in rows}
    assert shapes == {"blocks/0": (5, 3), "blocks/1": (5, 3), "head": (3, 7)}


@pytest.mark.parametrize("balance", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("reference", [1.0, 1e-3])
def test_the_gain_is_what_the_update_was_multiplied_by(balance: float, reference: float) -> None:
    rng = np.random.default_rng(0)
    grads = {
        name: jnp.asarray(rng.normal(size=(2, 3)) * 10.0**-i, jnp.float32)
        for i, name in enumerate(PARAMS)
    }
    tx = stablegrad(reference, balance=balance)
    updates, state = jax.jit(tx.update)(grads, tx.init(PARAMS))
    for row in scale_table(state, PARAMS, balance=balance).rows:
        np.testing.assert_allclose(updates[row.layer] / grads[row.layer], row.gain, rtol=1e-5)


def test_the_gain_of_equal_norms_is_what_the_update_was_multiplied_by() -> None:
    options = {"balance": 0.5, "equalize": "norm"}
    grads = {"large": jnp.arange(12.0).reshape(4, 3), "small": jnp.ones(2)}
    tx = stablegrad(**options)
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    gains = {row.layer: row.gain for row in scale_table(state, grads, **options).rows}
    for name, gain in gains.items():
        np.testing.assert_allclose(updates[name], grads[name] * gain, rtol=1e-5)


@pytest.mark.parametrize("option", [{"equalize": "l2"}, {"equalize": None}, {"balance": 7.0}])
def test_options_that_stablegrad_would_refuse_are_errors(option: dict[str, Any]) -> None:
    state = stablegrad().init(PARAMS)
    with pytest.raises(ValueError, match=next(iter(option))):
        scale_table(state, PARAMS, **option)


def test_a_model_without_layers_has_an_empty_table() -> None:
    params = {"scalar": jnp.ones(())}
    assert scale_table(stablegrad().init(params), params).rows == ()


@pytest.mark.parametrize(
    ("scale", "note"),
    [(0.0, "dead"), (1001.0, "exploding"), (1 / 1001, "vanishing"), (999.0, ""), (1 / 999, "")],
)
def test_a_layer_far_from_the_median_stands_out(scale: float, note: str) -> None:
    want = {"layer_3": (note,)} if note else {}
    assert notes(scale_table(state_of(layer_3=scale), PARAMS)) == want


def test_the_median_is_that_of_the_layers_that_are_not_dead() -> None:
    dead = {f"layer_{i}": 0.0 for i in range(9)}
    table = scale_table(state_of(**dead, layer_10=1e4), PARAMS)
    assert notes(table) == {**dict.fromkeys(dead, ("dead",)), "layer_10": ("exploding",)}


def test_a_scale_beyond_its_layers_peak_is_a_spike() -> None:
    state = state_of({"layer_1": 0.09, "layer_2": 0.11})
    assert notes(scale_table(state, PARAMS)) == {"layer_1": ("spike",)}
    assert notes(scale_table(state._replace(peak_scale=None), PARAMS)) == {}


def test_before_the_first_update_nothing_is_dead_yet() -> None:
    table = scale_table(stablegrad().init(PARAMS), PARAMS)
    assert notes(table) == dict.fromkeys(PARAMS, ("unseen",))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_stand_out(value: float) -> None:
    grads = {name: np.array(param) for name, param in PARAMS.items()}
    grads["layer_7"][1, 2] = value
    table = scale_table(state_of(layer_7=1e4), PARAMS, grads=grads)
    assert notes(table) == {"layer_7": ("exploding", "non-finite now")}


def test_gradients_of_other_params_are_an_error() -> None:
    with pytest.raises(ValueError, match="grads must have the paths and shapes of params"):
        scale_table(state_of(), PARAMS, grads={"layer_0": np.ones((2, 3))})


def test_a_pattern_chooses_rows_and_leaves_the_median_as_it_was() -> None:
    table = scale_table(state_of(layer_3=1e4), PARAMS, pattern="_3$")
    assert [row.layer for row in table.rows] == ["layer_3"]
    assert notes(table) == {"layer_3": ("exploding",)}


def shown() -> Any:
    params = {"a[b]": np.ones((2, 3)), "<c>": np.ones(4)}
    return scale_table(StableGradState(jnp.array([0.0, 0.125]), jnp.float32(1)), params)


def test_as_text_it_is_aligned() -> None:
    assert str(shown()) == (
        "layer  shape   gradient scale  gain  stands out\n"
        "<c>    (4,)                 0     1  dead\n"
        "a[b]   (2, 3)           0.125     8"
    )


def test_in_rich_it_has_the_same_cells_and_colours_what_stands_out() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    console.print(shown())
    header, _, dead, live = console.file.getvalue().rstrip().split("\n")
    assert all(name in header for name in ("layer", "shape", "gradient scale", "gain"))
    assert "\x1b[1;31m" in dead
    assert "dead" in dead
    assert "\x1b" not in live
    assert live.split() == ["a[b]", "(2,", "3)", "0.125", "8"]


def test_in_a_notebook_it_is_a_table_with_the_same_cells() -> None:
    table = ElementTree.fromstring(shown()._repr_html_())
    cells = [[cell.text or "" for cell in row] for row in table]
    assert cells == [
        ["layer", "shape", "gradient scale", "gain", "stands out"],
        ["<c>", "(4,)", "0", "1", "dead"],
        ["a[b]", "(2, 3)", "0.125", "8", ""],
    ]
    assert "color" in table[1].attrib["style"]
    assert "color" not in table[2].attrib["style"]


def test_text_and_html_need_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    table = shown()
    assert str(table).startswith("layer")
    assert table._repr_html_().startswith("<table>")
