"""Token embedding, learned positions and language-model head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.layers import matrix_init, shard_activation
from latentjax.models.spec import ModelSpec


class Embedding(nn.Module):
    """Rows of a (V, D) float32 table, multiplied by a constant.

    Attributes:
      scale: the constant; the recurrence chooses it so that tokens and thoughts have the same size.
    """

    spec: ModelSpec
    scale: float

    def setup(self) -> None:
        spec = self.spec
        init = nn.with_logical_partitioning(matrix_init(spec), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (spec.vocab_size, spec.hidden_size), jnp.float32)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns (B, T, D) in the compute dtype for int token ids."""
        # Whole rows are gathered for the lookup: were they split along D, all devices would look up every token.
        table_VD = shard_activation(self.embedding, "act_vocab", None)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0) * self.scale
        return shard_activation(x_BTD.astype(self.spec.compute_dtype), "batch", "slots", None)

    def transposed(self) -> jax.Array:
        """The (D, V) matrix of a tied head."""
        return self.embedding.T


class PositionEmbedding(nn.Module):
    """Learned positions (GPT-2): rows of a (P, D) float32 table, P = `max_position_embeddings`, added to every slot."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Returns x_BSD and the rows of its slots' position ids, int32 (B or 1, S), in the dtype of x_BSD.

        A position that the table does not have gives NaN.
        """
        spec = self.spec
        init = nn.with_logical_partitioning(matrix_init(spec), ("position", "embed"))
        table_PD = self.param("embedding", init, (spec.max_position_embeddings, spec.hidden_size), jnp.float32)
        table_PD = shard_activation(table_PD, None, None)  # whole rows, as in `Embedding`
        return x_BSD + jnp.take(table_PD, positions_BS, axis=0).astype(x_BSD.dtype)


class Head(nn.Module):
    """From hidden states to float32 logits, by its own matrix or a tied one."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, h_BTD: jax.Array, tied_DV: jax.Array | None) -> jax.Array:
        """Returns (..., T, V) float32 logits: operands in the compute dtype, sums in float32."""
        spec = self.spec
        kernel_DV = tied_DV
        if kernel_DV is None:
            init = nn.with_logical_partitioning(matrix_init(spec), ("embed", "vocab"))
            kernel_DV = self.param("kernel", init, (spec.hidden_size, spec.vocab_size), jnp.float32)
        logits = jnp.einsum(
            "...D,DV->...V",
            h_BTD.astype(spec.compute_dtype),
            kernel_DV.astype(spec.compute_dtype),
            preferred_element_type=jnp.float32,
        )
        return shard_activation(logits, *["batch", "slots"][: logits.ndim - 1], "act_vocab")
