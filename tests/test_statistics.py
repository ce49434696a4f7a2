"""The statistic over the whole range of each number format, always as compiled code.

With decay 0 the state after one update *is* the statistic, so everything here goes through the
public transform; and the compiled text shows how often a gradient is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import enable_x64
from jax.extend.core import Literal
from oracle import CONSTANT_EPSILONS, statistic, statistics

from stablegrad_optax import LayerAxes, _statistics, stablegrad

RTOL = 1e-3

both = stablegrad(
    decay=0.0, layers={"rms": LayerAxes(0, centered=False), "std": LayerAxes(0, centered=True)}
)
rows = stablegrad(
    decay=0.0, layers={"rms": LayerAxes(1, centered=False), "std": LayerAxes(1, centered=True)}
)


@jax.jit
def measure(entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The RMS and the std of a vector, and both updates."""
    grads = {"rms": entries, "std": entries}
    updates, state = both.update(grads, both.init(grads))
    return state.grad_scale, updates


@jax.jit
def measure_rows(entries: jax.Array) -> jax.Array:
    """The RMS and the std of every row, as two rows of results."""
    grads = {"rms": entries, "std": entries}
    _, state = rows.update(grads, rows.init(grads))
    return state.grad_scale.reshape(2, -1)


def expected(entries: Any) -> list[float]:
    wide = np.asarray(entries).astype(np.float64)
    return [statistic(wide, False), statistic(wide, True)]


def check(entries: Any, rtol: float = RTOL) -> None:
    scales, updates = measure(entries)
    np.testing.assert_allclose(scales, expected(entries), rtol=rtol)
    for update in jax.tree.leaves(updates):
        assert update.dtype == jnp.asarray(entries).dtype
        assert np.all(np.isfinite(np.asarray(update).astype(np.float64)))


def expected_rows(entries: np.ndarray) -> np.ndarray:
    """``statistic`` of every row at once, for tables of many thousand rows."""
    wide = entries.astype(np.float64)
    rms = np.sqrt(np.mean(wide**2, axis=1))
    std = np.sqrt(np.mean((wide - wide.mean(1, keepdims=True)) ** 2, axis=1))
    constant = std**2 <= CONSTANT_EPSILONS * 2.0**-23 * rms**2
    return np.stack([rms, np.where(constant, rms, std)])


# --- Plain sums and windows ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_plain_sums_and_windows_agree_where_both_hold(dtype: Any) -> None:
    """On a CPU one layer beyond the range of plain squares takes all of them to the windows."""
    rng = np.random.default_rng(0)
    entries = jnp.asarray(3 + rng.normal(size=(64, 32)), dtype)
    if dtype == jnp.complex64:
        entries *= jnp.exp(1j * rng.uniform(size=(64, 32))).astype(dtype)
    tx = stablegrad(decay=0.0)

    @jax.jit
    def scale(entries: jax.Array, other: float) -> jax.Array:
        grads = {"entries": entries, "other": jnp.full(7, other)}
        return tx.update(grads, tx.init(grads))[1].grad_scale[0]

    for power in range(-30, 40, 2):
        moved = entries * jnp.asarray(2.0**power, dtype)
        plain, windows = scale(moved, 2.0**power), scale(moved, 2.0**-90)
        np.testing.assert_allclose(plain, windows, rtol=1e-5)


# --- Range ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0, 30.0, -30.0])
@pytest.mark.parametrize("size", [1000, 2**16])
def test_float32_over_every_decade_for_means_up_to_30_std(ratio: float, size: int) -> None:
    unit = ratio + np.random.default_rng(0).normal(size=size)
    unit /= np.abs(unit).max()
    for decade in range(-36, 38):
        check((unit * 10.0**decade).astype(np.float32))


def test_float32_at_the_ends_of_the_range() -> None:
    signs = np.where(np.arange(64) % 3 == 0, -1.0, 1.0)
    for magnitude in (1e-37, 3e-37, 1e37, 2.0**126, 2.0**127, 3.4e38):
        check((magnitude * signs).astype(np.float32))


def test_a_mean_below_the_normal_range_still_counts() -> None:
    """At 1e-37 a mean of a tenth of the std is subnormal, and half a percent of the variance."""
    signs = np.where(np.arange(1000) < 450, -1.0, 1.0)
    for magnitude in (1e-37, 1.5e-37, 2e-37):
        check((magnitude * signs).astype(np.float32))


