"""Reading checkpoints: what is compared with what was written, and the parameters alone, for whoever does not train."""

import logging
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from latentjax.errors import UserError
from latentjax.training import checkpoint_files as files
from latentjax.training import programs
from latentjax.training.checksums import StateChecksums
from latentjax.training.storage_errors import ignore_leftovers, is_damage, is_full, one_line

STATE, RUN = "state", "run"  # the two items of a checkpoint: arrays, and JSON about the run and the arrays
ARRAYS = "arrays"  # in the JSON: {name: [shape, dtype, checksum]}


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says how that shows."""


def read_params(
    directory: epath.Path, step: int | None, abstract_params: Any, note: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]]:
    """Reads the parameters of a checkpoint, and of its other arrays nothing; a run may be at work in the directory.

    Nothing is changed there: a damaged checkpoint stays where it is, and is passed over with a `note` if no step was
    asked for.

    Args:
      step: of the checkpoint; None: the newest that is whole.
      abstract_params: shapes, dtypes and shardings.

    Returns:
      Its step, the parameters, and the JSON that belongs to it.

    Raises:
      UserError: there is no such checkpoint, none is whole, it holds another model's, or cannot be read for now.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # see `checkpoint.Checkpoints`
    ignore_leftovers()
    abstract = {"params": abstract_params}
    checksums = StateChecksums(abstract)
    damaged: dict[int, str] = {}
    while True:
        steps = files.complete_steps(directory)
        if step is not None and step not in steps:
            there = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            raise UserError(f"there is no checkpoint of step {step} in {directory}: {there}")
        left = [each for each in steps if each not in damaged]
        if not left:
            break
        chosen = left[-1] if step is None else step
        try:
            with programs.memory_errors("reading a checkpoint"):
                params, notes = _read_params(directory, chosen, abstract, checksums)
        except DamagedError as error:
            if chosen not in files.complete_steps(directory):
                continue  # the run has deleted it meanwhile, and has written others
            if step is not None:
                raise UserError(f"checkpoint {step} in {directory} is damaged ({error}): take another") from error
            damaged[chosen] = str(error)
            continue
        for each, reason in damaged.items():
            note(f"checkpoint {each} in {directory} is damaged ({reason}): reading that of step {chosen}")
        return chosen, params, notes
    if damaged:
        newest = max(damaged)
        raise UserError(
            f"no checkpoint in {directory} can be used: all {len(damaged)} are damaged, step {newest} for one "
            f"({damaged[newest]})"
        )
    raise UserError(f"there is no checkpoint in {directory} yet")


def _read_params(
    directory: epath.Path, step: int, abstract: Any, checksums: StateChecksums
) -> tuple[Any, dict[str, Any]]:
    notes = read_notes(directory, step)
    check_arrays(notes, checksums.describe(), f"checkpoint {step} in {directory}", all_of_them=False)
    handler = ocp.PyTreeCheckpointHandler()
    request = ocp.args.PyTreeRestore(
        item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    try:
        state = handler.restore(directory / str(step) / STATE, args=request)
    except jax.errors.JaxRuntimeError:
        raise  # of the devices, not of the files
    except Exception as error:
        raise reading_error(directory, step, error, f"its item {STATE!r} cannot be read") from error
    check_sums(notes, checksums.describe(checksums.start(state)))
    return state["params"], without_seal(notes)


def read_notes(directory: epath.Path, step: int) -> dict[str, Any]:
    """Reads the JSON of a checkpoint, seal and all.

    Raises:
      DamagedError: it is not what was written.
      UserError: it cannot be read for now.
    """
    try:
        notes = ocp.JsonCheckpointHandler().restore(directory / str(step) / RUN)
    except Exception as error:
        raise reading_error(directory, step, error, f"its item {RUN!r} cannot be read") from error
    if not files.is_sealed(notes):
        raise DamagedError(f"its item {RUN!r} is not what was written")
    if notes["step"] != step:
        raise DamagedError(f"it is that of step {notes['step']}")
    return notes


def check_arrays(notes: dict[str, Any], here: dict[str, list[Any]], source: str, all_of_them: bool = True) -> None:
    """Checks that a checkpoint holds arrays of the kinds that are `here`, in `StateChecksums.describe`'s form.

    Args:
      all_of_them: and no others.

    Raises:
      UserError: it holds another model's; `source` names the checkpoint.
    """
    there = notes[ARRAYS]
    more = [name for name in there if name not in here] if all_of_them else []
    for name in [*here, *more]:
        one, other = (_kind(tree[name]) if name in tree else "absent" for tree in (there, here))
        if one != other:
            raise UserError(
                f"{source} holds another model's state: {name} is {one} there and {other} here: give another "
                "--workdir, or the config that made it"
            )


def check_sums(notes: dict[str, Any], found: dict[str, list[Any]]) -> None:
    """Compares what was read with what was written.

    Raises:
      DamagedError: they differ.
    """
    differing = [name for name, entry in found.items() if entry != notes[ARRAYS][name]]
    if differing:
        more = f" and of {len(differing) - 1} more arrays" if len(differing) > 1 else ""
        raise DamagedError(f"the checksum of {differing[0]}{more} is another than when it was saved")


def without_seal(notes: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a checkpoint without what only its check needs."""
    return {key: value for key, value in notes.items() if key not in (ARRAYS, "sha256")}


def reading_error(directory: epath.Path, step: int, error: Exception, what: str) -> Exception:
    """What an error in reading a checkpoint means: damage, or trouble on the way to it."""
    if isinstance(error, MemoryError):
        return error
    if is_damage(error):
        return DamagedError(f"{what}: {one_line(error)}")
    where = "disk full" if is_full(error) else one_line(error)
    return UserError(
        f"checkpoint {step} in {directory} cannot be read for now ({where}): nothing was changed; give the same "
        "command again when the storage answers"
    )


def _kind(entry: list[Any]) -> str:
    """Dtype and shape of an entry of the JSON, as jax writes them."""
    shape, dtype, *_ = entry
    return f"{dtype}[{','.join(map(str, shape))}]"
