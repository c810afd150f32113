"""The chunked loss equals the plain one, and never holds all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.training.loss import next_token_loss

RNG = np.random.default_rng(0)
HIDDEN_BTD = RNG.standard_normal((2, 10, 4)).astype(np.float32)
KERNEL_DV = RNG.standard_normal((4, 13)).astype(np.float32)
TARGETS_BT = RNG.integers(0, 13, (2, 10)).astype(np.int32)
WEIGHTS_BT = (RNG.random((2, 10)) * (RNG.random((2, 10)) < 0.7)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def loss(hidden_BTD, kernel_DV, chunk_tokens):
    return next_token_loss(
        lambda h_BtD: h_BtD @ kernel_DV, hidden_BTD, TARGETS_BT, WEIGHTS_BT, chunk_tokens=chunk_tokens
    )


def test_value_and_gradient_written_out():
    """Sum of weight * -log softmax at the target; its gradient is weight * (softmax - one hot)."""
    logits = HIDDEN_BTD.astype(np.float64) @ KERNEL_DV
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    one_hot = np.eye(13)[TARGETS_BT]
    value, (grad_hidden, grad_kernel) = loss(HIDDEN_BTD, KERNEL_DV, 0)
    np.testing.assert_allclose(value, -np.sum(WEIGHTS_BT * np.log((probabilities * one_hot).sum(-1))), rtol=1e-5)
    grad_logits = WEIGHTS_BT[..., None] * (probabilities - one_hot)
    np.testing.assert_allclose(grad_hidden, grad_logits @ KERNEL_DV.T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(grad_kernel, np.einsum("btd,btv->dv", HIDDEN_BTD, grad_logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 5, 9, 10, 11])
def test_chunks_change_neither_value_nor_gradient(chunk_tokens):
    """Sizes that divide T = 10 and that do not; the padding weighs nothing."""
    value, grads = loss(HIDDEN_BTD, KERNEL_DV, chunk_tokens)
    expected, expected_grads = loss(HIDDEN_BTD, KERNEL_DV, 0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads):
        np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_is_held():
    """Neither forward nor backward has an array of all (B, T, V) logits, in whatever order."""
    jaxpr = str(jax.make_jaxpr(loss, static_argnums=2)(HIDDEN_BTD, KERNEL_DV, 5))
    assert "2,5,13]" in jaxpr
    assert not any(shape in jaxpr for shape in ("[2,10,13]", "[2,2,5,13]"))
    assert "[2,10,13]" in str(jax.make_jaxpr(loss, static_argnums=2)(HIDDEN_BTD, KERNEL_DV, 0))


def test_large_logits_stay_finite():
    """The normaliser is a log-sum-exp."""
    value = next_token_loss(
        lambda h: 1e4 * h, jnp.eye(4)[None], jnp.array([[0, 1, 2, 0]]), jnp.ones((1, 4)), chunk_tokens=2
    )
    assert float(value) == pytest.approx(1e4)
