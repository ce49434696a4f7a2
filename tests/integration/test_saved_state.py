"""The optimizer states of every version load in this one, which goes on from them as it did."""

from __future__ import annotations

from pathlib import Path

import chex
import jax
import pytest
from saved_state import CASES, FIXTURES, read, update, write

from stablegrad_optax import __version__

VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


def test_this_version_has_written_its_states() -> None:
    assert __version__ in VERSIONS, "write them with python -m tests.saved_state"


@pytest.mark.parametrize("version", VERSIONS)
def test_states_of_every_version_load_bit_for_bit(version: str) -> None:
    states, step = read(FIXTURES / version)
    chex.assert_trees_all_equal(states, step["states"], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_next_step_from_a_loaded_state_is_that_of_the_version_that_saved_it(
    version: str,
) -> None:
    states, step = read(FIXTURES / version)
    for name, state in states.items():
        updates, _ = update(name, state, step["given"])
        # Compilers and processors round differently.
        chex.assert_trees_all_close(updates, step["updates"][name], rtol=1e-5)


def test_a_version_writes_its_states_once(tmp_path: Path) -> None:
    directory = write(tmp_path)
    states, step = read(directory)
    assert states.keys() == CASES.keys()
    chex.assert_trees_all_equal(states, step["states"], strict=True)
    for name, state in states.items():
        updates, _ = update(name, state, step["given"])
        chex.assert_trees_all_equal(jax.device_get(updates), step["updates"][name])
    with pytest.raises(FileExistsError, match="never written again"):
        write(tmp_path)
