"""The key/value cache of incremental decoding: one entry per slot, thoughts included."""

import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of all layers for the slots seen so far.

    Attributes:
      keys_NBLGK, values_NBLGK: one row per slot, in the order fed; rows from `length` on are not yet written.
      segment_ids_BL: int32, the segment of each slot; a slot is attended to only by its own segment.
      length: int32 scalar, the number of slots fed so far.
    """

    keys_NBLGK: jax.Array
    values_NBLGK: jax.Array
    segment_ids_BL: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, spec: ModelSpec, batch_size: int, capacity: int) -> "KeyValueCache":
        """A cache with room for `capacity` slots, in the model's compute dtype."""
        shape = (spec.num_layers, batch_size, capacity, spec.kv_heads, spec.head_dim)
        return cls(
            keys_NBLGK=jnp.zeros(shape, spec.compute_dtype),
            values_NBLGK=jnp.zeros(shape, spec.compute_dtype),
            segment_ids_BL=jnp.zeros((batch_size, capacity), jnp.int32),
            length=jnp.zeros((), jnp.int32),
        )

    def write(self, layer: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> "KeyValueCache":
        """Puts the new slots of one layer behind those already there; `advance` moves on once all layers have."""
        start = (layer, 0, self.length, 0, 0)
        return self.replace(
            keys_NBLGK=jax.lax.dynamic_update_slice(self.keys_NBLGK, k_BSGK[None], start),
            values_NBLGK=jax.lax.dynamic_update_slice(self.values_NBLGK, v_BSGK[None], start),
        )

    def write_segments(self, segment_ids_BS: jax.Array) -> "KeyValueCache":
        """Notes the segments of the slots about to be written."""
        start = (0, self.length)
        segment_ids_BS = jnp.broadcast_to(segment_ids_BS, (self.segment_ids_BL.shape[0], segment_ids_BS.shape[1]))
        return self.replace(
            segment_ids_BL=jax.lax.dynamic_update_slice(self.segment_ids_BL, segment_ids_BS.astype(jnp.int32), start)
        )

    def layer(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, L, G, K) of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys_NBLGK, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values_NBLGK, layer, keepdims=False),
        )

    def advance(self, num_slots: int) -> "KeyValueCache":
        """Counts the slots that every layer has now written."""
        return self.replace(length=self.length + num_slots)
