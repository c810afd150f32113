"""Thoughts refined place by place: the same fixed point as by full passes, for less."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_latent_gradients import assert_same_gradients
from tiny import cross_entropy, language_model, params_of, tokens

from latentjax.models import attention
from latentjax.models.attention import XLA
from latentjax.recurrence.methods import train_recurrence

NUM_TOKENS = 7
TOKENS_BT = tokens(2, NUM_TOKENS)
DOCUMENTS = {
    "segment_ids_BT": np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]], np.int32),
    "positions_BT": np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]], np.int32),
}


def loss_of(model, params, iterations, **ids):
    """As training has it: by the form of refinement that the model's settings name."""
    thoughts = model.recurrence_spec.num_latent_thoughts
    hidden_BTD, residual_R = model.apply(
        {"params": params}, TOKENS_BT, num_latent_thoughts=thoughts, num_jacobi_iterations=iterations, method="hidden",
        **ids,
    )  # fmt: skip
    return cross_entropy(model.apply({"params": params}, hidden_BTD, method="logits"), TOKENS_BT), (
        hidden_BTD,
        residual_R,
    )


def computed(model, iterations, **ids):
    """Loss, hidden states, residuals and gradients."""
    fn = jax.value_and_grad(functools.partial(loss_of, model, iterations=iterations, **ids), has_aux=True)
    (loss, (hidden_BTD, residual_R)), grads = jax.jit(fn)(params_of(model))
    return float(loss), np.asarray(hidden_BTD), np.asarray(residual_R), grads


@pytest.mark.parametrize(
    ("architecture", "num_thoughts", "remat", "ids"),
    [
        ("llama", 1, "keep_pass_inputs", DOCUMENTS),
        pytest.param("gpt2", 1, "keep_layer_inputs", {}, marks=pytest.mark.long),
        pytest.param("llama", 2, "keep_pass_inputs", DOCUMENTS, marks=pytest.mark.long),
        pytest.param("gpt_neox", 2, "none", DOCUMENTS, marks=pytest.mark.long),
    ],
)
def test_refined_to_the_end_it_is_what_decoding_computes(architecture, num_thoughts, remat, ids):
    """A round makes the thoughts of one token more exact; then the gradients too are those of full passes."""
    model = language_model(num_thoughts, architecture, refinement="alternating", remat=remat)
    loss, hidden_BTD, residual_R, grads = computed(model, NUM_TOKENS, **ids)
    full = language_model(num_thoughts, architecture)
    expected_loss, expected_BTD, _, expected = computed(full, num_thoughts * NUM_TOKENS, **ids)
    np.testing.assert_allclose(hidden_BTD, expected_BTD, rtol=0, atol=2e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(grads, expected, 2e-4)
    assert residual_R.shape == (NUM_TOKENS,) and residual_R[0] > 0.01 and residual_R[-1] < 1e-5
    # Evaluation takes full passes, whatever training does.
    apply = functools.partial(model.apply, {"params": params_of(model)}, TOKENS_BT, num_jacobi_iterations=1, **ids)
    np.testing.assert_array_equal(
        apply(method="hidden")[0],
        full.apply({"params": params_of(full)}, TOKENS_BT, num_jacobi_iterations=1, method="hidden", **ids)[0],
    )


def test_one_layer_and_no_refinement():
    """The places see what is there: tokens only each other, thoughts the tokens too."""
    model = language_model(1, num_layers=1, refinement="alternating", loops="unrolled")
    hidden_BTD = computed(model, 0)[1]
    # In one layer keys and values are those of the inputs, so that no pass has old ones.
    full_BTD = model.apply({"params": params_of(model)}, TOKENS_BT, num_jacobi_iterations=0, method="hidden")[0]
    np.testing.assert_allclose(hidden_BTD, full_BTD, rtol=0, atol=1e-5)


def test_gradients_through_the_last_rounds_only():
    """k = R + 2 is all; with fewer the loss is the same and the gradients are not."""
    model = language_model(1, refinement="alternating")
    losses, grads = {}, {}
    for passes in (2, 0):
        spec = dataclasses.replace(model.recurrence_spec, backprop_passes=passes)
        losses[passes], _, _, grads[passes] = computed(dataclasses.replace(model, recurrence_spec=spec), 1)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    with pytest.raises(AssertionError):
        assert_same_gradients(grads[2], grads[0], 1e-2)
    recurrence = train_recurrence(dataclasses.replace(spec, backprop_passes=3), 1)
    assert [recurrence.num_trained_passes(iterations) for iterations in (0, 1, 2, 3)] == [2, 4, 5, 5]


def test_a_kernel_that_takes_all_queries_gets_them(monkeypatch):
    """Those of other slots are nothing, and what comes of them is left out."""
    model = language_model(1, "llama", refinement="alternating")
    expected_BTD = loss_of(model, params_of(model), 1)[1][0]
    backend = dataclasses.replace(XLA, needs_all_queries=True)
    monkeypatch.setitem(attention._ALL_BACKENDS, "xla", backend)
    np.testing.assert_allclose(loss_of(model, params_of(model), 1)[1][0], expected_BTD, rtol=0, atol=1e-6)
