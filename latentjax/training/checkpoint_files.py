"""The directory of a run's checkpoints: which there are, which are kept, and where damaged ones go.

A checkpoint is a directory named by its step. Orbax writes it under another name until it is whole; behind `gs://`,
where names cannot be changed at once, files in it say so. All of this is done by the first process alone.
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
# Behind a URL, Orbax writes into the first of these when a save has ended, and then makes the second.
_METADATA, _COMPLETE = "_CHECKPOINT_METADATA", "commit_success.txt"
_COPYING = "copying.txt"  # behind a URL, in a copy of a damaged checkpoint that is not whole yet
_REMOTE = "gs://"


def is_remote(directory: epath.Path) -> bool:
    """Returns whether the directory is behind a URL."""
    return str(directory).startswith(_REMOTE)


def directory_of(knob: str, workdir: Any) -> epath.Path:
    """Returns where checkpoints go: `checkpoint.directory`, or WORKDIR/checkpoints where that is empty."""
    if knob.startswith(_REMOTE):
        import fsspec  # slow to import, and not needed for local paths

        # A listing that is kept is wrong as soon as another process, or TensorStore in this one, has written.
        fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
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


def complete_steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, ascending, and changes nothing: for a run that may be going on.

    Raises:
      UserError: the directory cannot be read.
    """
    try:
        names = [path.name for path in directory.iterdir()]
        steps = sorted(int(name) for name in names if name.isdigit())
        if is_remote(directory):
            steps = [step for step in steps if _is_complete(directory / str(step))]
    except FileNotFoundError:
        return []
    except Exception as error:  # as in `open_directory`
        if not is_remote(directory) and not isinstance(error, OSError):
            raise
        raise UserError(f"cannot read the checkpoints in {directory} ({one_line(error)}): mend that") from error
    return steps


def _entries(directory: epath.Path) -> list[epath.Path]:
    """What lies in the directory; behind a URL one that holds nothing is not there at all."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        if not is_remote(directory):
            raise
        return []


def _is_complete(path: epath.Path) -> bool:
    """Whether the save of a checkpoint behind a URL has come to its end.

    Either sign of it is enough. Where one is lost the rest may be whole, which reading finds out; what is taken for the
    rest of a save is deleted, and that must not happen to a checkpoint.
    """
    names = {entry.name for entry in _entries(path)}  # an error of the storage is raised, as `exists` might not
    if _COMPLETE in names or _METADATA not in names:
        return _COMPLETE in names
    try:
        return bool(json.loads((path / _METADATA).read_bytes())["commit_timestamp_nsecs"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def drop_unfinished(directory: epath.Path) -> None:
    """Deletes what saves that were killed or failed have left behind."""
    for path in _entries(directory):
        incomplete = is_remote(directory) and path.name.isdigit() and not _is_complete(path)
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
        for sign in (_COMPLETE, _METADATA):  # without both of them it is the rest of a save, see `_is_complete`
            (path / sign).unlink(missing_ok=True)
    else:
        path = path.rename(directory / f"{step}{_UNFINISHED}-deleted")
    path.rmtree(missing_ok=True)


def set_aside(directory: epath.Path, step: int) -> epath.Path:
    """Moves a checkpoint to where it is not found again, and returns that place.

    Behind a URL it is copied and then deleted. If that is cut off, it is there still and is found to be damaged again,
    or all of it is in its new place.

    Raises:
      UserError: it cannot be moved.
    """
    path = directory / str(step)
    try:
        number, target = 1, directory / DAMAGED / str(step)
        while _is_taken(target):
            number += 1
            target = directory / DAMAGED / f"{step}-{number}"
        if is_remote(directory):
            _copy(path, target)
            delete(directory, step)
        else:
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    except Exception as error:  # as in `open_directory`
        if not is_remote(directory) and not isinstance(error, OSError):
            raise
        raise UserError(
            f"the damaged checkpoint {step} in {directory} cannot be moved to {DAMAGED}/ ({one_line(error)}): move it"
        ) from error
    return target


def _is_taken(target: epath.Path) -> bool:
    """Whether something lies there; a copy that was cut off does not count."""
    if not is_remote(target):
        return target.exists()
    names = {entry.name for entry in _entries(target)}
    return bool(names) and _COPYING not in names


def _copy(path: epath.Path, target: epath.Path) -> None:
    """Copies a checkpoint behind a URL; a file in the target meanwhile says that it is not whole."""
    import fsspec

    # The service itself copies, many objects at a time; epath would send each of them through here.
    filesystem, here = fsspec.core.url_to_fs(str(path))
    _, there = fsspec.core.url_to_fs(str(target))
    sources = filesystem.find(here)
    filesystem.pipe_file(f"{there}/{_COPYING}", str(path).encode())
    filesystem.copy(sources, [there + source.removeprefix(here) for source in sources])
    filesystem.rm_file(f"{there}/{_COPYING}")


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
