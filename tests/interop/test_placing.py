"""Weights on their way to the devices: one tensor at a time, in every dtype, onto every mesh; and what is refused."""

import json
import shutil
import tracemalloc
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from tiny import language_model, model_spec, params_of

from latentjax.config import default
from latentjax.errors import UserError
from latentjax.interop import placing, tensor_files
from latentjax.interop.hub import INDEX
from latentjax.interop.names import name_table
from latentjax.interop.pretrained import load_pretrained, read_model, read_params, tensors_from_params
from latentjax.opening import open_model
from latentjax.training.mesh import arrange_mesh
from latentjax.training.state import abstract_params

FOLDER = Path(__file__).parents[1] / "fixtures" / "parity" / "gpt_neox-latent-c1-r3"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def write(directory, tensors, num_files=1, **config):
    """A folder of tensors, spread over files with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    part = -(-len(tensors) // num_files)
    files = {name: f"part-{number // part}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: array for name, array in tensors.items() if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))
    return directory


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A LLaMA folder of 33 MB in bfloat16, of which the largest tensors, which follow one another, have 2."""
    sizes = {"num_layers": 4, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1000}
    model, rng = language_model(0, "llama", **sizes), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(nn.meta.unbox(shapes)["params"], sep="/").items()}
    tensors = {}
    for entry in name_table(model.spec):
        for name, parameter, row in entry.places(model.spec):
            values = rng.random(shapes[parameter][0 if row is None else 1 :], np.float32)
            tensors[name] = np.ascontiguousarray(entry.write(values, model.spec)).astype(ml_dtypes.bfloat16)
    return write(
        tmp_path_factory.mktemp("wide"), tensors, 3, model_type="llama", num_hidden_layers=4, hidden_size=512,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=2048, vocab_size=1000,
        max_position_embeddings=64,
    ), tensors  # fmt: skip


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_host_holds_one_tensor_at_a_time(wide, num_devices):
    """At its peak less than one and a half times the largest, as it is stored, whatever the mesh."""
    directory, tensors = wide
    sizes = default().mesh
    sizes.data, sizes.fsdp = 1, num_devices
    mesh = arrange_mesh(sizes, jax.devices()[:num_devices])
    model = read_model(directory)
    abstract = abstract_params(model, mesh)
    read_params(directory, model.spec, abstract)  # tracing and compiling take memory as well, once
    largest = max(array.nbytes for array in tensors.values())
    assert sum(array.nbytes for array in tensors.values()) > 12 * largest
    tracemalloc.start()
    params = read_params(directory, model.spec, abstract)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 1.5 * largest
    for name, array in tensors_from_params(params, model.spec).items():
        np.testing.assert_array_equal(array, tensors[name].astype(np.float32), err_msg=name)


def test_a_layer_is_written_into_the_memory_of_all():
    """The stack is given away and comes back: it is never there twice."""
    spec = model_spec()
    entry = next(entry for entry in name_table(spec) if entry.tensor.endswith("mlp.dense_h_to_4h.weight"))
    stack = placing._empty((3, 16, 24), jnp.dtype(jnp.float32), None)()
    place, tensor = stack.unsafe_buffer_pointer(), np.arange(384, dtype=np.float16).reshape(24, 16)
    written = placing._write_row(entry, spec, jnp.dtype(jnp.float32), None)(stack, tensor, 1)
    assert stack.is_deleted() and written.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(written, [np.zeros((16, 24)), tensor.T, np.zeros((16, 24))])


@pytest.mark.parametrize(("architecture", "dtype"), [("gpt_neox", "BF16"), ("llama", "F16"), ("gpt2", "F32")])
def test_every_dtype_and_architecture_onto_a_mesh(architecture, dtype, tmp_path):
    """Float32 numbers that are those stored, laid out over fsdp and tensor."""
    model = language_model(0, architecture, vocab_size=32, num_layers=3)
    tensors = {
        name: array.astype(DTYPES[dtype]) for name, array in tensors_from_params(params_of(model), model.spec).items()
    }
    spec = model.spec
    config = {"vocab_size": 32, "model_type": architecture}
    if architecture == "gpt2":
        config |= {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_inner": 24, "n_positions": 64}
    else:
        config |= {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": spec.num_heads,
                   "num_key_value_heads": spec.num_kv_heads, "intermediate_size": 24, "max_position_embeddings": 64,
                   "rotary_pct": 0.5, "rope_theta": 100.0}  # fmt: skip
    sizes = default().mesh
    sizes.update(data=2, fsdp=2, tensor=2)
    opened = open_model(write(tmp_path / "folder", tensors, 2, **config), mesh=sizes)
    for leaf in jax.tree.leaves(opened.params):
        assert leaf.dtype == np.float32 and len(leaf.sharding.device_set) == 8
    found = tensors_from_params(opened.params, opened.model.spec)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "folder")


def refused(directory, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        load_pretrained(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"weights are in {name}, a pickle, .*can run any code: save the model again as safetensors")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused(folder, dtype):
    """Quantised weights are not what their numbers say."""
    tensors = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, rf"tensor '{name}' is stored as '[A-Z0-9_]+'; only F32, F16, BF16 are read")


def test_a_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"gpt_neox.embed_in.weight": tensors["gpt_neox.embed_in.weight"]}, folder / "more.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}))
    refused(folder, r"tensor 'gpt_neox\.embed_in\.weight' is in both model\.safetensors and more\.safetensors")


def test_nothing_is_read_before_all_of_it_fits(folder, monkeypatch):
    """A tensor that is missing in the last of many files is found out at once."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(tensor_files.TensorFolder, "read", lambda *_: pytest.fail("read"))
    refused(folder, "tensor 'embed_out.weight' is missing")
