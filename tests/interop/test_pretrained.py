"""Hugging Face folders: what is written is what is read, and every mistake is named in one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file as save_jax_file
from safetensors.numpy import load_file, save_file
from tiny import language_model, model_spec, params_of

from latentjax.errors import UserError
from latentjax.interop.hf_config import specs_from_config
from latentjax.interop.hub import INDEX
from latentjax.interop.pretrained import load_pretrained, params_from_tensors, tensors_from_params

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
NEOX = "gpt_neox-latent-c1-r3"
LLAMA = "llama-vanilla-gqa"


@pytest.fixture
def folder(tmp_path, request):
    """A copy of a parity case (`request.param`, or the GPT-NeoX one) that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(CASES / getattr(request, "param", NEOX), directory)
    return directory


def change_config(directory, remove=(), **changes):
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / "model.safetensors")


def same(one, other):
    one, other = flatten_dict(one), flatten_dict(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype == jnp.float32
        np.testing.assert_array_equal(leaf, other[path], err_msg="/".join(path))


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_params_to_tensors_and_back(architecture, tie_embeddings):
    """Identical bits; one tensor per layer, under distinct names and in the layout of theirs."""
    model = language_model(0, architecture, tie_embeddings=tie_embeddings)
    params = params_of(model)
    tensors = tensors_from_params(params, model.spec)
    same(params_from_tensors(tensors, model.spec, "here"), params)
    assert sum(array.size for array in tensors.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    name, shape = {
        "gpt_neox": ("gpt_neox.layers.1.mlp.dense_h_to_4h.weight", (24, 16)),
        "llama": ("model.layers.1.mlp.up_proj.weight", (24, 16)),
        "gpt2": ("transformer.h.1.mlp.c_fc.weight", (16, 24)),
    }[architecture]
    assert tensors[name].shape == shape
    assert ({"embed_out.weight", "lm_head.weight"} & tensors.keys() == set()) == tie_embeddings


@pytest.mark.parametrize("folder", sorted(path.name for path in CASES.iterdir() if path.is_dir()), indirect=True)
def test_tensors_to_params_and_back(folder):
    """What a file held is what is written from the loaded params."""
    model, params = load_pretrained(folder)
    written = tensors_from_params(params, model.spec)
    stored = load_file(folder / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, array in stored.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_shards_with_an_index(folder):
    """Split over two files, the same params."""
    _, expected = load_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: array for name, array in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same(load_pretrained(folder)[1], expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_error(folder, r"model-00002-of-00002\.safetensors is missing")


def test_bfloat16_file(folder):
    """Read as the float32 numbers that bfloat16 stands for."""
    _, full = load_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_jax_file({name: jnp.asarray(x, jnp.bfloat16) for name, x in tensors.items()}, folder / "model.safetensors")
    _, params = load_pretrained(folder)
    same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), full))


@pytest.mark.parametrize("stored", [False, True])
def test_tied_head(folder, stored):
    """No head parameter, whether or not the file repeats the embedding under the head's name."""
    change_config(folder, tie_word_embeddings=True)
    if not stored:
        change_tensors(folder, lambda tensors: tensors.pop("embed_out.weight"))
    model, params = load_pretrained(folder)
    assert model.spec.tie_embeddings and "head" not in params


def test_constants_of_old_exports_are_passed_over(folder):
    """Rotary frequencies and causal masks were once stored."""
    _, expected = load_pretrained(folder)

    def add(tensors):
        for name in ("rotary_emb.inv_freq", "bias", "masked_bias"):
            tensors[f"gpt_neox.layers.0.attention.{name}"] = np.ones(4, np.float32)

    change_tensors(folder, add)
    same(load_pretrained(folder)[1], expected)


def test_rotary_settings_under_old_and_new_names(folder):
    """transformers 5 gathers them in rope_parameters."""
    old = load_pretrained(folder)[0].spec
    assert (old.rotary_fraction, old.rope_theta) == (0.25, 10000.0)
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    change_config(folder, ("rotary_pct", "rotary_emb_base"), rope_parameters=rope)
    new = load_pretrained(folder)[0].spec
    assert (new.rotary_fraction, new.rope_theta) == (0.5, 500.0)


def assert_error(directory, pattern):
    """Loading fails with a UserError of one line that matches, and names the folder."""
    with pytest.raises(UserError, match=pattern) as caught:
        load_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "mamba"}, r"config\.json: model_type='mamba'.*'gpt_neox', 'llama' and 'gpt2' are"),
        ({"quantization_config": {"bits": 4}}, r"config\.json: quantization_config=.*bits"),
        ({"num_key_value_heads": 2}, r"config\.json: num_key_value_heads=2 .*only llama"),
        ({"hidden_act": "relu"}, r"config\.json: hidden_act='relu'.*only 'gelu' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"config\.json: rope_scaling=.*linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"config\.json: rope_type='yarn'"),
        ({"rope_parameters": {"type": "yarn", "factor": 2.0}}, r"config\.json: rope_type='yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 500.0}}}, r"config\.json: .* 'full_attention' alone"),
        ({"attention_bias": False}, r"config\.json: attention_bias=False"),
        ({"interpolation": True}, r"config\.json: interpolation=True"),
        ({"method": "guess"}, r"config\.json: method='guess'.*vanilla.*latent"),
        ({"method": ["latent"]}, r"config\.json: method=\['latent'\]"),
        ({"method": "ponder", "interpolation": False}, r"config\.json: interpolation=False.*method='ponder'"),
        (
            {"method": "ponder", "interpolation": True, "residual_interpolated_embeds": False},
            r"config\.json: residual_interpolated_embeds=False",
        ),
        ({"method": "pause"}, r"config\.json: 'pause_token_id' is missing"),
        ({"method": "pause", "pause_token_id": 96}, r"config\.json: pause_token_id=96 is no token of vocab_size=96"),
        ({"head_dim": 16}, r"config\.json: head_dim=16"),
    ],
)
def test_config_that_is_not_implemented(folder, changes, pattern):
    """Names the file, the key, its value and what would do."""
    change_config(folder, **changes)
    assert_error(folder, pattern)


GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 29}


def test_config_of_gpt2():
    """Its own names, and its own defaults: a tied head, and an MLP of four times the width."""
    spec, recurrence = specs_from_config(GPT2, "config.json")
    assert spec == model_spec("gpt2", intermediate_size=64, max_position_embeddings=32, rope_theta=10000.0)
    assert recurrence.method == "vanilla"
    spec, _ = specs_from_config(GPT2 | {"n_inner": 24, "tie_word_embeddings": False}, "config.json")
    assert (spec.intermediate_size, spec.tie_embeddings) == (24, False)
    for key, value in {
        "activation_function": "relu", "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
        "add_cross_attention": True, "n_head": 3, "n_inner": 0,
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"^config\.json: .*{key}={value!r}"):
            specs_from_config(GPT2 | {key: value}, "config.json")
    for key in GPT2:
        with pytest.raises(UserError, match=rf"^config\.json: '{key}' is missing"):
            specs_from_config({name: value for name, value in GPT2.items() if name != key}, "config.json")


@pytest.mark.parametrize(
    "key",
    ["model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
     "max_position_embeddings", "num_latent_thoughts"],
)  # fmt: skip
def test_missing_config_key(folder, key):
    """None of the sizes has a hidden default."""
    change_config(folder, (key,))
    assert_error(folder, rf"config\.json: '{key}' is missing")


@pytest.mark.parametrize("text", ["{", "", "\x00", "[1]", "3"])
def test_config_that_is_not_json(folder, text):
    """Nor an object."""
    (folder / "config.json").write_text(text)
    assert_error(folder, r"config\.json (cannot be read as JSON|does not hold a JSON object)")


