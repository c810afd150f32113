"""The key/value cache of incremental decoding: one entry per slot, thoughts included, and per pass over it."""

import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec

Layers = jax.Array | tuple[jax.Array, ...]


@flax.struct.dataclass
class KeyValueCache:
    """Keys and values of all layers for the slots seen so far.

    Where a method passes the same slots through the backbone several times, each of the P passes attends to what the
    same pass made of the slots before, so it has entries of its own here. The backbone is told nothing of it: passes
    follow one another, and slots count as fed after the last.

    Attributes:
      keys_NPBGLK, values_NPBGLK: heads before slots, so that attention reads them as they lie; slots in the order fed,
        those from `length` on not yet written. Where layers are separate (`ModelSpec.separates`), a tuple of N arrays
        (P, B, G, L, K): no layer is cut out of a larger array.
      segment_ids_BL: int32, the segment of each slot; a slot is attended to only by its own segment.
      length: int32 scalar, the number of slots fed so far.
      pass_index: int32 scalar, which of the P passes comes next.
      is_prefill: nothing has been fed before, and all that is fed now comes in one call per pass: it attends within
        itself, by the model's attention backend. Static; whoever feeds sets it and takes it away again.
    """

    keys_NPBGLK: Layers
    values_NPBGLK: Layers
    segment_ids_BL: jax.Array
    length: jax.Array
    pass_index: jax.Array
    is_prefill: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, spec: ModelSpec, batch_size: int, capacity: int, num_passes: int = 1) -> "KeyValueCache":
        """A cache with room for `capacity` slots of `num_passes` passes each, in the model's compute dtype."""
        shape = (num_passes, batch_size, spec.kv_heads, capacity, spec.head_dim)

        def zeros() -> Layers:
            if spec.separates:
                return tuple(jnp.zeros(shape, spec.compute_dtype) for _ in range(spec.num_layers))
            return jnp.zeros((spec.num_layers, *shape), spec.compute_dtype)

        return cls(
            keys_NPBGLK=zeros(),
            values_NPBGLK=zeros(),
            segment_ids_BL=jnp.zeros((batch_size, capacity), jnp.int32),
            length=jnp.zeros((), jnp.int32),
            pass_index=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """L."""
        return self.segment_ids_BL.shape[1]

    def grown(self, capacity: int) -> "KeyValueCache":
        """The same slots, with room for `capacity`, which is L or more."""
        more = capacity - self.capacity

        def pad(array: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(array, [(0, more if axis == each else 0) for each in range(-array.ndim, 0)])

        keys, values = jax.tree.map(lambda array: pad(array, -2), (self.keys_NPBGLK, self.values_NPBGLK))
        return self.replace(keys_NPBGLK=keys, values_NPBGLK=values, segment_ids_BL=pad(self.segment_ids_BL, -1))

    def write(self, layer: jax.Array | int, k_BSGK: jax.Array, v_BSGK: jax.Array) -> "KeyValueCache":
        """Puts the new slots of one layer of this pass behind those already there; `advance` ends the pass."""
        start = (self.pass_index, 0, 0, self.length, 0)

        def put(layers: Layers, x_BSGK: jax.Array) -> Layers:
            x_PBGSK = x_BSGK.swapaxes(1, 2)[None]
            if isinstance(layers, tuple):
                # Else XLA fuses the write with each read of it, as several writes, for which it copies all the rest.
                written = jax.lax.optimization_barrier(jax.lax.dynamic_update_slice(layers[layer], x_PBGSK, start))
                return (*layers[:layer], written, *layers[layer + 1 :])
            return jax.lax.dynamic_update_slice(layers, x_PBGSK[None], (layer, *start))

        return self.replace(keys_NPBGLK=put(self.keys_NPBGLK, k_BSGK), values_NPBGLK=put(self.values_NPBGLK, v_BSGK))

    def write_segments(self, segment_ids_BS: jax.Array) -> "KeyValueCache":
        """Notes the segments of the slots about to be written."""
        start = (0, self.length)
        segment_ids_BS = jnp.broadcast_to(segment_ids_BS, (self.segment_ids_BL.shape[0], segment_ids_BS.shape[1]))
        return self.replace(
            segment_ids_BL=jax.lax.dynamic_update_slice(self.segment_ids_BL, segment_ids_BS.astype(jnp.int32), start)
        )

    def layer(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, G, L, K) of one layer of this pass."""

        def take(layers: Layers) -> jax.Array:
            if isinstance(layers, tuple):
                x_PBGLK = layers[layer]
            else:
                x_PBGLK = jax.lax.dynamic_index_in_dim(layers, layer, keepdims=False)
            if x_PBGLK.shape[0] == 1:
                return x_PBGLK[0]
            return jax.lax.dynamic_index_in_dim(x_PBGLK, self.pass_index, keepdims=False)

        return take(self.keys_NPBGLK), take(self.values_NPBGLK)

    def advance(self, num_slots: int) -> "KeyValueCache":
        """Ends a pass, all of whose layers have written `num_slots` slots; counts these after the last pass."""
        num_passes = jax.tree.leaves(self.keys_NPBGLK)[0].shape[-5]
        if num_passes == 1:
            return self.replace(length=self.length + num_slots)
        is_last = self.pass_index == num_passes - 1
        return self.replace(
            length=jnp.where(is_last, self.length + num_slots, self.length),
            pass_index=jnp.where(is_last, 0, self.pass_index + 1),
        )
