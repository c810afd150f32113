"""Refining until the thoughts have settled, against many passes and against sequential decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.recurrence.base import rounding_tolerance

NUM_TOKENS = 24
TOKENS = tokens(3, NUM_TOKENS)


@functools.partial(jax.jit, static_argnames=("model", "tolerance"))
def _settled(model, tolerance, params, counted_BT):
    variables = {"params": params}
    hidden, residual_B, passes = model.apply(
        variables, TOKENS, tolerance=tolerance, counted_BT=counted_BT, method="hidden_until"
    )
    return model.apply(variables, hidden, method="logits"), residual_B, passes


@functools.partial(jax.jit, static_argnames=("model", "num_jacobi_iterations"))
def _after(model, num_jacobi_iterations, params):
    variables = {"params": params}
    hidden, residual_R = model.apply(variables, TOKENS, num_jacobi_iterations=num_jacobi_iterations, method="hidden")
    return model.apply(variables, hidden, method="logits"), residual_R


@functools.partial(jax.jit, static_argnames="model")
def _sequential(model, params):
    def feed(cache, inputs):
        token_B, position = inputs
        position_B = jnp.full((len(TOKENS),), position, jnp.int32)
        logits, cache = model.apply({"params": params}, token_B, position_B, cache, method="decode")
        return cache, logits

    cache = model.apply({}, len(TOKENS), NUM_TOKENS, method="empty_cache")
    _, logits_TBV = jax.lax.scan(feed, cache, (jnp.asarray(TOKENS.T), jnp.arange(NUM_TOKENS)))
    return logits_TBV.swapaxes(0, 1)


def settled(model, tolerance, counted_BT=None):
    """The logits, each row's residual, and the number of passes."""
    return _settled(model, tolerance, params_of(model), counted_BT)


def after(model, num_jacobi_iterations):
    """The logits and the residual of each pass."""
    return _after(model, num_jacobi_iterations, params_of(model))


def sequential(model):
    """The logits of decoding token by token."""
    return _sequential(model, params_of(model))


@pytest.mark.parametrize(("num_thoughts", "architecture"), [(1, "llama"), (2, "gpt_neox")])
def test_exact_is_what_many_passes_and_sequential_decoding_compute(num_thoughts: int, architecture: str):
    model = language_model(num_thoughts, architecture)
    exact, residual_B, passes = settled(model, rounding_tolerance("float32"))
    assert (residual_B <= rounding_tolerance("float32")).all() and 4 < passes < num_thoughts * NUM_TOKENS
    np.testing.assert_allclose(exact, after(model, num_thoughts * NUM_TOKENS)[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(exact, sequential(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_passes_end_when_every_row_is_within_the_tolerance_and_not_later(tolerance: float):
    model = language_model(1)
    logits, residual_B, passes = settled(model, tolerance)
    assert (residual_B <= tolerance).all() and (residual_B > 0).all()
    same, residual_R = after(model, int(passes))
    np.testing.assert_allclose(logits, same, rtol=0, atol=1e-5)
    # The mean over all rows, as the pass before had it, is above the tolerance or just below: one row was not there.
    assert residual_R[-1] == pytest.approx(float(jnp.sqrt(jnp.mean(jnp.square(residual_B)))), rel=0.05)
    assert residual_R[-2] > tolerance / 2


def test_tokens_that_do_not_count_are_not_waited_for():
    model = language_model(1)
    first_alone = jnp.broadcast_to(jnp.arange(NUM_TOKENS) < 1, TOKENS.shape)
    # The first thought is exact from the beginning, so the first pass shows no change.
    assert settled(model, 1e-6, first_alone)[2] == 1 and settled(model, 1e-6)[2] > 5


def test_methods_without_refinement_need_none():
    model = language_model(0, method="vanilla")
    logits, residual_B, passes = settled(model, 0.0)
    assert passes == 0 and (residual_B == 0).all()
    expected = jax.jit(model.apply)({"params": params_of(model)}, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6)
