"""What `evaluate --diagnostics` has left in a run's directory: loss and thoughts by refinement pass."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from latentjax.reporting.numbers import finite
from latentjax.training.diagnostics import DIAGNOSTICS_FILE


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """Of one checkpoint on held-out text, for each number of refinement passes n, in order.

    Attributes:
      step: of the checkpoint; num_tokens: measured on.
      iterations: R, int64 (n,).
      loss: nats per token with so many passes, float64 (n,).
      residual: relative RMS change of the thoughts in the last of them, float64 (n,); NaN where there is none.
      distance: relative RMS distance of what the head reads from exact sequential decoding, float64 (n,).
      exact_loss: of exact sequential decoding.
      contraction: fitted factors per pass of `residual` and `distance`, NaN where they were not fitted.
    """

    step: int
    num_tokens: int
    iterations: np.ndarray
    loss: np.ndarray
    residual: np.ndarray
    distance: np.ndarray
    exact_loss: float
    contraction: dict[str, float]


def read_diagnostics(workdir: Path, remarks: list[str]) -> Diagnostics | None:
    """Reads them, None where there are none; a file that is something else is remarked on."""
    path = workdir / DIAGNOSTICS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        passes = sorted(content["passes"], key=lambda each: int(each["num_jacobi_iterations"]))
        found = Diagnostics(
            step=int(content["step"]),
            num_tokens=int(content["num_tokens"]),
            iterations=np.array([int(each["num_jacobi_iterations"]) for each in passes], np.int64),
            loss=_numbers(passes, "loss"),
            residual=_numbers(passes, "thought_residual"),
            distance=_numbers(passes, "distance_from_exact"),
            exact_loss=finite(content["exact"]["loss"]),
            contraction={name: finite(content["contraction"][name]) for name in ("residual", "distance")},
        )
        if not passes:
            raise ValueError("no passes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        remarks.append(f"{DIAGNOSTICS_FILE} is damaged, and left out")
        return None
    return found


def _numbers(passes: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([finite(each[name]) for each in passes], np.float64)
