"""What transformers makes of exported folders, with code from the folder, is what our model computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import greedy, language_model, params_of, tokens

from latentjax.errors import UserError
from latentjax.interop import comparison, writing
from latentjax.interop.exported_config import config_from_specs

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[peer]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peer]'")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder, model, dtype="float32"):
    folder.mkdir()
    writing.write_configs(folder, config_from_specs(model.spec, model.recurrence_spec, dtype))
    writing.write_weights(folder, params_of(model), model.spec, dtype, 10**9)
    writing.write_code(folder)
    return folder


# The others on GPT-NeoX and LLaMA have the reference's numbers (test_modeling.py): GPT-2 has none.
MODELS = [(architecture, "latent", count) for architecture in ("gpt_neox", "llama", "gpt2") for count in (0, 1, 2)]
MODELS += [("gpt2", "pause", 2), ("gpt2", "loop", 2), ("gpt2", "ponder", 1), ("gpt_neox", "ponder", 2)]


@pytest.mark.parametrize(("architecture", "method", "num_thoughts"), MODELS)
@torch.no_grad()
def test_logits_and_greedy_tokens(architecture, method, num_thoughts, tmp_path):
    """At our own R without a cache; with it, prompts of different lengths in one batch, padded on the left."""
    model, ids = language_model(num_thoughts, architecture, method=method), tokens(2, 14)
    folder = write(tmp_path / "model", model)
    vanilla = num_thoughts == 0
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not vanilla).eval()
    assert type(peer).__module__.startswith("transformers.") == vanilla
    expected = comparison.our_logits(model, params_of(model), ids)
    np.testing.assert_allclose(peer(torch.from_numpy(ids).long()).logits.numpy(), expected, rtol=0, atol=1e-4)
    assert comparison.compare(folder, expected, ids) < 1e-4

    lengths, total = (4, 9), 17
    ours = greedy(model, [row[:length] for row, length in zip(ids, lengths, strict=True)], total - 9)
    padded, mask = torch.zeros((2, 9), dtype=torch.long), torch.zeros((2, 9), dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 9 - length :] = torch.from_numpy(ids[row, :length])
        mask[row, 9 - length :] = 1
    options = {"do_sample": False, "max_new_tokens": total - 9, "pad_token_id": 0}
    theirs = peer.generate(padded, attention_mask=mask, **options).numpy()
    np.testing.assert_array_equal(theirs[:, 9:], ours)


def test_a_difference_is_found(tmp_path):
    """In a weight, a setting or a missing scale; a tensor too few is no comparison at all."""
    model, ids = language_model(1), tokens(1, 12)
    folder = write(tmp_path / "model", model)
    expected = comparison.our_logits(model, params_of(model), ids)
    config = json.loads((folder / "config.json").read_text())
    for changes in ({"scale_embeds": False}, {"num_jacobi_iterations": 0}, {"rotary_emb_base": 1000.0}):
        writing.write_json(folder / "config.json", config | changes)
        assert comparison.compare(folder, expected, ids) > 10 * comparison.TOLERANCE
    writing.write_json(folder / "config.json", config)
    assert comparison.compare(folder, expected, ids) < 1e-5
    assert not comparison.Difference(comparison.compare(folder, expected * np.nan, ids), 0.0, 12).is_within_tolerance
    writing.write_json(folder / "config.json", config | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"does not load all that was exported: .*layers\.2"):
        comparison.compare(folder, expected, ids)
    writing.write_json(folder / "config.json", config | {"hidden_act": "nothing"})
    with pytest.raises(UserError, match="transformers cannot load what was exported: .*nothing"):
        comparison.compare(folder, expected, ids)


def test_sixteen_bits_are_compared_without_their_rounding(tmp_path):
    """So that a mistake cannot hide behind it."""
    model, ids = language_model(1, "llama"), tokens(1, 12)
    folder, params = write(tmp_path / "model", model, "bfloat16"), params_of(model)
    exact = comparison.our_logits(model, params, ids)
    copies = jax.tree.map(jnp.copy, params)
    rounded = comparison.our_logits(model, comparison.round_params(copies, "bfloat16"), ids)
    assert comparison.compare(folder, rounded, ids) < 1e-5 < comparison.compare(folder, exact, ids)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert peer.dtype == torch.bfloat16
    with torch.no_grad():  # computing in bfloat16 too: 8 bits of a logit of size 3
        logits = peer(torch.from_numpy(ids).long()).logits.float().numpy()
    assert np.abs(logits - rounded).max() < 0.2
    assert peer.generate(torch.from_numpy(ids[:, :5]).long(), max_new_tokens=4, pad_token_id=0).shape == (1, 9)
