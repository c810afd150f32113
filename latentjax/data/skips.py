"""Stretches of batches that are stepped over: which batch a step trains on, once a run has gone back.

Where nothing was stepped over step s (from 0) trains on batch s. A run that goes back from bad numbers reads on behind
them, so that the batch is a function of the step and of the list of such moments, and of nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Skip:
    """One moment when a run went back.

    Attributes:
      step: how many steps were left done: step number `step` (from 0) is the first to be done again.
      batch: the batch that it trains on; those after it follow.
      seen_at: how many steps were done when the trouble was seen.
      reason: what the trouble was, in words.
    """

    step: int
    batch: int
    seen_at: int
    reason: str


def batch_of_step(step: int, skips: Sequence[Skip]) -> int:
    """Returns the number of the global batch that a step (from 0) trains on.

    Args:
      skips: in the order in which they happened. The last one that covers a step decides: if its `step` is smaller than
        that of one before, then the run went back behind that one too.
    """
    for skip in reversed(skips):
        if skip.step <= step:
            return skip.batch + step - skip.step
    return step


def skips_to_json(skips: Sequence[Skip]) -> list[dict[str, Any]]:
    """Returns JSON values: of each skip its fields."""
    return [dataclasses.asdict(skip) for skip in skips]


def skips_from_json(values: list[dict[str, Any]]) -> tuple[Skip, ...]:
    """Reads what `skips_to_json` returned.

    Raises:
      TypeError, KeyError, ValueError: it is something else.
    """
    return tuple(
        Skip(int(each["step"]), int(each["batch"]), int(each["seen_at"]), str(each["reason"])) for each in values
    )
