"""Beginning a run with the weights of another model: `train.init_from`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.models.spec import ModelSpec
from latentjax.opening import CONFIG, find_model, read_run_config
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import checkpoint_files, processes, run_directory

_MODEL = "model."


def begin_from(config: ConfigDict, given: Collection[str], workdir: Path) -> Callable[[Any], Any] | None:
    """Makes the config describe the model that `train.init_from` names, and returns what reads its weights.

    What the weights mean is taken from there: sizes, rotary settings, norms, a tied head. Method, data and all else are
    the config's. No weights are read here, and jax is not asked for devices.

    Token embeddings enter the backbone as they did: where the config's method multiplies them by another constant than
    the weights were trained with, the table is divided by what is too much.

    Args:
      config: validated; its group `model` is changed, so that it has to be validated again.
      given: dotted keys that the user set by flags: they contradict, or agree.

    Returns:
      From shapes, dtypes and shardings to parameters; None where the run has a checkpoint already, with which it goes
      on, whatever has become of what it began with.

    Raises:
      UserError: nothing can be read there, a flag asks for another model, or the table is the head's too and cannot be
        divided.
    """
    source = config.train.init_from
    if checkpoint_files.complete_steps(checkpoint_files.directory_of(config.checkpoint.directory, workdir)):
        if (workdir / CONFIG).exists():
            before = ModelSpec(**read_run_config(workdir).model)
            for key in _differing(before, config):
                if _MODEL + key not in given:  # else it is found out, and said, that the run has another model
                    config.model[key] = getattr(before, key)
        return None
    found = find_model(source, None, processes.say)
    taken = []
    for key in _differing(found.model.spec, config):
        value = getattr(found.model.spec, key)
        if _MODEL + key in given:
            raise UserError(
                f"{_MODEL}{key}={config.model[key]!r} is not what the weights of train.init_from={source} need: they "
                f"need {value!r}, which is taken from there if the flag is left out"
            )
        config.model[key] = value
        taken.append(f"{_MODEL}{key}={value}")
    divisor = _embedding_scale(RecurrenceSpec(**config.recurrence), found.model.spec) / _embedding_scale(
        found.model.recurrence_spec, found.model.spec
    )
    if divisor != 1 and found.model.spec.tie_embeddings:
        raise UserError(
            f"recurrence.method={config.recurrence.method} multiplies embeddings by {divisor:.4g} times what those of "
            f"train.init_from={source} were trained with, and they cannot be divided by it, for they are the head as "
            f"well: set recurrence.scale_embeddings={not config.recurrence.scale_embeddings}"
        )

    def read(abstract_params: Any) -> Any:
        params, step, _ = found.read(abstract_params)
        processes.say(f"beginning with the weights of {source}{'' if step is None else f', step {step}'}")
        if taken:
            processes.say(f"taken from there: {', '.join(taken)}")
        return params if divisor == 1 else _with_smaller_embeddings(params, divisor, config.recurrence.method)

    return read


def _differing(there: ModelSpec, config: ConfigDict) -> list[str]:
    """The keys of the `model` group in which a config differs from the model that weights were made for."""
    keys = [key.removeprefix(_MODEL) for key in run_directory.FIXED_KEYS if key.startswith(_MODEL)]
    if there.architecture == "gpt2":
        keys.append("max_position_embeddings")  # the rows of a table
    here = ModelSpec(**config.model)
    same_heads = there.kv_heads == here.kv_heads and there.num_heads == here.num_heads
    return [
        key for key in keys if getattr(there, key) != getattr(here, key) and not (key == "num_kv_heads" and same_heads)
    ]


def _with_smaller_embeddings(params: dict[str, Any], divisor: float, method: str) -> dict[str, Any]:
    processes.say(
        f"its embeddings are divided by {divisor:.4g}, by which recurrence.method={method} multiplies them, so that "
        "tokens enter as they did"
    )
    table = params["embedding"]["embedding"]
    divide = jax.jit(lambda table: table / divisor, donate_argnums=0, out_shardings=table.sharding)
    return {**params, "embedding": {"embedding": divide(table)}}


def _embedding_scale(recurrence: RecurrenceSpec, spec: ModelSpec) -> float:
    """What a method multiplies token embeddings by."""
    return make_recurrence(recurrence).embedding_scale(spec.hidden_size)
