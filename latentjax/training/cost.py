"""What a config costs, known without training it: parameters, FLOPs, cache, and how often tokens meet the layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Recurrence, RecurrenceSpec
from latentjax.recurrence.draw import TrainSchedule, Work
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence, train_recurrence
from latentjax.training.flops import cache_bytes_per_token, decode_flops_per_token, work_flops_per_token


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one config; what depends on C and R of a step is the mean over all steps, as often as each is drawn.

    Attributes:
      layer_parameters: all but the tables.
      table_parameters: embeddings of tokens and positions, and the head where it has its own matrix.
      train_forwards: slots through the layers per token in one training forward.
      decode_forwards: the same in decoding.
      train_flops: model FLOPs of training, forward and backward, per token.
      decode_flops: of decoding with a cache, per token, on average over a sequence of data.sequence_length.
      cache_bytes: of keys and values, per token.
      total_train_flops: of all steps of the config.
    """

    layer_parameters: int
    table_parameters: int
    train_forwards: float
    decode_forwards: int
    train_flops: float
    decode_flops: float
    cache_bytes: int
    total_train_flops: float

    def ratios(self, base: "Cost") -> dict[str, float]:
        """Each of the numbers over that of another config."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(base)
        return {name: ours[name] / theirs[name] for name in ours}


def cost_of(config: ConfigDict) -> Cost:
    """Counts; nothing is computed on any device.

    Args:
      config: validated.
    """
    spec, recurrence_spec, recurrence, schedule = _described(config)
    length = config.data.sequence_length
    layers, tables = _count_parameters(LanguageModel(spec, recurrence_spec))
    shares = schedule.shares
    flops = (share * work_flops_per_token(spec, recurrence_spec, length, work) for work, share in shares.items())
    train_flops = sum(flops)
    forwards = (
        share * train_recurrence(recurrence_spec, work.num_latent_thoughts).token_forwards(work.num_jacobi_iterations)
        for work, share in shares.items()
    )
    return Cost(
        layer_parameters=layers,
        table_parameters=tables,
        train_forwards=sum(forwards),
        decode_forwards=recurrence.forwards_per_token,
        train_flops=train_flops,
        decode_flops=decode_flops_per_token(spec, recurrence, length),
        cache_bytes=cache_bytes_per_token(spec, recurrence),
        total_train_flops=train_flops * config.train.num_steps * config.data.batch_size * length,
    )


def works_of_steps(config: ConfigDict, num_steps: int) -> list[Work]:
    """C and R of each of the first `num_steps` training steps.

    With `recurrence.train_tolerance` R is the most that a step may take: what it took, only its log knows.
    """
    _, _, _, schedule = _described(config)
    return [schedule.draw(config.train.seed, step) for step in range(num_steps)]


def flops_of_steps(config: ConfigDict, works: Sequence[Work]) -> np.ndarray:
    """Model FLOPs of training steps, forward and backward, each with its own C and R, float64 (n,).

    Args:
      config: validated.
      works: of each, as `works_of_steps` gives them; R may be a mean.
    """
    spec, recurrence_spec, _, _ = _described(config)
    length = config.data.sequence_length
    per_token = {work: work_flops_per_token(spec, recurrence_spec, length, work) for work in set(works)}
    return np.array([per_token[work] for work in works], np.float64) * config.data.batch_size * length


def _described(config: ConfigDict) -> tuple[ModelSpec, RecurrenceSpec, Recurrence, TrainSchedule]:
    """The model, the method, and what training draws."""
    # Which attention and which loops it will be says nothing about what has to be computed.
    spec = dataclasses.replace(ModelSpec(**config.model), attention="xla", loops="rolled", remat="none")
    recurrence_spec = RecurrenceSpec(**config.recurrence)
    schedule = TrainSchedule.of(recurrence_spec, config.train.num_steps)
    return spec, recurrence_spec, make_recurrence(recurrence_spec), schedule


def _count_parameters(model: LanguageModel) -> tuple[int, int]:
    """Of the layers, and of embeddings and head."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    leaves: dict[tuple[str, ...], Any] = flatten_dict(nn.meta.unbox(variables)["params"])
    sizes = {path: leaf.size for path, leaf in leaves.items()}
    tables = sum(size for path, size in sizes.items() if {"embedding", "position_embedding", "head"} & set(path))
    return sum(sizes.values()) - tables, tables


# A column's heading in two lines, the number, and how it is written.
_COLUMNS = (
    ("parameters", "of layers", "layer_parameters", "{:,}"),
    ("of embedding", "and head", "table_parameters", "{:,}"),
    ("forwards a token", "in training", "train_forwards", "{:g}"),
    ("", "in decoding", "decode_forwards", "{:g}"),
    ("FLOPs a token", "in training", "train_flops", "{:.3e}"),
    ("", "in decoding", "decode_flops", "{:.3e}"),
    ("cache a token", "in bytes", "cache_bytes", "{:,}"),
    ("FLOPs of the", "whole training", "total_train_flops", "{:.3e}"),
)
_WITH_RATIOS = ("train_flops", "decode_flops", "cache_bytes", "total_train_flops")


def cost_lines(names: Sequence[str], costs: Sequence[Cost]) -> list[str]:
    """A table with a line for each config; in brackets, the ratio to the first."""
    rows = [["", *(column[0] for column in _COLUMNS)], ["config", *(column[1] for column in _COLUMNS)]]
    for name, cost in zip(names, costs, strict=True):
        ratios = cost.ratios(costs[0])
        cells = [name]
        for _, _, key, form in _COLUMNS:
            ratio = f" ({ratios[key]:.2f})" if key in _WITH_RATIOS else ""
            cells.append(form.format(getattr(cost, key)) + ratio)
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if n else cell.ljust(width) for n, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]


def costs_as_json(names: Sequence[str], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """The numbers of each config, and their `ratios` to the first's."""
    return [
        {"config": name, **dataclasses.asdict(cost), "ratios": cost.ratios(costs[0])}
        for name, cost in zip(names, costs, strict=True)
    ]
