"""The layer statistic: standard deviation or RMS in one read, over the whole floating range.

Squares of gradients leave float32 long before gradients do: below 1e-19 they underflow, above 1e19
they overflow. Every entry is therefore added to one of three sums of squares, each kept in a unit
in which neither happens (J. L. Blue, *A portable Fortran program to find the Euclidean norm of a
vector*, ACM TOMS 1978; E. Anderson, *Algorithm 978: Safe scaling in the level 1 BLAS*, ACM TOMS
2017), and the mean gets the same three sums. That is one read of the gradient; all that follows is
arithmetic on one vector with an entry for each layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablegrad_optax._arithmetic import root
from stablegrad_optax._layers import Layout

PyTree = Any


def layer_statistic(tree: PyTree, layout: Layout) -> jax.Array:
    """Std or RMS of each layer, [num_layers]; NaN for a layer with an entry that is not finite."""
    dtype = statistic_dtype(tree)
    sums = [
        _replicated(_sums(values, leaf.reduce, dtype))
        for values, leaf in zip(jax.tree.leaves(tree), layout.leaves, strict=True)
        if leaf is not None
    ]
    if not sums:
        return jnp.zeros(0, dtype)
    return _from_sums(jnp.concatenate(sums, axis=-1), layout.entries, layout.centered)


def population_statistic(tree: PyTree) -> jax.Array:
    """Std of all entries of all leaves taken together, []; NaN if one of them is not finite."""
    dtype = statistic_dtype(tree)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    sums = sum(
        (_sums(leaf, tuple(range(leaf.ndim)), dtype) for leaf in leaves),
        jnp.zeros((3, 3, 1), dtype),
    )
    entries = sum(leaf.size for leaf in leaves)
    return _from_sums(sums, np.array([entries]), np.array([True]))[0]


def statistic_dtype(tree: PyTree) -> jnp.dtype:
    """float64 where the tree has float64 or complex128 leaves, float32 everywhere else."""
    dtypes = [getattr(leaf, "dtype", jnp.float32) for leaf in jax.tree.leaves(tree)]
    wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    # NumPy's float64 is float32 to JAX, unless it was told to keep 64 bits.
    return jax.dtypes.canonicalize_dtype(jnp.float64 if wide else jnp.float32)


def _limit_and_unit(dtype: jnp.dtype) -> tuple[float, float]:
    """Entries above ``limit`` are summed in multiples of ``unit``, those below 1/limit of 1/unit.

    In float32 these are 2^48 and 2^84: the squares of middle entries stay within 2^±96 and those of
    the scaled ones within 2^±88, so that 2^31 of them can be added.
    """
    octaves = jnp.finfo(dtype).maxexp / 128
    return 2.0 ** (48 * octaves), 2.0 ** (84 * octaves)


def _sums(values: jax.Array, reduce: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Sums over the reduced axes, [moment, part, layer].

    Moments are the square, the real and the imaginary part; parts are the big, the middle and the
    small entries, in units of ``unit``, 1 and ``1 / unit``.
    """
    limit, unit = _limit_and_unit(dtype)

    def parts(component: jax.Array) -> list[jax.Array]:
        x = component.astype(dtype)
        big, small = jnp.abs(x) > limit, jnp.abs(x) < 1 / limit
        # The middle is "neither", so that NaN flows into it. The scaled parts are selected twice:
        # XLA folds constants across multiplications, those that made x and those that square the
        # part, and such a product overflows or vanishes; it does not fold through a select.
        return [
            jnp.where(big, jnp.where(big, x, 0) * (1 / unit), 0),
            jnp.where(big | small, 0, x),
            jnp.where(small, jnp.where(small, x, 0) * unit, 0),
        ]

    def total(terms: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.sum(term, axis=reduce).ravel() for term in terms])

    real = parts(jnp.real(values))
    squares, means = total([part * part for part in real]), total(real)
    if not jnp.iscomplexobj(values):
        return jnp.stack([squares, means, jnp.zeros_like(means)])
    imaginary = parts(jnp.imag(values))
    squares += total([part * part for part in imaginary])
    return jnp.stack([squares, means, total(imaginary)])


def _replicated(x: jax.Array) -> jax.Array:
    """On a mesh with explicit axes, layers spread over devices must be brought together by name."""
    is_spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec()) if is_spread else x


def _from_sums(sums: jax.Array, entries: np.ndarray, centered: np.ndarray) -> jax.Array:
    """Std or RMS of each layer from its sums, [num_layers]."""
    dtype, limits = sums.dtype, jnp.finfo(sums.dtype)
    squares, real, imaginary = sums
    root_entries = jnp.asarray(np.sqrt(np.maximum(entries, 1)), dtype)

    # Every layer in the unit of its largest part, beside which what underflows is nothing. Parts
    # are put together as roots, for the square of a ratio of units is 0 in float32.
    _, unit = _limit_and_unit(dtype)
    has_big, has_middle = squares[0] > 0, squares[1] > 0
    layer_unit = jnp.where(has_big, unit, jnp.where(has_middle, 1, 1 / unit)).astype(dtype)
    middle = jnp.where(has_big, 1 / unit, 1)
    small = jnp.where(has_big, 0, jnp.where(has_middle, 1 / unit, 1))
    relative = jnp.stack([jnp.ones_like(middle), middle, small]).astype(dtype)
    norm = root(jnp.sum((root(squares) * relative) ** 2, axis=0))
    total = jnp.hypot(jnp.sum(real * relative, axis=0), jnp.sum(imaginary * relative, axis=0))

    mean_fraction = jnp.minimum(
        total / jnp.where(norm > 0, norm * root_entries, 1), 1
    )  # mean / RMS
    variance_fraction = (1 - mean_fraction) * (1 + mean_fraction)
    # Additions in a TPU's order leave up to 327 eps of a layer that is constant.
    has_std = centered & (variance_fraction > 512 * limits.eps)
    rms = norm / root_entries * layer_unit
    statistic = jnp.where(has_std, rms * root(variance_fraction), rms)
    # 0 is kept for "all entries are 0": a statistic below the normal range counts as its end.
    statistic = jnp.where(norm > 0, jnp.clip(statistic, limits.tiny, limits.max), 0)
    return jnp.where(jnp.all(jnp.isfinite(squares), axis=0), statistic, jnp.nan)
