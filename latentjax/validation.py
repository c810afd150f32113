"""Limits on the values of a config, checked before any device is touched."""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from latentjax.config import flatten
from latentjax.errors import UserError
from latentjax.models.attention import check_backend
from latentjax.models.backbone import ARCHITECTURES
from latentjax.models.loops import LOOPS
from latentjax.models.remat import POLICIES
from latentjax.recurrence.methods import METHODS

_CHOICES = {
    "model.architecture": tuple(ARCHITECTURES),
    "model.dtype": ("float32", "bfloat16"),
    "model.loops": LOOPS,
    "model.remat": tuple(POLICIES),
    "recurrence.method": tuple(METHODS),
}

# Lowest and highest allowed value, both included; numbers without an entry may not be negative.
_RANGES = {
    **dict.fromkeys(
        [
            "model.num_layers", "model.hidden_size", "model.num_heads", "model.intermediate_size", "model.vocab_size",
            "model.max_position_embeddings", "data.tokenizer_vocab_size", "data.sequence_length", "data.batch_size",
            "train.num_steps", "train.log_every_steps", "train.eval_batches", "train.sample_tokens",
            "train.gradient_accumulation_steps", "checkpoint.every_steps", "checkpoint.max_to_keep",
        ],
        (1, math.inf),
    ),
    "model.rotary_fraction": (0.0, 1.0),
    "model.rope_theta": (1.0, math.inf),
    "model.norm_epsilon": (1e-30, 1.0),
    "data.eval_fraction": (1e-9, 0.5),
    "optimizer.min_learning_rate_ratio": (0.0, 1.0),
    "optimizer.warmup_ratio": (0.0, 1.0),
    "optimizer.b1": (0.0, 1 - 1e-9),
    "optimizer.b2": (0.0, 1 - 1e-9),
    "optimizer.eps": (1e-30, 1.0),
    **dict.fromkeys((f"mesh.{axis}" for axis in ("replica", "data", "fsdp", "sequence", "tensor")), (-1, math.inf)),
}  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Checks every value by itself and the values against each other.

    Raises:
      UserError: the first value that cannot be, with what is allowed.
    """
    for key, value in flatten(config).items():
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{key}={value!r} is not known: choose {' or '.join(_CHOICES[key])}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(key, value, *_RANGES.get(key, (0, math.inf)))
    _check_model(config.model)
    _check_recurrence(config.recurrence)
    _check_data(config)
    _check_checkpoint(config.checkpoint)
    check_backend(config.model.attention)


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        limits = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise UserError(f"{key}={value!r} is out of range: it must be a number {limits}")


def _check_model(model: ConfigDict) -> None:
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}: change one"
        )
    kv_heads = model.num_kv_heads or model.num_heads
    if model.architecture == "gpt_neox" and kv_heads != model.num_heads:
        raise UserError(f"model.num_kv_heads={kv_heads}: gpt_neox has no grouped queries; set it to 0, or use llama")
    if model.num_heads % kv_heads:
        raise UserError(
            f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={kv_heads}: change one"
        )
    rotary_dims = int(model.hidden_size // model.num_heads * model.rotary_fraction)
    if rotary_dims % 2:
        raise UserError(
            f"model.rotary_fraction={model.rotary_fraction} of a head of {model.hidden_size // model.num_heads} is "
            f"{rotary_dims} dimensions, and rotation needs an even number: change it"
        )
    if model.architecture == "llama" and model.rotary_fraction != 1.0:
        raise UserError(f"model.rotary_fraction={model.rotary_fraction}: llama rotates whole heads; set it to 1.0")


def _check_recurrence(recurrence: ConfigDict) -> None:
    choices = recurrence.train_jacobi_iterations
    if not choices or not all(type(choice) is int and choice >= 0 for choice in choices):
        raise UserError(
            f"recurrence.train_jacobi_iterations={choices!r} must be whole numbers of at least 0, such as (2, 3, 4)"
        )


def _check_sources(data: ConfigDict) -> None:
    _check_pairs("data.mixture", data.mixture, '("path", weight)', (int, float))
    _check_pairs("data.eval_sets", data.eval_sets, '("name", "path")', str)
    if data.mixture and data.path:
        raise UserError(f"data.path={data.path!r} and data.mixture are both set: empty one of them")
    for path, weight in data.mixture:
        if not 0 < weight < math.inf:
            raise UserError(f"data.mixture: the weight of {path!r} is {weight!r}, but it must be a number above 0")
    names = [name for name, _ in data.eval_sets]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"data.eval_sets: the name {name!r} must be made of letters, digits, _ and -")
        if names.count(name) > 1:
            raise UserError(f"data.eval_sets: the name {name!r} stands for two sets: give each its own")


def _check_pairs(key: str, value: tuple, pair: str, second: Any) -> None:
    """Checks that `value` is a tuple of pairs of a text and a `second`."""
    for each in value:
        fits = isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) and each[0] != ""
        if not fits or not isinstance(each[1], second) or isinstance(each[1], bool) or each[1] == "":
            # A pair alone, without the comma that makes it one of a tuple, is an easy mistake.
            raise UserError(f"{key}={value!r} must be pairs, such as ({pair},) or ({pair}, {pair})")


def _check_data(config: ConfigDict) -> None:
    data, train = config.data, config.train
    for key in ("include", "exclude"):
        if not all(isinstance(pattern, str) for pattern in data[key]):
            raise UserError(f"data.{key}={data[key]!r} must be glob patterns in quotes")
    _check_sources(data)
    if not all(isinstance(prompt, str) and prompt for prompt in train.sample_prompts):
        raise UserError(f"train.sample_prompts={train.sample_prompts!r} must be texts in quotes, none of them empty")
    if data.sequence_length > config.model.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={data.sequence_length} is longer than the model's limit, "
            f"model.max_position_embeddings={config.model.max_position_embeddings}: shorten it or raise the limit"
        )
    if data.batch_size % train.gradient_accumulation_steps:
        raise UserError(
            f"data.batch_size={data.batch_size} is not divisible by "
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}: change one"
        )
    if [config.mesh[axis] for axis in config.mesh].count(-1) > 1 or 0 in [config.mesh[axis] for axis in config.mesh]:
        raise UserError("config group 'mesh': sizes are whole numbers of at least 1, of which one may be -1 (the rest)")


def _check_checkpoint(checkpoint: ConfigDict) -> None:
    if "://" in checkpoint.directory and not checkpoint.directory.startswith("gs://"):
        raise UserError(
            f"checkpoint.directory={checkpoint.directory!r} must be a path, or a URL that begins with gs://"
        )
