"""The LLaMA block: RMSNorm, rotary over the whole head, grouped queries, SwiGLU, no biases."""

import flax.linen as nn
import jax

from latentjax.models.attention import self_attention, wanted_queries
from latentjax.models.beside import Beside, KeysAndValues
from latentjax.models.cache import KeyValueCache
from latentjax.models.layers import Linear, rms_norm, shard_activation
from latentjax.models.remat import name_layer_input
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.models.spec import ModelSpec

final_norm = rms_norm


class LlamaBlock(nn.Module):
    """One layer.

    Attributes:
      forwards_per_token: C + 1; unused here: LLaMA's residual matrices start smaller by sqrt(2 N), whatever C is.
      kept: the slots whose outputs are computed; keys and values are, for all.
    """

    spec: ModelSpec
    forwards_per_token: int
    kept: SlotRange = ALL_SLOTS

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        segment_ids_BS: jax.Array | None,
        cache: KeyValueCache | Beside | None,
        layer: jax.Array | int,
    ) -> tuple[jax.Array, KeyValueCache | KeysAndValues | None]:
        """Returns the layer's output (B, Q, D) for the kept slots and the cache as `self_attention` gives it back."""
        spec, kept = self.spec, self.kept
        divisor = (2 * spec.num_layers) ** 0.5
        x_BSD = name_layer_input(x_BSD)

        def project(x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
            matrix = Linear(spec, (heads, spec.head_dim), ("embed", axis, "head_dim"), use_bias=False, name=name)
            return shard_activation(matrix(x), "batch", "slots", f"act_{axis}", None)

        normed_BSD = rms_norm(spec, "input_norm")(x_BSD)
        queried = wanted_queries(spec.attention, kept)
        attended_BQHK, written = self_attention(
            project(queried.take(normed_BSD), "query", spec.num_heads, "heads"),
            project(normed_BSD, "key", spec.kv_heads, "kv_heads"),
            project(normed_BSD, "value", spec.kv_heads, "kv_heads"),
            backend=spec.attention,
            angles=angles,
            segment_ids_BS=segment_ids_BS,
            cache=cache,
            layer=layer,
            queried=queried,
            kept=kept,
        )
        width, inner = (spec.hidden_size,), (spec.intermediate_size,)
        x_BQD = kept.take(x_BSD) + Linear(
            spec, width, ("heads", "head_dim", "embed"), use_bias=False, init_divisor=divisor, name="attention_out"
        )(attended_BQHK)

        normed_BQD = rms_norm(spec, "mlp_norm")(x_BQD)
        gate_BQF = Linear(spec, inner, ("embed", "mlp"), use_bias=False, name="mlp_gate")(normed_BQD)
        up_BQF = Linear(spec, inner, ("embed", "mlp"), use_bias=False, name="mlp_up")(normed_BQD)
        inner_BQF = shard_activation(nn.silu(gate_BQF) * up_BQF, "batch", "slots", "act_mlp")
        mlp_BQD = Linear(spec, width, ("mlp", "embed"), use_bias=False, init_divisor=divisor, name="mlp_out")(inner_BQF)
        return shard_activation(x_BQD + mlp_BQD, "batch", "slots", None), written
