"""Named policies for what the backward pass recomputes instead of keeping."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

# What a block calls its input, for policies that move it elsewhere.
LAYER_INPUT = "layer_input"

_Saveable = Callable[..., Any]  # a bool, or where to move the value


@dataclasses.dataclass(frozen=True)
class RematPolicy:
    """What is there when the backward pass of a layer begins.

    Attributes:
      saveable: tells which values of a layer are kept besides its input; None: all of them, nothing is recomputed.
      keeps_pass_inputs_only: layers' inputs are themselves recomputed, from the input of the pass.
    """

    saveable: _Saveable | None
    keeps_pass_inputs_only: bool = False


POLICIES: dict[str, RematPolicy] = {
    # Everything is kept. The fastest, if it fits.
    "none": RematPolicy(None),
    # Products with weights are kept; attention, norms and activation functions are recomputed.
    "keep_matmul_outputs": RematPolicy(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    # One (B, S, D) per layer and pass is kept; a layer's forward is computed twice.
    "keep_layer_inputs": RematPolicy(jax.checkpoint_policies.nothing_saveable),
    # The same, but what is kept lies in the host's memory until it is needed.
    "offload_layer_inputs": RematPolicy(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    ),
    # One (B, S, D) per pass is kept, and one per layer while a pass goes backward; a layer is computed forward thrice.
    "keep_pass_inputs": RematPolicy(jax.checkpoint_policies.nothing_saveable, keeps_pass_inputs_only=True),
}


def rematerialised(block: type[nn.Module], policy: str, *, in_loop: bool) -> type[nn.Module]:
    """Wraps a block class by the named policy.

    Args:
      in_loop: the block is the body of a scan, which keeps XLA from merging the recomputation with the forward pass;
        otherwise a barrier is put in its way.

    Raises:
      KeyError: not a key of POLICIES (the config is validated before a model is built).
    """
    saveable = POLICIES[policy].saveable
    if saveable is None:
        return block
    return nn.remat(block, policy=saveable, prevent_cse=not in_loop)


def name_layer_input(x_BSD: jax.Array) -> jax.Array:
    """Marks what a block was given, so that a policy can say where it is kept."""
    return checkpoint_name(x_BSD, LAYER_INPUT)
