"""What a part of training computes: with fewer thoughts than the model has, and with passes until they have settled."""

import functools

import jax
import numpy as np
import pytest
from test_latent_gradients import assert_same_gradients
from tiny import cross_entropy, language_model, params_of, tokens

TOKENS_BT = tokens(2, 8)


@functools.partial(jax.jit, static_argnames=("model", "method", "settings"))
def _loss_and_gradients(params, model, method, settings):
    def loss(params):
        hidden_BTD, found = model.apply({"params": params}, TOKENS_BT, **dict(settings), method=method)
        return cross_entropy(model.apply({"params": params}, hidden_BTD, method="logits"), TOKENS_BT), found

    return jax.value_and_grad(loss, has_aux=True)(params)


def loss_and_gradients(model, method="hidden", **settings):
    """Of any forward that gives hidden states and something besides: loss, gradients, and that."""
    (loss, found), grads = _loss_and_gradients(params_of(model), model, method, tuple(settings.items()))
    return float(loss), grads, found


def test_fewer_thoughts_are_those_of_a_model_with_fewer():
    """The same parameters do, and the gradients are its too."""
    loss, grads, _ = loss_and_gradients(language_model(2), num_latent_thoughts=1, num_jacobi_iterations=1)
    other_loss, other_grads, _ = loss_and_gradients(language_model(1), num_jacobi_iterations=1)
    assert loss == other_loss
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_without_thoughts_it_is_one_pass_with_the_scale_of_the_method():
    model = language_model(2)
    hidden_BTD, residual_R = model.apply(
        {"params": params_of(model)}, TOKENS_BT, num_latent_thoughts=0, num_jacobi_iterations=0, method="hidden"
    )

    def one_pass(module):
        return module.backbone(module.vocabulary().embed(TOKENS_BT), np.arange(8, dtype=np.int32)[None])[0]

    np.testing.assert_array_equal(hidden_BTD, model.apply({"params": params_of(model)}, method=one_pass))
    assert residual_R.shape == (0,) and hidden_BTD.shape == (2, 8, 16)
    vanilla = language_model(0, method="vanilla")
    unscaled_BTD, _ = vanilla.apply({"params": params_of(model)}, TOKENS_BT, method="hidden")
    assert not np.allclose(hidden_BTD, unscaled_BTD, atol=0.01)


@pytest.mark.parametrize(
    ("num_thoughts", "trained", "tolerance"), [(1, 2, 0.02), pytest.param(2, 3, 0.05, marks=pytest.mark.long)]
)
def test_passes_until_settled_are_as_many_passes(num_thoughts: int, trained: int, tolerance: float):
    """The loss and the gradients are those of R as it was found; which is the first for which they have settled."""
    model, most = language_model(num_thoughts, backprop_passes=trained), 8
    apply = functools.partial(model.apply, {"params": params_of(model)}, TOKENS_BT)
    residual_R = jax.jit(lambda: apply(num_jacobi_iterations=most, method="hidden")[1])()
    settled = {"num_latent_thoughts": num_thoughts, "tolerance": tolerance}
    loss, grads, passes = loss_and_gradients(model, "hidden_settled", num_jacobi_iterations=most, **settled)
    in_loop = int(np.argmax(residual_R <= tolerance)) + 1
    assert residual_R[in_loop - 1] <= tolerance and passes == in_loop + trained - 1 < most
    expected_loss, expected, _ = loss_and_gradients(model, num_jacobi_iterations=int(passes))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(grads, expected, 1e-4)
    # Where gradients flow through as many as there may be, nothing is decided.
    hidden = [
        jax.jit(lambda how=how: apply(num_jacobi_iterations=trained - 1, **how))()
        for how in ({**settled, "method": "hidden_settled"}, {"method": "hidden"})
    ]
    np.testing.assert_allclose(hidden[0][0], hidden[1][0], rtol=0, atol=1e-5)
    assert hidden[0][1] == trained - 1


def test_a_method_without_refinement_has_nothing_to_settle():
    with pytest.raises(ValueError, match="Loop has no refinement passes"):
        loss_and_gradients(
            language_model(1, method="loop"),
            "hidden_settled", num_jacobi_iterations=1, num_latent_thoughts=1, tolerance=0.1,
        )  # fmt: skip
