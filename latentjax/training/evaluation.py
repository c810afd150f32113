"""Evaluation on held-out text."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

EVALUATION_KEYS = ("eval_loss", "eval_bits_per_byte", "thought_residual")

# Batches that are under way before the first is waited for: enough to keep the devices busy, and no memory's trouble.
_IN_FLIGHT = 16


def evaluate(
    eval_step: Callable,
    params: Any,
    batches_of_sets: Mapping[str, Iterable[dict[str, jax.Array]]],
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Averages over batches of held-out windows, of one or more sets.

    Args:
      eval_step: (params, batch) -> sums, see `training.step.make_eval_step`.
      batches_of_sets: by name, on the devices; with `target_bytes` (B, T): how many bytes of text each target stands
        for.
      advance: called after each batch.

    Returns:
      `eval_loss` in nats per token; `eval_bits_per_byte`, which does not depend on the tokenizer; and, for methods
      that iterate, `thought_residual`: the relative RMS change of the thoughts in the last refinement pass. All are
      over the tokens of all sets together; so is, where there were as many passes as a tolerance needed,
      `num_jacobi_iterations`: the mean number. With more than one set, also `eval_loss/NAME` and
      `eval_bits_per_byte/NAME`.
    """
    sums_of_sets = {name: list(_sums(eval_step, params, batches, advance)) for name, batches in batches_of_sets.items()}
    everything = [each for sums in sums_of_sets.values() for each in sums]
    results = _averages(everything)
    for name, key in (("thought_residual", "thought_residual"), ("passes", "num_jacobi_iterations")):
        weighted = [each[name] * each["weight_sum"] for each in everything if name in each]
        if weighted:
            results[key] = math.fsum(weighted) / _total(everything, "weight_sum")
    if len(sums_of_sets) > 1:
        for name, sums in sums_of_sets.items():
            results |= {f"{key}/{name}": value for key, value in _averages(sums).items()}
    return results


def _sums(
    eval_step: Callable, params: Any, batches: Iterable[dict[str, jax.Array]], advance: Callable[[], None]
) -> Iterator[dict[str, float]]:
    """The sums of each batch, to be added in float64: the same whatever the number of batches in flight."""
    waiting: deque[dict[str, jax.Array]] = deque()
    for batch in batches:
        waiting.append(eval_step(params, batch))
        if len(waiting) > _IN_FLIGHT:
            yield _numbers(waiting.popleft())
            advance()
    for sums in waiting:
        yield _numbers(sums)
        advance()


def _numbers(sums: dict[str, jax.Array]) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(sums).items()}


def _averages(sums: list[dict[str, float]]) -> dict[str, float]:
    loss = _total(sums, "loss_sum")
    return {
        "eval_loss": loss / _total(sums, "weight_sum"),
        "eval_bits_per_byte": loss / math.log(2) / _total(sums, "text_bytes"),
    }


def _total(sums: list[dict[str, float]], name: str) -> float:
    total = math.fsum(each[name] for each in sums)
    return max(total, 1.0) if name != "loss_sum" else total  # text of which every token is an end of document
