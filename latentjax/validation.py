"""Limits on the values of a config, checked before any device is touched."""

import re
from typing import Any

from ml_collections import ConfigDict

from latentjax.config import TYPE_NAMES, default, flatten
from latentjax.errors import UserError, shown
from latentjax.models.attention import check_backend
from latentjax.models.backbone import ARCHITECTURES
from latentjax.models.loops import LOOPS
from latentjax.models.remat import POLICIES
from latentjax.recurrence.methods import METHODS, REFINEMENTS

_CHOICES = {
    "data.on_corrupt_block": ("stop", "skip"),
    "model.architecture": tuple(ARCHITECTURES),
    "model.dtype": ("float32", "bfloat16"),
    "model.loops": LOOPS,
    "model.remat": tuple(POLICIES),
    "recurrence.method": tuple(METHODS),
    "recurrence.refinement": tuple(REFINEMENTS),
    "train.on_bad_numbers": ("rewind", "stop", "skip"),
}

# What 32-bit numbers hold: devices count and index in int32 and compute in float32.
_LARGEST_SIZE = 2**31 - 1
_LARGEST_FLOAT = 3.4e38
# Of what only the host counts: as good as no limit.
_LARGEST_COUNT = 2**63 - 1
# A decay nearer to 1 is 1 in float32, and the first step's bias correction would divide by zero.
_LARGEST_DECAY = 1 - 1e-7

# R: many more than any model needs, few enough to be computed.
MOST_JACOBI_ITERATIONS = 10_000

# Lowest and highest allowed value, both included; numbers without an entry may not be negative.
_RANGES = {
    **dict.fromkeys(
        [
            "model.num_layers", "model.hidden_size", "model.num_heads", "model.intermediate_size", "model.vocab_size",
            "model.max_position_embeddings", "data.tokenizer_vocab_size", "data.sequence_length", "data.batch_size",
            "train.num_steps", "train.sample_tokens", "train.gradient_accumulation_steps", "train.max_skipped_updates",
            "train.max_rewinds", "train.eval_tasks_batch_tokens",
        ],
        (1, _LARGEST_SIZE),
    ),
    **dict.fromkeys(
        ["train.log_every_steps", "train.eval_batches", "checkpoint.every_steps", "checkpoint.max_to_keep"],
        (1, _LARGEST_COUNT),
    ),
    # Growing passes are written out one after another, and each of them is another program's worth of compiling.
    "recurrence.num_latent_thoughts": (0, 1000),
    "recurrence.num_jacobi_iterations": (0, MOST_JACOBI_ITERATIONS),
    "recurrence.pause_token_id": (-1, _LARGEST_SIZE),
    "recurrence.handover_ratio": (0.0, 1.0),
    "model.num_kv_heads": (0, _LARGEST_SIZE),
    "model.rotary_fraction": (0.0, 1.0),
    "model.rope_theta": (1.0, _LARGEST_FLOAT),
    "model.norm_epsilon": (1e-30, 1.0),
    "data.eval_fraction": (1e-9, 0.5),
    # More would start threads and processes, or fill the memory, without end.
    "data.num_threads": (0, 1000),
    "data.num_workers": (0, 1000),
    "data.prefetch_batches": (0, 10_000),
    "data.device_prefetch": (0, 1000),
    "data.seed": (0, 2**64 - 1),
    "train.spike_window": (10, 1_000_000),
    "optimizer.min_learning_rate_ratio": (0.0, 1.0),
    "optimizer.warmup_ratio": (0.0, 1.0),
    "optimizer.b1": (0.0, _LARGEST_DECAY),
    "optimizer.b2": (0.0, _LARGEST_DECAY),
    "optimizer.eps": (1e-30, 1.0),
    "train.lost_after_seconds": (1.0, 600.0),  # before jax loses its own patience
    "train.hung_after_seconds": (0.0, _LARGEST_FLOAT),
    "train.seed": (0, 2**32 - 1),  # jax would take it modulo 2**32
    **dict.fromkeys(
        ["mesh.replica", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"],
        (-1, _LARGEST_SIZE),
    ),
}  # fmt: skip

# Models and batches beyond these are slips of the keyboard: a digit or two too many.
_MOST_PARAMETERS = 10**13
_MOST_SLOTS = 2**31 - 1  # of a step

_FILLED = ("data.tokenizer", "data.store_cache")  # an empty path would be the current directory


def validate(config: ConfigDict) -> None:
    """Checks every value by itself and the values against each other.

    Raises:
      UserError: the first value that cannot be, with what is allowed.
    """
    defaults = flatten(default())
    for key, value in flatten(config).items():
        _check_type(key, value, type(defaults[key]))
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{key}={shown(value)} is not known: choose {' or '.join(_CHOICES[key])}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            largest = _LARGEST_COUNT if isinstance(value, int) else _LARGEST_FLOAT
            _check_range(key, value, *_RANGES.get(key, (0, largest)))
        if key in _FILLED and not value:
            raise UserError(f"{key} is empty: set it to {defaults[key]!r}, the default, or another")
    check_backend(config.model.attention)
    _check_model(config.model)
    _check_recurrence(config.recurrence, config.model.vocab_size)
    _check_data(config)
    _check_tasks(config.train)
    _check_spikes(config.train, config.checkpoint.every_steps)
    _check_checkpoint(config.checkpoint)
    _check_mesh(config.mesh)
    _check_size(config)


def _check_type(key: str, value: Any, kind: type) -> None:
    """Checks what a recipe can get past the config's own watch over types: None, and true for a number."""
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise UserError(f"config key {key!r} takes {TYPE_NAMES[kind]}, not {shown(value)}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}={shown(value)} holds the character U+0000, which no path or name can: leave it out")


def _check_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        no_limit = high in (_LARGEST_COUNT, _LARGEST_FLOAT) and value < high
        limits = f"at least {low}" if no_limit else f"from {low} to {high}"
        raise UserError(f"{key}={shown(value)} is out of range: it must be a number {limits}")


def _check_model(model: ConfigDict) -> None:
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}: change one"
        )
    kv_heads = model.num_kv_heads or model.num_heads
    if model.architecture != "llama" and kv_heads != model.num_heads:
        raise UserError(
            f"model.num_kv_heads={kv_heads}: {model.architecture} has no grouped queries; set it to 0, or use llama"
        )
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
    if model.architecture == "gpt2" and model.rotary_fraction != 0.0:
        raise UserError(
            f"model.rotary_fraction={model.rotary_fraction}: gpt2 learns its positions and rotates none; set it to 0.0"
        )


