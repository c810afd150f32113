"""The key/value cache of incremental decoding: one entry per slot, thoughts included, and per pass over it."""

from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec

Layers = jax.Array | tuple[jax.Array, ...]


class KeyValueCache(flax.struct.PyTreeNode):
    """Keys and values of all layers for the slots seen so far.

    Where a method passes the same slots through the backbone several times, each pass attends to what the same pass
    made of the slots before: it has layers of its own here, and N is the layers of all passes. The backbone is told
    nothing of it: passes follow one another, and slots count as fed after the last.

    Attributes:
      keys_NBGLK, values_NBGLK: heads before slots, so that attention reads them as they lie; slots in the order fed,
        those from `length` on not yet written. Where layers are separate (`ModelSpec.separates`), a tuple of N arrays.
      segment_ids_BL: int32, the segment of each slot; a slot is attended to only by its own segment.
      length: int32 scalar, the number of slots fed so far.
      first_layer: int32 scalar, where the layers of the next pass begin in stacked arrays.
      first_array: the same in a tuple; static, so such passes are no turns of a scan.
      is_prefill: nothing has been fed before, and all that is fed now comes in one call per pass: it attends within
        itself, by the model's attention backend. Static; whoever feeds sets it and takes it away again.
    """

    keys_NBGLK: Layers
    values_NBGLK: Layers
    segment_ids_BL: jax.Array
    length: jax.Array
    first_layer: jax.Array
    first_array: int = flax.struct.field(pytree_node=False, default=0)
    is_prefill: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, spec: ModelSpec, batch_size: int, capacity: int, num_passes: int = 1) -> "KeyValueCache":
        """A cache with room for `capacity` slots of `num_passes` passes each, in the model's compute dtype."""
        num_layers, shape = num_passes * spec.num_layers, (batch_size, spec.kv_heads, capacity, spec.head_dim)

        def zeros() -> Layers:
            if spec.separates:
                return tuple(jnp.zeros(shape, spec.compute_dtype) for _ in range(num_layers))
            return jnp.zeros((num_layers, *shape), spec.compute_dtype)

        return cls(
            keys_NBGLK=zeros(),
            values_NBGLK=zeros(),
            segment_ids_BL=jnp.zeros((batch_size, capacity), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            first_layer=jnp.zeros((), jnp.int32),
        )

    def grown(self, capacity: int) -> "KeyValueCache":
        """The same slots, with room for `capacity`, which is L or more."""
        more = capacity - self.segment_ids_BL.shape[1]

        def pad(array: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(array, [(0, more if axis == each else 0) for each in range(-array.ndim, 0)])

        keys, values = jax.tree.map(lambda array: pad(array, -2), (self.keys_NBGLK, self.values_NBGLK))
        return self.replace(keys_NBGLK=keys, values_NBGLK=values, segment_ids_BL=pad(self.segment_ids_BL, -1))

    def write(self, layer: jax.Array | int, k_BSGK: jax.Array, v_BSGK: jax.Array) -> "KeyValueCache":
        """Puts the new slots of one layer of this pass behind those already there; `advance` ends the pass."""

        def put(layers: Layers, x_BSGK: jax.Array) -> Layers:
            x_BGSK, start = x_BSGK.swapaxes(1, 2), (0, 0, self.length, 0)
            if not isinstance(layers, tuple):
                return jax.lax.dynamic_update_slice(layers, x_BGSK[None], (self.first_layer + layer, *start))
            place = self.first_array + layer
            written = jax.lax.dynamic_update_slice(layers[place], x_BGSK, start)
            return (*layers[:place], written, *layers[place + 1 :])

        return self.replace(keys_NBGLK=put(self.keys_NBGLK, k_BSGK), values_NBGLK=put(self.values_NBGLK, v_BSGK))

    def write_segments(self, segment_ids_BS: jax.Array) -> "KeyValueCache":
        """Notes the segments of the slots about to be written."""
        start = (0, self.length)
        segment_ids_BS = jnp.broadcast_to(segment_ids_BS, (self.segment_ids_BL.shape[0], segment_ids_BS.shape[1]))
        return self.replace(
            segment_ids_BL=jax.lax.dynamic_update_slice(self.segment_ids_BL, segment_ids_BS.astype(jnp.int32), start)
        )

    def layer(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, G, L, K) of one layer of this pass.

        What lies apart is handed out as it lies. A reshape in between would be enough for XLA to fuse the write with
        each read of it, as so many writes, and to copy the rest of the array for each.
        """
        if isinstance(self.keys_NBGLK, tuple):
            place = self.first_array + layer
            return self.keys_NBGLK[place], self.values_NBGLK[place]
        layer = self.first_layer + layer
        return (
            jax.lax.dynamic_index_in_dim(self.keys_NBGLK, layer, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values_NBGLK, layer, keepdims=False),
        )

    def advance(self, num_layers: int, num_slots: int) -> "KeyValueCache":
        """Ends a pass, whose `num_layers` layers have all written `num_slots` slots; counts these after the last."""
        if isinstance(self.keys_NBGLK, tuple):
            first_array = self.first_array + num_layers
            if first_array < len(self.keys_NBGLK):
                return self.replace(first_array=first_array)
            return self.replace(length=self.length + num_slots, first_array=0)
        first_layer = self.first_layer + num_layers
        is_last = first_layer == self.keys_NBGLK.shape[0]
        return self.replace(
            length=jnp.where(is_last, self.length + num_slots, self.length),
            first_layer=jnp.where(is_last, 0, first_layer),
        )


# Who is given a cache gives one back, and who is given none gives none.
OptionalCache = TypeVar("OptionalCache", KeyValueCache, None)
