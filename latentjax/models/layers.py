"""Matrices and norms as the blocks use them: float32, with logical axis names and the reference's initialisation."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec


def matrix_init(spec: ModelSpec, divisor: float = 1.0) -> nn.initializers.Initializer:
    """The reference's initialiser: normal with std sqrt(2 / (5 D)) / divisor, cut at 3 std (PonderLM-2, appendix)."""
    std = (2 / (5 * spec.hidden_size)) ** 0.5 / divisor
    return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


def linear(
    spec: ModelSpec,
    features: int | Sequence[int],
    axes: Sequence[str | None],
    *,
    num_input_axes: int = 1,
    use_bias: bool,
    init_divisor: float = 1.0,
    name: str,
) -> nn.DenseGeneral:
    """A matrix from the last `num_input_axes` axes of its input to `features`.

    Args:
      axes: logical names of the kernel's axes, input axes first.
      init_divisor: divides the standard deviation (matrices that write to the residual stream).
    """
    output_axes = tuple(axes[num_input_axes:])
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-num_input_axes, 0)),
        use_bias=use_bias,
        dtype=spec.compute_dtype,
        param_dtype=jnp.float32,
        kernel_init=nn.with_logical_partitioning(matrix_init(spec, init_divisor), tuple(axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), output_axes),
        name=name,
    )


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
