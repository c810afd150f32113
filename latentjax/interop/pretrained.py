"""Loading Hugging Face model folders, and the tensors that params are written as."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from latentjax.interop.hf_config import read_json, specs_from_config
from latentjax.interop.hub import CONFIG, find_folder
from latentjax.interop.names import name_table
from latentjax.interop.placing import Plan, each, kinds_of
from latentjax.interop.tensor_files import TensorFolder
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel


def load_pretrained(directory: str | Path) -> tuple[LanguageModel, dict[str, Any]]:
    """Reads a GPT-NeoX, LLaMA or GPT-2 folder, plain or with latent thoughts, onto the default device.

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
    return model, read_params(folder, model.spec, _abstract_params(model.spec))


def read_model(folder: Path) -> LanguageModel:
    """Returns the model that a folder's config.json describes, computing in float32 with attention by XLA.

    Raises:
      UserError: it is missing or damaged, or describes what is not implemented.
    """
    return LanguageModel(*specs_from_config(read_json(folder / CONFIG), str(folder / CONFIG)))


def read_params(folder: Path, spec: ModelSpec, abstract_params: Any) -> dict[str, Any]:
    """Reads a folder's weights onto the devices, tensor by tensor.

    Nothing but headers is read before all of them are known to fit. The host holds one tensor at a time.

    Args:
      abstract_params: shapes, dtypes and shardings, of which the last may be None: the default device.

    Raises:
      UserError: missing, broken or extra files or tensors.
    """
    tensors = TensorFolder(folder)
    plan = Plan(tensors.kinds, spec, abstract_params, str(folder))
    return plan.place(tensors.read(plan.names), are_read=True)


def params_from_tensors(tensors: dict[str, np.ndarray], spec: ModelSpec, source: str) -> dict[str, Any]:
    """Lays Hugging Face tensors out as a params tree (float32, all layers but the last stacked on axis 0).

    Raises:
      UserError: a tensor is missing, left over, or of another shape than the config says; `source` names the folder.
    """
    plan = Plan(kinds_of(tensors), spec, _abstract_params(spec), source)
    return plan.place(each(tensors, plan.names), are_read=False)


def tensors_from_params(params: dict[str, Any], spec: ModelSpec) -> dict[str, np.ndarray]:
    """The inverse of `params_from_tensors`: {Hugging Face name: array}, for params or for their gradients."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    tensors = {}
    for entry in name_table(spec):
        for name, parameter, row in entry.places(spec):
            array = np.asarray(flat[parameter]) if row is None else np.asarray(flat[parameter][row])
            tensors[name] = np.ascontiguousarray(entry.write(array, spec))
    return tensors


def _abstract_params(spec: ModelSpec) -> Any:
    """Shapes and dtypes of the parameters, all layers but the last stacked; without shardings."""
    vanilla = RecurrenceSpec("vanilla", 0, 0, (0,), 0, False, -1, 0, (), 0.0, 0.0, "full")
    variables = jax.eval_shape(LanguageModel(spec, vanilla).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return nn.meta.unbox(variables)["params"]
