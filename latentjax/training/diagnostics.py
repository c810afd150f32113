"""How fast the Jacobi iteration converges on held-out text: losses and distances after 0, 1 .. R refinement passes."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.recurrence.decoding import decoding_model
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.step import Batch, Metrics, loss_of_hidden

DIAGNOSTICS_FILE = "diagnostics.json"  # of a run
_FIRST_BIN = 4  # positions: with R = 3 and one thought, those that are exact
# A pass that leaves more of a value than this, at no more than so many epsilons, shrinks rounding alone.
_STANDSTILL, _ROUNDING_EPSILONS = 0.8, 32


def position_bins(num_tokens: int) -> tuple[int, ...]:
    """Where bins of positions begin, and the end of the last: 0, 4, 8, 16 .. num_tokens."""
    starts, start = [0], _FIRST_BIN
    while start < num_tokens:
        starts.append(start)
        start *= 2
    return (*starts, num_tokens)


def make_diagnostic_step(
    model: LanguageModel, *, num_jacobi_iterations: int, loss_chunk_tokens: int
) -> Callable[[Any, Batch], Metrics]:
    """Returns diagnose(params, batch) -> sums over the batch, float32; R is `num_jacobi_iterations`.

    First the text is decoded token by token, with a cache: that is exact, and C + 1 forwards a token, where refinement
    until no bit changes takes all of C T passes. Then the prediction slots of each of R + 1 passes are compared with
    it. Rows whose tokens have no weight at all fill the batch up, and do not count.

    Sums, with P bins of positions (`position_bins`; with document masks, of the position in the document):
      loss_sum (R + 1,), exact_loss_sum: nats; weight_sum, text_bytes (int32): as of `make_eval_step`.
      change (R + 1, P), size (P,): squares of the difference of the prediction slots' hidden states from the exact
        ones, and of these.
      thoughts_change, thoughts_size (R,): squares of the thoughts' change in passes 1 .. R, and of the new thoughts.
      tokens (P,), rows: how many count.
    """
    decoder = decoding_model(model, separates=False)

    def diagnose(params: Any, batch: Batch) -> Metrics:
        tokens_BT, weights_BT = batch["tokens"][:, :-1], batch["loss_weights"]
        counted_B = jnp.any(weights_BT > 0, axis=1)
        ids = {"positions_BT": batch.get("positions"), "segment_ids_BT": batch.get("segment_ids")}
        exact_BTD = decoder.apply({"params": params}, tokens_BT, method="hidden_decoded", **ids)
        bins = position_bins(tokens_BT.shape[1])
        positions_BT = batch.get("positions", jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None])
        starts_P, ends_P = (jnp.asarray(edges, jnp.int32) for edges in (bins[:-1], bins[1:]))
        in_bin_BTP = (positions_BT[..., None] >= starts_P) & (positions_BT[..., None] < ends_P)
        in_bin_BTP &= counted_B[:, None, None]

        def squares(x_BTD: jax.Array) -> jax.Array:
            square_BT = jnp.sum(jnp.square(x_BTD.astype(jnp.float32)), axis=-1)
            return jnp.sum(jnp.where(in_bin_BTP, square_BT[..., None], 0.0), axis=(0, 1))

        def read(hidden_BTD: jax.Array) -> Metrics:
            difference_BTD = hidden_BTD.astype(jnp.float32) - exact_BTD.astype(jnp.float32)
            return {
                "loss_sum": loss_of_hidden(model, params, hidden_BTD, batch, loss_chunk_tokens),
                "change": squares(difference_BTD),
            }

        readings, change_RB, size_RB = model.apply(
            {"params": params},
            tokens_BT,
            num_jacobi_iterations=num_jacobi_iterations,
            read=read,
            method="hidden_each",
            **ids,
        )
        return readings | {
            "exact_loss_sum": loss_of_hidden(model, params, exact_BTD, batch, loss_chunk_tokens),
            "weight_sum": jnp.sum(weights_BT),
            "text_bytes": jnp.sum(batch["target_bytes"]),
            "size": squares(exact_BTD),
            "thoughts_change": jnp.sum(jnp.where(counted_B, change_RB, 0.0), axis=1),
            "thoughts_size": jnp.sum(jnp.where(counted_B, size_RB, 0.0), axis=1),
            "tokens": jnp.sum(in_bin_BTP, axis=(0, 1)),
            "rows": jnp.sum(counted_B),
        }

    return diagnose


def diagnose(
    diagnostic_step: Callable[[Any, Batch], Metrics],
    params: Any,
    batches: Iterable[Batch],
    *,
    dtype: str,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Adds up what `make_diagnostic_step` gives of batches.

    Args:
      dtype: that the model computes in.
      advance: is called after each batch.

    Returns:
      num_tokens: predicted; rows: windows.
      passes: for 0, 1 .. R refinement passes `num_jacobi_iterations`, `loss` (nats per token), `bits_per_byte`,
        `thought_residual` (relative RMS change of the thoughts in the last refinement pass; None where there was none)
        and `distance_from_exact` (relative RMS difference of the prediction slots' hidden states from the exact ones).
      exact: `loss` and `bits_per_byte` of sequential decoding.
      contraction, rounding_floor, passes_fitted: of `residual` and `distance`, see `fit_contraction`.
      by_position: for each bin `first_position`, `last_position`, `num_tokens` and `distance_from_exact`, a list: after
        0, 1 .. R of them.
      dtype. What is not finite is None.
    """
    sums: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, value in jax.device_get(diagnostic_step(params, batch)).items():
            sums.setdefault(name, []).append(np.asarray(value, np.float64))
        num_positions = batch["loss_weights"].shape[1]
        advance()
    totals = {name: np.sum(values, axis=0) for name, values in sums.items()}
    residuals = [None, *_relative(totals["thoughts_change"], totals["thoughts_size"])]
    distances = _relative(totals["change"].sum(axis=1), totals["size"].sum())
    passes = [
        {"num_jacobi_iterations": index, **_losses(loss_sum, totals), "thought_residual": residual}
        | {"distance_from_exact": distance}
        for index, (loss_sum, residual, distance) in enumerate(
            zip(totals["loss_sum"], residuals, distances, strict=True)
        )
    ]
    fits = {"residual": fit_contraction(residuals[1:], dtype), "distance": fit_contraction(distances, dtype)}
    bins = position_bins(num_positions)
    by_position = [
        {
            "first_position": first,
            "last_position": end - 1,
            "num_tokens": int(count),
            "distance_from_exact": distances_R,
        }
        for first, end, count, distances_R in zip(
            bins[:-1],
            bins[1:],
            totals["tokens"],
            [_relative(change, size) for change, size in zip(totals["change"].T, totals["size"], strict=True)],
            strict=True,
        )
        if count
    ]
    return {
        "num_tokens": int(totals["weight_sum"]),
        "rows": int(totals["rows"]),
        "passes": passes,
        "exact": _losses(totals["exact_loss_sum"], totals),
        "contraction": {name: fit.factor for name, fit in fits.items()},
        "rounding_floor": {name: fit.floor for name, fit in fits.items()},
        "passes_fitted": {name: fit.num_passes for name, fit in fits.items()},
        "by_position": by_position,
        "dtype": dtype,
    }


