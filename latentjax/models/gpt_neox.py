"""The GPT-NeoX block (Pythia): biases, partial rotary, LayerNorm, GELU; parallel or sequential residual."""

import flax.linen as nn
import jax

from latentjax.models.attention import self_attention
from latentjax.models.cache import KeyValueCache
from latentjax.models.layers import Linear, layer_norm, shard_activation
from latentjax.models.spec import ModelSpec

final_norm = layer_norm


class GPTNeoXBlock(nn.Module):
    """One layer.

    Attributes:
      slots_per_token: C + 1; the matrices that write to the residual stream start smaller by sqrt(2 N (C + 1)).
    """

    spec: ModelSpec
    slots_per_token: int

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BS: jax.Array | None,
        cache: KeyValueCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KeyValueCache | None]:
        """Returns the layer's output (B, S, D) and the cache with this layer written."""
        spec = self.spec
        divisor = (2 * spec.num_layers * self.slots_per_token) ** 0.5

        normed_BSD = layer_norm(spec, "input_norm")(x_BSD)
        # One matrix for all three, laid out (3, H, K) so that each comes out contiguous and heads shard evenly.
        features, axes = (3, spec.num_heads, spec.head_dim), ("embed", None, "heads", "head_dim")
        qkv = Linear(spec, features, axes, use_bias=True, name="query_key_value")(normed_BSD)
        qkv = shard_activation(qkv, "batch", "slots", None, "act_heads", None)
        attended_BSHK, cache = self_attention(
            *(qkv[:, :, i] for i in range(3)),
            backend=spec.attention,
            angles=angles,
            segment_ids_BS=segment_ids_BS,
            cache=cache,
            layer=layer,
        )
        width = (spec.hidden_size,)
        attention_BSD = Linear(
            spec, width, ("heads", "head_dim", "embed"), use_bias=True, init_divisor=divisor, name="attention_out"
        )(attended_BSHK)

        if not spec.parallel_residual:
            x_BSD = x_BSD + attention_BSD
        normed_BSD = layer_norm(spec, "mlp_norm")(x_BSD)
        inner_BSF = Linear(spec, (spec.intermediate_size,), ("embed", "mlp"), use_bias=True, name="mlp_in")(normed_BSD)
        inner_BSF = shard_activation(nn.gelu(inner_BSF, approximate=False), "batch", "slots", "act_mlp")
        mlp_BSD = Linear(spec, width, ("mlp", "embed"), use_bias=True, init_divisor=divisor, name="mlp_out")(inner_BSF)
        if spec.parallel_residual:
            mlp_BSD = mlp_BSD + attention_BSD
        return shard_activation(x_BSD + mlp_BSD, "batch", "slots", None), cache
