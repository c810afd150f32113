"""Generating text with the key/value cache: exact sequential decoding, as one compiled program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from latentjax.recurrence.language_model import LanguageModel


@partial(jax.jit, static_argnames=("model", "num_tokens"))
def generate(
    model: LanguageModel,
    params: Any,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    temperature: jax.Array | float,
    *,
    num_tokens: int,
) -> jax.Array:
    """Continues prompts of any lengths, every token preceded by its C thoughts.

    Args:
      prompts_BP: int32 token ids, filled up at the end of each row with anything.
      lengths_B: int32, true length of each prompt, at least 1.
      key: of the sampling; temperature: float, 0 for greedy; both traced.
      num_tokens: P or more, static: prompt and continuation together.

    Returns:
      int32 (B, num_tokens): each row is its prompt and what follows it.
    """
    batch_size, prompt_tokens = prompts_BP.shape
    padded_BT = jnp.pad(prompts_BP, ((0, 0), (0, num_tokens - prompt_tokens)))

    def feed(carry: tuple, position: jax.Array) -> tuple[tuple, jax.Array]:
        token_B, cache = carry
        position_B = jnp.full((batch_size,), position, jnp.int32)
        logits_BV, cache = model.apply({"params": params}, token_B, position_B, cache, method="decode")
        # Dividing by a floor instead of 0 keeps the untaken branch finite.
        drawn_B = jax.random.categorical(
            jax.random.fold_in(key, position), logits_BV / jnp.maximum(temperature, 1e-6), axis=-1
        )
        next_B = jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1))
        # Rows whose prompt is not over yet read on instead.
        next_B = jnp.where(position + 1 < lengths_B, padded_BT[:, position + 1], next_B).astype(jnp.int32)
        return (next_B, cache), next_B

    cache = model.apply({}, batch_size, num_tokens, method="empty_cache")
    _, following_TB = jax.lax.scan(feed, (padded_BT[:, 0], cache), jnp.arange(num_tokens - 1))
    return jnp.concatenate([padded_BT[:, :1], following_TB.T], axis=1)