def _losses(loss_sum: np.ndarray, totals: dict[str, np.ndarray]) -> dict[str, float | None]:
    loss = float(loss_sum)
    return {
        "loss": _finite(loss / max(float(totals["weight_sum"]), 1.0)),
        "bits_per_byte": _finite(loss / math.log(2) / max(float(totals["text_bytes"]), 1.0)),
    }


def _relative(change: np.ndarray, size: np.ndarray) -> list[float | None]:
    """Roots of the ratios of sums of squares."""
    smallest = np.finfo(np.float32).tiny
    return [_finite(value) for value in np.sqrt(change / np.maximum(size, smallest)).tolist()]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What `fit_contraction` finds.

    Attributes:
      factor: that a value is multiplied by in a pass; None: there are fewer than two passes above the floor.
      floor: values from here down are rounding.
      num_passes: how many values the factor is of.
    """

    factor: float | None
    floor: float
    num_passes: int


def fit_contraction(values: Sequence[float | None], dtype: str) -> Contraction:
    """Fits a geometric sequence: a straight line by least squares through the logarithms of values above the floor.

    The floor is where the values come to a standstill, at no more than 32 epsilons of the compute dtype: a pass leaves
    over four fifths. It is twice the value there, since above it rounding no longer tells much; and where no standstill
    is seen, one epsilon. The fit ends where the values first reach it.

    Args:
      values: of consecutive passes; one that is None ends the sequence.
      dtype: that the model computes in.
    """
    epsilon = float(jnp.finfo(dtype).eps)
    known: list[float] = []
    for value in values:
        if value is None:
            break
        known.append(value)
    floor = epsilon
    for before, after in itertools.pairwise(known):
        if before <= _ROUNDING_EPSILONS * epsilon and after > _STANDSTILL * before:
            floor = max(floor, 2 * before)
            break
    above = known[: next((place for place, value in enumerate(known) if value <= floor), len(known))]
    if len(above) < 2:
        return Contraction(None, floor, len(above))
    slope, _ = np.polyfit(np.arange(len(above)), np.log(above), 1)
    return Contraction(float(np.exp(slope)), floor, len(above))
