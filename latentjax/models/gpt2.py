"""The GPT-2 block: biases, LayerNorm, GELU by its tanh form, sequential residual, no rotary.

Positions are learned: `models.embedding.PositionEmbedding` adds theirs to whatever enters the backbone.
"""

from functools import partial

import flax.linen as nn

from latentjax.models.gpt_neox import GPTNeoXBlock
from latentjax.models.layers import layer_norm

final_norm = layer_norm


class GPT2Block(GPTNeoXBlock):
    """One layer: GPT-NeoX's, with another activation and start, and attention and MLP one after the other.

    Attributes:
      forwards_per_token: C + 1; unused here: as in GPT-2 itself, the matrices that write to the residual stream start
        smaller by sqrt(2 N), whatever C is.
    """

    activation = staticmethod(partial(nn.gelu, approximate=True))

    @property
    def is_parallel(self) -> bool:
        """Never, whatever `model.parallel_residual` says: that is GPT-NeoX's."""
        return False

    @property
    def residual_divisor(self) -> float:
        """sqrt(2 N)."""
        return (2 * self.spec.num_layers) ** 0.5
