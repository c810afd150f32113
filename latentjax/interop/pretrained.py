"""Loading Hugging Face model folders."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from latentjax.errors import UserError, brief, shown
from latentjax.interop.names import name_table
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel

INDEX = "model.safetensors.index.json"
_MOST_PARAMETERS = 10**13


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
    config = _read_json(directory / "config.json")
    spec, recurrence_spec = specs_from_config(config, str(directory / "config.json"))
    return LanguageModel(spec, recurrence_spec), params_from_tensors(_read_tensors(directory), spec, str(directory))


def specs_from_config(config: dict[str, Any], source: str) -> tuple[ModelSpec, RecurrenceSpec]:
    """Translates a Hugging Face config, with the reference's keys for latent thoughts, to ours.

    Raises:
      UserError: a key is missing, or asks for what is not implemented; `source` names the file.
    """
    architecture = _require(config, "model_type", source)
    neox = architecture == "gpt_neox"
    _expect(config, "model_type", ("gpt_neox", "llama"), source)
    _expect(config, "hidden_act", ("gelu",) if neox else ("silu",), source)
    for key, only in (("rope_scaling", None), ("attention_bias", neox), ("mlp_bias", False), ("interpolation", False)):
        if key in config and config[key] not in (only, None):
            raise UserError(f"{source}: {key}={shown(config[key])} is not implemented; only {only!r} is")
    hidden_size = _whole(config, "hidden_size", source)
    num_heads = _whole(config, "num_attention_heads", source)
    num_kv_heads = _whole(config, "num_key_value_heads", source, lowest=0, missing=0)
    head_dim, rest = divmod(hidden_size, num_heads)
    if rest or num_heads % (num_kv_heads or num_heads):
        raise UserError(
            f"{source}: hidden_size={hidden_size}, num_attention_heads={num_heads} and "
            f"num_key_value_heads={num_kv_heads or num_heads} do not divide one another"
        )
    if config.get("head_dim") not in (None, head_dim):
        raise UserError(f"{source}: head_dim={shown(config['head_dim'])} is not hidden_size / num_attention_heads")
    # transformers 5 gathers the rotary settings in rope_parameters; before, each had a key of its own.
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters={shown(rope)} is no JSON object")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{source}: rope_type={shown(rope['rope_type'])} is not implemented; only 'default' is")
    rope = {
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
        "rope_theta": config.get("rope_theta", config.get("rotary_emb_base", 10000.0)),
    } | rope
    rotary_fraction = _number(rope, "partial_rotary_factor", source, 0.0, 1.0) if neox else 1.0
    if int(head_dim * rotary_fraction) % 2:
        raise UserError(f"{source}: {int(head_dim * rotary_fraction)} dimensions of a head cannot be rotated in pairs")
    epsilon = "layer_norm_eps" if neox else "rms_norm_eps"
    spec = ModelSpec(
        architecture=architecture,
        num_layers=_whole(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=_whole(config, "intermediate_size", source),
        vocab_size=_whole(config, "vocab_size", source),
        max_position_embeddings=_whole(config, "max_position_embeddings", source),
        rotary_fraction=rotary_fraction,
        rope_theta=_number(rope, "rope_theta", source, 1.0, 1e38),
        parallel_residual=_flag(config, "use_parallel_residual", source, True) if neox else False,
        norm_epsilon=_number({epsilon: 1e-5 if neox else 1e-6} | config, epsilon, source, 1e-30, 1.0),
        tie_embeddings=_flag(config, "tie_word_embeddings", source, False),
        dtype="float32",
        attention="xla",  # serves everywhere
        loops="rolled",
        remat="none",
    )
    layer = 4 * spec.hidden_size**2 + 2 * spec.hidden_size * spec.intermediate_size
    if spec.num_layers * layer + spec.vocab_size * spec.hidden_size > _MOST_PARAMETERS:
        raise UserError(f"{source}: describes a model of more than {_MOST_PARAMETERS:.0e} parameters: it is damaged")
    method = config.get("method") or ("latent" if config.get("recurrent_model") else "vanilla")
    if method not in ("vanilla", "latent"):
        raise UserError(f"{source}: method={shown(method)} is not implemented; vanilla and latent are")
    iterations = _whole(config, "num_jacobi_iterations", source, lowest=0, missing=3)
    return spec, RecurrenceSpec(
        method=method,
        num_latent_thoughts=_whole(config, "num_latent_thoughts", source, lowest=0) if method == "latent" else 0,
        num_jacobi_iterations=iterations,
        train_jacobi_iterations=(iterations,),
        backprop_passes=0,
        scale_embeddings=_flag(config, "scale_embeds", source, True),
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
    places = _require(_read_json(index), "weight_map", str(index))
    names = set(places.values()) if isinstance(places, dict) and all(map(_is_text, places.values())) else {""}
    for name in names:
        # A name that leads out of the folder would have any file of this machine read.
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{index}: the weight map names {shown(name)}, which is no safetensors file beside it")
    return sorted(names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the directory of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def _require(config: dict[str, Any], key: str, source: str) -> Any:
    if key not in config:
        raise UserError(f"{source}: {key!r} is missing")
    return config[key]


def _whole(config: dict[str, Any], key: str, source: str, *, lowest: int = 1, missing: int | None = None) -> int:
    value = _require(config, key, source) if missing is None else config.get(key)
    if value is None and missing is not None:
        return missing
    if type(value) is not int or not lowest <= value < 2**31:
        raise UserError(f"{source}: {key}={shown(value)} is not a whole number of at least {lowest}")
    return value


def _number(config: dict[str, Any], key: str, source: str, low: float, high: float) -> float:
    value = config[key]
    if type(value) not in (int, float) or not low <= value <= high:
        raise UserError(f"{source}: {key}={shown(value)} is not a number from {low} to {high}")
    return float(value)


def _flag(config: dict[str, Any], key: str, source: str, missing: bool) -> bool:
    value = config.get(key, missing)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key}={shown(value)} is neither true nor false")
    return value


def _expect(config: dict[str, Any], key: str, allowed: tuple[Any, ...], source: str) -> None:
    if config.get(key, allowed[0]) not in allowed:
        choices = " and ".join(repr(choice) for choice in allowed)
        raise UserError(f"{source}: {key}={shown(config[key])} is not implemented; {choices} are")
