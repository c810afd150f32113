"""Causal attention over slots, by named backend.

Causality follows the order of slots, not position ids: the slots of a token share a position, and a thought sees its
token and the thoughts before it. Segments (documents) are told apart by id.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from latentjax.errors import UserError
from latentjax.models.cache import KeyValueCache
from latentjax.models.rotary import rotate


def xla_attention(
    q_BSHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    *,
    first_slot: jax.Array | int,
    segment_ids_BS: jax.Array | None,
    segment_ids_BL: jax.Array | None,
) -> jax.Array:
    """Attention written out for XLA; softmax in float32. Serves every platform, masks and caches.

    Args:
      q_BSHK: queries of slots first_slot .. first_slot + S - 1.
      k_BLGK, v_BLGK: keys and values of slots 0 .. L - 1; G divides H (grouped queries).
      first_slot: index of the first query; a slot attends to slots up to and including itself.
      segment_ids_BS, segment_ids_BL: segment of each query and key, or None for one segment throughout.

    Returns:
      (B, S, H, K) in the dtype of q.
    """
    batch_size, num_queries, num_heads, head_dim = q_BSHK.shape
    num_keys, num_kv_heads = k_BLGK.shape[1:3]
    grouped_shape = (batch_size, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_BSGMK = (q_BSHK * head_dim**-0.5).reshape(grouped_shape)  # M query heads share one head of keys
    logits = jnp.einsum("BSGMK,BLGK->BGMSL", q_BSGMK, k_BLGK, preferred_element_type=jnp.float32)

    visible = jnp.arange(num_keys) <= (first_slot + jnp.arange(num_queries))[:, None]
    if segment_ids_BS is not None:
        visible = visible & (segment_ids_BS[:, :, None] == segment_ids_BL[:, None, :])[:, None, None]
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BSHK.dtype)
    return jnp.einsum("BGMSL,BLGK->BSGMK", weights, v_BLGK).reshape(q_BSHK.shape)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": xla_attention}


def choose_backend(name: str) -> str:
    """Resolves `model.attention` to the name of a backend.

    Raises:
      UserError: no backend of that name; a backend that was asked for is never silently replaced.
    """
    chosen = "xla" if name == "auto" else name
    if chosen not in BACKENDS:
        raise UserError(f"model.attention={name!r} is not an attention backend: choose auto or {', '.join(BACKENDS)}")
    return chosen


def self_attention(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    backend: str,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_BS: jax.Array | None,
    cache: KeyValueCache | None,
    layer: jax.Array,
) -> tuple[jax.Array, KeyValueCache | None]:
    """Rotates queries and keys, then attends within the sequence, or to all that `cache` holds and itself.

    Returns:
      (B, S, H, K) and the cache with this layer's keys and values written.
    """
    q_BSHK, k_BSGK = rotate(q_BSHK, angles), rotate(k_BSGK, angles)
    # Decoding attends from a handful of slots to a cache of which a part is empty: only XLA's form serves it.
    if cache is not None:
        cache = cache.write(layer, k_BSGK, v_BSGK)
        keys, values = cache.layer(layer)
        # All slots are one segment unless told otherwise; the empty rows behind are out of sight by causality.
        attended = xla_attention(
            q_BSHK,
            keys,
            values,
            first_slot=cache.length,
            segment_ids_BS=segment_ids_BS,
            segment_ids_BL=cache.segment_ids_BL,
        )
        return attended, cache
    attend = BACKENDS[choose_backend(backend)]
    attended = attend(
        q_BSHK, k_BSGK, v_BSGK, first_slot=0, segment_ids_BS=segment_ids_BS, segment_ids_BL=segment_ids_BS
    )
    return attended, None
