"""What the parity cases do not reach: GPT-NeoX one after the other, GPT-2, and the tied head."""

import jax
import numpy as np
import pytest
from scipy.special import erf, log_softmax, softmax
from tiny import language_model, params_of, tokens

from latentjax.models.backbone import Backbone
from latentjax.models.embedding import Vocabulary


def norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def exact_gelu(x):
    return x * (1 + erf(x / 2**0.5)) / 2


def tanh_gelu(x):
    """GPT-2's, as its code has it: from section 2 of arXiv 1606.08415."""
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def neox_hidden(params, x_TD, *, parallel, theta=100.0, rotary=4, gelu=exact_gelu):
    """A GPT-NeoX backbone for one sequence in float64 NumPy, from its paper (arXiv 2204.06745)."""
    layers = [jax.tree.map(lambda p: np.asarray(p[0], np.float64), params["layers"])]  # one, and the last
    layers.append(jax.tree.map(lambda p: np.asarray(p, np.float64), params["last_layer"]))
    _, _, num_heads, head_dim = layers[0]["query_key_value"]["kernel"].shape
    num_tokens = len(x_TD)
    turn = np.exp(1j * np.arange(num_tokens)[:, None] * theta ** (-2.0 * np.arange(rotary // 2) / rotary))
    for layer in layers:
        normed_TD = norm(x_TD, layer["input_norm"])
        attention_TD = np.zeros_like(x_TD) + layer["attention_out"]["bias"]
        for h in range(num_heads):
            q, k, v = (
                normed_TD @ layer["query_key_value"]["kernel"][:, i, h] + layer["query_key_value"]["bias"][i, h]
                for i in range(3)
            )
            for x in (q, k):
                turned = (x[:, : rotary // 2] + 1j * x[:, rotary // 2 : rotary]) * turn
                x[:, :rotary] = np.concatenate([turned.real, turned.imag], axis=1)
            scores = np.where(np.tri(num_tokens) > 0, q @ k.T / head_dim**0.5, -np.inf)
            attention_TD += softmax(scores, axis=-1) @ v @ layer["attention_out"]["kernel"][h]

        def mlp(x, layer=layer):
            inner = norm(x, layer["mlp_norm"]) @ layer["mlp_in"]["kernel"] + layer["mlp_in"]["bias"]
            return gelu(inner) @ layer["mlp_out"]["kernel"] + layer["mlp_out"]["bias"]

        x_TD = x_TD + attention_TD + mlp(x_TD if parallel else x_TD + attention_TD)
    return norm(x_TD, jax.tree.map(lambda p: np.asarray(p, np.float64), params["final_norm"]))


@pytest.mark.parametrize("parallel", [False, True])
def test_neox_residuals(parallel):
    """Both forms agree with NumPy, and they are not the same."""
    model = language_model(0, parallel_residual=parallel)
    params = params_of(model)["backbone"]
    x_BTD = np.random.default_rng(0).standard_normal((1, 7, 16)).astype(np.float32)
    hidden_BTD, _ = jax.jit(Backbone(model.spec, 1).apply)({"params": params}, x_BTD, np.arange(7)[None])
    np.testing.assert_allclose(hidden_BTD[0], neox_hidden(params, x_BTD[0], parallel=parallel), rtol=0, atol=2e-5)
    other = neox_hidden(params, x_BTD[0], parallel=not parallel)
    assert np.abs(hidden_BTD[0] - other).max() > 1e-2


def test_gpt2_is_neox_without_rotary_on_learned_positions():
    """Positions of tokens that are not in order, and the same for two slots: each adds its row of the table."""
    model = language_model(1, "gpt2")
    params = params_of(model)["backbone"]
    x_BSD = np.random.default_rng(0).standard_normal((2, 6, 16)).astype(np.float32)
    positions_BS = np.array([[0, 0, 1, 1, 2, 2], [5, 5, 0, 0, 63, 63]])
    hidden_BSD, _ = jax.jit(Backbone(model.spec, 2).apply)({"params": params}, x_BSD, positions_BS)
    table_PD = np.asarray(params["position_embedding"]["embedding"])
    for hidden_SD, x_SD, positions_S in zip(hidden_BSD, x_BSD, positions_BS):
        entering_SD = x_SD.astype(np.float64) + table_PD[positions_S]
        expected = neox_hidden(params, entering_SD, parallel=False, rotary=0, gelu=tanh_gelu)
        np.testing.assert_allclose(hidden_SD, expected, rtol=0, atol=2e-5)
        assert np.abs(hidden_SD - neox_hidden(params, entering_SD, parallel=False, rotary=0)).max() > 1e-4


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_tied_head_is_the_transposed_embedding(architecture):
    """No matrix of its own; the logits are those of an untied model whose head was set to it."""
    tied = language_model(0, architecture, tie_embeddings=True)
    params = params_of(tied)
    assert "head" not in params
    untied = language_model(0, architecture, tie_embeddings=False)
    copied = {**params, "head": {"kernel": params["embedding"]["embedding"].T}}
    tokens_BT = tokens(2, 5)
    np.testing.assert_allclose(
        tied.apply({"params": params}, tokens_BT), untied.apply({"params": copied}, tokens_BT), rtol=0, atol=1e-6
    )


def test_tied_embedding_gets_both_gradients():
    """A token that is never read is still a class of the softmax: its row's gradient comes through the head."""
    tied, untied = (language_model(0, tie_embeddings=tie) for tie in (True, False))
    tokens_BT = tokens(1, 4) % 10  # ids from 10 on are not read

    def gradient(model):
        loss = lambda params: model.apply({"params": params}, tokens_BT)[..., 20].sum()  # noqa: E731
        return np.asarray(jax.grad(loss)(params_of(model))["embedding"]["embedding"])

    assert np.abs(gradient(tied)[20]).max() > 0.1
    assert np.all(gradient(untied)[20] == 0)


def test_head_sums_in_float32():
    """Logits of a bfloat16 model are float32, of rounded operands but not rounded themselves."""
    rng = np.random.default_rng(0)
    spec = language_model(0, dtype="bfloat16", hidden_size=512, num_heads=2).spec
    hidden_TD = rng.standard_normal((1, 3, 512)).astype(np.float32)
    kernel_DV = rng.standard_normal((512, 29)).astype(np.float32)
    logits = Vocabulary(kernel_DV.T, kernel_DV, 1.0, spec.compute_dtype).logits(hidden_TD)
    assert logits.dtype == np.float32
    rounded = [np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float64) for x in (hidden_TD, kernel_DV)]
    np.testing.assert_allclose(logits, rounded[0] @ rounded[1], rtol=0, atol=1e-3)
    assert np.abs(log_softmax(logits, axis=-1) - log_softmax(hidden_TD @ kernel_DV, axis=-1)).max() < 0.6
