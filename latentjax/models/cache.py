"""The key/value cache of incremental decoding: one entry per slot, thoughts included, and per pass over it."""

import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of all layers for the slots seen so far.

    Where a method passes the same slots through the backbone several times, each pass attends to what the same pass
    made of the slots before: it has layers of its own here, and N is the layers of all passes. The backbone is told
    nothing of it: passes follow one another, and slots count as fed after the last.

    Attributes:
      keys_NBLGK, values_NBLGK: one row per slot, in the order fed; rows from `length` on are not yet written.
      segment_ids_BL: int32, the segment of each slot; a slot is attended to only by its own segment.
      length: int32 scalar, the number of slots fed so far.
      first_layer: int32 scalar, where the layers of the next pass begin.
    """

    keys_NBLGK: jax.Array
    values_NBLGK: jax.Array
    segment_ids_BL: jax.Array
    length: jax.Array
    first_layer: jax.Array

    @classmethod
    def empty(cls, spec: ModelSpec, batch_size: int, capacity: int, num_passes: int = 1) -> "KeyValueCache":
        """A cache with room for `capacity` slots of `num_passes` passes each, in the model's compute dtype."""
        shape = (num_passes * spec.num_layers, batch_size, capacity, spec.kv_heads, spec.head_dim)
        return cls(
            keys_NBLGK=jnp.zeros(shape, spec.compute_dtype),
            values_NBLGK=jnp.zeros(shape, spec.compute_dtype),
            segment_ids_BL=jnp.zeros((batch_size, capacity), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            first_layer=jnp.zeros((), jnp.int32),
        )

    def write(self, layer: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> "KeyValueCache":
        """Puts the new slots of one layer of this pass behind those already there; `advance` ends the pass."""
        start = (self.first_layer + layer, 0, self.length, 0, 0)
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
        """Keys and values (B, L, G, K) of one layer of this pass."""
        layer = self.first_layer + layer
        return (
            jax.lax.dynamic_index_in_dim(self.keys_NBLGK, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values_NBLGK, layer, keepdims=False),
        )

    def advance(self, num_layers: int, num_slots: int) -> "KeyValueCache":
        """Ends a pass, whose `num_layers` layers have all written `num_slots` slots; counts these after the last."""
        first_layer = self.first_layer + num_layers
        is_last = first_layer == self.keys_NBLGK.shape[0]
        return self.replace(
            length=jnp.where(is_last, self.length + num_slots, self.length),
            first_layer=jnp.where(is_last, 0, first_layer),
        )
