"""The layer statistic: standard deviation or RMS in one read, over the whole floating range.

Squares of gradients leave float32 long before gradients do: below 1e-19 they underflow, above 1e19
they overflow. So squares are added up three times, in units so far apart that whatever the entries,
the sum in one of them neither overflows nor misses what underflows (after J. L. Blue, *A portable
Fortran program to find the Euclidean norm of a vector*, ACM TOMS 1978; E. Anderson, *Algorithm 978:
Safe scaling in the level 1 BLAS*, ACM TOMS 2017, who add each entry to one of three sums). Entries
are added up twice, for their mean. That is one read of the gradient, without a branch or a select;
all that follows is arithmetic on one vector with an entry for each layer. On a CPU, where each sum
is a read, plain sums come first, and these five only where a plain one leaves its range.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._arithmetic import root
from stablegrad_optax._layers import Layout

PyTree = Any


def layer_statistic(tree: PyTree, layout: Layout) -> jax.Array:
    """Std or RMS of each layer, [num_layers]; NaN for a layer with an entry that is not finite."""
    leaves = [
        (values, leaf.reduce)
        for values, leaf in zip(jax.tree.leaves(tree), layout.leaves, strict=True)
        if leaf is not None
    ]
    if not leaves:
        return jnp.zeros(0, statistic_dtype(tree))
    return _from_sums(_sums_of(leaves, tree), layout.entries, layout.centered)


def population_statistic(tree: PyTree) -> jax.Array:
    """Std of all entries of all leaves taken together, []; NaN if one of them is not finite."""
    leaves = [(leaf, tuple(range(jnp.ndim(leaf)))) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return jnp.zeros((), statistic_dtype(tree))
    of_all = jax.tree.map(
        lambda total: jnp.sum(total, axis=-1, keepdims=True), _sums_of(leaves, tree)
    )
    entries = np.array([sum(jnp.size(leaf) for leaf, _ in leaves)])
    return _from_sums(of_all, entries, np.array([True]))[0]


def statistic_dtype(tree: PyTree) -> jnp.dtype:
    """float64 where the tree has float64 or complex128 leaves, float32 everywhere else."""
    dtypes = [getattr(leaf, "dtype", jnp.float32) for leaf in jax.tree.leaves(tree)]
    wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    # NumPy's float64 is float32 to JAX, unless it was told to keep 64 bits.
    return jax.dtypes.canonicalize_dtype(jnp.float64 if wide else jnp.float32)


class _Sums(NamedTuple):
    """Of each layer, float[3, num_layers] each: in the unit of big, middle and small entries."""

    squares: jax.Array
    entries: list[jax.Array]  # of the real and, in trees with complex leaves, the imaginary parts


def _sums_of(leaves: list[tuple[jax.Array, tuple[int, ...]]], tree: PyTree) -> _Sums:
    """The sums of leaves of the tree over the axes that are beside them."""
    values, reduce = zip(*leaves, strict=True)
    has_complex = any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(tree))
    return _sums_of_layers(values, reduce, statistic_dtype(tree), has_complex)


class _Windows(NamedTuple):
    """Where squares are safe, for float32 and, with exponents eight times as large, for float64.

    Entries are squared in multiples of ``unit``, 1 and ``1 / unit``. Each of these three sums takes
    entries of up to ``limit`` multiples, of which 2^31 can be added, and is exact to rounding once
    it is at least ``enough``: what is lost to underflow then is nothing beside it. A sum below
    ``enough`` says that all entries are within the limit of the next one.
    """

    unit: float
    limit: float
    enough: float
    shift: float  # of the sums of entries, which need two units only

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "_Windows":
        octaves = jnp.finfo(dtype).maxexp // 128
        return cls(*(2.0 ** (power * octaves) for power in (84, 48, -72, 40)))


@partial(jax.jit, static_argnums=(1, 2, 3))  # leaves that are alike are traced once
def _windowed_sums(
    values: jax.Array, reduce: tuple[int, ...], dtype: jnp.dtype, has_complex: bool
) -> list[jax.Array]:
    """Sums over the reduced axes, float[layers] each.

    Three sums of squares, for big, middle and small entries, and two sums of entries, for big and
    for other ones, of the real and, in trees with complex leaves, of the imaginary parts.
    """
    unit, limit, _, shift = _Windows.of(dtype)
    largest = float(jnp.finfo(dtype).max)

    # XLA folds constants across multiplications, those that made x and those that square it, and
    # such a product overflows or vanishes; it folds nothing through a minimum, a maximum or an
    # absolute value. No two sums share one, for XLA:CPU would write what they share to memory.
    def within(x: jax.Array, bound: float, factor: float) -> jax.Array:
        return jnp.minimum(jnp.maximum(x, -bound) * factor, bound * factor)

    def roots_of_squares(x: jax.Array) -> list[jax.Array]:
        # The first has no upper bound, so that it is finite only where all entries are.
        big = jnp.maximum(jnp.abs(x) * (1 / unit), 1 / unit)
        return [big, jnp.maximum(x, -limit), within(x, 2 * limit / unit, unit)]

    def in_two_units(x: jax.Array) -> list[jax.Array]:
        return [within(x, largest, 1 / shift), within(x, 4 * limit, shift)]

    real = jnp.real(values).astype(dtype)
    squares = [x * x for x in roots_of_squares(real)]
    entries = in_two_units(real)
    if has_complex:
        imaginary = jnp.imag(values).astype(dtype)
        squares = [x + y * y for x, y in zip(squares, roots_of_squares(imaginary), strict=True)]
        entries += in_two_units(imaginary)
    return [jnp.sum(term, axis=reduce).ravel() for term in squares + entries]


@partial(jax.jit, static_argnums=(1, 2, 3))  # or every call outside of jit would be compiled anew
def _sums_of_layers(
    leaves: tuple[jax.Array, ...],
    reduce: tuple[tuple[int, ...], ...],
    dtype: jnp.dtype,
    has_complex: bool,
) -> _Sums:
    """The sums of all layers, in as few reads as the platform can do with."""
    unit, limit, enough, shift = _Windows.of(dtype)

    def joined(sums_of: Callable[..., list[jax.Array]]) -> list[jax.Array]:
        sums = (
            sums_of(leaf, axes, dtype, has_complex)
            for leaf, axes in zip(leaves, reduce, strict=True)
        )
        return [jnp.concatenate(list(map(_replicated, one))) for one in zip(*sums, strict=True)]

    def in_one_read() -> _Sums:
        big, middle, small, *entries = joined(_windowed_sums)
        in_windows = [
            jnp.stack([of_big * (shift / unit), of_other * (1 / shift), of_other * (unit / shift)])
            for of_big, of_other in zip(entries[::2], entries[1::2], strict=True)
        ]
        return _Sums(jnp.stack([big, middle, small]), in_windows)

    # XLA:CPU makes a pass of every sum, and vectorizes plain ones best.
    def plain_first() -> _Sums:
        plain = joined(_plain_sums)

        def of_plain() -> _Sums:
            none = jnp.zeros_like(plain[0])
            squares, *entries = (jnp.stack([none, total, none]) for total in plain)
            return _Sums(squares, entries)

        are_safe = jnp.all((plain[0] >= enough) & (plain[0] <= limit**2))
        return jax.lax.cond(are_safe, of_plain, in_one_read)

    return jax.lax.platform_dependent(cpu=plain_first, default=in_one_read)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _plain_sums(
    values: jax.Array, reduce: tuple[int, ...], dtype: jnp.dtype, has_complex: bool
) -> list[jax.Array]:
    """The sum of squares, and of the entries, of the real and the imaginary parts."""
    parts = [jnp.real(values), jnp.imag(values)] if has_complex else [jnp.real(values)]
    parts = [part.astype(dtype) for part in parts]
    squares = sum(part * part for part in parts)
    return [jnp.sum(term, axis=reduce).ravel() for term in (squares, *parts)]


def _replicated(x: jax.Array) -> jax.Array:
    """On a mesh with explicit axes, layers spread over devices must be brought together by name."""
    is_spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if is_spread else x


def _from_sums(sums: _Sums, entries: np.ndarray, centered: np.ndarray) -> jax.Array:
    """Std or RMS of each layer from its sums, [num_layers]."""
    dtype, limits = sums.squares.dtype, jnp.finfo(sums.squares.dtype)
    root_entries = jnp.asarray(np.sqrt(np.maximum(entries, 1)), dtype)

    # Every layer in the largest unit in which there is enough of it.
    unit, _, enough, _ = _Windows.of(dtype)
    big, middle, _ = sums.squares
    is_big, is_middle = big >= enough, middle >= enough

    def choose(of_big: Any, of_middle: Any, of_small: Any) -> jax.Array:
        return jnp.where(is_big, of_big, jnp.where(is_middle, of_middle, of_small))

    norm = root(choose(*sums.squares))
    layer_unit = choose(unit, 1.0, 1 / unit).astype(dtype)
    total = jnp.zeros_like(norm)
    for part in sums.entries:
        total = jnp.hypot(total, choose(*part))

    # The mean beside the RMS.
    mean_fraction = jnp.minimum(total / jnp.where(norm > 0, norm * root_entries, 1), 1)
    variance_fraction = (1 - mean_fraction) * (1 + mean_fraction)
    # Additions in a TPU's order leave up to 327 eps of a layer that is constant.
    has_std = centered & (variance_fraction > 512 * limits.eps)
    rms = norm / root_entries * layer_unit
    statistic = jnp.where(has_std, rms * root(variance_fraction), rms)
    # 0 is kept for "all entries are 0": a statistic below the normal range counts as its end.
    statistic = jnp.where(norm > 0, jnp.clip(statistic, limits.tiny, limits.max), 0)
    return jnp.where(jnp.isfinite(big), statistic, jnp.nan)
