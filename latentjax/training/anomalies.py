"""Telling bad numbers from good ones: updates skipped one after another, and losses far above those before."""

import dataclasses
import math
import statistics
from collections import deque
from typing import Any

from ml_collections import ConfigDict

# The median of the distances from the median, times this, is the standard deviation of a normal distribution.
_DEVIATIONS_PER_MAD = 1.4826
# Where losses hardly differ, so small a share of their median still counts as one deviation.
_LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Bad numbers that the run should not go on from.

    Attributes:
      step: how many steps were done when they were seen.
      last_good: the last step (from 1) before them whose numbers were good; 0: none.
      reason: what is wrong, in words.
    """

    step: int
    last_good: int
    reason: str


class Monitor:
    """Watches the numbers of a run. It sees the same ones in all processes, and so they all find the same."""

    def __init__(self, train: ConfigDict, notes: dict[str, Any] | None = None):
        """Begins, or goes on from a checkpoint's `notes`.

        Args:
          train: the `train` group of a config.
        """
        notes = notes or {}
        self._train = train
        self._losses: deque[float] = deque(notes.get("losses", ()), maxlen=train.spike_window)
        self._last_good = int(notes.get("last_good", 0))  # the last logged step that was no trouble
        # The longest run of skipped updates since the last logged step, and its last step.
        self._skipped, self._skipped_until = notes.get("skipped", (0, 0))

    def notes(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "losses": list(self._losses),
            "last_good": self._last_good,
            "skipped": [self._skipped, self._skipped_until],
        }

    def skipped(self, step: int, in_a_row: int) -> None:
        """Notes that the update of a step (from 1) was skipped, the last one of so many."""
        if in_a_row >= self._skipped:
            self._skipped, self._skipped_until = in_a_row, step

    def judge(self, step: int, loss: float) -> Trouble | None:
        """Says whether there is trouble, at a logged step (from 1) whose loss is known, in nats.

        Trouble are `train.max_skipped_updates` skipped updates in a row since the last logged step; and a loss that is
        more than `train.spike_threshold` deviations above the median of the `train.spike_window` losses before it, once
        half as many are known. Only upwards: losses fall fast at first, and then the median is above them.
        """
        run, until = self._skipped, self._skipped_until
        self._skipped = 0
        if self._train.on_bad_numbers == "skip":
            return None
        if run >= self._train.max_skipped_updates:
            reason = f"the loss or the gradients of {run} steps in a row, {until - run + 1} to {until}, were not finite"
            return Trouble(step, min(until - run, step), reason)
        if not math.isfinite(loss):
            return None
        limit = self._limit()
        if loss > limit:
            reason = f"the loss is {loss:.4f}, above the limit of {limit:.4f} that train.spike_threshold sets"
            return Trouble(step, self._last_good, reason)
        self._losses.append(loss)
        self._last_good = step
        return None

    def _limit(self) -> float:
        """The loss above which a step is a spike, in nats."""
        if not self._train.spike_threshold or len(self._losses) < self._train.spike_window // 2:
            return math.inf
        median = statistics.median(self._losses)
        mad = statistics.median(abs(loss - median) for loss in self._losses)
        deviation = max(_DEVIATIONS_PER_MAD * mad, _LEAST_DEVIATION * abs(median))
        return median + self._train.spike_threshold * deviation
