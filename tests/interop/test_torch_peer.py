"""The peer in PyTorch computes what ours computes: losses, every gradient, and the weights after some steps."""

import dataclasses
import importlib.util

import jax
import numpy as np
import optax
import pytest
from tiny import language_model, params_of, tokens

from latentjax.config import default
from latentjax.data.windows import document_layout
from latentjax.errors import UserError
from latentjax.interop import torch_peer
from latentjax.interop.pretrained import tensors_from_params
from latentjax.interop.torch_peer import StepSettings, TorchPeer, Variant
from latentjax.training.optimizer import make_optimizer
from latentjax.training.step import summed_loss

pytest.importorskip("torch", reason="the peer needs torch: pip install '.[peer]'")
pytest.importorskip("transformers", reason="the peer needs transformers: pip install '.[peer]'")

EAGER = Variant("float32", compiled=False)
SETTINGS = StepSettings(
    num_jacobi_iterations=2,
    gradient_accumulation_steps=1,
    loss_chunk_tokens=0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=0.5,
)


def make_batch(masked=False):
    tokens_BT = tokens(4, 13)
    if not masked:
        return {"tokens": tokens_BT, "loss_weights": np.ones((4, 12), np.float32)}
    tokens_BT[:, 5] = tokens_BT[1, 8] = 0
    segment_ids, positions, loss_weights = document_layout(tokens_BT, 0)
    return {"tokens": tokens_BT, "loss_weights": loss_weights, "segment_ids": segment_ids, "positions": positions}


def make_peer(model, settings=SETTINGS, variant=EAGER, **spec_changes):
    spec = dataclasses.replace(model.spec, **spec_changes)
    tensors = tensors_from_params(params_of(model), model.spec)
    return TorchPeer(spec, model.recurrence_spec, tensors, settings, variant, "cpu")


def mean_loss(model, params, batch):
    return summed_loss(model, params, batch, 2, 0)[0] / batch["loss_weights"].sum()


def assert_same_gradients(model, peer, batch):
    loss, gradients = jax.value_and_grad(lambda params: mean_loss(model, params, batch))(params_of(model))
    peer_loss, theirs = peer.loss_and_gradients(peer.put_batch(batch))
    assert peer_loss == pytest.approx(float(loss), rel=1e-5)
    ours = tensors_from_params(gradients, model.spec)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        np.testing.assert_allclose(theirs[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("num_latent_thoughts", "masked"),
    [
        (0, False),
        (1, True),
        *[pytest.param(*each, marks=pytest.mark.long) for each in [(1, False), (2, False), (2, True)]],
    ],
)
def test_loss_and_every_gradient_are_ours(num_latent_thoughts, masked):
    """Also where transformers would take repeated position ids for the starts of packed documents."""
    model = language_model(num_latent_thoughts)
    assert_same_gradients(model, make_peer(model), make_batch(masked))


@pytest.mark.parametrize(
    "changes",
    [{"parallel_residual": False}, {"tie_embeddings": True}, {"backprop_passes": 2}, {"method": "vanilla"}],
    ids=str,
)
def test_every_form_of_the_model_is_ours(changes):
    model = language_model(1, **changes)
    assert_same_gradients(model, make_peer(model), make_batch())


@pytest.mark.parametrize("remat", ["keep_matmul_outputs", "keep_layer_inputs"])
def test_remat_chunks_and_microbatches_change_nothing(remat):
    """Computed by parts and twice, the same gradients."""
    model = language_model(1)
    settings = dataclasses.replace(SETTINGS, loss_chunk_tokens=5, gradient_accumulation_steps=2)
    assert_same_gradients(model, make_peer(model, settings, remat=remat), make_batch(masked=True))


def test_steps_update_the_weights_as_ours():
    """AdamW with clipping (in force here), and decay of matrices alone."""
    model, batch, rate = language_model(1), make_batch(), 1e-2
    # Some biases of keys have no gradient but rounding errors, which a smaller eps would make steps of.
    settings = dataclasses.replace(SETTINGS, eps=1e-4)
    config = default().optimizer
    config.update(learning_rate=rate, warmup_ratio=0.0, min_learning_rate_ratio=1.0)
    config.update({key: getattr(settings, key) for key in ("b1", "b2", "eps", "weight_decay", "clip_norm")})
    optimizer, params, peer = make_optimizer(config, 10), params_of(model), make_peer(model, settings)
    state, on_device = optimizer.init(params), peer.put_batch(batch)
    for _ in range(3):
        loss, gradients = jax.value_and_grad(lambda params: mean_loss(model, params, batch))(params)
        assert optax.global_norm(gradients) > SETTINGS.clip_norm
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        assert float(peer.step(on_device, rate)) == pytest.approx(float(loss), rel=1e-4)
    theirs = peer.weights()
    for name, weight in tensors_from_params(params, model.spec).items():
        np.testing.assert_allclose(theirs[name], weight, rtol=0, atol=rate * 1e-2, err_msg=name)


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_bfloat16_computes_about_the_same_and_loses_no_small_update(precision):
    """An update that is far below a bfloat16's resolution reaches the float32 weights."""
    model, batch = language_model(1), make_batch()
    peer = make_peer(model, variant=Variant(precision, compiled=False))
    before = peer.weights()["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"]
    loss = peer.step(peer.put_batch(batch), 1e-5)
    assert float(loss) == pytest.approx(float(mean_loss(model, params_of(model), batch)), rel=1e-2)
    change = np.abs(peer.weights()["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"] - before)
    assert 0.5e-5 < np.median(change) < 1.5e-5


def test_variants_are_chosen_by_dtype_and_name():
    assert {variant.precision for variant in torch_peer.variants("float32")} == {"float32"}
    assert len(torch_peer.variants("bfloat16")) == 4
    assert torch_peer.variants("bfloat16", only="autocast, eager") == [Variant("autocast", compiled=False)]
    with pytest.raises(UserError, match="'float32, eager' does not run .*bfloat16: choose 'autocast, eager'"):
        torch_peer.variants("bfloat16", only="float32, eager")


def test_what_has_no_peer_is_an_error(monkeypatch):
    model, llama = language_model(1), language_model(1, "llama")
    torch_peer.check_peer(model.spec, model.recurrence_spec)
    with pytest.raises(UserError, match="'llama' with .*='latent' has no peer in PyTorch: choose gpt_neox"):
        torch_peer.check_peer(llama.spec, llama.recurrence_spec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch and transformers .*latentjax\[peer\]"):
        torch_peer.check_peer(model.spec, model.recurrence_spec)
