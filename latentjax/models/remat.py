"""Named policies for what the backward pass recomputes instead of keeping."""

from collections.abc import Callable

import flax.linen as nn
import jax

# What each policy keeps of a layer for the backward pass, besides the layer's input.
POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything: no recomputation
    "keep_matmul_outputs": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # recompute attention, norms, GELU
    "keep_layer_inputs": jax.checkpoint_policies.nothing_saveable,  # recompute the whole layer
}


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wraps a block class, to be scanned over layers, by the named policy.

    Raises:
      KeyError: not a key of POLICIES (the config is validated before a model is built).
    """
    if POLICIES[policy] is None:
        return block
    # The scan around the block already keeps XLA from merging forward and backward computations.
    return nn.remat(block, policy=POLICIES[policy], prevent_cse=False)
