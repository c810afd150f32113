"""Batches that make bad numbers, and a run that goes back from them.

As a recipe of the command line it is the run of test_rewinding.py in several processes, of which only the last one's
batches are bad; each says at its end which batches it took.
"""

import atexit
import contextlib
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a recipe: where the other one is

import jax
import numpy as np
import pytest
import recipes
from ml_collections import ConfigDict

from latentjax.data.windows import TrainBatches
from latentjax.training import loop

NUM_STEPS = 27
BAD = (13, 14, 15)
# Of a run that has begun with batch 3: its steps 14 to 16 as well.
FIRST, BAD_BEHIND_FIRST = 3, (16, 17, 18)
TAKEN = "batches taken: "


def config_of(every_steps: int = 4, **train: object) -> ConfigDict:
    """Steps 14 to 16 are looked at only after step 24: there is a checkpoint of step 20 by then."""
    config = recipes.get_config("vanilla")
    config.train.update(num_steps=NUM_STEPS, log_every_steps=12, eval_every_steps=0, sample_every_steps=0)
    config.train.max_skipped_updates = 3
    config.train.update(train)
    config.checkpoint.update(every_steps=every_steps, max_to_keep=3)
    return config


class Batches:
    """Stands between the data and the loop: spoils chosen batches, and keeps the numbers of those that were taken."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        bad: Collection[int],
        spoil: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.bad, self.taken = bad, []
        self.spoil = spoil or (lambda batch: batch["loss_weights"].__setitem__((0, 0), np.nan))
        real = loop.train_batches

        def train_batches(mixture, data, *, eod_id, start_step, rows, skips):
            # Batches are known by what is in them, so that it does not matter how their numbers are worked out.
            plain = TrainBatches(mixture, data, eod_id, 0, rows)
            numbers = {plain[number]["tokens"].tobytes(): number for number in range(3 * NUM_STEPS)}
            self.taken.append([])
            batches = real(mixture, data, eod_id=eod_id, start_step=start_step, rows=rows, skips=skips)
            with contextlib.closing(batches):
                for batch in batches:
                    number = numbers[batch["tokens"].tobytes()]
                    self.taken[-1].append(number)
                    if number in self.bad:
                        self.spoil(batch)
                    yield batch

        monkeypatch.setattr(loop, "train_batches", train_batches)


def get_config() -> ConfigDict:
    """The run of several processes."""

    def spoil(batch: dict[str, Any]) -> None:
        if jax.process_index() == jax.process_count() - 1:
            batch["loss_weights"][0, 0] = np.nan

    batches = Batches(pytest.MonkeyPatch(), BAD_BEHIND_FIRST, spoil)
    atexit.register(lambda: print(TAKEN + json.dumps(batches.taken), file=sys.stderr, flush=True))
    return config_of()
