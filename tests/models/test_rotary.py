"""Rotary embedding against complex numbers, and the property that it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.models.rotary import rotary_angles, rotate

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("rotary_dims", "theta"), [(8, 10000.0), (4, 100.0)])
def test_complex_formula(rotary_dims, theta):
    """Dimension j and j + half are the parts of a number that is turned by position * theta^(-2j / dims)."""
    x_BSHK = RNG.standard_normal((2, 6, 3, 8)).astype(np.float32)
    positions_BS = RNG.integers(0, 50, (2, 6))
    half = rotary_dims // 2
    numbers = x_BSHK[..., :half] + 1j * x_BSHK[..., half:rotary_dims].astype(np.float64)
    turned = numbers * np.exp(1j * positions_BS[:, :, None, None] * theta ** (-2.0 * np.arange(half) / rotary_dims))
    expected = np.concatenate([turned.real, turned.imag, x_BSHK[..., rotary_dims:]], axis=-1)
    out = rotate(jnp.asarray(x_BSHK), rotary_angles(jnp.asarray(positions_BS), rotary_dims, theta))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_partial_leaves_the_rest_unchanged():
    """Bit for bit, in the dtype that came in."""
    x_BSHK = jnp.asarray(RNG.standard_normal((1, 5, 2, 8)), jnp.bfloat16)
    out = rotate(x_BSHK, rotary_angles(jnp.arange(5)[None], 2, 10000.0))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[..., 2:].astype(jnp.float32), x_BSHK[..., 2:].astype(jnp.float32))
    assert np.all(np.asarray(out[:, 1:, :, :2] != x_BSHK[:, 1:, :, :2]))


def test_dot_products_depend_on_relative_position_only():
    """Shifting query and key by the same number of positions changes nothing; shifting one does."""
    q_K, k_K = RNG.standard_normal((2, 8)).astype(np.float32)

    def product(q_position, k_position):
        x = jnp.asarray(np.stack([q_K, k_K]))[None, :, None]
        rotated = rotate(x, rotary_angles(jnp.array([[q_position, k_position]]), 8, 100.0))[0, :, 0]
        return float(rotated[0] @ rotated[1])

    for shift in (1, 17, 200):
        assert product(9 + shift, 4 + shift) == pytest.approx(product(9, 4), abs=1e-4)
    assert abs(product(10, 4) - product(9, 4)) > 1e-2


def test_late_positions_keep_their_phase_in_bfloat16():
    """bfloat16 cannot tell position 2047 from 2048; the rotation is done in float32."""
    x_BSHK = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    out = rotate(x_BSHK, rotary_angles(jnp.array([[2047, 2048]]), 4, 10000.0)).astype(jnp.float32)
    for row, position in zip(out[0, :, 0], (2047, 2048)):
        expected = (1 + 1j) * np.exp(1j * position * np.array([1, 0.01]))
        np.testing.assert_allclose(row, [*expected.real, *expected.imag], atol=0.01)