def test_missing_files(folder, tmp_path):
    """The weights; the config; the whole folder."""
    (folder / "model.safetensors").unlink()
    assert_error(folder, r"model\.safetensors is missing")
    (folder / "config.json").unlink()
    assert_error(folder, r"config\.json is missing")
    assert_error(tmp_path / "nowhere", r"there is no directory .*nowhere")


def test_index_without_a_map(folder):
    """A broken index is named, and so is one that names a file that is not there."""
    (folder / INDEX).write_text("{}")
    assert_error(folder, r"index\.json: 'weight_map' is missing")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2-of-2.safetensors"}}))
    assert_error(folder, r"model-2-of-2\.safetensors is missing: .*index\.json says")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights(folder, size):
    """In the length, in the header or in the data."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_error(folder, r"model\.safetensors is not a whole safetensors file")


DENSE = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
FUSED = "gpt_neox.layers.1.attention.query_key_value"
TENSOR_MISTAKES = {
    "missing": (lambda t: t.pop(DENSE), rf"tensor '{DENSE}' is missing"),
    "extra": (lambda t: t.update(more=np.ones(2, np.float32)), r"tensor 'more' is not part of this model"),
    "extra layer": (lambda t: t.update({DENSE.replace("1", "2"): t[DENSE]}), r"layers\.2\.mlp.* is not part"),
    "transposed": (lambda t: t.update({DENSE: t[DENSE].T}), rf"'{DENSE}' has shape \(32, 128\).*\(128, 32\)"),
    "fused": (
        lambda t: t.update({FUSED + ".bias": t[FUSED + ".bias"][:-1]}),
        r"query_key_value\.bias' has shape \(95,",
    ),
    "kernel": (lambda t: t.update({FUSED + ".weight": t[FUSED + ".weight"][:48]}), r"weight' has shape \(48, 32\)"),
    "one layer": (
        lambda t: t.update({"gpt_neox.layers.1.mlp.dense_4h_to_h.bias": np.ones(31, np.float32)}),
        r"'gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.bias' has shape \(31,\)",
    ),
    "vocabulary": (
        lambda t: t.update({"gpt_neox.embed_in.weight": np.ones((95, 32), np.float32)}),
        r"'gpt_neox\.embed_in\.weight' has shape \(95, 32\).*\(96, 32\)",
    ),
}


@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_tensors_that_do_not_fit_the_config(folder, mistake):
    """Names the tensor; a shape of the right size but the wrong way round is no better."""
    change, pattern = TENSOR_MISTAKES[mistake]
    change_tensors(folder, change)
    assert_error(folder, pattern)


def test_spec_of_a_llama_folder():
    """Every field comes from its key."""
    model, _ = load_pretrained(CASES / LLAMA)
    expected = model_spec(
        "llama", hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=88, vocab_size=96,
        max_position_embeddings=128, rope_theta=10000.0, attention="xla",
    )  # fmt: skip
    assert model.spec == expected
    assert model.recurrence_spec.method == "vanilla"
    latent = load_pretrained(CASES / NEOX)[0].recurrence_spec
    assert (latent.method, latent.num_latent_thoughts, latent.num_jacobi_iterations) == ("latent", 1, 3)


@pytest.mark.parametrize(
    ("case", "method", "number", "pause"),
    [
        ("gpt_neox-vanilla", "vanilla", 0, -1),
        ("llama-loop-2", "loop", 2, -1),
        ("llama-ponder-2", "ponder", 2, -1),
        ("gpt_neox-pause-1", "pause", 1, 95),
    ],
)
def test_methods_of_the_reference(case, method, number, pause):
    """By name; and all but loop, whose configs have nothing of its own, by their other keys too."""
    config = json.loads((CASES / case / "config.json").read_text())
    nameless = {key: value for key, value in config.items() if key != "method"}
    for each in [config] if method == "loop" else [config, nameless]:
        _, recurrence = specs_from_config(each, case)
        assert (recurrence.method, recurrence.num_latent_thoughts) == (method, number)
        assert recurrence.pause_token_id == pause
