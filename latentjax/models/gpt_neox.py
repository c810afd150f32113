"""The GPT-NeoX block (Pythia): biases, partial rotary, LayerNorm, GELU; parallel or sequential residual."""

from functools import partial

import flax.linen as nn
import jax

from latentjax.models.attention import self_attention, wanted_queries
from latentjax.models.beside import Beside, KeysAndValues
from latentjax.models.cache import KeyValueCache
from latentjax.models.layers import Linear, layer_norm, shard_activation
from latentjax.models.remat import name_layer_input
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.models.spec import ModelSpec

final_norm = layer_norm


class GPTNeoXBlock(nn.Module):
    """One layer.

    Attributes:
      forwards_per_token: C + 1; the matrices that write to the residual stream start smaller by sqrt(2 N (C + 1)).
      kept: the slots whose outputs are computed; keys and values are, for all.
    """

    spec: ModelSpec
    forwards_per_token: int
    kept: SlotRange = ALL_SLOTS

    activation = staticmethod(partial(nn.gelu, approximate=False))

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP read the same input."""
        return self.spec.parallel_residual

    @property
    def residual_divisor(self) -> float:
        """sqrt(2 N (C + 1))."""
        return (2 * self.spec.num_layers * self.forwards_per_token) ** 0.5

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
        divisor = self.residual_divisor
        x_BSD = name_layer_input(x_BSD)

        normed_BSD = layer_norm(spec, "input_norm")(x_BSD)
        # One matrix for all three, laid out (3, H, K) so that each comes out contiguous and heads shard evenly.
        features, axes = (3, spec.num_heads, spec.head_dim), ("embed", None, "heads", "head_dim")
        matrix = Linear(spec, features, axes, use_bias=True, name="query_key_value")

        def project(normed: jax.Array, part: slice) -> tuple[jax.Array, ...]:
            heads = shard_activation(matrix(normed, part), "batch", "slots", None, "act_heads", None)
            return tuple(heads[:, :, i] for i in range(heads.shape[2]))

        queried = wanted_queries(spec.attention, kept)
        if queried.is_all:
            q_BQHK, k_BSHK, v_BSHK = project(normed_BSD, slice(0, 3))
        else:
            (q_BQHK,) = project(queried.take(normed_BSD), slice(0, 1))
            k_BSHK, v_BSHK = project(normed_BSD, slice(1, 3))
        attended_BQHK, written = self_attention(
            q_BQHK,
            k_BSHK,
            v_BSHK,
            backend=spec.attention,
            angles=angles,
            segment_ids_BS=segment_ids_BS,
            cache=cache,
            layer=layer,
            queried=queried,
            kept=kept,
        )
        x_BQD = kept.take(x_BSD)
        width = (spec.hidden_size,)
        attention_BQD = Linear(
            spec, width, ("heads", "head_dim", "embed"), use_bias=True, init_divisor=divisor, name="attention_out"
        )(attended_BQHK)

        if not self.is_parallel:
            x_BQD = x_BQD + attention_BQD
        normed_BQD = layer_norm(spec, "mlp_norm")(x_BQD)
        inner_BQF = Linear(spec, (spec.intermediate_size,), ("embed", "mlp"), use_bias=True, name="mlp_in")(normed_BQD)
        inner_BQF = shard_activation(self.activation(inner_BQF), "batch", "slots", "act_mlp")
        mlp_BQD = Linear(spec, width, ("mlp", "embed"), use_bias=True, init_divisor=divisor, name="mlp_out")(inner_BQF)
        if self.is_parallel:
            mlp_BQD = mlp_BQD + attention_BQD
        return shard_activation(x_BQD + mlp_BQD, "batch", "slots", None), written
