"""Slots: how those of a token lie among each other, and which of them something is done for."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SlotRange:
    """Slots start .. stop - 1 of each token, where a token has `period` slots; hashable, so static under jit."""

    period: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many slots of each token there are in the range."""
        return self.stop - self.start

    @property
    def is_all(self) -> bool:
        """Whether no slot is left out."""
        return self.count == self.period

    def indices(self, num_slots: int) -> np.ndarray:
        """Where the range's slots lie among all `num_slots` slots of a sequence, int32, in order."""
        return np.arange(num_slots, dtype=np.int32).reshape(-1, self.period)[:, self.start : self.stop].reshape(-1)

    def take(self, x_BS: jax.Array) -> jax.Array:
        """Picks the range's slots out of (B, S, ...), as (B, S / period * count, ...); B may be 1."""
        if self.is_all:
            return x_BS
        return interleave([x_BS[:, slot :: self.period] for slot in range(self.start, self.stop)])


ALL_SLOTS = SlotRange(1, 0, 1)


def interleave(parts: Sequence[jax.Array]) -> jax.Array:
    """Lays out arrays of (B, T, ...) slot by slot, as (B, len(parts) * T, ...): the first of each, then the second ...

    Each is spread out by itself and all are added. Stacking them on an axis of their own and merging that with T says
    the same, but a TPU tiles the last two axes of an array, so that it would have to be laid out anew, twice.
    """
    count = len(parts)
    if count == 1:
        return parts[0]

    def spread(part: jax.Array, place: int) -> jax.Array:
        padding = [(0, 0, 0), (place, count - 1 - place, count - 1), *[(0, 0, 0)] * (part.ndim - 2)]
        return jax.lax.pad(part, jnp.zeros((), part.dtype), padding)

    return cast(jax.Array, sum(spread(part, place) for place, part in enumerate(parts)))


def repeat_ids(ids_BT: jax.Array | None, slots: int) -> jax.Array | None:
    """Gives every slot its token's id: (B, T) to (B, slots * T)."""
    return None if ids_BT is None else jnp.repeat(ids_BT, slots, axis=1)


def split(x_BS: jax.Array, count: int) -> list[jax.Array]:
    """The inverse of `interleave`: (B, count * T, ...) to `count` arrays of (B, T, ...)."""
    return [x_BS[:, place::count] for place in range(count)]
