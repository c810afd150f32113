"""What every method offers, and the settings that choose one."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.cache import KeyValueCache
from latentjax.models.embedding import Vocabulary


@dataclasses.dataclass(frozen=True)
class RecurrenceSpec:
    """The `recurrence` group of the config (see `latentjax.config` for each field); hashable, so static under jit."""

    method: str
    num_latent_thoughts: int
    num_jacobi_iterations: int
    train_jacobi_iterations: tuple[int, ...]
    backprop_passes: int
    scale_embeddings: bool
    pause_token_id: int
    ponder_chunk_tokens: int
    train_schedule: tuple[tuple[float, int, tuple[int, ...]], ...]
    handover_ratio: float
    train_tolerance: float
    refinement: str


def rounding_tolerance(dtype: str) -> float:
    """The relative change of thoughts that is no more than rounding in a compute dtype: twice its epsilon.

    Below it passes change last bits only. To wait until nothing at all changes would take up to C T passes.
    """
    return 2 * float(jnp.finfo(dtype).eps)


@flax.struct.dataclass
class Prefilled:
    """What comes of a prompt.

    Attributes:
      hidden_BD: what the head reads to predict the token behind the prompt.
      cache: with all slots of the prompt.
      residual_B: float32, how much each row's thoughts changed in the last refinement pass, relatively (RMS); 0 where
        nothing was solved for.
      num_passes: int32, how many refinement passes there were.
    """

    hidden_BD: jax.Array
    cache: KeyValueCache
    residual_B: jax.Array
    num_passes: jax.Array


class Recurrence(abc.ABC):
    """A method. `backbone` is always a bound Flax module with the signature of `models.backbone.Backbone`."""

    @property
    @abc.abstractmethod
    def slots_per_token(self) -> int:
        """How many slots a token takes: C + 1, or 1 where it is the passes over it that are more."""

    @property
    def passes_per_slot(self) -> int:
        """How many passes over a slot have keys and values of their own in decoding."""
        return 1

    @property
    def forwards_per_token(self) -> int:
        """How often decoding takes a token through the layers, in slots or in passes: its cost next to vanilla's 1."""
        return self.slots_per_token * self.passes_per_slot

    @property
    @abc.abstractmethod
    def uses_jacobi_iterations(self) -> bool:
        """Whether R changes what is computed; if not, one program serves every R."""

    @abc.abstractmethod
    def embedding_scale(self, hidden_size: int) -> float:
        """The constant that token embeddings are multiplied by."""

    @abc.abstractmethod
    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """The passes of one training forward, in order: how many slots per token each feeds to the backbone."""

    def kept_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """How many slots per token of each of `passes` are read afterwards: the last layer computes no others."""
        return self.passes(num_jacobi_iterations)

    def seen_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """How many slots per token each of `passes` attends among: those it feeds, unless there are others."""
        return self.passes(num_jacobi_iterations)

    @property
    def vocabulary_products(self) -> int:
        """Products with a (D, V) matrix per token of a forward or in decoding, besides the one that makes logits."""
        return 0

    def token_forwards(self, num_jacobi_iterations: int) -> int:
        """Slots through the backbone per token in one training forward: the method's cost next to vanilla's 1."""
        return sum(self.passes(num_jacobi_iterations))

    def num_trained_passes(self, num_jacobi_iterations: int) -> int:
        """How many of `passes`, the last ones, gradients flow through."""
        return len(self.passes(num_jacobi_iterations))

    @abc.abstractmethod
    def forward(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The training forward, over all tokens at once.

        Args:
          x_BTD: scaled token embeddings.
          positions_BT: int32, B may be 1; segment_ids_BT: int32 or None.
          vocabulary: for methods that look tokens up, or read predictions on the way.
          num_jacobi_iterations: R, static.

        Returns:
          What the head reads, (B, T, D), and the thought residual of each refinement pass, float32 (R,): the relative
          RMS change of the thoughts in that pass; None where the method has no refinement passes.
        """

    def forward_settled(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
        tolerance: float,
    ) -> tuple[jax.Array, jax.Array]:
        """As `forward`, with as many refinement passes as the thoughts need, but R at most; to be differentiated.

        Args:
          vocabulary: as for `forward`.
          num_jacobi_iterations: R, static.
          tolerance: passes go on until the thoughts' relative change (RMS, over all of them) is no more than this.

        Returns:
          What the head reads, (B, T, D), and the number of refinement passes, int32.

        Raises:
          ValueError: the method has no refinement passes.
        """
        del backbone, x_BTD, positions_BT, segment_ids_BT, vocabulary, num_jacobi_iterations, tolerance
        raise ValueError(f"{type(self).__name__} has no refinement passes")

    def forward_until(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        tolerance: float,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `forward`, with as many refinement passes as the thoughts need to settle; not to be differentiated.

        Args:
          vocabulary: as for `forward`.
          tolerance: passes go on until no row's thoughts change by more than this, relatively (RMS); 0: until nothing
            changes, which is what sequential decoding computes.
          counted_BT: bool, the tokens whose thoughts count for that; None: all.

        Returns:
          What the head reads, (B, T, D); each row's last relative change, float32 (B,), 0 where a method has no
          refinement passes; and their number, int32.
        """
        del tolerance, counted_BT
        hidden_BTD, _ = self.forward(
            backbone, x_BTD, positions_BT, segment_ids_BT, vocabulary=vocabulary, num_jacobi_iterations=0
        )
        return hidden_BTD, jnp.zeros(x_BTD.shape[:1], jnp.float32), jnp.zeros((), jnp.int32)

    def forward_each(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
        read: Callable[[jax.Array], Any],
    ) -> tuple[Any, jax.Array, jax.Array]:
        """What `forward` computes for 0, 1 .. R refinement passes, at once; not to be differentiated.

        Args:
          vocabulary: as for `forward`.
          num_jacobi_iterations: R, static.
          read: from what the head reads, (B, T, D), to arrays that are to be known of it.

        Returns:
          What `read` gave, its arrays stacked as (R + 1, ...); and of refinement passes 1 .. R, for each row, the sums
          of squares of the thoughts' change and of the new thoughts: float32 (R, B) each.

        Raises:
          ValueError: the method has no refinement passes.
        """
        del backbone, x_BTD, positions_BT, segment_ids_BT, vocabulary, num_jacobi_iterations, read
        raise ValueError(f"{type(self).__name__} has no refinement passes")

    @abc.abstractmethod
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
        """Feeds one token per sequence, with its thoughts one after another: the method's exact definition.

        Args:
          x_BD: scaled token embeddings; position_B: int32 (B,); segment_id_B: int32 (B,) or None.
          cache: room for `slots_per_token` more slots, of `passes_per_slot` passes each.
          vocabulary: as in `forward`.

        Returns:
          What the head reads to predict the next token, (B, D), and the grown cache.
        """

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
        """Feeds whole prompts to an empty cache. Here: token by token, which is right for every method.

        Args:
          x_BTD: scaled token embeddings of prompts that end at T - 1; positions_BT: int32.
          segment_ids_BT: int32; rows may begin with padding, which has a segment of its own, 0.
          cache: empty, with room for T tokens.
          vocabulary: as in `forward`.
          tolerance: where thoughts are solved for together, until none of the rows' change by more than this; 0: until
            nothing changes.
        """
        del tolerance
        hidden_BTD, cache = self.decode_each(
            backbone, x_BTD, positions_BT, segment_ids_BT, cache, vocabulary=vocabulary
        )
        return prefilled_at_once(hidden_BTD[:, -1], cache)

    def decode_each(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        cache: KeyValueCache,
        *,
        vocabulary: Vocabulary,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Feeds tokens that are known one after another, as `decode` does.

        Args:
          x_BTD: scaled token embeddings; positions_BT: int32, B may be 1; segment_ids_BT: int32 or None.
          cache: with room for T more tokens.
          vocabulary: as in `forward`.

        Returns:
          What the head reads behind each token, (B, T, D), and the grown cache.
        """
        positions_BT = jnp.broadcast_to(positions_BT, x_BTD.shape[:2])

        def feed(backbone: nn.Module, cache: KeyValueCache, token: tuple) -> tuple[KeyValueCache, jax.Array]:
            x_BD, position_B, segment_id_B = token
            hidden_BD, cache = self.decode(backbone, x_BD, position_B, segment_id_B, cache, vocabulary=vocabulary)
            return cache, hidden_BD

        scanned = nn.scan(feed, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        cache, hidden_BTD = scanned(backbone, cache, (x_BTD, positions_BT, segment_ids_BT))
        return hidden_BTD, cache


def prefilled_at_once(hidden_BD: jax.Array, cache: KeyValueCache) -> Prefilled:
    """What comes of a prompt by a method that has nothing to refine."""
    residual_B = jnp.zeros(hidden_BD.shape[:1], jnp.float32)
    return Prefilled(hidden_BD, cache, residual_B, jnp.zeros((), jnp.int32))
