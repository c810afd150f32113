"""Keys and values of slots that a pass does not feed, so that it can go over one slot of every token alone."""

import dataclasses
from typing import Any

import flax.struct
import jax

from latentjax.models.slots import SlotRange, interleave, repeat_ids

# Of the slots at one place of all tokens: (B, T, G, K) each in one layer, or stacked as (N, B, T, G, K).
KeysAndValues = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class PlaceKeys:
    """What a pass over one slot of every token leaves behind: keys and values of all layers.

    Attributes:
      layers: of all layers but the last, stacked; None where there is but one layer.
      last: of the last layer.
    """

    layers: KeysAndValues | None
    last: KeysAndValues


@flax.struct.dataclass
class Beside:
    """The other slots of each token while a pass feeds those at one place.

    Attributes:
      others: of each place in the order of slots, what a pass over it left, `PlaceKeys`; at `place`, which is fed now,
        None. In a layer, its `KeysAndValues` alone.
      place: static.
    """

    others: tuple[Any, ...]
    place: int = flax.struct.field(pytree_node=False)

    @property
    def stacked(self) -> "Beside":
        """Of all layers but the last, to be scanned over."""
        return dataclasses.replace(self, others=tuple(None if each is None else each.layers for each in self.others))

    @property
    def of_last_layer(self) -> "Beside":
        """Of the last layer."""
        return dataclasses.replace(self, others=tuple(None if each is None else each.last for each in self.others))

    @property
    def slots(self) -> SlotRange:
        """Those that are fed, among all slots that a token has here."""
        return SlotRange(len(self.others), self.place, self.place + 1)

    def with_own(self, k_BTGK: jax.Array, v_BTGK: jax.Array) -> KeysAndValues:
        """Keys and values of all slots in order, (B, S, G, K), in one layer."""
        own = (k_BTGK, v_BTGK)
        parts = [own if each is None else each for each in self.others]
        return interleave([keys for keys, _ in parts]), interleave([values for _, values in parts])

    def segment_ids(self, segment_ids_BT: jax.Array | None) -> jax.Array | None:
        """Those of all slots."""
        return repeat_ids(segment_ids_BT, len(self.others))