def test_a_statistic_below_the_normal_range_is_positive_and_tiny() -> None:
    """Zero is kept for a gradient of zeros."""
    entries = np.zeros(1000, np.float32)
    entries[7] = 1e-37
    scales, updates = measure(entries)
    assert np.all(scales > 0)
    assert np.all(scales <= 1.2e-38)
    assert np.all(np.isfinite(updates["std"]))


def test_bfloat16_over_every_decade() -> None:
    rng = np.random.default_rng(1)
    for ratio in (0.0, 1.0, 5.0):
        unit = ratio + rng.normal(size=1000)
        unit /= np.abs(unit).max()
        for decade in range(-36, 38):
            check(jnp.asarray((unit * 10.0**decade).astype(np.float32)).astype(jnp.bfloat16))


def test_float16_over_its_range() -> None:
    rng = np.random.default_rng(2)
    for ratio in (0.0, 1.0, 10.0):
        unit = ratio + rng.normal(size=1000)
        unit /= np.abs(unit).max()
        for exponent in range(-20, 16):
            check((unit * 2.0**exponent).astype(np.float16))
    check(np.float16([65504.0, -65504.0] * 8))
    check(np.float16([6e-8, -6e-8, 6e-8, 1.2e-7]))


@pytest.mark.parametrize("exponent", [-300, -200, 0, 200, 300])
def test_float64_where_its_own_squares_do_not_hold(exponent: int) -> None:
    with enable_x64():
        rng = np.random.default_rng(3)
        entries = (0.5 + rng.normal(size=1000)) * 10.0**exponent
        scales, _ = measure(entries)
        assert scales.dtype == jnp.float64
        np.testing.assert_allclose(scales, expected(entries), rtol=1e-9)


def test_complex_entries_over_the_range() -> None:
    rng = np.random.default_rng(4)
    unit = rng.normal(size=500) + 1j * rng.normal(size=500) + (3 - 2j)
    unit /= np.abs(unit).max()
    for decade in range(-36, 38):
        entries = (unit * 10.0**decade).astype(np.complex64)
        scales, _ = measure(entries)
        want = [statistic(entries, False), statistic(entries, True)]
        np.testing.assert_allclose(scales, want, rtol=RTOL)


def test_complex_parts_of_very_different_magnitude() -> None:
    for real, imaginary in [(1e-30, 1e30), (1e30, 1e-30), (1e-30, 1e-37), (1.0, 1e-25)]:
        entries = (np.float64([1, -1, 1, -1]) * real + 1j * imaginary).astype(np.complex64)
        scales, _ = measure(entries)
        want = [statistic(entries, False), statistic(entries, True)]
        np.testing.assert_allclose(scales, want, rtol=RTOL)


@pytest.mark.parametrize("centered", [True, False])
def test_a_million_large_entries_do_not_overflow_the_sum(centered: bool) -> None:
    rng = np.random.default_rng(5)
    for scale in (1e37, 1e-36):
        grads = {"w": (scale * (1 + rng.uniform(-0.9, 0.9, 2**20))).astype(np.float32)}
        tx = stablegrad(decay=0.0, layers={"w": LayerAxes(0, centered)})
        _, state = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_allclose(state.grad_scale, statistic(grads["w"], centered), rtol=RTOL)


# --- Thresholds of the accumulators --------------------------------------------------------


def test_entries_spread_over_the_whole_range() -> None:
    rng = np.random.default_rng(6)
    for low, high in [(-126, 127), (-126, 0), (0, 127), (-60, 60), (-126, -40), (40, 127)]:
        for _ in range(5):
            exponent = rng.uniform(low, high, 1000)
            check((rng.choice([-1, 1], 1000) * 2.0**exponent).astype(np.float32))


