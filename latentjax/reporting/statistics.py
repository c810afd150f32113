"""Means and spreads over seeds, differences between them, and values between the points of a curve."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number as several runs have it.

    Attributes:
      mean: over them.
      spread: sample standard deviation (n - 1 in the denominator); None for one run.
      n: how many runs.
    """

    mean: float
    spread: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns mean and spread of what is finite among the values, None if nothing is."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return None
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return Estimate(math.fsum(finite) / len(finite), spread, len(finite))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one mean is from another.

    Attributes:
      value: the one less the other.
      spread: sqrt(s1^2 + s2^2), the standard deviation of the difference between one run of each; None where one of
        them has a single run.
    """

    value: float
    spread: float | None

    @property
    def exceeds_spread(self) -> bool | None:
        """Whether it is larger than the spread, None where that is not known."""
        return None if self.spread is None else abs(self.value) > self.spread


def difference(one: Estimate, other: Estimate) -> Difference:
    """Returns `one` less `other`."""
    value = one.mean - other.mean
    if one.spread is None or other.spread is None:
        return Difference(value, None)
    return Difference(value, math.hypot(one.spread, other.spread))


def interpolate_log(at: float, x_n: np.ndarray, y_n: np.ndarray) -> float | None:
    """Returns y at x = `at`, on the straight line in log x between the two points around it; None outside of them.

    Args:
      x_n: increasing, above 0.
    """
    rounding = 1e-9  # sums of the same FLOPs in another order
    if not len(x_n) or not x_n[0] * (1 - rounding) <= at <= x_n[-1] * (1 + rounding):
        return None
    return float(np.interp(math.log(at), np.log(x_n), y_n))


def smoothed(y_n: np.ndarray, width: float) -> np.ndarray:
    """Returns local means of y, weighted by a Gaussian of so many points' standard deviation; NaN are left out."""
    known_n = np.isfinite(y_n)
    if width <= 0 or not known_n.any():
        return y_n
    reach = min(math.ceil(4 * width), len(y_n))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)

    def folded(values_n: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(values_n, reach), weights, mode="valid")

    with np.errstate(invalid="ignore"):
        means_n = folded(np.where(known_n, y_n, 0.0)) / folded(known_n.astype(np.float64))
    return np.where(known_n, means_n, np.nan)
