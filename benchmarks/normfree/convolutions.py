"""What both convolutional networks are made of, with BatchNorm or without it."""

import functools
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.normfree.convnets import is_stacked

Activation = Callable[[jax.Array], jax.Array]
Norm = Callable[..., nnx.BatchNorm] | None


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, as a sum of shifted products.

    That is what ``nnx.Conv`` with as many groups as channels gives; XLA's CPU program for that is
    slow.
    """

    def __init__(self, channels: int, size: int, stride: int, *, rngs: nnx.Rngs) -> None:
        initializer = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initializer(rngs.params(), (size, size, 1, channels)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        size, stride = self.kernel.shape[0], self.stride
        height, width = ((length - 1) // stride + 1 for length in x.shape[1:3])
        margin = ((size - 1) // 2,) * 2
        x = jnp.pad(x, ((0, 0), margin, margin, (0, 0)))

        def shifted(row: int, column: int) -> jax.Array:
            rows = slice(row, row + stride * (height - 1) + 1, stride)
            columns = slice(column, column + stride * (width - 1) + 1, stride)
            return x[:, rows, columns] * self.kernel[row, column, 0]

        places = product(range(size), repeat=2)
        return functools.reduce(jnp.add, (shifted(row, column) for row, column in places))


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
        self.conv = (
            Depthwise(outputs, size, stride, rngs=rngs)
            if depthwise
            else nnx.Conv(
                inputs,
                outputs,
                (size, size),
                stride,
                padding=(size - 1) // 2,
                use_bias=False,
                rngs=rngs,
            )
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