def _check_recurrence(recurrence: ConfigDict, vocab_size: int) -> None:
    choices = recurrence.train_jacobi_iterations
    if not _are_iterations(choices):
        raise UserError(
            f"recurrence.train_jacobi_iterations={shown(choices)} must be whole numbers from 0 to "
            f"{MOST_JACOBI_ITERATIONS}, such as (2, 3, 4)"
        )
    _check_schedule(recurrence)
    _check_tolerance(recurrence)
    if recurrence.refinement != "full" and recurrence.method != "latent":
        raise UserError(
            f"recurrence.refinement={recurrence.refinement}: recurrence.method={recurrence.method} has nothing to "
            "refine; set it to full"
        )
    if recurrence.method in ("loop", "ponder") and recurrence.backprop_passes:
        raise UserError(
            f"recurrence.backprop_passes={recurrence.backprop_passes}: the embeddings of {recurrence.method} learn "
            "through its first pass alone; set it to 0"
        )
    if recurrence.refinement == "alternating" and recurrence.backprop_passes == 1:
        raise UserError(
            "recurrence.backprop_passes=1: with recurrence.refinement=alternating embeddings learn through the passes "
            "before the last alone; set it to 0, or to 2 or more"
        )
    if recurrence.pause_token_id >= vocab_size:
        raise UserError(
            f"recurrence.pause_token_id={recurrence.pause_token_id} is no token of model.vocab_size={vocab_size}: "
            "lower it, or set it to -1, the last"
        )


