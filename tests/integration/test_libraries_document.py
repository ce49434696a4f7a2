"""docs/libraries.md: its code runs, and the paths it names are those that layer_scales shows."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from stablegrad_optax import layer_scales, stablegrad

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DOCUMENT = Path(__file__).parents[2] / "docs" / "libraries.md"
SECTIONS: dict[str, str] = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
)
LIBRARIES = {"Flax Linen": "flax", "Flax NNX": "flax", "Equinox": "equinox", "Haiku": "haiku"}


@functools.cache
def after(section: str) -> dict[str, Any]:
    """The variables after the section's code."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


@pytest.mark.parametrize("section", LIBRARIES)
def test_the_code_runs_and_has_the_paths_the_text_names(section: str) -> None:
    pytest.importorskip(LIBRARIES[section])
    variables = after(section)
    (named,) = re.findall(r"^Paths: (.*?)[.:]", SECTIONS[section], re.DOTALL | re.MULTILINE)
    assert set(variables["scales"]) == set(re.findall(r"`(.*?)`", named))
    assert np.all(np.asarray(jax.tree.leaves(variables["scales"])) > 0)


def test_every_script_is_in_the_table_or_on_the_page_of_many_devices() -> None:
    pages = [DOCUMENT.read_text(), (DOCUMENT.parent / "many_devices.md").read_text()]
    linked = set(re.findall(r"\(\.\./examples/(.*?)\)", "".join(pages)))
    scripts = {path.name for path in (DOCUMENT.parents[1] / "examples").glob("*.py")}
    assert linked == scripts - {"__init__.py"}


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@pytest.mark.parametrize("section", LIBRARIES)
@pytest.mark.parametrize(
    "only_matrices",
    [
        lambda tx: optax.masked(tx, is_matrix),
        lambda tx: optax.partition({True: tx, False: optax.set_to_zero()}, is_matrix),
    ],
    ids=["masked", "partition"],
)
def test_a_part_of_a_model(section: str, only_matrices: Any) -> None:
    pytest.importorskip(LIBRARIES[section])
    grads = after(section)["grads"]  # like the params
    tx = only_matrices(stablegrad())
    updates, opt_state = tx.update(grads, tx.init(grads), grads)
    kept = jax.tree.map(lambda keep, leaf: leaf if keep else None, is_matrix(grads), grads)
    scales = layer_scales(opt_state, kept)
    assert len(scales) == 2
    for update in jax.tree.leaves(updates):
        if update.ndim > 1:
            np.testing.assert_allclose(np.std(update), 1, rtol=1e-4)
