"""What draws :func:`plot_scales`. It needs matplotlib, so only that function imports it."""

import io

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from stablegrad_optax._history import ScaleHistory

MOST_LABELS = 40
NUM_PROFILES = 4
DEAD = "#d9d9d9"


class ScalePicture(Figure):
    """A figure that a notebook shows once; pyplot's are also shown at the end of the cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(history: ScaleHistory, labels: list[str]) -> Figure:
    """A heat map and profiles of the layers of a history in order, the first one on top."""
    height = np.clip(1.4 + 0.21 * len(labels), 3.6, 10)
    figure = ScalePicture(figsize=(11, height), layout="constrained")
    heat_map, profile = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
    _label_layers(heat_map, labels)
    _draw_heat_map(heat_map, history)
    _draw_profiles(profile, history)
    return figure


def _label_layers(ax: Axes, labels: list[str]) -> None:
    """Of too many to read, every second, third, ..."""
    shown = range(0, len(labels), -(-len(labels) // MOST_LABELS))
    ax.set_yticks(shown, [labels[index] for index in shown], fontsize="small")
    ax.set_ylim(len(labels) - 0.5, -0.5)


def _draw_heat_map(ax: Axes, history: ScaleHistory) -> None:
    scale = _positive(history.grad_scale.T)
    # A logarithmic norm takes its limits from what is not masked, and has none where all is.
    norm = LogNorm() if scale.count() else LogNorm(0.1, 1)
    edges = np.append(history.step, history.num_seen), np.arange(len(scale) + 1) - 0.5
    image = ax.pcolormesh(*edges, scale, norm=norm, cmap="viridis", rasterized=True)
    ax.set(title="gradient scale by layer and step", xlabel="step", facecolor=DEAD)
    ax.figure.colorbar(image, ax=ax, pad=0.015, aspect=30)


def _draw_profiles(ax: Axes, history: ScaleHistory) -> None:
    last = len(history.step) - 1
    rows = np.unique(np.linspace(0, last, NUM_PROFILES).round().astype(int))
    colours = colormaps["plasma_r"](np.linspace(0.2, 0.9, len(rows)))
    for row, colour in zip(rows, colours, strict=True):
        scale = _positive(history.grad_scale[row])
        label = f"step {history.step[row]}"
        ax.plot(scale, np.arange(len(scale)), "o-", color=colour, markersize=3.5, label=label)
    ax.set(title="profile by depth", xlabel="gradient scale", xscale="log")
    ax.grid(alpha=0.25)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize="small")


def _positive(scale: np.ndarray) -> np.ma.MaskedArray:
    return np.ma.masked_less_equal(scale, 0)
