"""Loading Hugging Face model folders."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from latentjax.errors import UserError, brief, shown
from latentjax.interop.hf_config import read_json, require, specs_from_config
from latentjax.interop.names import name_table
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel

INDEX = "model.safetensors.index.json"


def load_pretrained(directory: str | Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads a GPT-NeoX or LLaMA folder, plain or with latent thoughts.

    Args:
      directory: holds config.json and model.safetensors, or shards of it with their index.

    Returns:
      The model, computing in float32, and its float32 params: `model.apply({"params": params}, tokens_BT)` gives
      logits.

    Raises:
      UserError: a missing or broken file, a config that is not implemented, missing, extra or misshapen tensors.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    spec, recurrence_spec = specs_from_config(config, str(directory / "config.json"))
    return LanguageModel(spec, recurrence_spec), params_from_tensors(_read_tensors(directory), spec, str(directory))


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


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    names = ["model.safetensors"]
    if (directory / INDEX).exists():
        names = _names_of_shards(directory / INDEX)
    tensors = {}
    for name in names:
        path = directory / name
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


def _names_of_shards(index: Path) -> list[str]:
    places = require(read_json(index), "weight_map", str(index))
    names = set(places.values()) if isinstance(places, dict) and all(map(_is_text, places.values())) else {""}
    for name in names:
        # A name that leads out of the folder would have any file of this machine read.
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{index}: the weight map names {shown(name)}, which is no safetensors file beside it")
    return sorted(names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
