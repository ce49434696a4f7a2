"""What both convolutional networks are made of, with BatchNorm or without it."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.normfree.convnets import is_stacked

Activation = Callable[[jax.Array], jax.Array]
Norm = Callable[..., nnx.BatchNorm] | None


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """What ``lax.conv_general_dilated`` gives for images; on CPUs as products of shifted images.

    Those have no dilation, and as many groups as channels or one.
    XLA's CPU program for small convolutions, and above all for depthwise ones, is slow.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=feature_group_count, **options
        )
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [
        (length - size) // stride * stride + 1
        for length, size, stride in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
    ]

    def shifted(row: int, column: int) -> jax.Array:
        rows = slice(row, row + ends[0], strides[0])
        return x[:, rows, slice(column, column + ends[1], strides[1])]

    images = [shifted(*place) for place in product(*map(range, kernel.shape[:2]))]
    if feature_group_count == 1:
        return jnp.concatenate(images, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
    factors = kernel.reshape(len(images), -1)
    products = [image * factor for image, factor in zip(images, factors, strict=True)]
    return functools.reduce(jnp.add, products)


class Convolution(nnx.Module):
    """A convolution without a bias, BatchNorm if wanted, and an activation.

    A norm-free network lacks the norm and nothing else: it does not get the bias that a norm has.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        *,
        activation: Activation | None = None,
        depthwise: bool = False,
        norm: Norm,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (size, size),
            stride,
            padding=(size - 1) // 2,
            feature_group_count=outputs if depthwise else 1,
            use_bias=False,
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.norm = norm(outputs, rngs=rngs) if norm else None
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        x = self.norm(x) if self.norm else x
        return self.activation(x) if self.activation else x


def norm_of(epsilon: float, wanted: bool) -> Norm:
    """BatchNorm, which keeps the statistics of the last batch for evaluation, or none."""
    return partial(nnx.BatchNorm, momentum=0.0, epsilon=epsilon) if wanted else None


class Stages(nnx.Module):
    """Stages of residual blocks, each the first block and the others, which are alike.

    Those are stacked under the name of the stage and ``_rest``: compiled once, however many.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()

    def add_stage(
        self,
        name: str,
        block: Callable[..., Any],
        inputs: int,
        outputs: int,
        count: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Append a stage of ``count`` blocks, the first of which changes width and size."""
        setattr(self, name, block(inputs, outputs, stride, rngs=rngs))
        self.names += (name,)
        if count > 1:

            @nnx.split_rngs(splits=count - 1)
            @nnx.vmap
            def rest(rngs: nnx.Rngs) -> Any:
                return block(outputs, outputs, 1, rngs=rngs)

            setattr(self, f"{name}_rest", rest(rngs))
            self.names += (f"{name}_rest",)

    def run_stages(self, x: jax.Array) -> jax.Array:
        """All stages, in order."""
        run_rest = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        for name in self.names:
            part = getattr(self, name)
            x = run_rest(x, part) if is_stacked(name) else part(x)
        return x
