"""Translating a Hugging Face config.json, with the reference's keys for latent thoughts, to our settings."""

import json
from pathlib import Path
from typing import Any

from latentjax.errors import UserError, brief, shown
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec

_MOST_PARAMETERS = 10**13


def specs_from_config(config: dict[str, Any], source: str) -> tuple[ModelSpec, RecurrenceSpec]:
    """Translates a Hugging Face config, with the reference's keys for latent thoughts, to ours.

    Raises:
      UserError: a key is missing, or asks for what is not implemented; `source` names the file.
    """
    architecture = require(config, "model_type", source)
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


# The class of transformers for each architecture, and the names that our own code for it begins with.
_CLASSES = {"gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX"), "llama": ("LlamaForCausalLM", "Llama")}
CODE_FILES = ("configuration_latentjax.py", "modeling_latentjax.py")  # in interop/hf


def is_vanilla(recurrence_spec: RecurrenceSpec) -> bool:
    """Returns whether the method is one pass over the tokens, so that transformers' own classes compute it."""
    return recurrence_spec.method == "vanilla" or recurrence_spec.num_latent_thoughts == 0


def config_from_specs(
    spec: ModelSpec, recurrence_spec: RecurrenceSpec, dtype: str = "float32", eod_id: int | None = None
) -> dict[str, Any]:
    """Translates our settings to a Hugging Face config.json, the inverse of `specs_from_config`.

    The keys for the methods are the reference's, beside `method`, which tells them apart. A config that is not vanilla
    names the classes of `interop/hf`, whose files (CODE_FILES) have to be beside it.

    Args:
      dtype: of the tensors beside it.
      eod_id: the token that ends documents, if there is a tokenizer.
    """
    own_class, stem = _CLASSES[spec.architecture]
    config: dict[str, Any] = {
        "architectures": [own_class],
        "model_type": spec.architecture,
        "method": recurrence_spec.method,
        "torch_dtype": dtype,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        # As in training; the reference's initialiser, for whoever trains on.
        "attention_dropout": 0.0,
        "initializer_range": (2 / (5 * spec.hidden_size)) ** 0.5,
        "use_cache": True,
    }
    if spec.architecture == "gpt_neox":
        config |= {
            "hidden_act": "gelu",
            "hidden_dropout": 0.0,
            "attention_bias": True,
            "layer_norm_eps": spec.norm_epsilon,
            "rotary_pct": spec.rotary_fraction,
            "rotary_emb_base": spec.rope_theta,
            "use_parallel_residual": spec.parallel_residual,
        }
    else:
        config |= {
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "num_key_value_heads": spec.kv_heads,
            "rms_norm_eps": spec.norm_epsilon,
            "rope_theta": spec.rope_theta,
        }
    if is_vanilla(recurrence_spec):
        return config | {"method": "vanilla"}
    config |= {
        "architectures": [f"Latentjax{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_latentjax.Latentjax{stem}Config",
            "AutoModelForCausalLM": f"modeling_latentjax.Latentjax{stem}ForCausalLM",
        },
        "recurrent_model": True,
        "num_latent_thoughts": recurrence_spec.num_latent_thoughts,
        "scale_embeds": recurrence_spec.scale_embeddings,
        "interpolation": recurrence_spec.method == "ponder",
    }
    if recurrence_spec.method == "latent":
        config |= {
            "num_jacobi_iterations": recurrence_spec.num_jacobi_iterations,
            "random_jacobi_iterations": False,
            "prefill_tolerance": None,
        }
    elif recurrence_spec.method == "ponder":
        config["residual_interpolated_embeds"] = True
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of a model folder that holds a JSON object.

    Raises:
      UserError: it is missing, not JSON, or another JSON value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give the directory of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {brief(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def require(config: dict[str, Any], key: str, source: str) -> Any:
    """Returns the value of a key.

    Raises:
      UserError: it is not there; `source` names the file.
    """
    if key not in config:
        raise UserError(f"{source}: {key!r} is missing")
    return config[key]


def _whole(config: dict[str, Any], key: str, source: str, *, lowest: int = 1, missing: int | None = None) -> int:
    value = require(config, key, source) if missing is None else config.get(key)
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
