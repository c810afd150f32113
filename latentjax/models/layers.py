"""Matrices and norms as the blocks use them: float32, with logical axis names and the reference's initialisation."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec


def matrix_init(spec: ModelSpec, divisor: float = 1.0) -> nn.initializers.Initializer:
    """The reference's initialiser: normal with std sqrt(2 / (5 D)) / divisor, cut at 3 std (PonderLM-2, appendix)."""
    std = (2 / (5 * spec.hidden_size)) ** 0.5 / divisor
    return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


class Linear(nn.Module):
    """A matrix (and a bias) from the last axes of its input to `features`, computed in the compute dtype.

    Attributes:
      features: sizes of the output axes.
      axes: logical names of the kernel's axes, input axes first.
      use_bias: add one.
      init_divisor: divides the standard deviation (matrices that write to the residual stream).
    """

    spec: ModelSpec
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool
    init_divisor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, part: slice = slice(None)) -> jax.Array:
        """Contracts as many last axes of x as `axes` has before those of `features`.

        Args:
          part: which entries of the first output axis are computed.
        """
        spec, num_inputs = self.spec, len(self.axes) - len(self.features)
        inputs = x.shape[-num_inputs:]
        if spec.separates:
            return self._by_output(x.reshape(*x.shape[: x.ndim - num_inputs], -1), part)
        init: Any = nn.with_logical_partitioning(matrix_init(spec, self.init_divisor), self.axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        kernel = kernel[*[slice(None)] * num_inputs, part].astype(spec.compute_dtype)
        contracted = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
        y = jax.lax.dot_general(x.astype(spec.compute_dtype), kernel, (contracted, ((), ())))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[num_inputs:])
            y = y + self.param("bias", init, self.features, jnp.float32)[part].astype(spec.compute_dtype)
        return y

    def _by_output(self, x: jax.Array, part: slice) -> jax.Array:
        """The same with the matrix as (outputs, inputs), both flat; on a CPU far faster where x has few rows."""
        spec, (first, *others) = self.spec, self.features
        shape = (math.prod(self.features), x.shape[-1])
        kernel = self.param("kernel", matrix_init(spec, self.init_divisor), shape, jnp.float32)
        kernel = kernel.reshape(first, -1, x.shape[-1])[part].reshape(-1, x.shape[-1]).astype(spec.compute_dtype)
        contracted = ((1,), (x.ndim - 1,))
        y = jax.lax.dot_general(kernel, x.astype(spec.compute_dtype), (contracted, ((), ())))
        y = jnp.moveaxis(y, 0, -1).reshape(*x.shape[:-1], -1, *others)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), self.features, jnp.float32)
            y = y + bias[part].astype(spec.compute_dtype)
        return y


def layer_norm(spec: ModelSpec, name: str) -> nn.LayerNorm:
    """LayerNorm with scale and bias, statistics in float32."""
    return nn.LayerNorm(
        epsilon=spec.norm_epsilon,
        dtype=spec.compute_dtype,
        param_dtype=jnp.float32,
        # E[x^2] - E[x]^2 is faster but cancels when a channel's mean is large, as trained residual streams have.
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",)),
        name=name,
    )


def rms_norm(spec: ModelSpec, name: str) -> nn.RMSNorm:
    """RMSNorm with scale, statistics in float32."""
    return nn.RMSNorm(
        epsilon=spec.norm_epsilon,
        dtype=spec.compute_dtype,
        param_dtype=jnp.float32,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)),
        name=name,
    )


def shard_activation(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the mesh by logical axis names; nothing happens where no mesh is in force."""
    return nn.with_logical_constraint(x, axes)
