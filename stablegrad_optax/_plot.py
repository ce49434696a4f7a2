"""The picture of a history, for which matplotlib is imported when it is asked for."""

from typing import TYPE_CHECKING, Any

from stablegrad_optax._history import ScaleHistory
from stablegrad_optax._inspect import check_layout, in_depth_order, layer_names
from stablegrad_optax._layers import LayerRule, layout_of, per_leaf

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PyTree = Any


def plot_scales(
    history: ScaleHistory,
    params: PyTree,
    layers: PyTree | LayerRule = per_leaf,
    *,
    pattern: str = "",
) -> "Figure":
    r"""Draw a heat map of the scales, depth by step, and beside it their profile by depth.

    Both show :math:`s_{l,t}` of :func:`stablegrad` on a logarithmic scale, layers from top to
    bottom in the order of their names, numbers in them by size. A layer without a gradient,
    :math:`s_{l,t} = 0`, is grey in the map and missing in the profile.

    Args:
      history: What a training loop collected, on its own, not a batch.
      params: The params, or anything with their paths, shapes and dtypes.
      layers: The ``layers`` that were given to :func:`stablegrad`.
      pattern: Regular expression: only layers with a match in their name are drawn, such as
        ``"kernel"``. The default draws all.

    Returns:
      A ``matplotlib.figure.Figure``, which a notebook shows and ``savefig`` writes. It has two axes
      for the two panels, and one for the colour bar.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: The history is empty or a batch; it does not fit ``params`` and ``layers``; or the
        pattern matches no layer.

    Example:
      >>> import jax.numpy as jnp, stablegrad_optax as sg
      >>> params, tx = {"Dense_0": jnp.ones((3, 4)), "Dense_1": jnp.ones(4)}, sg.stablegrad()
      >>> _, opt_state = tx.update(params, tx.init(params))
      >>> history = sg.ScaleHistory.init(opt_state).record(opt_state)
      >>> sg.plot_scales(history, params)
      <ScalePicture size ... with 3 Axes>

    References:
      The scales are those of StableGrad, `arXiv:2605.19856 <https://arxiv.org/abs/2605.19856>`_.
    """
    try:
        from stablegrad_optax._picture import draw
    except ImportError as error:
        raise ImportError(
            "plot_scales needs matplotlib: pip install 'stablegrad_optax[diagnostics]'."
        ) from error

    history, layout = history.in_order(), layout_of(layers, params)
    check_layout(layout, history.grad_scale.shape[1:])
    if not len(history.step):
        raise ValueError(
            "plot_scales: the history is empty. history.record(opt_state) does not change it, but "
            "returns the one with the step in it."
        )
    names = layer_names(layout)
    order = in_depth_order(names, pattern)
    shown = history._replace(grad_scale=history.grad_scale[:, order])
    return draw(shown, [names[index] for index in order])
