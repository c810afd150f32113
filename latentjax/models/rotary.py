"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of GPT-NeoX and LLaMA."""

import jax
import jax.numpy as jnp


def rotary_angles(positions_BS: jax.Array, rotary_dims: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of position times frequency, float32 (B, S, 1, rotary_dims / 2), ready to meet heads."""
    exponents = jnp.arange(0, rotary_dims, 2, dtype=jnp.float32) / rotary_dims
    angles = positions_BS[..., None].astype(jnp.float32) * (theta**-exponents)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BSHK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first `2 * angles.shape[-1]` dimensions of every head and passes the rest through.

    The rotation is done in float32, so that late positions keep their phase under bfloat16.
    """
    cos, sin = angles
    half = cos.shape[-1]
    if half == 0:
        return x_BSHK
    first, second, rest = jnp.split(x_BSHK, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x_BSHK.dtype) for part in rotated] + [rest], axis=-1)
