"""Causal attention over slots, by named backend.

Causality follows the order of slots, not position ids: the slots of a token share a position, and a thought sees its
token and the thoughts before it. Segments (documents) are told apart by id. For scoring there is besides a backend that
lets segments share a prefix (`SHARED_PREFIX`), which no config names.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.errors import UserError
from latentjax.models.attention_backend import AttentionBackend, AttentionRequest, choose
from latentjax.models.attention_mesh import sequence_shards, shard_attention
from latentjax.models.beside import BesideInLayer, KeysAndValues
from latentjax.models.cache import KeyValueCache
from latentjax.models.gpu_attention import CUDNN, TOKAMAX
from latentjax.models.rotary import rotate
from latentjax.models.slots import ALL_SLOTS, SlotRange, interleave
from latentjax.models.splash_attention import SPLASH

# Queries are taken this many at a time, so that what causality hides is mostly never computed and what is held at once
# stays small; beyond MAX_CHUNKS pieces the rest of the saving is not worth a larger program.
QUERY_CHUNK = 64
MAX_CHUNKS = 8

# With the backend SHARED_PREFIX a segment id is BRANCHES * tree + branch: branch 0 is the prefix of its tree, which the
# other branches of the tree see besides themselves.
BRANCHES = 1024


def xla_attention(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segment_ids_BS: jax.Array | None,
    queried: SlotRange,
    shares_prefix: bool = False,
) -> jax.Array:
    """Causal attention within a sequence, written out for XLA; serves every platform and mask.

    Args:
      q_BQHK: queries at the slots of `queried`, in order; k_BSGK, v_BSGK: keys and values of all slots, where G divides
        H (grouped queries).
      segment_ids_BS: slots attend within their segment only; None: one segment.
      shares_prefix: the ids are of trees and branches, see BRANCHES.

    Returns:
      (B, Q, H, K) in the dtype of q.
    """
    kernel = partial(_in_chunks, shares_prefix=shares_prefix)
    if sequence_shards() > 1:
        # Left to itself the compiler would move queries about, so that every device has a part of each chunk.
        return shard_attention(kernel, q_BQHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS, queried=queried)
    return kernel(q_BQHK, k_BSGK, v_BSGK, queried.indices(k_BSGK.shape[1]), segment_ids_BS)


def _in_chunks(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    slots_Q: jax.Array | np.ndarray,
    segment_ids_BS: jax.Array | None,
    shares_prefix: bool,
) -> jax.Array:
    """Attends from queries at slots_Q, as many at a time as QUERY_CHUNK and MAX_CHUNKS say."""
    num_queries = q_BQHK.shape[1]
    queried_ids_BQ = None if segment_ids_BS is None else jnp.take(segment_ids_BS, slots_Q, axis=1)
    # Heads first, once for all chunks: else every product of every chunk would lay its operands out anew.
    q_BGMQK, k_BGSK, v_BGSK = _group(q_BQHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
    chunk = max(QUERY_CHUNK, -(-num_queries // MAX_CHUNKS))
    attended = []
    for start in range(0, num_queries, chunk):
        rows = slice(start, start + chunk)
        # No query of the chunk sees beyond its last; where that is known only when the program runs, all are computed.
        seen = slice(0, int(slots_Q[rows][-1]) + 1 if isinstance(slots_Q, np.ndarray) else None)
        segments = None, None
        if segment_ids_BS is not None and queried_ids_BQ is not None:
            segments = queried_ids_BQ[:, rows], segment_ids_BS[:, seen]
        attended.append(
            _attend(
                q_BGMQK[:, :, :, rows], k_BGSK[:, :, seen], v_BGSK[:, :, seen], slots_Q[rows], *segments, shares_prefix
            )
        )
    return _ungroup(jnp.concatenate(attended, axis=3))


def cached_attention(
    q_BSHK: jax.Array, cache: KeyValueCache, layer: jax.Array | int, segment_ids_BS: jax.Array
) -> jax.Array:
    """Attention from the newest slots, whose keys and values are in the cache already, to all that it holds."""
    keys_BGLK, values_BGLK = cache.layer(layer)
    # The rows not yet written lie behind every query: causality keeps them out of sight.
    slots_S = cache.length + jnp.arange(q_BSHK.shape[1])
    q_BGMSK = _group(q_BSHK, keys_BGLK.shape[1])
    segments = (segment_ids_BS, cache.segment_ids_BL)
    return _ungroup(_attend(q_BGMSK, keys_BGLK, values_BGLK, slots_S, *segments))


def _group(q_BQHK: jax.Array, num_kv_heads: int) -> jax.Array:
    """Scales queries and puts heads first, M of them to each head of keys: (B, G, M, Q, K)."""
    batch_size, num_queries, num_heads, head_dim = q_BQHK.shape
    grouped_shape = (batch_size, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return (q_BQHK * head_dim**-0.5).reshape(grouped_shape).transpose(0, 2, 3, 1, 4)


def _ungroup(x_BGMQK: jax.Array) -> jax.Array:
    """The inverse of `_group`'s order: (B, Q, H, K)."""
    batch_size, _, _, num_queries, head_dim = x_BGMQK.shape
    return x_BGMQK.transpose(0, 3, 1, 2, 4).reshape(batch_size, num_queries, -1, head_dim)


