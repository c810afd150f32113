"""The backbone f: the whole stack of layers and the final norm, scanned so that one layer is traced once."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models import gpt_neox, llama
from latentjax.models.cache import KeyValueCache
from latentjax.models.layers import shard_activation
from latentjax.models.remat import rematerialised
from latentjax.models.rotary import rotary_angles
from latentjax.models.spec import ModelSpec

# Block and final norm of each architecture.
ARCHITECTURES = {
    "gpt_neox": (gpt_neox.GPTNeoXBlock, gpt_neox.final_norm),
    "llama": (llama.LlamaBlock, llama.final_norm),
}


class Backbone(nn.Module):
    """Embeddings in, hidden states out.

    Attributes:
      spec: the model.
      slots_per_token: how many slots share a token (C + 1); enters the initialisation alone.
    """

    spec: ModelSpec
    slots_per_token: int

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[jax.Array, KeyValueCache | None]:
        """Applies all layers and the final norm.

        Args:
          x_BSD: input embeddings (of tokens, or latent thoughts), any float dtype.
          positions_BS: int32 position ids, of which B may be 1: shared by the batch.
          segment_ids_BS: int32, slots attend within their segment only; None: one segment.
          cache: keys and values of the slots before these; None: there are none before, and none are kept.

        Returns:
          Hidden states (B, S, D) after the final norm in the compute dtype, and the cache with these slots added.
        """
        spec = self.spec
        block, final_norm = ARCHITECTURES[spec.architecture]
        x_BSD = shard_activation(x_BSD.astype(spec.compute_dtype), "batch", "slots", None)
        angles = rotary_angles(positions_BS, spec.rotary_dims, spec.rope_theta)
        if cache is not None:
            if segment_ids_BS is None:
                segment_ids_BS = jnp.zeros(x_BSD.shape[:2], jnp.int32)
            cache = cache.write_segments(segment_ids_BS)

        def apply_layer(layer_module, carry, layer):
            x_BSD, cache = carry
            return layer_module(x_BSD, angles, segment_ids_BS, cache, layer), None

        layers = rematerialised(block, spec.remat)(spec, self.slots_per_token, name="layers")
        (x_BSD, cache), _ = nn.scan(
            apply_layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=spec.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(layers, (x_BSD, cache), jnp.arange(spec.num_layers))
        if cache is not None:
            cache = cache.advance(x_BSD.shape[1])
        return final_norm(spec, "final_norm")(x_BSD), cache
