"""The static description of a model that modules carry."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from latentjax.models.loops import SEPARATE


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The `model` group of the config (see `latentjax.config` for each field); hashable, so static under jit."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rotary_fraction: float
    rope_theta: float
    parallel_residual: bool
    norm_epsilon: float
    tie_embeddings: bool
    dtype: str
    attention: str
    loops: str
    remat: str

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G: `num_kv_heads`, where 0 stands for as many as query heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def rotary_dims(self) -> int:
        """How many of a head's K dimensions are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def unrolls(self) -> bool:
        """Whether layers and passes are written out one after another in the program."""
        return self.loops in ("unrolled", SEPARATE)

    @property
    def separates(self) -> bool:
        """Whether each layer has parameters and cache of its own, and matrices lie by output."""
        return self.loops == SEPARATE

    @property
    def compute_dtype(self) -> Any:
        """The dtype of activations and matmuls."""
        return jnp.dtype(self.dtype)
