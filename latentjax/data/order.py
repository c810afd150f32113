"""The order of windows: arithmetic on whole arrays of places, the same on every machine and for every version of it.

A place is a number in the endless stream of windows that training reads. It is taken apart as

    place -> component of the mixture, index within it -> epoch, index within that -> number of the window

each a function of its number alone, so that any part of the stream costs the same to find.
"""

import math
from collections.abc import Sequence

import numpy as np

# Weights are rounded to multiples of 1 / PERIOD of their sum; hundredths of percents are exact.
PERIOD = 10_000

# Half rounds of the permutation; with fewer, some permutations of very few windows are likelier than others.
_HALF_ROUNDS = 12
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """Where in a mixture of components each place of the stream is."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool):
        """Describes a mixture of components of so many windows each, in proportion to their weights.

        Components do not disturb each other: each is read epoch by epoch, every window once an epoch, in an order
        that depends on the seed, the component and the epoch; without `shuffle`, in its own order every time.

        Args:
          lengths: windows of each component, at least 1.
          weights: of each component, above 0; their scale does not matter.
          seed: at least 0.
        """
        self._lengths = np.array(lengths, np.int64)
        self._pattern, self._counts = interleaving(weights)
        self._ranks = np.zeros(len(self._pattern), np.int64)
        for component, count in enumerate(self._counts):
            self._ranks[self._pattern == component] = np.arange(count)
        self._seeds = _mix(_mix(np.array([seed % 2**64], np.uint64)) ^ np.arange(len(lengths), dtype=np.uint64))
        self._shuffle = shuffle

    def locate(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the component and the number of the window in it, each (n,) int64, of places (n,) int64."""
        period, place = np.divmod(places, len(self._pattern))
        components = self._pattern[place]
        epochs, indices = np.divmod(period * self._counts[components] + self._ranks[place], self._lengths[components])
        if self._shuffle:
            seeds = _mix(self._seeds[components] ^ epochs.astype(np.uint64))
            indices = permute(indices, self._lengths[components], seeds)
        return components, indices


def interleaving(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Spreads components evenly over the shortest period that keeps their weights to 1 / PERIOD.

    Every next position goes to the component that lags most behind its share. So after any number of positions no
    component is ahead of its share by one or more, and after a whole period none is off.

    Returns:
      pattern (P,) int64: the component of each position, P at most PERIOD (more only for more components than that);
      counts (K,) int64: how often each occurs in it, at least once.
    """
    shares = np.array(weights, np.float64) / np.max(weights)
    exact = shares / shares.sum() * PERIOD
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    # What rounding down left over goes to the largest remainders.
    leftover = max(PERIOD - int(counts.sum()), 0)
    counts[np.argsort(counts - exact, kind="stable")[:leftover]] += 1
    counts //= math.gcd(*counts.tolist())
    period = int(counts.sum())
    pattern, lag = np.empty(period, np.int64), np.zeros(len(counts), np.int64)
    for position in range(period):
        lag += counts  # in units of 1 / period: whole numbers, so that no rounding decides
        pattern[position] = chosen = lag.argmax()
        lag[chosen] -= period
    return pattern, counts


def permute(indices: np.ndarray, lengths: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Applies to each index the permutation of range(length) that its seed stands for.

    A generalised Feistel network (Black and Rogaway 2002): index = left * b + right with a * b just above the length,
    whose halves are shifted in turn by a hash of the other. The few results that are beyond the length are sent
    through again until they are not. About 0.2 microseconds an index, in arrays of hundreds; Grain's `index_shuffle`
    takes 3.5, and promises no order to later versions.

    Args:
      indices, lengths: (n,) int64, 0 <= index < length.
      seeds: (n,) uint64.

    Returns:
      (n,) int64.
    """
    a = np.ceil(np.sqrt(lengths)).astype(np.int64)
    b = -(-lengths // a)
    result = _feistel(indices, a, b, seeds)
    while (beyond := np.flatnonzero(result >= lengths)).size:
        result[beyond] = _feistel(result[beyond], a[beyond], b[beyond], seeds[beyond])
    return result


def _feistel(indices: np.ndarray, a: np.ndarray, b: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    left, right = (half.astype(np.uint64) for half in np.divmod(indices, b))
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    key = seeds.copy()
    for half_round in range(_HALF_ROUNDS):
        if half_round % 2:
            right = (right + _mix(left ^ key)) % b
        else:
            left = (left + _mix(right ^ key)) % a
        key += _GOLDEN
    return (left * b + right).astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit numbers, none to the same as another: the finaliser of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
