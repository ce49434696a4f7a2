"""What a layer is: which entries of a parameter tree share one gradient statistic."""

import dataclasses
import math
import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Path = tuple[Any, ...]
Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True, init=False)
class LayerAxes:
    r"""How one leaf divides into layers, and which statistic each layer has.

    A leaf :math:`g` with index sets :math:`i` (axes in ``reduce``) and :math:`l` (the others) has
    one statistic for each :math:`l`, with :math:`\mathbb{E}_i` the mean over the reduced axes:

    .. math::
        \sigma_l = \sqrt{\mathbb{E}_i |g_{l,i}|^2 - |\mathbb{E}_i\, g_{l,i}|^2}
        \quad\text{(centered)},\qquad
        \sigma_l = \sqrt{\mathbb{E}_i |g_{l,i}|^2} \quad\text{(otherwise)}.

    Args:
      reduce: The axes pooled into one statistic, an int or a tuple of ints, negative ones counting
        from the end. Every index of the remaining axes is a layer of its own: a leaf of shape
        ``(12, 64, 64)`` with ``reduce=(1, 2)`` holds 12 layers of 4096 entries. The leaf's dtype
        must be floating or complex.
      centered: True for the standard deviation, False for the root mean square (RMS). A layer so
        nearly constant that rounding may have made up its variance, one of at most 512 times the
        epsilon of the statistic's dtype beside the mean square, takes the RMS too: in float32 that
        is a mean of 128 standard deviations.

    Raises:
      TypeError: ``reduce`` is not an int or a tuple of ints, or ``centered`` is not a bool.
      ValueError: An axis is named twice. (An axis the leaf does not have is reported, with the
        leaf's path, by the transform, for a ``LayerAxes`` does not know its leaf's shape.)

    Example:
      >>> import stablegrad_optax as sg
      >>> kernel, scanned = sg.LayerAxes((0, 1)), sg.LayerAxes((1, 2))
      >>> tx = sg.stablegrad(layers={"head": kernel, "blocks": scanned, "temperature": None})

    References:
      The statistic is that of StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """

    reduce: tuple[int, ...]
    centered: bool = True

    def __init__(self, reduce: int | tuple[int, ...], centered: bool = True) -> None:
        """See the class."""
        try:
            axes = tuple(
                map(operator.index, reduce if isinstance(reduce, tuple | list) else [reduce])
            )
        except TypeError:
            raise TypeError(
                f"LayerAxes: reduce must be an int or a tuple of ints, got {reduce!r}."
            ) from None
        if len(set(axes)) != len(axes):
            raise ValueError(f"LayerAxes: reduce names an axis twice: {axes}.")
        if not isinstance(centered, bool):
            raise TypeError(
                f"LayerAxes: centered must be True (std) or False (RMS), got {centered!r}."
            )
        object.__setattr__(self, "reduce", axes)
        object.__setattr__(self, "centered", centered)


LayerRule = Callable[[PyTree], PyTree]


def per_leaf(params: PyTree) -> PyTree:
    r"""Default rule: every leaf with more than one entry is one layer.

    .. math::
        \sigma = \operatorname{std}(g)\ \text{if}\ \operatorname{ndim}(g) \ge 2,\qquad
        \sigma = \sqrt{\mathbb{E}\, g^2}\ \text{for vectors (biases, norm scales)}.

    Vectors take the root mean square: a bias gradient is often nearly constant over its few
    entries, where a standard deviation measures next to nothing. Leaves of one entry, empty leaves
    and leaves that are neither floating nor complex are left alone.

    Args:
      params: A pytree of arrays of any shape and dtype, or of anything that has ``shape`` and
        ``dtype``; values are not looked at.

    Returns:
      The same tree with a ``LayerAxes`` or None for each leaf.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> sg.per_leaf({"bias": jnp.ones(4), "kernel": jnp.ones((3, 4))})["kernel"]
      LayerAxes(reduce=(0, 1), centered=True)

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_, extended to biases.
    """
    return jax.tree.map(lambda leaf: _whole_leaf(leaf, min_ndim=1), params)


