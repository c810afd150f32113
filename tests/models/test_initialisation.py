"""Initialisation statistics: the reference's standard deviations, cut at three of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import language_model, params_of

NUM_LAYERS, WIDTH = 3, 160
BASE = (2 / (5 * WIDTH)) ** 0.5
CUT_STD = 0.98658  # the standard deviation of a unit normal cut at 3


@functools.cache
def initialised(architecture, num_thoughts):
    model = language_model(
        num_thoughts,
        architecture,
        num_layers=NUM_LAYERS,
        hidden_size=WIDTH,
        num_heads=4,
        num_kv_heads=0,
        intermediate_size=200,
        vocab_size=300,
    )
    params = jax.jit(lambda key: nn.meta.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"])
    return model, params(jax.random.key(0))


@pytest.mark.parametrize("num_thoughts", [0, 1, 3])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_standard_deviations(architecture, num_thoughts):
    """sqrt(2 / 5D); what writes to the residual stream / sqrt(2N), or sqrt(2N (C + 1)) (gpt_neox)."""
    _, params = initialised(architecture, num_thoughts)
    divisor = (2 * NUM_LAYERS * (num_thoughts + 1 if architecture == "gpt_neox" else 1)) ** 0.5
    seen = 0
    for path, leaf in flatten_dict(params).items():
        leaf, name = np.asarray(leaf), "/".join(path)
        if path[-1] in ("kernel", "embedding"):
            std = BASE / (divisor if path[-2] in ("attention_out", "mlp_out") else 1)
            seen += 1
            # Cutting makes the deviation smaller than that of the normal which is cut; four standard errors.
            assert leaf.std() == pytest.approx(std * CUT_STD, rel=4 / (2 * leaf.size) ** 0.5), name
            assert abs(leaf.mean()) < 5 * std / leaf.size**0.5, name
            assert 0.93 * 3 * std < np.abs(leaf).max() <= 3 * std * 1.0001, name
        else:
            np.testing.assert_array_equal(leaf, 1.0 if path[-1] == "scale" else 0.0, err_msg=name)
    assert seen == {"gpt_neox": 10, "llama": 16, "gpt2": 10}[architecture]  # the last layer stands alone


def test_layers_differ():
    """Stacked layers are drawn one by one, not copied."""
    _, params = initialised("gpt_neox", 1)
    for name in ("query_key_value", "attention_out", "mlp_in", "mlp_out"):
        scanned, last = (np.asarray(params["backbone"][part][name]["kernel"]) for part in ("layers", "last_layer"))
        kernel_N = np.concatenate([scanned, last[None]])
        assert kernel_N.shape[0] == NUM_LAYERS
        for layer in range(1, NUM_LAYERS):
            correlation = np.corrcoef(kernel_N[0].ravel(), kernel_N[layer].ravel())[0, 1]
            assert abs(correlation) < 0.05


def test_embeddings_enter_with_unit_rms_as_thoughts_do():
    """The scale sqrt(2.5 D) undoes the standard deviation; a thought leaves the final norm with RMS 1."""
    model, params = initialised("gpt_neox", 1)

    def first_pass(module, tokens_BT):
        x_BTD = module.vocabulary().embed(tokens_BT)
        return x_BTD, module.backbone(x_BTD, jnp.arange(tokens_BT.shape[1])[None])[0]

    tokens_BT = np.arange(300).reshape(10, 30)
    for x_BTD in model.apply({"params": params}, tokens_BT, method=first_pass):
        assert np.sqrt(np.mean(np.square(x_BTD))) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("method", "num_thoughts", "scale"),
    [("latent", 1, 40**0.5), ("loop", 1, 40**0.5), ("pause", 2, 4.0), ("ponder", 2, 4.0), ("vanilla", 1, 1.0),
     ("ponder", 0, 1.0)],
)  # fmt: skip
def test_embeddings_scale_is_the_methods_choice(method, num_thoughts, scale):
    """sqrt(2.5 D), sqrt(D), or the rows of the table as they are; of width 16."""
    model, tokens_BT = language_model(num_thoughts, method=method), np.array([[3, 5, 3]])
    params = params_of(model)
    x_BTD = model.apply({"params": params}, tokens_BT, method=lambda module, ids: module.vocabulary().embed(ids))
    np.testing.assert_allclose(x_BTD, params["embedding"]["embedding"][tokens_BT] * scale, rtol=1e-6)
