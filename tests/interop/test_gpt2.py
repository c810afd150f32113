"""GPT-2 is transformers' GPT-2: logits of a folder that it wrote, with and without thoughts, and with the cache."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tokens

from latentjax.interop.pretrained import load_pretrained, tensors_from_params

torch = pytest.importorskip("torch", reason="the comparison needs torch: pip install '.[peer]'")
transformers = pytest.importorskip("transformers", reason="the comparison needs transformers: pip install '.[peer]'")

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small GPT-2 of transformers' with large weights, biases too, and the folder that it was saved to."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=29, n_embd=16, n_layer=3, n_head=2, n_positions=12, n_inner=24, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    directory = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(directory)
    return model, directory


def latent_logits(model, ids_BT, num_thoughts, scale):
    """Sequential decoding as the method defines it, slot by slot: transformers adds wpe[position] to every slot."""
    embed, stack = model.transformer.wte, model.transformer
    slots, positions, logits = [], [], []
    for position in range(ids_BT.shape[1]):
        slot_B1D = embed(torch.tensor(ids_BT[:, position : position + 1]).long()) * scale
        for _ in range(num_thoughts + 1):
            slots.append(slot_B1D)
            positions.append(position)
            position_ids = torch.tensor([positions] * len(ids_BT))
            # With a mask given, equal positions are not taken for packed documents.
            mask = torch.ones_like(position_ids)
            out = stack(inputs_embeds=torch.cat(slots, 1), position_ids=position_ids, attention_mask=mask)
            slot_B1D = out.last_hidden_state[:, -1:]
        logits.append(model.lm_head(slot_B1D))
    return torch.cat(logits, 1).numpy()


def test_vanilla_logits_and_tensors(written):
    model, directory = written
    ids_BT = tokens(2, NUM_TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor(ids_BT).long()).logits.numpy()
    ours, params = load_pretrained(directory)
    np.testing.assert_allclose(jax.jit(ours.apply)({"params": params}, ids_BT), expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 2 and ours.spec.tie_embeddings
    stored, again = load_file(directory / "model.safetensors"), tensors_from_params(params, ours.spec)
    assert stored.keys() == again.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.parametrize("num_thoughts", [1, 2])
def test_latent_logits(written, tmp_path, num_thoughts):
    """Converged Jacobi passes, and the cache, against transformers slot by slot."""
    model, directory = written
    config = json.loads((directory / "config.json").read_text())
    config |= {"recurrent_model": True, "num_latent_thoughts": num_thoughts, "num_jacobi_iterations": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(directory / "model.safetensors"), tmp_path / "model.safetensors")
    ids_BT = tokens(2, NUM_TOKENS)
    with torch.no_grad():
        expected = latent_logits(model, ids_BT, num_thoughts, 40**0.5)
    ours, params = load_pretrained(tmp_path)
    passes = functools.partial(ours.apply, num_jacobi_iterations=num_thoughts * NUM_TOKENS)
    exact = jax.jit(passes)({"params": params}, ids_BT)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4)
    cache = ours.empty_cache(2, NUM_TOKENS)
    decode = jax.jit(lambda *arguments: ours.apply({"params": params}, *arguments, method="decode"))
    for position in range(NUM_TOKENS):
        logits, cache = decode(ids_BT[:, position], np.full(2, position), cache)
        np.testing.assert_allclose(logits, expected[:, position], rtol=0, atol=1e-4)


def test_names_without_their_prefix(written, tmp_path):
    """As the published checkpoints of GPT-2 have them, with the causal masks of old versions."""
    _, directory = written
    tensors = {
        name.removeprefix("transformer."): array for name, array in load_file(directory / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = np.tri(12, dtype=np.float32)[None, None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    expected, found = load_pretrained(directory)[1], load_pretrained(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, expected, found)
