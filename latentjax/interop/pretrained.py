"""Loading Hugging Face model folders."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from latentjax.errors import UserError, brief
from latentjax.interop.hf_config import read_json, specs_from_config
from latentjax.interop.hub import CONFIG, find_folder, weight_files
from latentjax.interop.names import name_table
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel


def load_pretrained(directory: str | Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads a GPT-NeoX or LLaMA folder, plain or with latent thoughts.

    Args:
      directory: holds config.json and model.safetensors, or shards of it with their index; or an id of the hub.

    Returns:
      The model, computing in float32, and its float32 params: `model.apply({"params": params}, tokens_BT)` gives
      logits.

    Raises:
      UserError: a missing or broken file, a config that is not implemented, missing, extra or misshapen tensors.
    """
    folder = find_folder(directory)
    model = read_model(folder)
    return model, params_from_tensors(read_tensors(folder), model.spec, str(folder))


def read_model(folder: Path) -> LanguageModel:
    """Returns the model that a folder's config.json describes, computing in float32 with attention by XLA.

    Raises:
      UserError: it is missing or damaged, or describes what is not implemented.
    """
    return LanguageModel(*specs_from_config(read_json(folder / CONFIG), str(folder / CONFIG)))


def read_params(folder: Path, spec: ModelSpec, abstract_params: Any) -> dict[str, Any]:
    """Reads a folder's weights onto the devices.

    Args:
      abstract_params: shapes, dtypes and shardings.

    Raises:
      UserError: missing, broken or extra files or tensors.
    """
    params = params_from_tensors(read_tensors(folder), spec, str(folder))
    return jax.tree.map(
        lambda leaf, abstract: jax.device_put(leaf.astype(abstract.dtype), abstract.sharding), params, abstract_params
    )


def params_from_tensors(tensors: dict[str, np.ndarray], spec: ModelSpec, source: str) -> dict[str, Any]:
    """Lays Hugging Face tensors out as a params tree (float32, all layers but the last stacked on axis 0).

    Raises:
      UserError: a tensor is missing, left over, or of another shape than the config says; `source` names the folder.
    """
    remaining = dict(tensors)
    shapes = _parameter_shapes(spec)
    rows: dict[str, list[np.ndarray]] = {}
    stacked = set()
    for entry in name_table(spec):
        for name, parameter, row in entry.places(spec):
            shape = shapes[parameter] if row is None else shapes[parameter][1:]
            # Compared before it is laid out: a transposed matrix would fit as well, and mean nothing.
            tensor_shape = entry.write(np.broadcast_to(np.float32(0), shape), spec).shape
            if name not in remaining:
                raise UserError(f"{source}: tensor {name!r} is missing")
            array = np.asarray(remaining.pop(name), np.float32)
            if array.shape != tensor_shape:
                raise UserError(
                    f"{source}: tensor {name!r} has shape {array.shape}, but config.json makes it {tensor_shape}"
                )
            rows.setdefault(parameter, []).append(entry.read(array, spec))
            if row is not None:
                stacked.add(parameter)
    params = {
        tuple(parameter.split("/")): jnp.asarray(np.stack(arrays) if parameter in stacked else arrays[0])
        for parameter, arrays in rows.items()
    }
    if spec.tie_embeddings:  # a tied head may be stored all the same
        remaining = {
            name: array for name, array in remaining.items() if name not in ("embed_out.weight", "lm_head.weight")
        }
    # Old GPT-NeoX and LLaMA exports carry constants that are recomputed here.
    derived = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    extra = sorted(name for name in remaining if not name.endswith(derived))
    if extra:
        raise UserError(f"{source}: tensor {extra[0]!r} is not part of this model ({len(extra)} such)")
    return unflatten_dict(params)


def tensors_from_params(params: dict[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
    """The inverse of `params_from_tensors`: {Hugging Face name: array}, for params or for their gradients."""
    flat = flatten_dict(params, sep="/")
    tensors = {}
    for entry in name_table(spec):
        for name, parameter, row in entry.places(spec):
            array = np.asarray(flat[parameter]) if row is None else np.asarray(flat[parameter][row])
            tensors[name] = np.ascontiguousarray(entry.write(array, spec))
    return tensors


def _parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """{path of a parameter: its shape}, all layers but the last stacked."""
    vanilla = RecurrenceSpec("vanilla", 0, 0, (0,), 0, False)
    variables = jax.eval_shape(LanguageModel(spec, vanilla).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return {path: leaf.shape for path, leaf in flatten_dict(nn.meta.unbox(variables)["params"], sep="/").items()}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Returns {name: float32 array} of all tensors of a folder.

    Raises:
      UserError: a file is missing or broken.
    """
    tensors = {}
    for name in weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path} is missing: a model folder holds config.json and safetensors (pickles are not read)"
            )
        try:
            # The flax framework reads bfloat16, which NumPy's does not.
            with safe_open(path, framework="flax") as file:
                tensors.update({key: np.asarray(file.get_tensor(key).astype(jnp.float32)) for key in list(file.keys())})
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            # All but the first: tensors of a dtype that NumPy has no name for, or of more items than it can count.
            raise UserError(f"{path} is not a whole safetensors file: {brief(error)}") from error
    return tensors
