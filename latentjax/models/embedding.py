"""Token embedding, learned positions and language-model head."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from latentjax.models.layers import matrix_init, shard_activation
from latentjax.models.spec import ModelSpec
from latentjax.models.token_chunks import join_tokens, num_chunks, split_tokens


@flax.struct.dataclass
class Vocabulary:
    """Both ways between token ids and vectors, as arrays: loops may close over these, but not over modules.

    Attributes:
      table_VD: float32 embeddings; scale: what they are multiplied by before they enter a backbone.
      head_DV: float32 matrix of the head, which lies as (V, D) where `head_by_output` is true.
      dtype: the compute dtype.
    """

    table_VD: jax.Array
    head_DV: jax.Array
    scale: float = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    head_by_output: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def size(self) -> int:
        """V."""
        return self.table_VD.shape[0]

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Looks up int token ids: scaled embeddings (B, T, D) in the compute dtype."""
        x_BTD = jnp.take(_whole_rows(self.table_VD), tokens_BT, axis=0) * self.scale
        return shard_activation(x_BTD.astype(self.dtype), "batch", "slots", None)

    def embedding_of(self, token: int) -> jax.Array:
        """The scaled embedding of one token, (D,) in the compute dtype; -1 is the last of the vocabulary."""
        return (self.table_VD[token] * self.scale).astype(self.dtype)

    def logits(self, h_BTD: jax.Array) -> jax.Array:
        """The head: float32 logits (..., T, V); operands in the compute dtype, sums in float32."""
        h_BTD, head_DV = h_BTD.astype(self.dtype), self.head_DV.astype(self.dtype)
        if self.head_by_output:
            contracted = ((1,), (h_BTD.ndim - 1,))
            logits = jax.lax.dot_general(head_DV, h_BTD, (contracted, ((), ())), preferred_element_type=jnp.float32)
            return jnp.moveaxis(logits, 0, -1)
        logits_BTV = jnp.einsum("...D,DV->...V", h_BTD, head_DV, preferred_element_type=jnp.float32)
        return shard_activation(logits_BTV, *["batch", "slots"][: logits_BTV.ndim - 1], "act_vocab")

    def expected_embedding(self, h_BTD: jax.Array, *, chunk_tokens: int) -> jax.Array:
        """The mean scaled embedding under the head's distribution: softmax(logits(h)) @ (scale * table).

        Args:
          h_BTD: hidden states.
          chunk_tokens: tokens per sequence whose probabilities are held at once, 0: all. The backward pass recomputes
            them.

        Returns:
          (B, T, D) in the compute dtype; probabilities are float32 and rounded to that for the product.
        """

        @jax.checkpoint
        def expect(h_BtD: jax.Array, vocabulary: "Vocabulary") -> jax.Array:
            probabilities_BtV = jax.nn.softmax(vocabulary.logits(h_BtD), axis=-1).astype(self.dtype)
            table_VD = _whole_rows(vocabulary.table_VD).astype(self.dtype)
            x_BtD = jnp.einsum("BtV,VD->BtD", probabilities_BtV, table_VD, preferred_element_type=jnp.float32)
            return shard_activation((x_BtD * self.scale).astype(self.dtype), "batch", "slots", None)

        num_tokens = h_BTD.shape[1]
        chunks = num_chunks(num_tokens, chunk_tokens)
        if chunks == 1:
            return expect(h_BTD, self)
        return join_tokens(jax.lax.map(lambda h_BtD: expect(h_BtD, self), split_tokens(h_BTD, chunks)), num_tokens)


def _whole_rows(table_VD: jax.Array) -> jax.Array:
    """Gathers whole rows: were they split along D, all devices would look up every token."""
    return shard_activation(table_VD, "act_vocab", None)


class Embedding(nn.Module):
    """The float32 table of token embeddings."""

    spec: ModelSpec

    def setup(self) -> None:
        spec = self.spec
        init: Any = nn.with_logical_partitioning(matrix_init(spec), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (spec.vocab_size, spec.hidden_size), jnp.float32)

    def __call__(self) -> jax.Array:
        """Returns the table, (V, D)."""
        return self.embedding


class PositionEmbedding(nn.Module):
    """Learned positions (GPT-2): rows of a (P, D) float32 table, P = `max_position_embeddings`, added to every slot."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Returns x_BSD and the rows of its slots' position ids, int32 (B or 1, S), in the dtype of x_BSD.

        A position that the table does not have gives NaN.
        """
        spec = self.spec
        init: Any = nn.with_logical_partitioning(matrix_init(spec), ("position", "embed"))
        table_PD = self.param("embedding", init, (spec.max_position_embeddings, spec.hidden_size), jnp.float32)
        table_PD = shard_activation(table_PD, None, None)  # whole rows, as in `Embedding`
        return x_BSD + jnp.take(table_PD, positions_BS, axis=0).astype(x_BSD.dtype)


class Head(nn.Module):
    """The float32 matrix that makes logits of hidden states; a tied model has none of its own."""

    spec: ModelSpec

    def setup(self) -> None:
        spec = self.spec
        shape, axes = (spec.hidden_size, spec.vocab_size), ("embed", "vocab")
        if spec.separates:
            shape, axes = shape[::-1], axes[::-1]
        init: Any = nn.with_logical_partitioning(matrix_init(spec), axes)
        self.kernel = self.param("kernel", init, shape, jnp.float32)

    def __call__(self) -> jax.Array:
        """Returns the matrix, (D, V), or (V, D) where `ModelSpec.separates`."""
        return self.kernel
