"""The directory of a run's checkpoints: which there are, which are kept, and where damaged ones go.

A checkpoint is a directory named by its step. Orbax writes it under another name until it is whole; behind `gs://`,
where names cannot be changed at once, a file in it says so. All of this is done by the first process alone.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from latentjax.errors import UserError
from latentjax.training.storage_errors import one_line

DAMAGED = "damaged"  # where checkpoints that cannot be used are put: nothing is ever lost
_UNFINISHED = ".orbax-checkpoint-tmp"
_COMPLETE = "commit_success.txt"
_REMOTE = "gs://"


def is_remote(directory: epath.Path) -> bool:
    """Returns whether the directory is behind a URL."""
    return str(directory).startswith(_REMOTE)


def directory_of(knob: str, workdir: Any) -> epath.Path:
    """Returns where checkpoints go: `checkpoint.directory`, or WORKDIR/checkpoints where that is empty."""
    if knob.startswith(_REMOTE):
        return epath.Path(knob)
    return epath.Path(knob or workdir / "checkpoints").expanduser().absolute()


def open_directory(directory: epath.Path) -> list[int]:
    """Makes the directory if need be, drops what was never finished, and returns the steps that are there, ascending.

    Raises:
      UserError: it cannot be reached or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        drop_unfinished(directory)
        return sorted(int(path.name) for path in _entries(directory) if path.name.isdigit())
    except ImportError as error:
        raise UserError(
            f"checkpoint.directory={directory} needs the package gcsfs: pip install gcsfs ({one_line(error)})"
        ) from error
    except Exception as error:
        # Every store has exceptions of its own: credentials, quota, HTTP status.
        if not is_remote(directory) and not isinstance(error, OSError):
            raise
        raise UserError(
            f"cannot use {directory} for checkpoints ({one_line(error)}): mend that, or set checkpoint.directory"
        ) from error


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What lies in the directory; behind a URL one that holds nothing is not there at all."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        if not is_remote(directory):
            raise
        return []


def drop_unfinished(directory: epath.Path) -> None:
    """Deletes what saves that were killed or failed have left behind."""
    for path in _entries(directory):
        incomplete = is_remote(directory) and path.name.isdigit() and not (path / _COMPLETE).exists()
        if _UNFINISHED in path.name or incomplete:
            path.rmtree()


def steps_to_delete(steps: Sequence[int], max_to_keep: int, keep_every_steps: int) -> list[int]:
    """Returns the steps that are neither among the last `max_to_keep` nor multiples of `keep_every_steps` (0: none)."""
    old = sorted(steps)[:-max_to_keep]
    return [step for step in old if not keep_every_steps or step % keep_every_steps]


def delete(directory: epath.Path, step: int) -> None:
    """Deletes a checkpoint, in such a way that a process that is killed meanwhile leaves none that looks whole."""
    path = directory / str(step)
    if is_remote(directory):
        (path / _COMPLETE).unlink(missing_ok=True)
    else:
        path = path.rename(directory / f"{step}{_UNFINISHED}-deleted")
    path.rmtree()


def set_aside(directory: epath.Path, step: int) -> epath.Path:
    """Moves a checkpoint to where it is not found again, and returns that place.

    Raises:
      UserError: it cannot be moved.
    """
    try:
        (directory / DAMAGED).mkdir(exist_ok=True)
        number, target = 1, directory / DAMAGED / str(step)
        while target.exists():
            number += 1
            target = directory / DAMAGED / f"{step}-{number}"
        (directory / str(step)).rename(target)
    except OSError as error:
        raise UserError(
            f"the damaged checkpoint {step} in {directory} cannot be moved to {DAMAGED}/ ({one_line(error)}): move it"
        ) from error
    return target


def seal(notes: dict[str, Any]) -> dict[str, Any]:
    """Returns JSON values with a digest of themselves beside them, which tells when any of them is changed."""
    return {**notes, "sha256": _digest(notes)}


def is_sealed(notes: Any) -> bool:
    """Returns whether these are the values that `seal` has seen, after a way through JSON."""
    if not isinstance(notes, dict) or "sha256" not in notes:
        return False
    return notes["sha256"] == _digest({key: value for key, value in notes.items() if key != "sha256"})


def _digest(notes: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notes, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
