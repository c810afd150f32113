"""Evaluation on held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from latentjax.training.mesh import put_batch

EVALUATION_KEYS = ("eval_loss", "eval_bits_per_byte", "thought_residual")


def evaluate(
    eval_step: Callable, params: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh
) -> dict[str, float]:
    """Averages over batches of held-out windows.

    Args:
      eval_step: (params, batch) -> sums, see `training.step.make_eval_step`.
      batches: with `target_bytes` (B, T): how many bytes of text each target stands for.

    Returns:
      `eval_loss` in nats per token; `eval_bits_per_byte`, which does not depend on the tokenizer; and, for methods
      that iterate, `thought_residual`: the relative RMS change of the thoughts in the last refinement pass.
    """
    text_bytes, sums = 0, []
    for batch in batches:
        text_bytes += int(batch["target_bytes"].sum())
        arrays = {name: rows for name, rows in batch.items() if name != "target_bytes"}
        sums.append(eval_step(params, put_batch(arrays, mesh)))
    # Summed on the host in float64: the same whatever the number of batches in flight.
    loss_sum = math.fsum(float(each["loss_sum"]) for each in sums)
    weight_sum = math.fsum(float(each["weight_sum"]) for each in sums)
    results = {"eval_loss": loss_sum / weight_sum, "eval_bits_per_byte": loss_sum / math.log(2) / max(text_bytes, 1)}
    residuals = [float(each["thought_residual"]) for each in sums if "thought_residual" in each]
    if residuals:
        results["thought_residual"] = math.fsum(residuals) / len(residuals)
    return results
