"""A checksum of every array of a state, computed where the state is; the same on every mesh.

An element's bits are mixed with its position in the whole array, and the results added modulo 2^32. Sums of integers do
not depend on their order, so that shards can be summed where they lie. Mixing is not linear: neither a flipped bit, nor
two that would cancel out, nor elements that have changed places leave the sum as it was (but by a chance of 2^-32).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by the bytes of an element; of 8, two words


def checksum(array: jax.Array) -> jax.Array:
    """Returns the checksum of an array of any shape and dtype, a uint32 scalar; to be traced."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        # Of an array that is larger than 2^32, positions come again: a swap of just those would not be seen.
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ (position * jnp.uint32(0x9E3779B1))), dtype=jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the result depends on every bit of the word."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


class StateChecksums:
    """The checksums of all arrays of a state, by one compiled program."""

    def __init__(self, abstract_state: Any):
        """Compiles the program.

        Args:
          abstract_state: shapes, dtypes and shardings, all on one mesh.
        """
        leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
        self.names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        self._kinds = [(list(leaf.shape), str(leaf.dtype)) for _, leaf in leaves]
        mesh = leaves[0][1].sharding.mesh

        def all_checksums(state: Any) -> jax.Array:
            return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(state)])

        program = jax.jit(all_checksums, out_shardings=NamedSharding(mesh, PartitionSpec()))
        # Here and now, and not in a thread beside the restoring: there, jax 0.10 was seen to wait forever for a program
        # of its cache.
        self.program = program.lower(abstract_state).compile()  # state -> (K,) uint32, K arrays

    def start(self, state: Any) -> jax.Array:
        """Dispatches the program; returns its result, (K,) uint32 on every device."""
        return self.program(state)

    def describe(self, sums: jax.Array | None = None) -> dict[str, list[Any]]:
        """Returns {name: [shape, dtype, checksum]} for JSON, in the order of the tree; without `sums` no checksum."""
        if sums is None:
            return {name: list(kind) for name, kind in zip(self.names, self._kinds, strict=True)}
        numbers = np.asarray(jax.device_get(sums)).tolist()
        return {name: [*kind, number] for name, kind, number in zip(self.names, self._kinds, numbers, strict=True)}
