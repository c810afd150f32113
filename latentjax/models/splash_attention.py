"""Splash attention on TPU: jax's Pallas kernel, which skips blocks that causality hides and holds no (S, S) array."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding

from latentjax.errors import UserError
from latentjax.models.attention_backend import AttentionBackend
from latentjax.models.attention_mesh import shard_attention
from latentjax.models.slots import SlotRange

# Queries and keys are worked on this many at a time, or the largest smaller power of two that divides them. Large
# blocks amortise the loads of keys and values; 512 x 512 scores in float32 are 1 MiB of the vector memory.
MAX_BLOCK = 512
MIN_BLOCK = 128  # lanes of the vector unit: rows are filled up to a multiple


class SlotCausalMask(masks._ComputableMask):
    """Query i, at the i-th slot of a range, sees the slots up to its own; computed inside the kernel."""

    def __init__(self, num_queries: int, num_slots: int, queried: SlotRange):
        """Makes the mask of `num_queries` x `num_slots`."""
        self.queried = queried

        def visible(query_ids: Any, slot_ids: Any) -> Any:
            return _slot_of(query_ids, queried) >= slot_ids

        super().__init__((num_queries, num_slots), visible)

    def _key(self) -> tuple:
        return (self.shape, self.queried)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, SlotCausalMask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())


def _slot_of(query: Any, queried: SlotRange) -> Any:
    """The slot at which a query stands; of NumPy or jax integers."""
    if queried.is_all:
        return query
    if queried.count == 1:
        return query * queried.period + queried.start
    token = query // queried.count
    return token * (queried.period - queried.count) + query + queried.start


def splash_attention(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segment_ids_BS: jax.Array | None,
    queried: SlotRange,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention as `models.attention_backend` defines it, for TPU.

    Args:
      interpret: run the kernel's program on any platform, slowly (for tests).

    Raises:
      UserError: the slots of a sequence are spread over so many devices that a device's do not fill a block.
    """
    num_queries, num_slots = q_BQHK.shape[1], k_BSGK.shape[1]

    def tables(num_shards: int, heads_per_device: int) -> tuple[Any, Callable[[NamedSharding], Any]]:
        if num_shards > 1 and num_queries % (num_shards * MIN_BLOCK):
            raise UserError(
                f"{num_queries} queries over mesh.sequence={num_shards} devices are not whole blocks of {MIN_BLOCK} "
                "each, which splash attention works on: change data.sequence_length or mesh.sequence"
            )
        kernel = _make_kernel(heads_per_device, num_queries, num_slots, queried, num_shards, interpret)
        return kernel, kernel.manual_sharding_spec

    return shard_attention(
        _attend, q_BQHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS, queried=queried, tables=tables
    )


def _make_kernel(
    num_heads: int, num_queries: int, num_slots: int, queried: SlotRange, num_shards: int, interpret: bool
) -> splash_kernel.SplashAttentionKernel:
    """The kernel and which of its blocks have anything to do, for queries spread over `num_shards` devices."""
    num_queries, num_slots = _filled(num_queries), _filled(num_slots)
    block_q, block_kv = _block(num_queries // num_shards), _block(num_slots)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = SlotCausalMask(num_queries, num_slots, queried)
    # Its tables become constants of the program being traced, so it is made anew for each.
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,  # heads see the same, so each device makes do with one table for all of them
        q_seq_shards=num_shards,
        interpret=interpret,
    )


def _attend(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    slots_Q: jax.Array,
    segment_ids_BS: jax.Array | None,
    kernel: Callable[..., jax.Array],
) -> jax.Array:
    """One device's part; `slots_Q` says where its queries stand."""
    num_queries, head_dim = q_BQHK.shape[1], q_BQHK.shape[3]
    # The kernel wants heads before slots, and scaled queries.
    q_BHQK = _fill((q_BQHK * head_dim**-0.5).swapaxes(1, 2), 2)
    k_BGSK, v_BGSK = _fill(k_BSGK.swapaxes(1, 2), 2), _fill(v_BSGK.swapaxes(1, 2), 2)
    if segment_ids_BS is None:
        attended_BHQK = jax.vmap(kernel)(q_BHQK, k_BGSK, v_BGSK)
    else:
        # Rows filled up belong to the last document, so that none of them sees nothing at all: that would be 0 / 0.
        segments = splash.SegmentIds(
            q=_fill(jnp.take(segment_ids_BS, slots_Q, axis=1), 1, mode="edge"),
            kv=_fill(segment_ids_BS, 1, mode="edge"),
        )
        attended_BHQK = jax.vmap(kernel)(q_BHQK, k_BGSK, v_BGSK, segments)
    return attended_BHQK[:, :, :num_queries].swapaxes(1, 2)


def _filled(size: int) -> int:
    return -(-size // MIN_BLOCK) * MIN_BLOCK


def _fill(x: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
    """Fills an axis up to whole blocks, behind what is there: causality hides it."""
    missing = _filled(x.shape[axis]) - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if each == axis else 0) for each in range(x.ndim)], mode=mode)


def _block(size: int) -> int:
    return math.gcd(size, MAX_BLOCK)


SPLASH = AttentionBackend("splash", splash_attention, frozenset({"tpu"}))
