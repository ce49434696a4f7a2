"""Stops the run under any other optax than the pinned one: its tests change with each release."""

import importlib.metadata
import tempfile
import tomllib
from pathlib import Path

import jax
import pytest

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pytest_configure(config: pytest.Config) -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    installed = f"optax=={importlib.metadata.version('optax')}"
    if installed not in extras["optax-suites"]:
        raise pytest.UsageError(
            f"{installed} is installed, but the extra optax-suites in pyproject.toml has "
            f"{extras['optax-suites']}, and it is that version's tests that tests/optax_suites "
            "runs: `make test-optax` makes an environment with it."
        )
    _compile_no_program_twice(config)


def _compile_no_program_twice(config: pytest.Config) -> None:
    """Half of the time would go into it: MultiSteps outside jit compiles both branches each step.

    JAX reads these settings once, at its first compilation, which is before the first fixture.
    """
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
