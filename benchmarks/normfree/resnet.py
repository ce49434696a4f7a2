"""ResNet-50 (arXiv:1512.03385), with BatchNorm or without it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.normfree.convolutions import Convolution, Norm, Stages, norm_of

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Width inside the blocks, number of blocks and stride of each stage."""
EXPANSION = 4


class Bottleneck(nnx.Module):
    """Three convolutions beside a shortcut; the one in the middle has the stride, as usual."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, norm: Norm, rngs: nnx.Rngs
    ) -> None:
        convolution = partial(Convolution, norm=norm, rngs=rngs)
        width = outputs // EXPANSION
        self.conv1 = convolution(inputs, width, activation=nnx.relu)
        self.conv2 = convolution(width, width, 3, stride, activation=nnx.relu)
        self.conv3 = convolution(width, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else convolution(inputs, outputs, 1, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        change = self.conv3(self.conv2(self.conv1(x)))
        return nnx.relu(change + (self.shortcut(x) if self.shortcut else x))


class ResNet50(Stages):
    """The network of torchvision's ``resnet50``, with Flax's default initialization.

    Its parts are named as in the paper's Table 1.

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
        norm = norm_of(1e-5, wanted=batch_norm)
        stem = round(64 * width)
        self.conv1 = Convolution(channels, stem, 7, 2, activation=nnx.relu, norm=norm, rngs=rngs)
        inputs = stem
        for number, (inside, count, stride) in enumerate(STAGES, start=2):
            block = partial(Bottleneck, norm=norm)
            outputs = EXPANSION * round(inside * width)
            self.add_stage(f"conv{number}", block, inputs, outputs, count, stride, rngs=rngs)
            inputs = outputs
        self.fc = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The logits, [n, classes], of images, [n, height, width, channels]."""
        # Zeros do for a margin, for nothing is below them.
        x = jnp.pad(self.conv1(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nnx.max_pool(x, (3, 3), (2, 2))
        return self.fc(jnp.mean(self.run_stages(x), axis=(1, 2)))
