"""Keeping the stretches of batches that a run steps over: data_skips.json, and which checkpoints know of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from latentjax.data.skips import Skip, skips_from_json, skips_to_json
from latentjax.errors import UserError
from latentjax.training import processes
from latentjax.training.agreement import numbers_of_first, text_of_first
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.run_directory import write_durably

SKIPS_FILE = "data_skips.json"


def read_skips(workdir: Path) -> tuple[Skip, ...]:
    """Returns the stretches that the run in `workdir` steps over, in the order in which it found them.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / SKIPS_FILE
    try:
        return skips_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path}, which says what batches the run steps over ({error!r}): restore it, or remove it to "
            "go by what the newest checkpoint says"
        ) from error


def skips_of_run(workdir: Path) -> tuple[Skip, ...]:
    """Returns what `read_skips` finds in the first process; to be called in all.

    A file system that shows the others an older file, or none, would have them train on other batches.
    """
    found = processes.on_first(lambda: read_skips(workdir)) or ()
    return skips_from_json(json.loads(text_of_first(json.dumps(skips_to_json(found)))))


def write_skips(workdir: Path, skips: Sequence[Skip]) -> None:
    """Writes them so that they outlast whatever happens next.

    Raises:
      UserError: they cannot be written.
    """
    path = workdir / SKIPS_FILE
    try:
        write_durably(path, json.dumps(skips_to_json(skips), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_abandoned(checkpoints: Checkpoints, skips: Sequence[Skip]) -> None:
    """Removes checkpoints that a run went back from and had no time to remove itself; to be called in all processes.

    Such a one is of a later step than the one gone back to, and does not know of it.
    """
    if not skips:
        return
    steps = checkpoints.steps
    abandoned = processes.on_first(lambda: [step for step in steps if _is_abandoned(checkpoints, step, skips)])
    for step in numbers_of_first(abandoned or ()):
        checkpoints.delete(step)


def _is_abandoned(checkpoints: Checkpoints, step: int, skips: Sequence[Skip]) -> bool:
    # What was gone back to since a checkpoint knew of so many skips; later steps than that it must not be of.
    limits = [min(skip.step for skip in skips[known:]) for known in range(len(skips))]
    if step <= min(limits):
        return False
    notes = checkpoints.notes(step)
    if notes is None:
        return False  # damaged: nobody goes on from there
    known = len(notes.get("data_skips", ()))
    return known < len(skips) and step > limits[known]
