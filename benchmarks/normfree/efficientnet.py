"""EfficientNetV2-S (arXiv:2104.00298), with BatchNorm or without it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.normfree.convolutions import Convolution, Norm, Stages, norm_of

STEM, TOP = 24, 1280
STAGES = (
    ("fused", 1, 24, 2, 1),
    ("fused", 4, 48, 4, 2),
    ("fused", 4, 64, 4, 2),
    ("gated", 4, 128, 6, 2),
    ("gated", 6, 160, 9, 1),
    ("gated", 6, 256, 15, 2),
)
"""Kind of block, expansion, width, number of blocks and stride of each stage."""


class Gate(nnx.Module):
    """Squeeze and excitation: a factor for each channel, from the means of all channels."""

    def __init__(self, channels: int, squeezed: int, *, rngs: nnx.Rngs) -> None:
        self.squeeze = nnx.Linear(channels, squeezed, rngs=rngs)
        self.excite = nnx.Linear(squeezed, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.excite(nnx.silu(self.squeeze(means))))


class Block(nnx.Module):
    """MBConv, or fused MBConv: its first convolution is depthwise and wide in one.

    ========  ===================================================
    gated     1 x 1 to expand, 3 x 3 depthwise, gate, 1 x 1 to project
    fused     3 x 3 to expand, 1 x 1 to project; one 3 x 3 alone if it does not expand
    ========  ===================================================
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        kind: str,
        expansion: int,
        norm: Norm,
        rngs: nnx.Rngs,
    ) -> None:
        convolution = partial(Convolution, norm=norm, rngs=rngs)
        wide = inputs * expansion
        if kind == "gated":
            layers = [
                convolution(inputs, wide, activation=nnx.silu),
                convolution(wide, wide, 3, stride, depthwise=True, activation=nnx.silu),
                Gate(wide, max(1, inputs // 4), rngs=rngs),
                convolution(wide, outputs),
            ]
        elif expansion > 1:
            layers = [
                convolution(inputs, wide, 3, stride, activation=nnx.silu),
                convolution(wide, outputs),
            ]
        else:
            layers = [convolution(inputs, outputs, 3, stride, activation=nnx.silu)]
        self.layers = nnx.Sequential(*layers)
        self.is_residual = inputs == outputs and stride == 1

    def __call__(self, x: jax.Array) -> jax.Array:
        change = self.layers(x)
        return x + change if self.is_residual else change


class EfficientNetV2S(Stages):
    """The network of torchvision's ``efficientnet_v2_s``, with Flax's default initialization.

    Without its dropout of layers and of blocks, which long training needs. Its parts are named as
    in the paper's Table 4.

    Args:
        channels: Of an image.
        classes: How many there are.
        width: Factor of the width of every layer.
        batch_norm: Whether BatchNorm follows every convolution.
        rngs: The start.
    """

    def __init__(
        self, channels: int, classes: int, width: float, *, batch_norm: bool, rngs: nnx.Rngs
    ) -> None:
        super().__init__()
        norm = norm_of(1e-3, wanted=batch_norm)
        convolution = partial(Convolution, activation=nnx.silu, norm=norm, rngs=rngs)
        inputs = _of_eight(STEM * width)
        self.stage0 = convolution(channels, inputs, 3, 2)
        for number, (kind, expansion, channels_out, count, stride) in enumerate(STAGES, start=1):
            block = partial(Block, kind=kind, expansion=expansion, norm=norm)
            outputs = _of_eight(channels_out * width)
            self.add_stage(f"stage{number}", block, inputs, outputs, count, stride, rngs=rngs)
            inputs = outputs
        top = _of_eight(TOP * width)
        self.stage7 = convolution(inputs, top)
        self.stage7_fc = nnx.Linear(top, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, [n, classes], of images, [n, height, width, channels]."""
        x = self.stage7(self.run_stages(self.stage0(images)))
        return self.stage7_fc(jnp.mean(x, axis=(1, 2)))


def _of_eight(channels: float) -> int:
    """The nearest multiple of 8, at least 8, as the definition asks for with every width."""
    return max(8, int(channels + 4) // 8 * 8)