def weights_only(params: PyTree) -> PyTree:
    r"""The rule of the paper to the letter: weights are layers, the rest is left alone.

    .. math::
        \sigma = \operatorname{std}(g)\ \text{if}\ \operatorname{ndim}(g) \ge 2,\qquad
        \text{otherwise}\ g' = g.

    Args:
      params: A pytree of arrays of any shape and dtype, or of anything that has ``shape`` and
        ``dtype``; values are not looked at.

    Returns:
      The same tree with a ``LayerAxes`` or None for each leaf.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> sg.weights_only({"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)})
      {'bias': None, 'kernel': LayerAxes(reduce=(0, 1), centered=True)}

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    return jax.tree.map(lambda leaf: _whole_leaf(leaf, min_ndim=2), params)


def stacked(pattern: str, rule: LayerRule = per_leaf) -> LayerRule:
    r"""Rule for scanned layers: leaves whose path matches have one layer per index of axis 0.

    A matching leaf of shape :math:`(L, \ldots)` is :math:`L` layers, each what ``rule`` makes of
    one slice:

    .. math::
        \sigma_l = \sigma_{\text{rule}}(g_{l,\ldots}),\qquad l = 1 \ldots L,

    as ``flax.linen.scan``, ``flax.nnx.vmap`` and MaxText stack them. All other leaves follow
    ``rule``.

    Args:
      pattern: Regular expression, searched for (``re.search``) in the leaf's path:
        ``jax.tree_util.keystr(path, simple=True, separator="/")``, such as
        ``"decoder/layers/mlp/kernel"``. A path that ends in ``/value``, as those in a
        ``flax.nnx.State`` do, is matched without it too.
      rule: The rule for one slice and for the leaves that do not match. Rules nest, for leaves
        stacked along several leading axes.

    Returns:
      A function of params that gives a pytree of ``LayerAxes | None``; it looks at paths, shapes
      and dtypes only.

    Raises:
      TypeError: ``rule`` is not callable.
      ValueError: ``pattern`` is not a regular expression; or, when the rule is applied, a leaf
        that matches is a scalar and has no axis 0.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> params = {"blocks": {"kernel": jnp.ones((12, 8, 8))}, "head": jnp.ones((8, 2))}
      >>> tx = sg.stablegrad(layers=sg.stacked("^blocks/"))
      >>> tx.init(params).grad_scale.shape
      (13,)

    References:
      Layers of StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    if not callable(rule):
        raise TypeError(f"stacked: rule must be a function of params, got {rule!r}.")
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"stacked: pattern must be a regular expression, got {pattern!r}: {error}."
        ) from None

    def stacked_rule(params: PyTree) -> PyTree:
        def is_stacked(path: Path, leaf: Any) -> bool:
            return any(map(regex.search, (_shown(path), _joined(_keys(path)))))

        def one_slice(path: Path, leaf: Any, is_stacked: bool) -> Any:
            if not is_stacked:
                return leaf
            shape, dtype = _shape_and_dtype(leaf)
            if not shape:
                raise ValueError(
                    f"stacked({pattern!r}): the leaf {_shown(path)!r} is a scalar and has "
                    "no axis 0 to hold layers; make the pattern more specific."
                )
            return jax.ShapeDtypeStruct(shape[1:], dtype)

        def behind_axis_0(is_stacked: bool, axes: LayerAxes | None) -> LayerAxes | None:
            if not is_stacked or axes is None:
                return axes
            return LayerAxes(tuple(a if a < 0 else a + 1 for a in axes.reduce), axes.centered)

        matches = jax.tree_util.tree_map_with_path(is_stacked, params)
        slices = jax.tree_util.tree_map_with_path(one_slice, params, matches)
        return jax.tree.map(behind_axis_0, matches, rule(slices))

    return stacked_rule


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """The layers of one leaf: its path, shape and ``LayerAxes``, with axes from the front."""

    path: str
    shape: tuple[int, ...]
    reduce: tuple[int, ...]
    centered: bool

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The axes that index layers: ``()`` for a leaf that is one layer."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.reduce)

    @property
    def broadcast_shape(self) -> tuple[int, ...]:
        """The shape in which one number per layer broadcasts against the leaf."""
        return tuple(1 if axis in self.reduce else n for axis, n in enumerate(self.shape))

    @property
    def num_layers(self) -> int:
        """How many layers the leaf holds."""
        return math.prod(self.layer_shape)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """The axes that are pooled: the shape of each of the leaf's layers."""
        return tuple(self.shape[axis] for axis in self.reduce)

    @property
    def entries(self) -> int:
        """Entries in each of the leaf's layers."""
        return math.prod(self.reduced_shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each layer of a tree sits in the one vector of scales.

    All of it is static, so that arithmetic on the vector is one operation for all layers, however
    many leaves there are.
    """

    leaves: tuple[LeafLayout | None, ...]  # in tree order; None: the leaf is left alone

    @property
    def scaled(self) -> list[LeafLayout]:
        """The leaves that have layers, in tree order."""
        return [leaf for leaf in self.leaves if leaf is not None]

    @property
    def num_layers(self) -> int:
        """Length of the vector of scales."""
        return sum(leaf.num_layers for leaf in self.scaled)

    @property
    def entries(self) -> np.ndarray:
        """Entries in each layer, float64[num_layers]."""
        return np.repeat(
            np.array([leaf.entries for leaf in self.scaled], np.float64),
            [leaf.num_layers for leaf in self.scaled],
        )

    @property
    def centered(self) -> np.ndarray:
        """Whether each layer's statistic is the standard deviation, bool[num_layers]."""
        return np.repeat(
            np.array([leaf.centered for leaf in self.scaled], np.bool_),
            [leaf.num_layers for leaf in self.scaled],
        )

    def split(self, vector: jax.Array) -> list[jax.Array]:
        """The vector's pieces, flat, one for each leaf of ``scaled``."""
        return _split_as_the_platform_does(vector, tuple(leaf.num_layers for leaf in self.scaled))


@partial(jax.jit, static_argnums=1)  # without it, every call outside of jit would be compiled anew
def _split_as_the_platform_does(vector: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    return jax.lax.platform_dependent(
        vector, cpu=partial(_split_apart, sizes=sizes), default=partial(_split, sizes=sizes)
    )


def _split(vector: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    return jnp.split(vector, np.cumsum(sizes)[:-1]) if sizes else []


def _split_apart(vector: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """The same, but the pieces of one entry come out of few operations, 64 at a time.

    XLA:CPU compiles operations that are alike only once, and merges a slice into all that use it,
    which are then no longer alike. A sum of one entry and 0 is not merged. One operation with all
    pieces would take longer to compile than a few with 64 each.
    """
    pieces = _split(vector, sizes)
    single = [index for index, piece in enumerate(pieces) if piece.size == 1]
    for first in range(0, len(single), 64):
        some = single[first : first + 64]
        padded = tuple(jnp.pad(pieces[index], (0, 1)) for index in some)
        zeros = tuple(jnp.zeros_like(piece, shape=()) for piece in padded)
        sums = jax.lax.reduce(padded, zeros, partial(jax.tree.map, jnp.add), (0,))
        for index, one in zip(some, sums, strict=True):
            pieces[index] = one[None]
    return pieces


def layout_of(layers: PyTree | LayerRule, tree: PyTree) -> Layout:
    """Match ``layers``, a rule or a pytree of ``LayerAxes | None``, with the leaves of ``tree``."""
    if not jax.tree.leaves(tree):  # as what optax.tree.map_params gives init, which no rule knows
        return Layout(())
    # A tree may be callable too, such as a module whose leaves were replaced by their LayerAxes.
    is_tree = any(isinstance(leaf, LayerAxes) for leaf in jax.tree.leaves(layers))
    axes_tree = layers(tree) if callable(layers) and not is_tree else layers
    axes_of = {
        _keys(path): axes
        for path, axes in jax.tree_util.tree_flatten_with_path(axes_tree, is_leaf=_is_none)[0]
    }
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    layout = Layout(tuple(_leaf_layout(path, leaf, axes_of) for path, leaf in leaves))

    # A None or MaskedNode in the tree stands for what `layers` may still name.
    known = {_keys(path) for path, _ in leaves}
    holes = {
        _keys(path)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_hole)[0]
        if _is_hole(leaf)
    }
    for keys, axes in axes_of.items():
        if axes is None or keys in known:
            continue
        if not any(keys[:length] in holes for length in range(len(keys) + 1)):
            raise ValueError(
                f"layers has {axes} at {_joined(keys)!r}, where the gradients have no leaf; they "
                f"have {', '.join(repr(_joined(keys)) for keys in sorted(known))}."
            )
    return layout


def _leaf_layout(key_path: Path, leaf: Any, axes_of: dict[Keys, Any]) -> LeafLayout | None:
    """The layers of one leaf, checked against its shape and dtype."""
    path, keys = _shown(key_path), _keys(key_path)
    if keys not in axes_of:
        raise ValueError(
            f"layers has no entry for the leaf {path!r}: give it a LayerAxes, or None to leave it "
            "alone."
        )
    axes = axes_of[keys]
    if axes is None:
        return None
    shape, dtype = _shape_and_dtype(leaf)
    if not isinstance(axes, LayerAxes):
        raise TypeError(f"layers has {axes!r} at {path!r}; it takes a LayerAxes or None.")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"layers has {axes} at {path!r}, a leaf of dtype {dtype}; only floating and complex "
            "leaves have gradients to scale: use None."
        )
    reduce = tuple(sorted(axis + len(shape) if axis < 0 else axis for axis in axes.reduce))
    if len(set(reduce)) != len(reduce) or not all(0 <= axis < len(shape) for axis in reduce):
        raise ValueError(
            f"layers has {axes} at {path!r}, a leaf of shape {shape}: reduce must name different "
            f"axes among its {len(shape)}."
        )
    return LeafLayout(path, shape, reduce, axes.centered)


def _whole_leaf(leaf: Any, min_ndim: int) -> LayerAxes | None:
    """All axes of the leaf as one layer; None below ``min_ndim`` or with nothing to pool."""
    shape, dtype = _shape_and_dtype(leaf)
    if len(shape) < min_ndim or math.prod(shape) <= 1 or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    return LayerAxes(tuple(range(len(shape))), centered=len(shape) >= 2)


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Of an array, a tracer, a ``ShapeDtypeStruct`` or a Python number."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), leaf.dtype
    try:
        return (), jnp.result_type(leaf)
    except TypeError:
        raise TypeError(
            f"stablegrad: params must have arrays or numbers as leaves, got {leaf!r}. Of a model "
            "that holds functions too give the arrays: eqx.filter(model, eqx.is_inexact_array)."
        ) from None


def _keys(path: Path) -> Keys:
    """A path as its names, by which trees of different containers can be compared.

    Flax's boxes (``nnx.Variable``, ``linen.Partitioned``) hold their array as ``.value``, and
    ``nnx.Optimizer`` takes the boxes off between init and update: their name is left out.
    """
    is_boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),)
    return tuple(
        jax.tree_util.keystr((key,), simple=True) for key in (path[:-1] if is_boxed else path)
    )


def _joined(keys: Keys) -> str:
    return "/".join(keys)


def _shown(path: Path) -> str:
    """A path as users read and match it, boxes included."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_hole(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)
