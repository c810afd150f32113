"""Cross-entropy of the next token, over as many tokens at a time as memory allows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def next_token_loss(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk_tokens: int,
) -> jax.Array:
    """Sums weighted cross-entropy, in nats, without ever holding the logits of more than `chunk_tokens` tokens a row.

    Args:
      logits_fn: the head, (B, t, D) to float32 (B, t, V).
      hidden_BTD: what the head reads; targets_BT: int32 ids; weights_BT: float32.
      chunk_tokens: t; 0: all T at once. The backward pass recomputes the logits of each chunk.

    Returns:
      float32 scalar, the weighted sum.
    """
    num_tokens = hidden_BTD.shape[1]
    if chunk_tokens == 0 or chunk_tokens >= num_tokens:
        return _summed(logits_fn, hidden_BTD, targets_BT, weights_BT)
    chunks = -(-num_tokens // chunk_tokens)
    padding = chunks * chunk_tokens - num_tokens

    def split(x: jax.Array) -> jax.Array:
        """(B, T, ...) to (chunks, B, t, ...), padded at the end with zeros, which also weigh nothing.

        A chunk takes every chunks-th token: where T is spread over devices, each of them has its part in every chunk.
        """
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunk_tokens, chunks, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _summed(logits_fn, *chunk), None

    total, _ = jax.lax.scan(
        add_chunk, jnp.zeros((), jnp.float32), (split(hidden_BTD), split(targets_BT), split(weights_BT))
    )
    return total


def _summed(logits_fn: Callable, hidden_BtD: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> jax.Array:
    logits_BtV = logits_fn(hidden_BtD)
    normaliser_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    target_logits_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return jnp.sum((normaliser_Bt - target_logits_Bt) * weights_Bt)