def _are_iterations(choices: Any) -> bool:
    """Whether these are values of R."""
    if not isinstance(choices, tuple) or not choices:
        return False
    return all(type(choice) is int and 0 <= choice <= MOST_JACOBI_ITERATIONS for choice in choices)


def _check_schedule(recurrence: ConfigDict) -> None:
    stages, handover = recurrence.train_schedule, recurrence.handover_ratio
    key = f"recurrence.train_schedule={shown(stages)}"
    if stages and recurrence.method != "latent":
        raise UserError(f"{key}: recurrence.method={recurrence.method} has no stages, only latent has; set it to ()")
    for stage in stages:
        if not isinstance(stage, tuple) or len(stage) != 3 or type(stage[0]) not in (int, float):
            raise UserError(
                f"{key} must be stages (share of num_steps, C, (R, ..)), such as ((0.0, 0, (0,)), (0.5, 1, (2, 3)))"
            )
        _, thoughts, choices = stage
        if type(thoughts) is not int or not 0 <= thoughts <= recurrence.num_latent_thoughts:
            raise UserError(
                f"{key}: the C of a stage is {shown(thoughts)}, but it must be a whole number from 0 to "
                f"recurrence.num_latent_thoughts={recurrence.num_latent_thoughts}"
            )
        if not _are_iterations(choices):
            raise UserError(
                f"{key}: the values of R of a stage are {shown(choices)}, but they must be whole numbers from 0 to "
                f"{MOST_JACOBI_ITERATIONS}, such as (2, 3)"
            )
        if thoughts == 0 and set(choices) != {0}:
            raise UserError(f"{key}: a stage with C = 0 has no thoughts to refine; its values of R must be (0,)")
    shares = [share for share, _, _ in stages]
    if shares and (shares[0] != 0 or any(not one < other for one, other in zip(shares, [*shares[1:], 1.0]))):
        raise UserError(f"{key}: the shares at which stages begin must rise from 0.0, and be below 1.0")
    lengths = [other - one for one, other in zip(shares[1:], [*shares[2:], 1.0])]
    if handover and not lengths:
        raise UserError(
            f"recurrence.handover_ratio={handover}, but recurrence.train_schedule has no second stage to hand over to: "
            "add one, or set it to 0.0"
        )
    if lengths and handover > min(lengths) + 1e-9:
        raise UserError(
            f"recurrence.handover_ratio={handover} is longer than a stage of {key}, which takes {min(lengths):.3g} of "
            "num_steps: lower it"
        )


def _check_tolerance(recurrence: ConfigDict) -> None:
    if not recurrence.train_tolerance:
        return
    key, passes = f"recurrence.train_tolerance={recurrence.train_tolerance}", recurrence.backprop_passes
    if recurrence.method != "latent":
        raise UserError(f"{key}: recurrence.method={recurrence.method} has nothing to refine; set it to 0.0")
    if not passes:
        raise UserError(
            f"{key}: gradients flow through a fixed number of last passes then; set recurrence.backprop_passes to 1 or "
            "more"
        )
    stages = recurrence.train_schedule or ((0.0, recurrence.num_latent_thoughts, recurrence.train_jacobi_iterations),)
    for _, thoughts, choices in stages:
        if thoughts and (len(set(choices)) > 1 or choices[0] < passes - 1):
            name = "train_schedule" if recurrence.train_schedule else "train_jacobi_iterations"
            raise UserError(
                f"{key} finds R at every step, so that recurrence.{name} must say, in place of {shown(choices)}, the "
                f"most it may be: one number, at least recurrence.backprop_passes - 1 = {passes - 1}"
            )


def _check_sources(data: ConfigDict) -> None:
    _check_pairs("data.mixture", data.mixture, '("path", weight)', (int, float))
    _check_pairs("data.eval_sets", data.eval_sets, '("name", "path")', str)
    if data.mixture and data.path:
        raise UserError(f"data.path={shown(data.path)} and data.mixture are both set: empty one of them")
    for path, weight in data.mixture:
        if not 0 < weight <= _LARGEST_FLOAT:
            raise UserError(
                f"data.mixture: the weight of {shown(path)} is {shown(weight)}, but it must be a number above 0"
            )
    names = [name for name, _ in data.eval_sets]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"data.eval_sets: the name {shown(name)} must be made of letters, digits, _ and -")
        if names.count(name) > 1:
            raise UserError(f"data.eval_sets: the name {shown(name)} stands for two sets: give each its own")


