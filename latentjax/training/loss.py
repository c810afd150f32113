"""Cross-entropy of the next token, over as many tokens at a time as memory allows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from latentjax.models.token_chunks import num_chunks, split_tokens


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
    chunks = num_chunks(hidden_BTD.shape[1], chunk_tokens)
    if chunks == 1:
        return _summed(logits_fn, hidden_BTD, targets_BT, weights_BT)

    @jax.checkpoint
    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _summed(logits_fn, *chunk), None

    # The zeros that a sequence is filled up with weigh nothing either.
    parts = tuple(split_tokens(part, chunks) for part in (hidden_BTD, targets_BT, weights_BT))
    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), parts)
    return total


def _summed(logits_fn: Callable, hidden_BtD: jax.Array, targets_Bt: jax.Array, weights_Bt: jax.Array) -> jax.Array:
    logits_BtV = logits_fn(hidden_BtD)
    normaliser_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    target_logits_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return jnp.sum((normaliser_Bt - target_logits_Bt) * weights_Bt)
