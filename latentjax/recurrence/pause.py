"""Pause tokens: "Think before you speak" (arXiv 2310.02226), with N of them behind every token.

    x_1 p .. p x_2 p .. p ..     the hidden state at a token's last pause predicts the next token

A pause is a token of the vocabulary like any other, the same everywhere. All slots are known beforehand, so one pass
computes them, in training as in decoding.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.cache import KeyValueCache, OptionalCache
from latentjax.models.embedding import Vocabulary
from latentjax.models.layers import shard_activation
from latentjax.models.slots import SlotRange, interleave, repeat_ids
from latentjax.recurrence.base import Prefilled, Recurrence, prefilled_at_once


@dataclasses.dataclass(frozen=True)
class Pause(Recurrence):
    """N pauses per token.

    Attributes:
      num_pauses: N >= 1 (N = 0 is `Vanilla`).
      token_id: of the pause; -1: the last of the vocabulary.
      scale_embeddings: multiply embeddings by sqrt(D).
    """

    num_pauses: int
    token_id: int
    scale_embeddings: bool

    uses_jacobi_iterations: ClassVar[bool] = False

    @property
    def slots_per_token(self) -> int:
        """N + 1."""
        return self.num_pauses + 1

    def embedding_scale(self, hidden_size: int) -> float:
        """sqrt(D)."""
        return hidden_size**0.5 if self.scale_embeddings else 1.0

    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """One, over all slots."""
        return (self.slots_per_token,)

    def kept_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """The last pause."""
        return (1,)

    def forward(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
    ) -> tuple[jax.Array, None]:
        """One pass, of which the last pauses are read."""
        return self._pass(backbone, x_BTD, positions_BT, segment_ids_BT, None, vocabulary)[0], None

    def decode(
        self,
        backbone: nn.Module,
        x_BD: jax.Array,
        position_B: jax.Array,
        segment_id_B: jax.Array | None,
        cache: KeyValueCache,
        *,
        vocabulary: Vocabulary,
    ) -> tuple[jax.Array, KeyValueCache]:
        """All slots of the token at once."""
        slots = self.slots_per_token
        pause_D = vocabulary.embedding_of(self.token_id)
        pause_BSD = jnp.broadcast_to(pause_D, (x_BD.shape[0], self.num_pauses, x_BD.shape[1]))
        segment_ids_B1 = None if segment_id_B is None else segment_id_B[:, None]
        ids = repeat_ids(position_B[:, None], slots), repeat_ids(segment_ids_B1, slots)
        hidden_BSD, cache = backbone(jnp.concatenate([x_BD[:, None], pause_BSD], axis=1), *ids, cache)
        return hidden_BSD[:, -1], cache

    def prefill(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KeyValueCache,
        *,
        vocabulary: Vocabulary,
        tolerance: jax.Array | float,
    ) -> Prefilled:
        """One pass."""
        cache = cache.replace(is_prefill=True)
        hidden_BTD, cache = self._pass(backbone, x_BTD, positions_BT, segment_ids_BT, cache, vocabulary)
        return prefilled_at_once(hidden_BTD[:, -1], cache.replace(is_prefill=False))

    def _pass(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: OptionalCache,
        vocabulary: Vocabulary,
    ) -> tuple[jax.Array, OptionalCache]:
        """All slots of all tokens, with a cache to fill or without; hidden states (B, T, D) at the last pauses."""
        slots = self.slots_per_token
        pause_BTD = jnp.broadcast_to(vocabulary.embedding_of(self.token_id), x_BTD.shape)
        x_BSD = shard_activation(interleave([x_BTD, *[pause_BTD] * self.num_pauses]), "batch", "slots", None)
        ids = repeat_ids(positions_BT, slots), repeat_ids(segment_ids_BT, slots)
        return backbone(x_BSD, *ids, cache, kept=SlotRange(slots, slots - 1, slots))
