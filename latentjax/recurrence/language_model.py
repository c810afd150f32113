"""The whole language model: embedding, a backbone applied by a recurrence, head."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.backbone import Backbone
from latentjax.models.cache import KeyValueCache
from latentjax.models.embedding import Embedding, Head, Vocabulary
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Prefilled, Recurrence, RecurrenceSpec
from latentjax.recurrence.methods import make_recurrence, train_recurrence


class LanguageModel(nn.Module):
    """Tokens in, logits out, by any method on any architecture.

    Attributes:
      spec: the model.
      recurrence_spec: the method and its settings.
    """

    spec: ModelSpec
    recurrence_spec: RecurrenceSpec

    if TYPE_CHECKING:

        def apply(self, variables: Any, *arguments: Any, **settings: Any) -> Any:
            """As Flax's, whose types say only that a method may return variables beside what it computes."""

    def setup(self) -> None:
        recurrence = make_recurrence(self.recurrence_spec)
        self.recurrence = recurrence
        self.embedding = Embedding(self.spec)
        self.backbone = Backbone(self.spec, recurrence.forwards_per_token)
        self.head = Head(self.spec)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        num_jacobi_iterations: int | None = None,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits (B, T, V) float32; row t predicts token t + 1.

        Args:
          tokens_BT: int token ids.
          num_jacobi_iterations: R, static; None: the model's own (`recurrence.num_jacobi_iterations`).
          positions_BT, segment_ids_BT: int32, for packed documents; None: 0 .. T - 1 and one segment.
        """
        hidden_BTD, _ = self.hidden(
            tokens_BT,
            num_jacobi_iterations=num_jacobi_iterations,
            positions_BT=positions_BT,
            segment_ids_BT=segment_ids_BT,
        )
        return self.logits(hidden_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        num_jacobi_iterations: int | None = None,
        num_latent_thoughts: int | None = None,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """What the head reads, (B, T, D), and the thought residuals (R,) or None; arguments as in `__call__`.

        Args:
          num_latent_thoughts: C of a training step, static, in the form that training has; None: as in evaluation, and
            the model's own.
        """
        if num_jacobi_iterations is None:
            num_jacobi_iterations = self.recurrence_spec.num_jacobi_iterations
        vocabulary, x_BTD, positions_BT = self._fed(tokens_BT, positions_BT)
        if self.is_initializing():
            # Parameters are the backbone's: one plain pass makes them all, whatever the method does with it.
            return self.backbone(x_BTD, positions_BT, segment_ids_BT)[0], None
        recurrence = self.recurrence
        if num_latent_thoughts is not None:
            recurrence = train_recurrence(self.recurrence_spec, num_latent_thoughts)
        return recurrence.forward(
            self.backbone,
            x_BTD,
            positions_BT,
            segment_ids_BT,
            vocabulary=vocabulary,
            num_jacobi_iterations=num_jacobi_iterations,
        )

    def hidden_settled(
        self,
        tokens_BT: jax.Array,
        *,
        num_jacobi_iterations: int,
        num_latent_thoughts: int,
        tolerance: float,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `hidden`, with as many refinement passes as the thoughts need to settle; see `Recurrence.forward_settled`.

        Returns:
          (B, T, D), and the number of refinement passes, int32.
        """
        vocabulary, x_BTD, positions_BT = self._fed(tokens_BT, positions_BT)
        return train_recurrence(self.recurrence_spec, num_latent_thoughts).forward_settled(
            self.backbone,
            x_BTD,
            positions_BT,
            segment_ids_BT,
            vocabulary=vocabulary,
            num_jacobi_iterations=num_jacobi_iterations,
            tolerance=tolerance,
        )

    def _fed(self, tokens_BT: jax.Array, positions_BT: jax.Array | None) -> tuple[Vocabulary, jax.Array, jax.Array]:
        """What every method is given of tokens: the vocabulary, their embeddings, and positions, 0 .. T - 1 if None."""
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        vocabulary = self.vocabulary()
        return vocabulary, vocabulary.embed(tokens_BT), positions_BT

    def vocabulary(self) -> Vocabulary:
        """The ways between token ids and vectors, as the method scales them."""
        table_VD, spec = self.embedding(), self.spec
        return Vocabulary(
            table_VD=table_VD,
            head_DV=self._tied_head(table_VD) if spec.tie_embeddings else self.head(),
            scale=self.recurrence.embedding_scale(spec.hidden_size),
            dtype=spec.compute_dtype,
            head_by_output=spec.separates,
        )

    def _tied_head(self, table_VD: jax.Array) -> jax.Array:
        return table_VD if self.spec.separates else table_VD.T

    def hidden_until(
        self,
        tokens_BT: jax.Array,
        *,
        tolerance: float,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `hidden`, with as many passes as the thoughts need to settle; see `Recurrence.forward_until`.

        Returns:
          (B, T, D), each row's thought residual (B,), and the number of refinement passes, int32.
        """
        vocabulary, x_BTD, positions_BT = self._fed(tokens_BT, positions_BT)
        return self.recurrence.forward_until(
            self.backbone,
            x_BTD,
            positions_BT,
            segment_ids_BT,
            vocabulary=vocabulary,
            tolerance=tolerance,
            counted_BT=counted_BT,
        )

    def hidden_each(
        self,
        tokens_BT: jax.Array,
        *,
        num_jacobi_iterations: int,
        read: Callable[[jax.Array], Any],
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """What `hidden` gives for 0, 1 .. R refinement passes, at once; see `Recurrence.forward_each`.

        Returns:
          What `read` gave of each, stacked as (R + 1, ...); and the squares of the thoughts' changes and sizes, (R, B).
        """
        vocabulary, x_BTD, positions_BT = self._fed(tokens_BT, positions_BT)
        return self.recurrence.forward_each(
            self.backbone,
            x_BTD,
            positions_BT,
            segment_ids_BT,
            vocabulary=vocabulary,
            num_jacobi_iterations=num_jacobi_iterations,
            read=read,
        )

    def hidden_decoded(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads in sequential decoding of these tokens, (B, T, D); arguments as in `__call__`."""
        vocabulary, x_BTD, positions_BT = self._fed(tokens_BT, positions_BT)
        hidden_BTD, _ = self.recurrence.decode_each(
            self.backbone,
            x_BTD,
            positions_BT,
            segment_ids_BT,
            self.empty_cache(*tokens_BT.shape),
            vocabulary=vocabulary,
        )
        return hidden_BTD

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """The head: (..., T, D) to float32 (..., T, V)."""
        return self.vocabulary().logits(hidden_BTD)

    def decode(
        self,
        token_B: jax.Array,
        position_B: jax.Array,
        cache: KeyValueCache,
        segment_id_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Feeds one token per sequence and returns the logits of the next, float32 (B, V), with the grown cache."""
        vocabulary = self.vocabulary()
        x_BD = vocabulary.embed(token_B[:, None])[:, 0]
        hidden_BD, cache = self.recurrence.decode(
            self.backbone, x_BD, position_B, segment_id_B, cache, vocabulary=vocabulary
        )
        return vocabulary.logits(hidden_BD[:, None])[:, 0], cache

    def prefill(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KeyValueCache,
        *,
        tolerance: jax.Array | float = 0.0,
        token_by_token: bool = False,
    ) -> tuple[jax.Array, Prefilled]:
        """Feeds whole prompts to an empty cache, see `Recurrence.prefill`.

        Args:
          token_by_token: as decoding does it, whatever the method offers besides.

        Returns:
          The logits of the token behind each prompt, float32 (B, V), and what else came of it.
        """
        vocabulary = self.vocabulary()
        prefill = partial(Recurrence.prefill, self.recurrence) if token_by_token else self.recurrence.prefill
        prefilled = prefill(
            self.backbone,
            vocabulary.embed(tokens_BT),
            positions_BT,
            segment_ids_BT,
            cache,
            vocabulary=vocabulary,
            tolerance=tolerance,
        )
        return vocabulary.logits(prefilled.hidden_BD[:, None])[:, 0], prefilled

    def empty_cache(self, batch_size: int, num_tokens: int) -> KeyValueCache:
        """A cache with room for `num_tokens` tokens and their thoughts."""
        passes = make_recurrence(self.recurrence_spec).passes_per_slot
        return KeyValueCache.empty(self.spec, batch_size, self.cache_slots(num_tokens), passes)

    def cache_slots(self, num_tokens: int) -> int:
        """The capacity of a cache with room for `num_tokens` tokens."""
        return num_tokens * make_recurrence(self.recurrence_spec).slots_per_token
