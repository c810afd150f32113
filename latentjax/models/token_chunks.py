"""Taking a sequence some tokens at a time, where what is made of a token is too large to be held for all of them."""

import jax
import jax.numpy as jnp


def num_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """Returns into how many pieces of at most `chunk_tokens` tokens a sequence is taken; 0: all of it at once."""
    return 1 if chunk_tokens == 0 else -(-num_tokens // chunk_tokens)


def split_tokens(x_BT: jax.Array, chunks: int) -> jax.Array:
    """(B, T, ...) to (chunks, B, t, ...), filled up at the end with zeros.

    A chunk takes every chunks-th token: where T is spread over devices, each of them has its part in every chunk.
    """
    batch_size, num_tokens = x_BT.shape[:2]
    padding = -num_tokens % chunks
    x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(batch_size, -1, chunks, *x_BT.shape[2:]), 2, 0)


def join_tokens(chunks_BT: jax.Array, num_tokens: int) -> jax.Array:
    """The inverse of `split_tokens`, without what it filled up: (chunks, B, t, ...) to (B, num_tokens, ...)."""
    x_BT = jnp.moveaxis(chunks_BT, 0, 2)
    return x_BT.reshape(x_BT.shape[0], -1, *x_BT.shape[3:])[:, :num_tokens]
