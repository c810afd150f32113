"""The LLaMA block: RMSNorm, rotary over the whole head, grouped queries, SwiGLU, no biases."""

import flax.linen as nn
import jax

from latentjax.models.attention import self_attention
from latentjax.models.cache import KeyValueCache
from latentjax.models.layers import Linear, rms_norm, shard_activation
from latentjax.models.spec import ModelSpec

final_norm = rms_norm


class LlamaBlock(nn.Module):
    """One layer.

    Attributes:
      slots_per_token: C + 1; unused here: LLaMA's residual matrices start smaller by sqrt(2 N), whatever C is.
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
        divisor = (2 * spec.num_layers) ** 0.5

        def project(x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
            matrix = Linear(spec, (heads, spec.head_dim), ("embed", axis, "head_dim"), use_bias=False, name=name)
            return shard_activation(matrix(x), "batch", "slots", f"act_{axis}", None)

        normed_BSD = rms_norm(spec, "input_norm")(x_BSD)
        attended_BSHK, cache = self_attention(
            project(normed_BSD, "query", spec.num_heads, "heads"),
            project(normed_BSD, "key", spec.kv_heads, "kv_heads"),
            project(normed_BSD, "value", spec.kv_heads, "kv_heads"),
            backend=spec.attention,
            angles=angles,
            segment_ids_BS=segment_ids_BS,
            cache=cache,
            layer=layer,
        )
        width, inner = (spec.hidden_size,), (spec.intermediate_size,)
        x_BSD = x_BSD + Linear(
            spec, width, ("heads", "head_dim", "embed"), use_bias=False, init_divisor=divisor, name="attention_out"
        )(attended_BSHK)

        normed_BSD = rms_norm(spec, "mlp_norm")(x_BSD)
        gate_BSF = Linear(spec, inner, ("embed", "mlp"), use_bias=False, name="mlp_gate")(normed_BSD)
        up_BSF = Linear(spec, inner, ("embed", "mlp"), use_bias=False, name="mlp_up")(normed_BSD)
        inner_BSF = shard_activation(nn.silu(gate_BSF) * up_BSF, "batch", "slots", "act_mlp")
        mlp_BSD = Linear(spec, width, ("mlp", "embed"), use_bias=False, init_divisor=divisor, name="mlp_out")(inner_BSF)
        return shard_activation(x_BSD + mlp_BSD, "batch", "slots", None), cache
