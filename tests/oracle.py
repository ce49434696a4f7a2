"""An independent oracle: the recurrences of StableGrad in plain float64 NumPy loops.

Nothing here imports the package or JAX. A tree is a list of arrays, and its layers are a list
of ``Axes`` beside it: the axes pooled into one statistic and whether it is centered, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Axes = tuple[tuple[int, ...], bool] | None

CONSTANT_EPSILONS = 512


def statistic(entries: np.ndarray, centered: bool, epsilon: float = 2.0**-23) -> float:
    """Population std (or RMS) of all entries; the RMS too where the std is lost in rounding.

    Float32 entries have squares that float64 holds, and float64 entries are scaled by the
    largest one first, so nothing here can overflow.
    """
    wide = np.asarray(entries)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64).ravel()
    if wide.size == 0:
        return 0.0
    if not np.all(np.isfinite(wide)):
        return math.nan
    largest = float(np.max(np.abs(wide)))
    if largest == 0.0:
        return 0.0
    unit = wide / largest
    root_mean_square = math.sqrt(float(np.mean(np.abs(unit) ** 2)))
    deviation = math.sqrt(float(np.mean(np.abs(unit - np.mean(unit)) ** 2)))
    lost = (deviation / root_mean_square) ** 2 <= CONSTANT_EPSILONS * epsilon
    return largest * (root_mean_square if lost or not centered else deviation)


def split(leaf: np.ndarray, axes: Axes) -> list[np.ndarray]:
    """The layers of one leaf, in row-major order of the axes that are not pooled."""
    if axes is None:
        return []
    pooled = {axis % leaf.ndim for axis in axes[0]}
    kept = [axis for axis in range(leaf.ndim) if axis not in pooled]
    moved = np.transpose(leaf, [*kept, *sorted(pooled)])
    count = math.prod(leaf.shape[axis] for axis in kept)
    return list(moved.reshape(count, -1)) if count else []


def statistics(
    leaves: Sequence[np.ndarray], layers: Sequence[Axes], epsilon: float = 2.0**-23
) -> np.ndarray:
    """The statistic of every layer of every leaf, in tree order."""
    return np.array(
        [
            statistic(part, axes[1], epsilon)
            for leaf, axes in zip(leaves, layers, strict=True)
            if axes is not None
            for part in split(np.asarray(leaf), axes)
        ],
        dtype=np.float64,
    )


def running(
    before: float,
    now: float,
    decay: float,
    through_zeros: bool = False,
    attack: float | None = None,
) -> float:
    """One step of the running statistic; 0 means nothing seen, and NaN is never taken in."""
    if attack is not None and now > before:
        decay = attack
    if not math.isfinite(now) or (through_zeros and now == 0.0):
        return before
    return now if before == 0.0 else decay * before + (1.0 - decay) * now


@dataclass
class Oracle:
    """The transform over a list of leaves; ``step`` returns the updates and moves the state."""

    layers: Sequence[Axes]
    reference: float | str = 1.0
    decay: float = 0.0
    balance: float = 1.0
    delayed: bool = False
    fade_below: float = 2.0**-23
    epsilon: float = 2.0**-23
    attack: float | None = None
    equalize: str = "std"
    grad_scale: list[float] = field(default_factory=list)
    reference_scale: float = 0.0
    peak_scale: list[float] | None = field(default_factory=list)

    def step(
        self, leaves: Sequence[np.ndarray], prediction_grad: Sequence[np.ndarray] = ()
    ) -> list[np.ndarray]:
        """The rescaled gradients of this step, in float64 (complex128 for complex leaves)."""
        now = statistics(leaves, self.layers, self.epsilon)
        before = self.grad_scale or [0.0] * len(now)
        self.grad_scale = [
            running(b, s, self.decay, self.delayed, self.attack)
            for b, s in zip(before, now, strict=True)
        ]
        scales = self.grad_scale
        if self.delayed:
            pairs = zip(before, self.grad_scale, strict=True)
            scales = [b if b > 0.0 else s for b, s in pairs]

        if isinstance(self.reference, str):
            everything = np.concatenate([np.ravel(part) for part in prediction_grad])
            seen = statistic(everything, True, self.epsilon)
            self.reference_scale = running(
                self.reference_scale, seen, self.decay, attack=self.attack
            )
        else:
            peaks = self.peak_scale or [0.0] * len(now)
            self.reference_scale = float(self.reference) * self._fade(scales, peaks)
            agreed = [
                min(b, s) if math.isfinite(s) else 0.0 for b, s in zip(before, now, strict=True)
            ]
            self.peak_scale = [max(p, a) for p, a in zip(peaks, agreed, strict=True)]
        return self._rescale(leaves, scales)

    def _rescale(self, leaves: Sequence[np.ndarray], scales: list[float]) -> list[np.ndarray]:
        parts = [split(leaf, axes) for leaf, axes in zip(leaves, self.layers, strict=True)]
        sizes = [part.size for leaf in parts for part in leaf]
        largest = max(scales, default=0.0) or 1.0
        squares = sum(n * (s / largest) ** 2 for n, s in zip(sizes, scales, strict=True))
        pooled = largest * math.sqrt(squares / sum(sizes)) if sum(sizes) else 0.0

        gains = [self._gain(scale, pooled) for scale in scales]
        if self.equalize == "norm":
            mean = sum(sizes) / len(sizes)
            gains = [
                gain * (mean / n) ** (self.balance / 2) if scale else gain
                for gain, n, scale in zip(gains, sizes, scales, strict=True)
            ]
        updates = []
        for leaf, axes in zip(leaves, self.layers, strict=True):
            wide = leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
            if axes is not None:
                pooled_axes = {axis % leaf.ndim for axis in axes[0]}
                shape = [1 if a in pooled_axes else n for a, n in enumerate(leaf.shape)]
                count = math.prod(shape)
                wide = wide * np.reshape(gains[:count], shape)
                gains = gains[count:]
            updates.append(wide)
        return updates

    def _fade(self, scales: list[float], peaks: list[float]) -> float:
        """1, or how far below the limit even the layer is that fell least from its peak."""
        if not any(peaks):
            return 1.0
        fallen = [s / p if p > 0.0 else float(s > 0.0) for s, p in zip(scales, peaks, strict=True)]
        least = max(fallen)
        return least / self.fade_below if least < self.fade_below else 1.0

    def _gain(self, scale: float, pooled: float) -> float:
        if scale == 0.0:
            return 1.0
        return self.reference_scale / (scale**self.balance * pooled ** (1.0 - self.balance))