def _attend(
    q_BGMQK: jax.Array,
    k_BGLK: jax.Array,
    v_BGLK: jax.Array,
    slots_Q: jax.Array | np.ndarray,
    segment_ids_BQ: jax.Array | None,
    segment_ids_BL: jax.Array | None,
    shares_prefix: bool = False,
) -> jax.Array:
    """Softmax attention of scaled queries at slots_Q to slots 0 .. L - 1, (B, G, M, Q, K); softmax in float32."""
    logits = jnp.einsum("BGMQK,BGLK->BGMQL", q_BGMQK, k_BGLK, preferred_element_type=jnp.float32)
    visible = jnp.arange(k_BGLK.shape[2]) <= slots_Q[:, None]
    if segment_ids_BQ is not None:
        assert segment_ids_BL is not None  # ids come for both sides or for neither
        same = segment_ids_BQ[:, :, None] == segment_ids_BL[:, None, :]
        if shares_prefix:
            prefix_ids_BQ = segment_ids_BQ // BRANCHES * BRANCHES
            same = same | (prefix_ids_BQ[:, :, None] == segment_ids_BL[:, None, :])
        visible = visible & same[:, None, None]
    logits = jnp.where(visible, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BGMQK.dtype)
    return jnp.einsum("BGMQL,BGLK->BGMQK", weights, v_BGLK)


XLA = AttentionBackend("xla", xla_attention, frozenset({"cpu", "gpu", "tpu"}))
BACKENDS: dict[str, AttentionBackend] = {backend.name: backend for backend in (XLA, SPLASH, CUDNN, TOKAMAX)}
SHARED_PREFIX = AttentionBackend("shared_prefix", partial(xla_attention, shares_prefix=True), XLA.platforms)
# What a ModelSpec may name: those of configs, and what scoring chooses by itself.
_ALL_BACKENDS = BACKENDS | {SHARED_PREFIX.name: SHARED_PREFIX}


def choose_backend(name: str, request: AttentionRequest) -> str:
    """Resolves `model.attention` to the name of the backend that serves the request.

    Raises:
      UserError: no such backend, or one that was asked for but cannot serve: it is never silently replaced.
    """
    return choose(BACKENDS, name, request).name


def check_backend(name: str) -> None:
    """Checks that `model.attention` is auto or the name of a backend, whatever the platform.

    Raises:
      UserError: it is neither.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is not an attention backend: choose auto or {', '.join(BACKENDS)}")


def wanted_queries(backend: str, kept: SlotRange) -> SlotRange:
    """The slots whose queries a backend wants to see, to attend from those of `kept`."""
    return ALL_SLOTS if _ALL_BACKENDS[backend].needs_all_queries else kept


def self_attention(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    backend: str,
    angles: tuple[jax.Array, jax.Array],
    segment_ids_BS: jax.Array | None,
    cache: KeyValueCache | BesideInLayer | None,
    layer: jax.Array | int,
    queried: SlotRange,
    kept: SlotRange,
) -> tuple[jax.Array, KeyValueCache | KeysAndValues | None]:
    """Rotates queries and keys, then attends within the sequence, or to all that `cache` holds and itself.

    Args:
      q_BQHK: queries at the slots of `queried`, which is `wanted_queries(backend, kept)`.
      angles: of all S slots.
      cache: where it is a `BesideInLayer`, all slots are queried and kept, and are those at its place.
      kept: the slots whose results are returned; all of them where there is a cache, but for a prefill.

    Returns:
      (B, slots of `kept`, H, K) and the cache with this layer's keys and values written; beside others, those alone.
    """
    cos, sin = angles
    q_BQHK = rotate(q_BQHK, (queried.take(cos), queried.take(sin)))
    k_BSGK = rotate(k_BSGK, angles)
    if isinstance(cache, BesideInLayer):
        return _attend_beside(q_BQHK, k_BSGK, v_BSGK, cache, backend, segment_ids_BS), (k_BSGK, v_BSGK)
    if cache is not None:
        cache = cache.write(layer, k_BSGK, v_BSGK)
        if not cache.is_prefill:
            assert segment_ids_BS is not None  # the backbone gives them wherever there is a cache
            return cached_attention(q_BQHK, cache, layer, segment_ids_BS), cache
    attended = _ALL_BACKENDS[backend].call(q_BQHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS, queried=queried)
    return attended if queried == kept else kept.take(attended), cache


def _attend_beside(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    beside: BesideInLayer,
    backend: str,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Attention from the slots at one place of all tokens to those of every place: (B, T, H, K)."""
    slots, queried = beside.slots, beside.slots
    if wanted_queries(backend, slots) != slots:
        nothing = jnp.zeros_like(q_BTHK)
        q_BTHK = interleave([q_BTHK if place == beside.place else nothing for place in range(slots.period)])
        queried = ALL_SLOTS
    segment_ids_BS = beside.segment_ids(segment_ids_BT)
    k_BSGK, v_BSGK = beside.with_own(k_BTGK, v_BTGK)
    attended = _ALL_BACKENDS[backend].call(q_BTHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS, queried=queried)
    return attended if queried == slots else slots.take(attended)
