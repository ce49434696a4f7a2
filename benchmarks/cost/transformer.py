"""A small decoder in Flax, whose whole training step is compiled."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

PyTree = Any

LAYERS, WIDTH, HEADS, VOCABULARY, BATCH, LENGTH = 4, 1024, 16, 8192, 8, 1024


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = nn.Embed(VOCABULARY, WIDTH)
        x = embedding(tokens)
        for _ in range(LAYERS):
            x = Block()(x)
        return embedding.attend(nn.LayerNorm()(x))


def loss_of(params: PyTree, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token."""
    logits = Decoder().apply(params, tokens[:, :-1])
    assert isinstance(logits, jax.Array)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def parameters_and_batch() -> tuple[PyTree, PyTree]:
    """Shapes and dtypes of both."""
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    params = jax.eval_shape(Decoder().init, jax.random.key(0), tokens)
    return params, tokens
