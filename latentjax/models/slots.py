"""Which slots of every token something is done for."""

import dataclasses

import jax
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
        batch_size, num_slots, *rest = x_BS.shape
        grouped = x_BS.reshape(batch_size, num_slots // self.period, self.period, *rest)
        return grouped[:, :, self.start : self.stop].reshape(batch_size, -1, *rest)


ALL_SLOTS = SlotRange(1, 0, 1)
