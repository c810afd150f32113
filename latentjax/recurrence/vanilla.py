"""The plain decoder: every token is one slot, and its hidden state predicts the next token."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from latentjax.models.cache import KeyValueCache
from latentjax.models.embedding import Vocabulary
from latentjax.recurrence.base import Prefilled, Recurrence, prefilled_at_once


@dataclasses.dataclass(frozen=True)
class Vanilla(Recurrence):
    """The baseline."""

    slots_per_token: ClassVar[int] = 1
    uses_jacobi_iterations: ClassVar[bool] = False

    def embedding_scale(self, hidden_size: int) -> float:
        """Embeddings enter as they are."""
        return 1.0

    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """One, over one slot."""
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
        """One pass."""
        hidden_BTD, _ = backbone(x_BTD, positions_BT, segment_ids_BT)
        return hidden_BTD, None

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
        """One slot."""
        segment_ids_B1 = None if segment_id_B is None else segment_id_B[:, None]
        hidden_B1D, cache = backbone(x_BD[:, None], position_B[:, None], segment_ids_B1, cache)
        return hidden_B1D[:, 0], cache

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
        hidden_BTD, cache = backbone(x_BTD, positions_BT, segment_ids_BT, cache.replace(is_prefill=True))
        return prefilled_at_once(hidden_BTD[:, -1], cache.replace(is_prefill=False))
