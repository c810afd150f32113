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

# Queries are taken this many at a time, so that what causality hides is mostly never computed and what is held at once
# stays small; beyond MAX_CHUNKS pieces the rest of the saving is not worth a larger program.
QUERY_CHUNK = 64
MAX_CHUNKS = 8


def xla_attention(
    q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, *, segment_ids_BS: jax.Array | None
) -> jax.Array:
    """Causal attention within a sequence, written out for XLA; serves every platform and mask.

    Args:
      q_BSHK: queries; k_BSGK, v_BSGK: keys and values, where G divides H (grouped queries).
      segment_ids_BS: slots attend within their segment only; None: one segment.

    Returns:
      (B, S, H, K) in the dtype of q.
    """
    num_slots = q_BSHK.shape[1]
    chunk = max(QUERY_CHUNK, -(-num_slots // MAX_CHUNKS))
    attended = []
    for start in range(0, num_slots, chunk):
        stop = min(start + chunk, num_slots)
        segments = (None, None) if segment_ids_BS is None else (segment_ids_BS[:, start:stop], segment_ids_BS[:, :stop])
        attended.append(_attend(q_BSHK[:, start:stop], k_BSGK[:, :stop], v_BSGK[:, :stop], start, *segments))
    return jnp.concatenate(attended, axis=1)


def cached_attention(q_BSHK: jax.Array, cache: KeyValueCache, layer: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
    """Attention from the newest slots, whose keys and values are in the cache already, to all that it holds."""
    keys_BLGK, values_BLGK = cache.layer(layer)
    # The rows not yet written lie behind every query: causality keeps them out of sight.
    return _attend(q_BSHK, keys_BLGK, values_BLGK, cache.length, segment_ids_BS, cache.segment_ids_BL)


def _attend(
    q_BSHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    first_slot: jax.Array | int,
    segment_ids_BS: jax.Array | None,
    segment_ids_BL: jax.Array | None,
) -> jax.Array:
    """Softmax attention of slots first_slot .. first_slot + S - 1 to slots 0 .. L - 1; softmax in float32."""
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


def choose_backend(name: str, platform: str) -> str:
    """Resolves `model.attention` to the name of a backend, on devices of a platform (cpu, gpu, tpu).

    Raises:
      UserError: no backend of that name; a backend that was asked for is never silently replaced.
    """
    check_backend(name)
    return "xla" if name == "auto" else name


def check_backend(name: str) -> None:
    """Checks that `model.attention` is auto or the name of a backend, whatever the platform.

    Raises:
      UserError: it is neither.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is not an attention backend: choose auto or {', '.join(BACKENDS)}")


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
    if cache is not None:
        cache = cache.write(layer, k_BSGK, v_BSGK)
        return cached_attention(q_BSHK, cache, layer, segment_ids_BS), cache
    return BACKENDS[backend](q_BSHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS), None
