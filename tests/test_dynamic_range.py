"""The table of benchmarks/robustness, its small form, holds the target in every cell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.robustness import dynamic_range as table
from benchmarks.robustness import tpu_accumulation

pytestmark = pytest.mark.standard_promotion  # optax mixes dtypes where a threshold has its own


@pytest.fixture(scope="module")
def results() -> list[table.Result]:
    with jax.numpy_dtype_promotion("standard"):
        return table.measure(table.FAST)


def test_our_error_is_within_the_target_in_every_cell(results: list[table.Result]) -> None:
    asked = [r for r in results if r.region == "target" and r.column in table.OURS]
    assert len(asked) > 5000
    assert {r.dtype for r in asked} == set(table.DTYPES)
    assert {r.family for r in asked} == set(table.FAMILIES)
    assert [r for r in asked if not r.error <= 1e-3] == []


def test_our_statistic_is_finite_in_every_cell(results: list[table.Result]) -> None:
    ours = [r for r in results if r.column in table.OURS]
    assert [r for r in ours if not math.isfinite(r.got)] == []


def test_of_flushed_entries_our_statistic_is_exact_for_what_the_backend_sees(
    results: list[table.Result],
) -> None:
    flushed = [r for r in results if r.region == "flushed" and r.column in table.OURS]
    assert [r for r in flushed if not r.seen_error <= 1e-3] == []


def test_our_std_beyond_30_std_is_a_std_or_the_rms(results: list[table.Result]) -> None:
    """Nothing in between: a factor of less than 1.1 from the std, or the documented RMS."""
    for r in results:
        if (r.region, r.column) == ("beyond", "ours: std") and r.truth > 1e5 * 1.2e-38:
            rms = r.truth * math.hypot(1, r.ratio)
            assert r.error < 0.1 or abs(r.got / rms - 1) <= 1e-3, r


@pytest.mark.parametrize("column", table.PEERS)
def test_the_table_tells_the_peers_apart(results: list[table.Result], column: str) -> None:
    asked = [r for r in results if r.region == "target" and r.column == column]
    share = sum(r.within for r in asked) / len(asked)
    assert 0.3 < share < 0.8
    assert any(math.isinf(r.error) for r in asked)
    for dtype in ("float32", "float64"):
        middle = [r for r in asked if r.dtype == dtype and 1e-6 < r.magnitude < 1e6]
        assert middle
        assert all(r.within for r in middle)


def test_the_peers_columns_are_what_their_transforms_compute() -> None:
    entries = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    params = np.ones_like(entries)
    columns = table.peers(entries, jnp.float32(0.01))

    update, _ = optax.scale_by_trust_ratio().update(entries, optax.EmptyState(), params)
    norm = optax.safe_norm(params, 0.0) * entries / np.asarray(update)
    np.testing.assert_allclose(norm, columns["scale_by_trust_ratio"], rtol=1e-5)

    update, _ = optax.adaptive_grad_clip(0.01).update(entries, optax.EmptyState(), params)
    norm = 0.01 * math.sqrt(1000) * entries / np.asarray(update)
    np.testing.assert_allclose(norm, columns["adaptive_grad_clip"], rtol=1e-5)

    rms = math.sqrt(np.mean(np.square(entries, dtype=np.float64)))
    np.testing.assert_allclose(columns["clip_by_block_rms"], rms, rtol=1e-5)


def test_the_truth_of_a_constant_and_of_a_large_mean() -> None:
    constant = table.truth_of(np.full(10, 0.1, np.float32), 0.1)
    assert constant.std == 0
    assert constant.ratio == math.inf
    shifted = table.truth_of(1e6 + np.array([1.0, -1.0] * 1000), 1e6)
    assert shifted.std == pytest.approx(1, rel=1e-12)
    assert shifted.ratio == pytest.approx(1e6, rel=1e-12)


def test_sums_in_the_order_of_a_tpu() -> None:
    """A chain that stops growing at 2^24 shows the order; lanes and windows start anew."""
    ones = np.ones((3, 4), np.float32)
    lanes = tpu_accumulation.lane_sums([ones, 2 * ones])
    np.testing.assert_array_equal(lanes, [[9] * 4, [15] * 4])
    np.testing.assert_array_equal(tpu_accumulation.added_in_pairs(lanes), [36, 60])
    stuck = np.array([[2.0**24], [1.0], [1.0]], np.float32)
    assert tpu_accumulation.lane_sums([stuck])[0] == 2.0**24
    assert tpu_accumulation.lane_sums([stuck[:1], stuck[1:]])[0] == 2.0**24 + 2
