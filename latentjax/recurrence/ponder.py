"""Pondering in the space of embeddings: PonderLM (arXiv 2505.20674), section 3.

    e = embeddings;   N times:  e = e + softmax(head(backbone(e))) @ (scale * table);   hidden = backbone(e)

A token is one slot: what is predicted at it is added to it as the mean embedding, and it is read anew. Each pass
attends to what the same pass made of the tokens before, so in decoding each has keys and values of its own.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from latentjax.models.cache import KeyValueCache, OptionalCache
from latentjax.models.embedding import Vocabulary
from latentjax.models.layers import shard_activation
from latentjax.recurrence.base import Prefilled, Recurrence, prefilled_at_once


@dataclasses.dataclass(frozen=True)
class Ponder(Recurrence):
    """N pondering steps.

    Attributes:
      num_steps: N >= 1 (N = 0 is `Vanilla`).
      scale_embeddings: multiply embeddings by sqrt(D).
      chunk_tokens: tokens per sequence whose probabilities over the vocabulary are held at once; 0: all.
    """

    num_steps: int
    scale_embeddings: bool
    chunk_tokens: int

    slots_per_token: ClassVar[int] = 1
    uses_jacobi_iterations: ClassVar[bool] = False

    @property
    def passes_per_slot(self) -> int:
        """N + 1."""
        return self.num_steps + 1

    @property
    def vocabulary_products(self) -> int:
        """Two a step: the head, and the mean of embeddings."""
        return 2 * self.num_steps

    def embedding_scale(self, hidden_size: int) -> float:
        """sqrt(D)."""
        return hidden_size**0.5 if self.scale_embeddings else 1.0

    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """N + 1, over one slot."""
        return (1,) * self.passes_per_slot

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
        """N steps as one scan, and the pass that the head reads."""
        hidden_BTD, _ = self._run(backbone, x_BTD, positions_BT, segment_ids_BT, None, vocabulary)
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
        """One slot, N + 1 times."""
        segment_ids_B1 = None if segment_id_B is None else segment_id_B[:, None]
        hidden_B1D, cache = self._run(backbone, x_BD[:, None], position_B[:, None], segment_ids_B1, cache, vocabulary)
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
        """All tokens at once, N + 1 times."""
        cache = cache.replace(is_prefill=True)
        hidden_BTD, cache = self._run(backbone, x_BTD, positions_BT, segment_ids_BT, cache, vocabulary)
        return prefilled_at_once(hidden_BTD[:, -1], cache.replace(is_prefill=False))

    def _run(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: OptionalCache,
        vocabulary: Vocabulary,
    ) -> tuple[jax.Array, OptionalCache]:
        """The passes, with a cache or without; hidden states (B, T, D)."""
        ids = positions_BT, segment_ids_BT

        def ponder(backbone: nn.Module, carry: tuple, _: None) -> tuple[tuple, None]:
            x_BTD, cache = carry
            hidden_BTD, cache = backbone(x_BTD, *ids, cache)
            x_BTD = x_BTD + vocabulary.expected_embedding(hidden_BTD, chunk_tokens=self.chunk_tokens)
            return (shard_activation(x_BTD, "batch", "slots", None), cache), None

        if backbone.spec.separates:  # see `KeyValueCache.first_array`
            for _ in range(self.num_steps):
                (x_BTD, cache), _ = ponder(backbone, (x_BTD, cache), None)
            return backbone(x_BTD, *ids, cache)
        scanned = nn.scan(
            ponder,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.num_steps,
            unroll=self.num_steps if backbone.spec.unrolls else 1,
        )
        (x_BTD, cache), _ = scanned(backbone, (x_BTD, cache), None)
        return backbone(x_BTD, *ids, cache)
