"""Translating a Hugging Face config.json, with the reference's keys for latent thoughts, to our settings."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from latentjax.errors import UserError, brief, shown
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.methods import METHODS

_MOST_PARAMETERS = 10**13


@dataclasses.dataclass(frozen=True)
class _Keys:
    """What a model type calls the settings that all have, and what of its others is implemented."""

    layers: str
    width: str
    heads: str
    positions: str
    inner: str
    activation: str
    activations: tuple[str, ...]
    epsilon: str
    default_epsilon: float
    ties: bool  # whether the head is tied where the config does not say
    only: dict[str, Any]  # keys of which one value is implemented


_KEYS = {
    "gpt_neox": _Keys(
        "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "intermediate_size",
        "hidden_act", ("gelu",), "layer_norm_eps", 1e-5, False,
        {"rope_scaling": None, "attention_bias": True, "mlp_bias": False},
    ),
    "llama": _Keys(
        "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "intermediate_size",
        "hidden_act", ("silu",), "rms_norm_eps", 1e-6, False,
        {"rope_scaling": None, "attention_bias": False, "mlp_bias": False},
    ),
    "gpt2": _Keys(
        "n_layer", "n_embd", "n_head", "n_positions", "n_inner",
        "activation_function", ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon", 1e-5, True,
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
}  # fmt: skip
_NOWHERE = {"quantization_config": None}  # of no model type is more implemented


def specs_from_config(config: dict[str, Any], source: str) -> tuple[ModelSpec, RecurrenceSpec]:
    """Translates a Hugging Face config, with the reference's keys for latent thoughts, to ours.

    Raises:
      UserError: a key is missing, or asks for what is not implemented; `source` names the file.
    """
    spec = _model_spec(config, source)
    layer = 4 * spec.hidden_size**2 + 2 * spec.hidden_size * spec.intermediate_size
    if spec.num_layers * layer + spec.vocab_size * spec.hidden_size > _MOST_PARAMETERS:
        raise UserError(f"{source}: describes a model of more than {_MOST_PARAMETERS:.0e} parameters: it is damaged")
    return spec, _recurrence_spec(config, spec.vocab_size, source)


def _recurrence_spec(config: dict[str, Any], vocab_size: int, source: str) -> RecurrenceSpec:
    method = config.get("method") or _method_by_keys(config)
    if not isinstance(method, str) or method not in METHODS:
        choices = ", ".join(METHODS)
        raise UserError(f"{source}: method={shown(method)} is not implemented; {choices} are")
    interpolates = _flag(config, "interpolation", source, method == "ponder")
    if interpolates != (method == "ponder"):
        raise UserError(f"{source}: interpolation={interpolates} is not implemented with method={method!r}")
    if interpolates and not _flag(config, "residual_interpolated_embeds", source, True):
        raise UserError(f"{source}: residual_interpolated_embeds=False is not implemented; only True is")
    pause_token_id = -1
    if method == "pause":
        pause_token_id = _whole(config, "pause_token_id", source, lowest=0)
        if pause_token_id >= vocab_size:
            raise UserError(f"{source}: pause_token_id={pause_token_id} is no token of vocab_size={vocab_size}")
    iterations = _whole(config, "num_jacobi_iterations", source, lowest=0, missing=3)
    return RecurrenceSpec(
        method=method,
        num_latent_thoughts=0 if method == "vanilla" else _whole(config, "num_latent_thoughts", source, lowest=0),
        num_jacobi_iterations=iterations,
        train_jacobi_iterations=(iterations,),
        backprop_passes=0,
        scale_embeddings=_flag(config, "scale_embeds", source, True),
        pause_token_id=pause_token_id,
        ponder_chunk_tokens=0,
        train_schedule=(),
        handover_ratio=0.0,
        train_tolerance=0.0,
        refinement="full",
    )


def _method_by_keys(config: dict[str, Any]) -> str:
    """The method of a config that does not name it, as the reference's own do not."""
    if not config.get("recurrent_model"):
        return "vanilla"
    if config.get("interpolation"):
        return "ponder"
    return "latent" if config.get("pause_token_id") is None else "pause"


