"""Evaluation on held-out text."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

EVALUATION_KEYS = ("eval_loss", "eval_bits_per_byte", "thought_residual")


def evaluate(
    eval_step: Callable,
    params: Any,
    batches_of_sets: Mapping[str, Iterable[dict[str, jax.Array]]],
) -> dict[str, float]:
    """Averages over batches of held-out windows, of one or more sets.

    Args:
      eval_step: (params, batch) -> sums, see `training.step.make_eval_step`.
      batches_of_sets: by name, on the devices; with `target_bytes` (B, T): how many bytes of text each target stands
        for.

    Returns:
      `eval_loss` in nats per token; `eval_bits_per_byte`, which does not depend on the tokenizer; and, for methods
      that iterate, `thought_residual`: the relative RMS change of the thoughts in the last refinement pass. All are
      over the tokens of all sets together. With more than one set, also `eval_loss/NAME` and `eval_bits_per_byte/NAME`.
    """
    steps_of_sets = {name: [eval_step(params, batch) for batch in batches] for name, batches in batches_of_sets.items()}
    # Only now waited for, and then added in float64: the same whatever the number of batches in flight.
    sums_of_sets = {
        name: [{key: float(value) for key, value in each.items()} for each in jax.device_get(steps)]
        for name, steps in steps_of_sets.items()
    }
    everything = [each for sums in sums_of_sets.values() for each in sums]
    results = _averages(everything)
    residuals = [each["thought_residual"] * each["weight_sum"] for each in everything if "thought_residual" in each]
    if residuals:
        results["thought_residual"] = math.fsum(residuals) / _total(everything, "weight_sum")
    if len(sums_of_sets) > 1:
        for name, sums in sums_of_sets.items():
            results |= {f"{key}/{name}": value for key, value in _averages(sums).items()}
    return results


def _averages(sums: list[dict[str, float]]) -> dict[str, float]:
    loss = _total(sums, "loss_sum")
    return {
        "eval_loss": loss / _total(sums, "weight_sum"),
        "eval_bits_per_byte": loss / math.log(2) / _total(sums, "text_bytes"),
    }


def _total(sums: list[dict[str, float]], name: str) -> float:
    total = math.fsum(each[name] for each in sums)
    return max(total, 1.0) if name != "loss_sum" else total  # text of which every token is an end of document
