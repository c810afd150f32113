"""Folders as they are written: the same bits, in files of any size, whole or not at all."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import language_model, params_of

from latentjax.errors import UserError
from latentjax.interop import writing
from latentjax.interop.exported_config import CODE_FILES, config_from_specs, is_vanilla
from latentjax.interop.hf_config import specs_from_config
from latentjax.interop.pretrained import load_pretrained, tensors_from_params
from latentjax.recurrence.methods import METHODS

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
CONFIGS = {path.parent.name: json.loads(path.read_text()) for path in sorted(CASES.glob("*/config.json"))}
NAMES = [name for name, config in CONFIGS.items() if config["method"] in METHODS]
# What a config from elsewhere need not say, or says of more than the model.
OF_OTHERS = {"architectures", "bos_token_id", "eos_token_id", "num_key_value_heads"}


def write(folder, model, params, dtype="float32", max_shard_bytes=10**9):
    folder.mkdir()
    writing.write_configs(folder, config_from_specs(model.spec, model.recurrence_spec, dtype))
    return writing.write_weights(folder, params, model.spec, dtype, max_shard_bytes)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_written(name, tmp_path):
    """All tensors to the last bit, under the names they had; and a config that says the same."""
    model, params = load_pretrained(CASES / name)
    assert write(tmp_path / "again", model, params) == sum(leaf.size for leaf in jax.tree.leaves(params))
    before, after = load_file(CASES / name / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor, array in before.items():
        assert after[tensor].dtype == array.dtype
        np.testing.assert_array_equal(after[tensor], array, err_msg=tensor)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    kept = {key: value for key, value in CONFIGS[name].items() if key not in OF_OTHERS}
    assert {key: written[key] for key in kept} == kept
    assert specs_from_config(written, "") == (model.spec, model.recurrence_spec)
    assert ("auto_map" in written) != is_vanilla(model.recurrence_spec)
    again, params_again = load_pretrained(tmp_path / "again")
    assert again == model
    assert_same(params_again, params)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "parallel_residual": False, "norm_epsilon": 1e-4}])
def test_every_setting_comes_back(architecture, changes):
    for method, count in (("vanilla", 0), ("latent", 2)):
        model = language_model(count, architecture, method=method, **changes)
        if architecture != "gpt_neox":
            model = model.clone(spec=dataclasses.replace(model.spec, parallel_residual=False))
        spec, recurrence_spec = specs_from_config(config_from_specs(model.spec, model.recurrence_spec), "")
        kept = {"num_kv_heads": model.spec.num_kv_heads, "rope_theta": model.spec.rope_theta}
        kept |= {} if architecture == "llama" else {"num_kv_heads": 0}
        assert dataclasses.replace(spec, **kept) == model.spec
        if method == "latent":
            assert recurrence_spec == model.recurrence_spec
        else:
            assert recurrence_spec.method == "vanilla"


def test_shards(tmp_path):
    """No file is larger than was said, unless it holds one tensor; the index says where each is."""
    model = language_model(1)
    params, limit = params_of(model), 5000
    write(tmp_path / "one", model, params)
    write(tmp_path / "many", model, params, max_shard_bytes=limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "one" / "model.safetensors.index.json").exists()
    assert [path.name for path in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    contents = {path.name: load_file(path) for path in files}
    assert index["weight_map"] == {tensor: name for name, arrays in contents.items() for tensor in arrays}
    sizes = [sum(array.nbytes for array in arrays.values()) for arrays in contents.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for size, arrays in zip(sizes, contents.values(), strict=True):
        assert size <= limit or len(arrays) == 1
    assert_same(load_pretrained(tmp_path / "many")[1], load_pretrained(tmp_path / "one")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype, tmp_path):
    """Rounded to nearest, and marked as such for every reader."""
    model = language_model(1, "llama")
    params = params_of(model)
    write(tmp_path / "half", model, params, dtype)
    with safe_open(tmp_path / "half" / "model.safetensors", framework="flax") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in tensors_from_params(params, model.spec).items():
            stored = file.get_tensor(name)
            assert stored.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(stored, jnp.asarray(array).astype(dtype), err_msg=name)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    assert_same(load_pretrained(tmp_path / "half")[1], rounded)


@pytest.mark.parametrize(("number", "dtype"), [(7e4, "float16"), (np.nan, "float32"), (np.inf, "bfloat16")])
def test_numbers_that_cannot_be_written(number, dtype, tmp_path):
    model = language_model(1)
    params = jax.tree.map(lambda leaf: leaf, params_of(model))
    params["backbone"]["last_layer"]["mlp_out"]["bias"] = jnp.full(16, number)
    reason = "float16 does not reach: choose another --dtype" if number == 7e4 else "not finite"
    with pytest.raises(UserError, match=rf"'gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.bias' has numbers .*{reason}"):
        write(tmp_path / "x", model, params, dtype)


def test_one_tensor_at_a_time(tmp_path):
    """Host memory stays below two of the largest tensor, whatever there is of them."""
    model = language_model(1, num_layers=6, hidden_size=128, intermediate_size=512, vocab_size=64)
    params = jax.tree.map(jnp.ones_like, params_of(model))
    write(tmp_path / "warm", model, params)
    largest, total = 4 * 128 * 512, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    try:
        write(tmp_path / "x", model, params)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * largest < total / 5


def test_a_folder_is_whole_or_not_there(tmp_path):
    output = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), writing.new_folder(output) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(output.parent.iterdir()) == []
    with writing.new_folder(output) as folder:
        (folder / "whole").write_text("")
        assert not output.exists() and folder.name == "out.partial"
    assert [path.name for path in output.parent.rglob("*")] == ["out", "whole"]
    with pytest.raises(UserError, match="out is there already, and nothing is overwritten"), writing.new_folder(output):
        pass


def test_what_a_killed_export_has_left_is_in_nobody_s_way(tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (
        pytest.raises(UserError, match=r"out\.partial is there, and no left"),
        writing.new_folder(tmp_path / "out"),
    ):
        pass
    assert partial.is_dir()
    (partial / ".latentjax-export").touch()
    (partial / "old").touch()
    with writing.new_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_nowhere_to_write(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--output") as caught, writing.new_folder(output):
            pass
        assert "\n" not in str(caught.value)


def test_sizes():
    assert [writing.parse_size(text) for text in ("5GB", "500mb", "2GiB", "12", " 3 KB ")] == [
        5 * 10**9, 5 * 10**8, 2 * 2**30, 12, 3000,
    ]  # fmt: skip
    for text in ("", "GB", "0GB", "-1", "1.5GB", "5XB", "9" * 20):
        with pytest.raises(UserError, match="--max_shard_size"):
            writing.parse_size(text)


def test_the_code_is_copied_as_it_is(tmp_path):
    writing.write_code(tmp_path)
    for name in CODE_FILES:
        text = (tmp_path / name).read_text()
        compile(text, name, "exec")
        assert "import latentjax" not in text and "from latentjax" not in text
