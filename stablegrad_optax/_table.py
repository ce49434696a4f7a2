"""The table of a state: each layer's scale, its gain and what stands out."""

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from stablegrad_optax._checks import check_gain_options
from stablegrad_optax._gain import gain_of
from stablegrad_optax._inspect import in_depth_order, layer_names, state_and_layout
from stablegrad_optax._layers import LayerRule, Layout, layout_of, per_leaf
from stablegrad_optax._stablegrad import StableGradState
from stablegrad_optax._statistics import layer_statistic

if TYPE_CHECKING:
    from rich.table import Table

PyTree = Any

FAR_FROM_MEDIAN = 1e3
FAR_ABOVE_PEAK = 10


class LayerRow(NamedTuple):
    """What the table says of one layer."""

    layer: str
    shape: tuple[int, ...]
    grad_scale: float
    gain: float
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class ScaleTable:
    """Rows that show themselves as text, in rich's consoles and in notebooks."""

    rows: tuple[LayerRow, ...]

    HEAD = ("layer", "shape", "gradient scale", "gain", "stands out")
    RIGHT = (False, False, True, True, False)

    def __repr__(self) -> str:
        cells = [self.HEAD, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                f"{cell:{'>' if right else '<'}{width}}"
                for cell, right, width in zip(line, self.RIGHT, widths, strict=True)
            ).rstrip()
            for line in cells
        )

    def __rich__(self) -> "Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name, right in zip(self.HEAD, self.RIGHT, strict=True):
            table.add_column(name, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)), style="bold red" if row.notes else "")
        return table

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...], style: str = "") -> str:
            aligned = (
                f'<{tag} style="text-align: {"right" if right else "left"}">{html.escape(cell)}'
                f"</{tag}>"
                for cell, right in zip(cells, self.RIGHT, strict=True)
            )
            return f'<tr style="{style}">{"".join(aligned)}</tr>'

        body = (
            line("td", _cells(row), "color: firebrick; font-weight: bold" if row.notes else "")
            for row in self.rows
        )
        return f"<table>{line('th', self.HEAD)}{''.join(body)}</table>"


def scale_table(
    opt_state: PyTree,
    params: PyTree,
    layers: PyTree | LayerRule = per_leaf,
    *,
    grads: PyTree | None = None,
    balance: float = 1.0,
    equalize: Literal["std", "norm"] = "std",
    pattern: str = "",
) -> ScaleTable:
    r"""Each layer's name, shape, gradient scale and gain, and what stands out.

    The gain is what :func:`stablegrad` multiplies a gradient by,

    .. math::
        r_t \,\big/\, (s_{l,t}^{\,b}\; \bar s_t^{\,1-b}),

    of the last step, with the factor of ``equalize="norm"``; with ``delayed`` it is that of the
    next. What stands out, beside the other layers' median :math:`m` (of those that are not dead)
    and the layer's own peak :math:`p_l`:

    - unseen: no update was made yet,
    - dead: :math:`s_{l,t} = 0`, all of the layer's finite gradients were zeros,
    - exploding: :math:`s_{l,t} > 1000\, m`,
    - vanishing: :math:`s_{l,t} < m / 1000`,
    - spike: :math:`s_{l,t} > 10\, p_l`,
    - non-finite now: there is a NaN or an infinity in the layer of ``grads``.

    Args:
      opt_state: Any pytree with one :class:`StableGradState` in it.
      params: The params, or anything with their paths, shapes and dtypes.
      layers: The ``layers`` that were given to :func:`stablegrad`.
      grads: The gradients to look for what is not finite, a pytree like ``params``; None: nothing
        is looked for. The state does not tell, for it keeps a scale through such a gradient.
      balance: The ``balance`` that was given to :func:`stablegrad`, a float which the state does
        not hold.
      equalize: The ``equalize`` that was given to :func:`stablegrad`.
      pattern: Regular expression: only layers with a match in their name are shown. The medians
        are still those of all layers.

    Returns:
      A table that ``print`` writes as text, a ``rich`` console in colour and a notebook as HTML.
      Its ``rows`` are tuples of ``layer``, ``shape``, ``grad_scale``, ``gain`` and ``notes``, in
      the order of the names, numbers in them by size.

    Raises:
      TypeError, ValueError: As :func:`layer_scales`; ``balance`` or ``equalize`` is not one of
        :func:`stablegrad`; ``grads`` are not like ``params``; or the pattern matches no layer.

    Example:
      >>> import jax.numpy as jnp, optax, stablegrad_optax as sg
      >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
      >>> tx = optax.chain(sg.stablegrad(), optax.adam(1e-3))
      >>> _, opt_state = tx.update({**params, "kernel": jnp.ones((3, 4)) / 8}, tx.init(params))
      >>> print(sg.scale_table(opt_state, params))
      layer   shape   gradient scale  gain  stands out
      bias    (4,)                 0     1  dead
      kernel  (3, 4)           0.125     8

    References:
      StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    check_gain_options(balance, equalize)
    state, layout = state_and_layout(opt_state, params, layers)
    gain = gain_of(state.grad_scale, layout.entries, balance, state.reference_scale, equalize)
    columns = (
        layer_names(layout),
        [shape for leaf in layout.scaled for shape in [leaf.reduced_shape] * leaf.num_layers],
        np.asarray(state.grad_scale).tolist(),
        (np.asarray(gain.multiplier, np.float64) / np.asarray(gain.divisor)).tolist(),
        _notes(state, _is_finite(grads, layers, layout)),
    )
    rows = [LayerRow(*row) for row in zip(*columns, strict=True)]
    order = in_depth_order([row.layer for row in rows], pattern)
    return ScaleTable(tuple(rows[index] for index in order))


def _is_finite(grads: PyTree | None, layers: PyTree | LayerRule, layout: Layout) -> np.ndarray:
    if grads is None:
        return np.ones(layout.num_layers, np.bool_)
    grads_layout = layout_of(layers, grads)
    if grads_layout != layout:
        raise ValueError(
            "scale_table: grads must have the paths and shapes of params, got layers "
            f"{layer_names(grads_layout)} and {layer_names(layout)}."
        )
    return np.isfinite(np.asarray(layer_statistic(grads, layout)))


def _notes(state: StableGradState, is_finite: np.ndarray) -> list[tuple[str, ...]]:
    """What stands out of each layer."""
    scale = np.asarray(state.grad_scale, np.float64)
    is_live = scale > 0
    median = np.median(scale[is_live]) if is_live.any() else 0.0
    peak = scale if state.peak_scale is None else np.asarray(state.peak_scale)
    is_unseen = np.asarray(state.reference_scale) == 0
    stands_out = {
        "unseen": ~is_live & is_unseen,
        "dead": ~is_live & ~is_unseen,
        "exploding": scale > FAR_FROM_MEDIAN * median,
        "vanishing": is_live & (scale < median / FAR_FROM_MEDIAN),
        "spike": (peak > 0) & (scale > FAR_ABOVE_PEAK * peak),
        "non-finite now": ~is_finite,
    }
    return [
        tuple(note for note, is_so in stands_out.items() if is_so[index])
        for index in range(len(scale))
    ]


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        *(row.layer, str(row.shape)),
        *(f"{row.grad_scale:.3g}", f"{row.gain:.3g}", ", ".join(row.notes)),
    )