def _check_pairs(key: str, value: tuple, pair: str, second: Any) -> None:
    """Checks that `value` is a tuple of pairs of a text and a `second`."""
    for each in value:
        fits = isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) and each[0] != ""
        if not fits or not isinstance(each[1], second) or isinstance(each[1], bool) or each[1] == "":
            # A pair alone, without the comma that makes it one of a tuple, is an easy mistake.
            raise UserError(f"{key}={shown(value)} must be pairs, such as ({pair},) or ({pair}, {pair})")


def _check_spikes(train: ConfigDict, every_steps: int) -> None:
    if train.spike_threshold and train.on_bad_numbers == "rewind" and train.log_every_steps > every_steps:
        raise UserError(
            f"train.log_every_steps={train.log_every_steps} is more than checkpoint.every_steps={every_steps}: when a "
            "spike of the loss is seen the checkpoints from before it may be gone; log more often or set "
            "train.spike_threshold=0"
        )


def _check_data(config: ConfigDict) -> None:
    data, train = config.data, config.train
    for key in ("include", "exclude"):
        if not all(isinstance(pattern, str) and pattern for pattern in data[key]):
            raise UserError(f"data.{key}={shown(data[key])} must be glob patterns in quotes, none of them empty")
    _check_sources(data)
    if not all(isinstance(prompt, str) and prompt and _is_text(prompt) for prompt in train.sample_prompts):
        raise UserError(
            f"train.sample_prompts={shown(train.sample_prompts)} must be texts in quotes, none of them empty"
        )
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


def _check_tasks(train: ConfigDict) -> None:
    names = train.eval_tasks
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f'train.eval_tasks={shown(names)} must be names in quotes, such as ("piqa",), none of them empty'
        )
    if train.tasks_every_steps and not names:
        raise UserError(
            f"train.tasks_every_steps={train.tasks_every_steps}, but train.eval_tasks names no task to run: name some, "
            "or set train.tasks_every_steps=0"
        )


def _is_text(text: str) -> bool:
    """Whether a text has a spelling in UTF-8; bytes of a command line in another encoding have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_mesh(mesh: ConfigDict) -> None:
    sizes = list(mesh.values())
    if sizes.count(-1) > 1 or 0 in sizes:
        raise UserError("config group 'mesh': sizes are whole numbers of at least 1, of which one may be -1 (the rest)")


def _check_size(config: ConfigDict) -> None:
    """Checks that model and batch are not of a size that no machine has, before anything is made of it."""
    model, data = config.model, config.data
    matrices = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    parameters = model.num_layers * matrices + model.vocab_size * model.hidden_size
    if parameters > _MOST_PARAMETERS:
        raise UserError(
            f"a model of model.num_layers={model.num_layers}, model.hidden_size={model.hidden_size}, "
            f"model.intermediate_size={model.intermediate_size} and model.vocab_size={model.vocab_size} has "
            f"{parameters:.1e} parameters, more than any machine holds: lower one of them"
        )
    slots = data.batch_size * data.sequence_length * (config.recurrence.num_latent_thoughts + 1)
    if slots > _MOST_SLOTS:
        raise UserError(
            f"data.batch_size={data.batch_size} sequences of data.sequence_length={data.sequence_length} tokens, each "
            f"with recurrence.num_latent_thoughts={config.recurrence.num_latent_thoughts}, are {slots:.1e} slots a "
            f"step, but at most {_MOST_SLOTS} can be counted: lower one of them"
        )


def _check_checkpoint(checkpoint: ConfigDict) -> None:
    if "://" in checkpoint.directory and not checkpoint.directory.startswith("gs://"):
        raise UserError(
            f"checkpoint.directory={checkpoint.directory!r} must be a path, or a URL that begins with gs://"
        )
