"""Settings of the whole suite. The platform must be set before JAX is imported."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is compiling, which the second line of flags makes much shorter.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0, as in `make test-compiler`, leaves the compiler as it comes. XLA
# ends a process that has a flag which it does not know, hence for known versions only.
# The caller's flags are last: of two equal ones XLA takes the last.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "0"
        and tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10)
        else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import hypothesis
import jax
import pytest

# Compilation makes the first example slow, so no example has a deadline.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """For modules that compile much and run little of it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make mixing dtypes an error, where the code under test is this package's alone.

    Not in integration/, and not under the marker ``standard_promotion``: optax.adam raises a float
    to an int32 count, which strict promotion refuses, and other libraries do the like.
    """
    foreign = request.path.parent != TESTS or request.node.get_closest_marker("standard_promotion")
    with jax.numpy_dtype_promotion("standard" if foreign else "strict"):
        yield
