"""Shared depth: the layers are run N + 1 times over the same residual stream, and the final norm once, at the end.

    x = embeddings;   N + 1 times:  x = layers(x);   hidden = norm(x)

A token is one slot. Each run attends to what the same run made of the tokens before, so in decoding each has keys and
values of its own.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax

from latentjax.models.cache import KeyValueCache, OptionalCache
from latentjax.models.embedding import Vocabulary
from latentjax.recurrence.base import Prefilled, Recurrence, prefilled_at_once


@dataclasses.dataclass(frozen=True)
class Loop(Recurrence):
    """N more runs.

    Attributes:
      num_more_runs: N >= 1 (N = 0 is `Vanilla`).
    """

    num_more_runs: int

    slots_per_token: ClassVar[int] = 1
    uses_jacobi_iterations: ClassVar[bool] = False

    @property
    def passes_per_slot(self) -> int:
        """N + 1."""
        return self.num_more_runs + 1

    def embedding_scale(self, hidden_size: int) -> float:
        """sqrt(2.5 D), as the reference has it whatever its `scale_embeds` says."""
        return (2.5 * hidden_size) ** 0.5

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
        """All runs, the middle ones as one scan."""
        hidden_BTD, _ = self._run(backbone, x_BTD, positions_BT, segment_ids_BT, None)
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
        hidden_B1D, cache = self._run(backbone, x_BD[:, None], position_B[:, None], segment_ids_B1, cache)
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
        hidden_BTD, cache = self._run(backbone, x_BTD, positions_BT, segment_ids_BT, cache)
        return prefilled_at_once(hidden_BTD[:, -1], cache.replace(is_prefill=False))

    def _run(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: OptionalCache,
    ) -> tuple[jax.Array, OptionalCache]:
        """The runs, with a cache or without; hidden states (B, T, D)."""
        ids = positions_BT, segment_ids_BT
        carry = backbone(x_BTD, *ids, cache, ends=False)
        if (num_middle := self.num_more_runs - 1) > 0:

            def run_again(backbone: nn.Module, carry: tuple, _: None) -> tuple[tuple, None]:
                x_BTD, cache = carry
                return backbone(x_BTD, *ids, cache, begins=False, ends=False), None

            if backbone.spec.separates:  # see `KeyValueCache.first_array`
                for _ in range(num_middle):
                    carry, _ = run_again(backbone, carry, None)
                x_BTD, cache = carry
                return backbone(x_BTD, *ids, cache, begins=False)
            scanned = nn.scan(
                run_again,
                variable_broadcast="params",
                split_rngs={"params": False},
                length=num_middle,
                unroll=num_middle if backbone.spec.unrolls else 1,
            )
            carry, _ = scanned(backbone, carry, None)
        x_BTD, cache = carry
        return backbone(x_BTD, *ids, cache, begins=False)
