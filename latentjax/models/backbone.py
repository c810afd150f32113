"""The backbone f: the whole stack of layers and the final norm.

All layers but the last are scanned, so that one is traced for all of them (unless `ModelSpec.separates`). The last
stands alone: often a part of its outputs is thrown away, and then only its keys and values are computed for all slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models import gpt2, gpt_neox, llama
from latentjax.models.beside import Beside, KeysAndValues, PlaceKeys
from latentjax.models.cache import KeyValueCache
from latentjax.models.embedding import PositionEmbedding
from latentjax.models.layers import shard_activation
from latentjax.models.remat import POLICIES, rematerialised
from latentjax.models.rotary import rotary_angles
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a backbone is made of.

    Attributes:
      block: one layer.
      final_norm: from the model's settings and a name.
      learns_positions: embeddings of position ids are added to the input of every pass, thoughts included.
    """

    block: type[nn.Module]
    final_norm: Callable[[ModelSpec, str], nn.Module]
    learns_positions: bool = False


ARCHITECTURES = {
    "gpt_neox": Architecture(gpt_neox.GPTNeoXBlock, gpt_neox.final_norm),
    "llama": Architecture(llama.LlamaBlock, llama.final_norm),
    "gpt2": Architecture(gpt2.GPT2Block, gpt2.final_norm, learns_positions=True),
}


class Backbone(nn.Module):
    """Embeddings in, hidden states out.

    Attributes:
      spec: the model.
      forwards_per_token: how often a token goes through the layers in decoding (C + 1), in slots or in passes; enters
        the initialisation alone.
    """

    spec: ModelSpec
    forwards_per_token: int

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        segment_ids_BS: jax.Array | None = None,
        cache: KeyValueCache | Beside | None = None,
        kept: SlotRange = ALL_SLOTS,
        begins: bool = True,
        ends: bool = True,
    ) -> tuple[jax.Array, KeyValueCache | PlaceKeys | None]:
        """Applies all layers and the final norm: one pass.

        Several calls can make up one long pass over the same residual stream, with shared layers: the first of them
        `begins` it, the last `ends` it.

        Args:
          x_BSD: input embeddings (of tokens, or latent thoughts), any float dtype.
          positions_BS: int32 position ids, of which B may be 1: shared by the batch.
          segment_ids_BS: int32, slots attend within their segment only; None: one segment.
          cache: keys and values of the slots before these; None: there are none before, and none are kept. Or those of
            other slots of the same tokens: then one slot of each is fed, and all of these are kept.
          kept: the slots whose hidden states are asked for; the others' are not computed in the last layer.
          begins: x_BSD enters from outside, so learned positions are added; else it is what a call that does not end
            its pass has returned.
          ends: the final norm is applied.

        Returns:
          Hidden states (B, Q, D) of the Q kept slots in the compute dtype, after the final norm where the pass ends,
          and the cache with all S slots added; beside other slots, the keys and values of those that were fed.
        """
        num_slots = x_BSD.shape[1]
        if isinstance(cache, KeyValueCache):
            if segment_ids_BS is None:
                segment_ids_BS = jnp.zeros(x_BSD.shape[:2], jnp.int32)
            cache = cache.write_segments(segment_ids_BS)
        stack = _apply_stack
        if POLICIES[self.spec.remat].keeps_pass_inputs_only:
            stack = nn.remat(_apply_stack, policy=jax.checkpoint_policies.nothing_saveable, static_argnums=(5, 6, 7))
        x_BSD = x_BSD.astype(self.spec.compute_dtype)
        hidden_BQD, written = stack(self, x_BSD, positions_BS, segment_ids_BS, cache, kept, begins, ends)
        if isinstance(written, KeyValueCache):
            written = written.advance(self.spec.num_layers, num_slots)
        return hidden_BQD, written


def _apply_stack(
    backbone: Backbone,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segment_ids_BS: jax.Array | None,
    cache: KeyValueCache | Beside | None,
    kept: SlotRange,
    begins: bool,
    ends: bool,
) -> tuple[jax.Array, KeyValueCache | PlaceKeys | None]:
    """The layers and the norm, in the scope of `backbone`; arguments and results as in `Backbone.__call__`."""
    spec, forwards_per_token = backbone.spec, backbone.forwards_per_token
    architecture = ARCHITECTURES[spec.architecture]
    block = architecture.block
    if architecture.learns_positions and begins:
        x_BSD = PositionEmbedding(spec, name="position_embedding")(x_BSD, positions_BS)
    x_BSD = shard_activation(x_BSD, "batch", "slots", None)
    angles = rotary_angles(positions_BS, spec.rotary_dims, spec.rope_theta)
    num_scanned, own_keys = spec.num_layers - 1, None
    beside = cache if isinstance(cache, Beside) else None

    def apply_layer(layer_module: nn.Module, carry: tuple, layer: jax.Array) -> tuple[Any, None]:
        x_BSD, cache = carry
        return layer_module(x_BSD, angles, segment_ids_BS, cache, layer), None

    def apply_beside(layer_module: nn.Module, x_BSD: jax.Array, layer: tuple) -> tuple[jax.Array, KeysAndValues]:
        return layer_module(x_BSD, angles, segment_ids_BS, layer[1], layer[0])

    if spec.separates:
        for index in range(num_scanned):
            layer_module = block(spec, forwards_per_token, name=f"layer_{index}")
            x_BSD, cache = layer_module(x_BSD, angles, segment_ids_BS, cache, index)
    elif num_scanned:
        # A loop keeps XLA from merging the forward computation with its repetition in the backward pass.
        layers = rematerialised(block, spec.remat, in_loop=not spec.unrolls)(spec, forwards_per_token, name="layers")
        body: Callable[..., Any] = apply_layer if beside is None else apply_beside
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=num_scanned,
            unroll=num_scanned if spec.unrolls else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if beside is None:
            (x_BSD, cache), _ = scanned(layers, (x_BSD, cache), jnp.arange(num_scanned))
        else:
            x_BSD, own_keys = scanned(layers, x_BSD, (jnp.arange(num_scanned), beside.stacked))
    if beside is not None:
        cache = beside.of_last_layer
    last_layer = rematerialised(block, spec.remat, in_loop=False)(spec, forwards_per_token, kept, name="last_layer")
    x_BQD, written = last_layer(x_BSD, angles, segment_ids_BS, cache, num_scanned)
    if ends:
        x_BQD = architecture.final_norm(spec, "final_norm")(x_BQD)
    return x_BQD, written if beside is None else PlaceKeys(own_keys, written)
