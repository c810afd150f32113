"""Continuations of many prompts of different lengths, some at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from latentjax.errors import UserError
from latentjax.recurrence.decoding import generate
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.request_packing import row_length

_SHORTEST_PROMPT = 32


def complete(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    batch_tokens: int,
    end_id: int,
    sampling: dict[str, float],
    stops: Callable[[Sequence[int]], bool],
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """Continues prompts by exact sequential decoding, the longest first.

    Args:
      prompts: ids, at least one each, that with `num_tokens` more fit the model's positions.
      batch_tokens: tokens of a batch, prompts and continuations together.
      sampling: `temperature`; empty: greedy.
      stops: whether a continuation is over; what is behind the first such place is left out.
      advance: called with a number of prompts that are done.

    Returns:
      The ids that follow each prompt, without the end of text.

    Raises:
      UserError: `sampling` asks for more than a temperature.
    """
    unknown = sorted(sampling.keys() - {"temperature"})
    if unknown:
        raise UserError(f"{', '.join(unknown)} in sampling is not implemented: leave it out")
    temperature = float(sampling.get("temperature", 0.0))
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    continued: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        longest = row_length(len(prompts[order[start]]), _SHORTEST_PROMPT)
        size = max(1, min(batch_tokens // (longest + num_tokens), len(order)))
        size = 1 << size.bit_length() - 1
        numbers = order[start : start + size]
        lengths_B = np.ones(size, np.int32)
        prompts_BP = np.full((size, longest), end_id, np.int32)
        for row, number in enumerate(numbers):
            lengths_B[row] = len(prompts[number])
            prompts_BP[row, : lengths_B[row]] = prompts[number]
        key = jax.random.fold_in(jax.random.key(0), start)
        tokens_BT = generate(model, params, prompts_BP, lengths_B, key, temperature, num_tokens=longest + num_tokens)
        if not tokens_BT.is_fully_addressable:
            tokens_BT = multihost_utils.process_allgather(tokens_BT, tiled=True)
        for row, number in enumerate(numbers):
            begin = lengths_B[row]
            continued[number] = _cut(np.asarray(tokens_BT)[row, begin : begin + num_tokens].tolist(), end_id, stops)
        start += size
        advance(len(numbers))
    return continued


def _cut(ids: list[int], end_id: int, stops: Callable[[Sequence[int]], bool]) -> list[int]:
    """Leaves out the end of text and what is behind it, or behind the first place where the text is over."""
    if end_id in ids:
        ids = ids[: ids.index(end_id)]
    if not stops(ids):
        return ids
    low, high = 1, len(ids)  # once a stop is there it stays: the first such place is found by halving
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stops(ids[:middle]) else (middle + 1, high)
    return ids[:low]