@pytest.mark.parametrize("large", [1, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_mixtures_of_two_magnitudes_any_power_of_two_apart(large: int, signed: bool) -> None:
    """All pairs 2**e, 2**(e + k): 1 or 8 large entries among 16, so the small ones count."""
    exponents = np.arange(-122, 127)
    low, high = (a.ravel() for a in np.meshgrid(exponents, exponents))
    table = np.where(np.arange(16) < large, high[:, None], low[:, None])
    entries = np.ldexp(np.float32(1), table).astype(np.float32)
    entries *= np.where(np.arange(16) % 2, -1, 1).astype(np.float32) if signed else np.float32(1)
    want = expected_rows(entries)
    for got, right in zip(np.asarray(measure_rows(entries)), want, strict=True):
        np.testing.assert_allclose(got, right, rtol=RTOL)


def test_mixtures_of_two_magnitudes_in_one_whole_leaf() -> None:
    """The reduction of a whole leaf compiles to other code than that of rows."""
    for low in range(-122, 120, 7):
        for gap in range(0, 126 - low, 5):
            entries = np.float32(2.0**low) * np.where(np.arange(64) % 3 == 0, -1, 1)
            entries[5] = 2.0 ** (low + gap)
            check(entries.astype(np.float32))


@pytest.mark.parametrize("steps_per_octave", [4])
def test_entries_of_one_magnitude_across_every_threshold(steps_per_octave: int) -> None:
    exponents = np.arange(-122 * steps_per_octave, 127 * steps_per_octave) / steps_per_octave
    wobble = 2.0 ** np.linspace(-0.5, 0.5, 32)
    entries = (2.0 ** exponents[:, None] * wobble).astype(np.float32)
    entries *= np.where(np.arange(32) % 2, -1, 1).astype(np.float32)
    want = expected_rows(entries)
    np.testing.assert_allclose(measure_rows(entries), want, rtol=RTOL)


# --- Special values ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 2**16])
def test_a_constant_leaf_uses_its_rms(size: int) -> None:
    for value in (1e-37, -3.3e-20, 1e-10, 0.1, -1.0, 7.7, 1e20, -1e37):
        scales, updates = measure(np.full(size, value, np.float32))
        np.testing.assert_allclose(scales, abs(np.float32(value)), rtol=1e-4)
        np.testing.assert_allclose(updates["std"], np.sign(value), rtol=1e-4)


def test_a_std_within_the_rounding_of_the_mean_uses_the_rms() -> None:
    entries = np.full(512, 1.0, np.float32)
    entries[::2] += np.float32(1e-6)
    scales, _ = measure(entries)
    np.testing.assert_allclose(scales, 1.0, rtol=1e-4)


def test_the_std_is_used_up_to_a_mean_of_some_hundred_std_and_the_rms_beyond() -> None:
    noise = np.random.default_rng(11).normal(size=1000)
    noise = (noise - noise.mean()) / noise.std()
    for ratio, want in [(100.0, 1.0), (2000.0, 2000.0)]:
        scales, _ = measure((ratio + noise).astype(np.float32))
        np.testing.assert_allclose(scales[1], want, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_constant_leaf_of_a_short_format_uses_its_rms(dtype: Any) -> None:
    entries = jnp.full(100, 0.1, dtype)
    scales, _ = measure(entries)
    np.testing.assert_allclose(scales, float(entries[0]), rtol=1e-4)


def test_zeros_give_zero_and_stay_zero() -> None:
    for entries in (np.zeros(16, np.float32), -np.zeros(16, np.float32)):
        scales, updates = measure(entries)
        np.testing.assert_array_equal(scales, 0.0)
        np.testing.assert_array_equal(updates["std"], 0.0)


@pytest.mark.parametrize("magnitude", [1e-35, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e37])
def test_sparse_leaves_and_one_outlier(magnitude: float) -> None:
    sparse = np.zeros(1000, np.float32)
    sparse[[3, 500]] = magnitude
    check(sparse)
    single = np.zeros(1000, np.float32)
    single[7] = -magnitude
    check(single)
    outlier = np.random.default_rng(7).normal(size=1000).astype(np.float32)
    outlier[5] = magnitude
    check(outlier)
    check((outlier * np.float32(1e-7)).astype(np.float32))


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1.0, 1e25, 1e37])
def test_non_finite_entries_never_reach_the_state(fault: float, scale: float) -> None:
    entries = scale * np.random.default_rng(8).normal(size=64)
    for where in ([0], [63], [1, 2], range(64)):
        faulty = entries.astype(np.float32)
        faulty[where] = fault
        scales, updates = measure(faulty)
        np.testing.assert_array_equal(scales, 0.0)
        for update in jax.tree.leaves(updates):
            assert not np.all(np.isfinite(update))
    both_signs = np.float32([np.inf, -np.inf, 1.0])
    np.testing.assert_array_equal(measure(both_signs)[0], 0.0)


# --- Axes ----------------------------------------------------------------------------------


AXES: list[tuple[tuple[int, ...], Any]] = [
    ((64, 5), 0),
    ((64, 5), (0,)),
    ((5, 64), -1),
    ((4, 8, 3), (0, 1)),
    ((4, 8, 3), (1, 2)),
    ((4, 8, 3), (0, -1)),
    ((4, 8, 3), (-1, 0)),
    ((4, 8, 3), (1,)),
    ((2, 3, 4, 5), (0, 2)),
    ((2, 3, 4, 5), (3, 1, 2)),
    ((6, 2), ()),
    ((1, 8), (0,)),
]


@pytest.mark.parametrize(("shape", "reduce"), AXES)
@pytest.mark.parametrize("centered", [True, False])
def test_statistics_per_axis_in_row_major_order_of_the_other_axes(
    shape: tuple[int, ...], reduce: Any, centered: bool
) -> None:
    rng = np.random.default_rng(9)
    grads = {"w": (10.0 ** rng.uniform(-20, 20, shape) * rng.normal(size=shape))}
    grads = {"w": grads["w"].astype(np.float32)}
    tx = stablegrad(decay=0.0, layers={"w": LayerAxes(reduce, centered)})
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    axes = (reduce,) if isinstance(reduce, int) else reduce
    want = statistics([grads["w"]], [(axes, centered)])
    assert state.grad_scale.shape == want.shape
    np.testing.assert_allclose(state.grad_scale, want, rtol=1e-5)
    out = statistics([np.asarray(updates["w"])], [(axes, centered)])
    np.testing.assert_allclose(out, 1.0, rtol=1e-5)


# --- One read ------------------------------------------------------------------------------


LEAF = (64, 33)
CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"}


@dataclass
class Passes:
    """Passes over leaf-sized arrays that any compiler needs, from the data flow of a jaxpr.

    A reduction of a leaf-sized array ends a pass: what depends on its result can only run in the
    next one. XLA:CPU's own text does not show this, since it hands each reduction to a library
    and writes what goes into it to memory.
    """

    reductions: int = 0
    stages: set[int] = field(default_factory=set)

    def follow(self, jaxpr: Any, stages: list[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, stages, strict=True))
        stage_of = lambda v: 0 if isinstance(v, Literal) else known.get(v, 0)  # noqa: E731
        for equation in jaxpr.eqns:
            inputs = [stage_of(v) for v in equation.invars]
            out = self._outputs(equation, inputs)
            known |= dict(zip(equation.outvars, out, strict=True))
        return [stage_of(v) for v in jaxpr.outvars]

    def _outputs(self, equation: Any, inputs: list[int]) -> list[int]:
        name = equation.primitive.name
        if name in CALLS:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            return self.follow(getattr(inner, "jaxpr", inner), inputs)
        if name == "cond":  # the branch of the steady state: the last, where the predicate holds
            taken = self.follow(equation.params["branches"][-1].jaxpr, inputs[1:])
            return [max(stage, inputs[0]) for stage in taken]
        stage = max(inputs, default=0)
        sized = any(v.aval.shape == LEAF for v in equation.invars)
        if sized:
            self.stages.add(stage)
        ends_pass = name.startswith("reduce_") and sized
        self.reductions += ends_pass
        return [stage + ends_pass] * len(equation.outvars)


def passes(step: Callable[..., Any], *arguments: Any) -> Passes:
    closed = jax.make_jaxpr(step)(*arguments)
    found = Passes()
    found.follow(closed.jaxpr, [0] * len(closed.jaxpr.invars))
    return found


def whole(centered: bool = True) -> LayerAxes:
    return LayerAxes((0, 1), centered)


@pytest.mark.parametrize("layers", [whole(), whole(False), LayerAxes(1)], ids=repr)
@pytest.mark.parametrize("balance", [1.0, 0.5])
@pytest.mark.parametrize(("delayed", "count"), [(False, 2), (True, 1)])
def test_one_pass_for_the_statistic_and_one_to_rescale_and_delayed_needs_one_alone(
    layers: LayerAxes, balance: float, delayed: bool, count: int
) -> None:
    tx = stablegrad(balance=balance, delayed=delayed, layers={"w": layers})
    grads = {"w": jnp.zeros(LEAF)}
    found = passes(tx.update, grads, tx.init(grads))
    assert found.stages == set(range(count))
    assert 0 < found.reductions <= 6, "seven made XLA split the pass in two"


def test_the_prediction_gradient_is_read_once() -> None:
    tx = stablegrad("prediction", layers={"w": whole()})
    grads = {"w": jnp.zeros((2, 2))}
    update = lambda g, s, p: tx.update(g, s, prediction_grad=p)  # noqa: E731
    found = passes(update, grads, tx.init(grads), jnp.zeros(LEAF))
    assert found.stages == {0}
    assert 0 < found.reductions <= 6


def test_the_count_of_passes_sees_a_two_pass_statistic() -> None:
    def two_pass(g: jax.Array) -> jax.Array:
        centered = g - jnp.mean(g)
        return g / jnp.sqrt(jnp.mean(centered**2))

    assert passes(two_pass, jnp.zeros(LEAF)).stages == {0, 1, 2}


@pytest.mark.standard_promotion
def test_statistic_equals_the_oracle_inside_a_whole_training_step() -> None:
    """Fused into Adam and apply_updates, the compiled statistic must not change."""
    tx = optax.chain(stablegrad(decay=0.0, delayed=True), optax.adam(1e-3))
    rng = np.random.default_rng(10)
    params = {"w": jnp.zeros((64, 33))}

    @jax.jit
    def step(grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for low, high in [(-126, 127), (-100, -50), (30, 120), (-126, -110)]:
        magnitudes = 2.0 ** rng.uniform(low, high, (64, 33))
        grads = {"w": (rng.choice([-1, 1], (64, 33)) * magnitudes).astype(np.float32)}
        _, state = step(grads, state)
        scale = optax.tree.get(state, "grad_scale")
        np.testing.assert_allclose(scale, statistic(grads["w"], True), rtol=RTOL)


@pytest.fixture(params=["plain sums first", "windows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the branch of a CPU, across which no constant is folded."""
    if request.param == "windows":
        not_compiled = _statistics._sums_of_layers.__wrapped__
        monkeypatch.setattr(_statistics, "_sums_of_layers", not_compiled)
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, **of: default(*a))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_an_infinity_that_a_constant_makes_in_the_same_program_is_seen(factor: float) -> None:
    params = {"w": jnp.ones((64, 64))}
    tx = stablegrad()
    state = tx.init(params)._replace(grad_scale=jnp.ones(1))

    @jax.jit
    def step(x: jax.Array) -> Any:
        return tx.update({"w": x * jnp.float32(factor)}, state)

    for sign in (1, -1):
        updates, new = step(jnp.ones((64, 64)).at[0, 0].set(sign * 3e38))
        assert not np.isfinite(updates["w"][0, 0])
        np.testing.assert_array_equal(new.grad_scale, state.grad_scale)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("constant", [1e-36, 1e-19, 1e19, 1e36])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_a_constant_in_the_same_program_is_not_squared_apart(constant: float, mean: float) -> None:
    entries = mean + np.random.default_rng(0).normal(size=(100, 100))
    small = (entries / constant).astype(np.float32)  # of which squares vanish or overflow
    tx = stablegrad(decay=0.0)

    @jax.jit
    def scale(small: jax.Array) -> jax.Array:
        grads = {"w": small * constant}
        return tx.update(grads, tx.init(grads))[1].grad_scale[0]

    assert float(scale(small)) == pytest.approx(np.std(entries), rel=1e-4)


@pytest.mark.usefixtures("way")
def test_a_mean_that_a_constant_makes_in_the_same_program_is_seen() -> None:
    entries = np.random.default_rng(0).normal(1, 0.1, (1024, 256)) * 2.0**126
    entries, factor = entries.astype(np.float32).ravel(), np.float32(2.0**-87)

    @jax.jit
    def scales(entries: jax.Array) -> jax.Array:
        grads = {"rms": entries * factor, "std": entries * factor}
        return both.update(grads, both.init(grads))[1].grad_scale

    np.testing.assert_allclose(scales(entries), expected(entries * factor), rtol=RTOL)