def _model_spec(config: dict[str, Any], source: str) -> ModelSpec:
    architecture = require(config, "model_type", source)
    if not isinstance(architecture, str) or architecture not in _KEYS:
        raise UserError(f"{source}: model_type={shown(architecture)} is not implemented; {_in_words(_KEYS)}")
    keys, neox = _KEYS[architecture], architecture == "gpt_neox"
    _expect(config, keys.activation, keys.activations, source)
    for key, only in (keys.only | _NOWHERE).items():
        if key in config and config[key] not in (only, None):
            raise UserError(f"{source}: {key}={shown(config[key])} is not implemented; only {only!r} is")
    width = _whole(config, keys.width, source)
    num_heads = _whole(config, keys.heads, source)
    num_kv_heads = _whole(config, "num_key_value_heads", source, lowest=0, missing=0)
    head_dim, rest = divmod(width, num_heads)
    if rest or num_heads % (num_kv_heads or num_heads):
        raise UserError(
            f"{source}: {keys.width}={width}, {keys.heads}={num_heads} and num_key_value_heads="
            f"{num_kv_heads or num_heads} do not divide one another"
        )
    if architecture != "llama" and num_kv_heads not in (0, num_heads):
        raise UserError(f"{source}: num_key_value_heads={num_kv_heads} is not implemented; only llama groups queries")
    if config.get("head_dim") not in (None, head_dim):
        raise UserError(f"{source}: head_dim={shown(config['head_dim'])} is not {keys.width} / {keys.heads}")
    rotary_fraction, rope_theta = (0.0, 10000.0) if architecture == "gpt2" else _rotary(config, source, neox)
    if int(head_dim * rotary_fraction) % 2:
        raise UserError(f"{source}: {int(head_dim * rotary_fraction)} dimensions of a head cannot be rotated in pairs")
    # Of GPT-2, null stands for four times the width.
    inner = 4 * width if architecture == "gpt2" else None
    epsilon = {keys.epsilon: keys.default_epsilon} | config
    return ModelSpec(
        architecture=architecture,
        num_layers=_whole(config, keys.layers, source),
        hidden_size=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=_whole(config, keys.inner, source, missing=inner),
        vocab_size=_whole(config, "vocab_size", source),
        max_position_embeddings=_whole(config, keys.positions, source),
        rotary_fraction=rotary_fraction,
        rope_theta=rope_theta,
        parallel_residual=_flag(config, "use_parallel_residual", source, True) if neox else False,
        norm_epsilon=_number(epsilon, keys.epsilon, source, 1e-30, 1.0),
        tie_embeddings=_flag(config, "tie_word_embeddings", source, keys.ties),
        dtype="float32",
        attention="xla",  # serves everywhere
        loops="rolled",
        remat="none",
    )


def _rotary(config: dict[str, Any], source: str, neox: bool) -> tuple[float, float]:
    """The share of each head that is rotated, and the base of the wavelengths."""
    # transformers 5 gathers the rotary settings in rope_parameters; before, each had a key of its own.
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rope_parameters={shown(rope)} is no JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{source}: rope_type={shown(kind)} is not implemented; only 'default' is")
    if differing := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(
            f"{source}: rope_parameters of {shown(differing[0])} alone are not implemented, only those of all layers"
        )
    rope = {
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
        "rope_theta": config.get("rope_theta", config.get("rotary_emb_base", 10000.0)),
    } | rope
    fraction = _number(rope, "partial_rotary_factor", source, 0.0, 1.0) if neox else 1.0
    return fraction, _number(rope, "rope_theta", source, 1.0, 1e38)


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
        raise UserError(f"{source}: {key}={shown(config[key])} is not implemented; {_in_words(allowed)}")


def _in_words(choices: Collection[Any]) -> str:
    *others, last = map(repr, choices)
    return f"{', '.join(others)} and {last} are" if others else f"only {last} is"
