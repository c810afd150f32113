"""Checkpoints of a run, by Orbax: asynchronous, atomic, checked, restored onto whatever mesh is there now.

What is written and what is read is compared by checksums that the devices compute (`latentjax.training.checksums`). A
checkpoint that is not what was written is set aside, and the one before it is taken. A save that fails is reported and
tried again. docs/reliability.md tells users about all of this.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.training import checkpoint_files as files
from latentjax.training import checkpoint_reading as reading
from latentjax.training import processes, programs
from latentjax.training.agreement import Wish, gather_texts, numbers_of_first
from latentjax.training.checkpoint_reading import ARRAYS, RUN, STATE
from latentjax.training.checksums import StateChecksums
from latentjax.training.state import TrainState
from latentjax.training.storage_errors import ignore_leftovers, one_line

_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 10.0, 600.0  # behind a second failure and each that follows
_ASK_EVERY_STEPS = 10  # several processes, whether one of them wants a checkpoint
_LAST_WAITS = (1.0, 4.0)  # seconds before each further try of the last save: schedulers give half a minute


class _Save:
    """A save under way, and the thread that waits for it."""

    def __init__(self, step: int):
        self.step, self.seconds = step, 0.0
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def finish_by(self, finish: Callable[[], None]) -> None:
        """Runs `finish` in the background; what it raises is kept."""

        began = time.monotonic()

        def run() -> None:
            try:
                finish()
            except Exception as error:
                self.error = error
            self.seconds = time.monotonic() - began

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def has_failed(self) -> bool:
        """Whether it is known to have failed."""
        return self.error is not None

    def join(self) -> None:
        """Waits for the end."""
        if self._thread is not None:
            self._thread.join()


class Checkpoints:
    """The checkpoints of a run, in one directory. With several processes, all call everything at the same places."""

    def __init__(self, directory: epath.Path, config: ConfigDict, abstract_state: TrainState):
        """Opens the directory, making it if need be.

        Args:
          directory: of `checkpoint_files.directory_of`; the same one for all processes.
          config: the `checkpoint` group: when to save, and how many are kept.
          abstract_state: shapes, dtypes and shardings of what is saved and restored.

        Raises:
          UserError: the directory cannot be reached or written.
        """
        # Orbax logs every phase of every save; what a user needs to know is said by `note`.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_leftovers()
        self.directory = directory
        self.note: Callable[[str], None] = processes.say  # how a line about a save is shown
        self._config, self._abstract = config, abstract_state
        self._steps = numbers_of_first(processes.on_first(lambda: files.open_directory(directory)) or ())
        self._checksums = StateChecksums(abstract_state)
        # Directories are made before `save` returns: made behind it, one that fails would let every thread that writes
        # wait for five minutes, and so would the end of the process.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            STATE, RUN, composite_options=ocp.CompositeOptions(async_options=options)
        )
        self._checkpointer = ocp.AsyncCheckpointer(handler, async_options=options)
        self._current: _Save | None = None
        self._reason = ""  # why the last save failed
        self._failures, self._retry_at = 0, 0.0
        self._last_save_at = time.monotonic()
        self.last_save_seconds = 0.0  # from the return of `save` until the checkpoint was whole
        self._wish = Wish(jax.tree.leaves(abstract_state)[0].sharding.mesh, _ASK_EVERY_STEPS)

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None; whether it is whole only `restore` finds out."""
        return max(self._steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order; whether they are whole only `restore` finds out."""
        self.settle()
        return sorted(self._steps)

    def notes(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as `run` for a step, read without its arrays; None if it is damaged."""
        try:
            return reading.without_seal(self._read_notes(step))
        except reading.DamagedError:
            return None

    def due(self, step: int) -> bool:
        """Returns whether the state after `step` is to be saved: by its number, by the clock, or after a failure."""
        if step % self._config.every_steps == 0:
            return True
        now = time.monotonic()
        late = 0 < self._config.every_minutes * 60 <= now - self._last_save_at and processes.is_first()
        again = self._current is not None and self._current.has_failed() and now >= self._retry_at
        return self._wish.granted(step, late or again)

    def save(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Starts saving and returns once the state has been copied off the devices; nothing if `step` is there.

        First waits for the save before to end. A failure is no error here: it is told by `note`, and `due` asks for
        another try.

        Args:
          run: JSON values that belong to the checkpoint (config, versions, data position, wall time).
        """
        self.settle()
        if step in self._steps:
            return
        sums = self._checksums.start(state)
        notes = files.seal({**run, ARRAYS: self._checksums.describe(sums)})
        self._last_save_at = time.monotonic()
        self._wish.forget()
        self._current = _Save(step)
        try:
            self._checkpointer.save(
                self.directory / str(step),
                args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), RUN: ocp.args.JsonSave(notes)}),
            )
        except jax.errors.JaxRuntimeError:
            self._current = None
            raise  # of the devices, not of the storage
        except Exception as error:
            self._current.error = error
        else:
            self._current.finish_by(lambda: self._finish(step))

    def _finish(self, step: int) -> None:
        """Waits until a checkpoint is whole, and only then deletes those that it replaces."""
        self._checkpointer.wait_until_finished()
        if not processes.is_first():
            return
        config = self._config
        for old in files.steps_to_delete([*self._steps, step], config.max_to_keep, config.keep_every_steps):
            try:
                files.delete(self.directory, old)
            except Exception as error:  # a checkpoint too many is no reason to call this save a failure
                self.note(f"checkpoint {old} in {self.directory} could not be deleted: {one_line(error)}")

    def settle(self) -> bool:
        """Waits for the save under way; returns false, after a `note`, if it failed in any process."""
        if self._current is None:
            return True
        save, self._current = self._current, None
        save.join()
        failures = [text for text in gather_texts(one_line(save.error) if save.error else "") if text]
        if failures:
            self._failures += 1
            wait = _FIRST_RETRY_SECONDS * 2 ** (self._failures - 1)
            self._retry_at = time.monotonic() + min(wait, _LONGEST_RETRY_SECONDS)
            self._reason = failures[0]
            if processes.is_first():
                self._tidy()
            self.note(f"saving step {save.step} to {self.directory} failed ({self._reason}); {self._last_good()}")
            return False
        config = self._config
        self.last_save_seconds = save.seconds
        self._steps.append(save.step)
        deleted = files.steps_to_delete(self._steps, config.max_to_keep, config.keep_every_steps)
        self._steps = [step for step in self._steps if step not in deleted]
        self._failures, self._retry_at = 0, 0.0
        return True

    def _tidy(self) -> None:
        """Gives back the space that a failed save has taken."""
        try:
            files.drop_unfinished(self.directory)
        except Exception as error:
            self.note(f"what a failed save has left in {self.directory} could not be deleted: {one_line(error)}")

    def _last_good(self) -> str:
        if self.latest_step is None:
            return "there is no checkpoint yet"
        return f"the last checkpoint is that of step {self.latest_step}"

    def save_last(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Saves, as `save` does, and returns when the checkpoint of `step` is whole; tries more than once.

        Raises:
          UserError: it cannot be saved.
        """
        for wait in (0.0, *_LAST_WAITS):
            time.sleep(wait)
            self.save(state, step, run)
            if self.settle():
                return
        advice = "free some space" if self._reason.startswith("no space left") else "mend that"
        raise UserError(
            f"step {step} cannot be saved to {self.directory} ({self._reason}): {advice} and give the same command "
            f"again; {self._last_good()}"
        )

    def restore(self) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest whole checkpoint onto the mesh of the abstract state; damaged ones on the way are set aside.

        Nothing is set aside before a whole one is found: what makes all of them unreadable is not damage.

        Returns:
          The state, and what `save` was given as `run`.

        Raises:
          UserError: none is whole, one holds another model's state, or one cannot be read for now.
        """
        self.settle()
        damaged: dict[int, str] = {}
        for step in sorted(self._steps, reverse=True):
            try:
                state, notes = self._read(step)
            except reading.DamagedError as error:
                damaged[step] = str(error)
                continue
            for each, reason in damaged.items():
                target = processes.on_first(lambda each=each: files.set_aside(self.directory, each))
                self._steps.remove(each)
                self.note(f"checkpoint {each} is damaged ({reason}): moved to {target}; going back to step {step}")
            return state, notes
        if not damaged:
            raise UserError(f"there is no checkpoint in {self.directory}")
        newest = max(damaged)
        raise UserError(
            f"no checkpoint in {self.directory} can be used: all {len(damaged)} are damaged, step {newest} for "
            f"one ({damaged[newest]}); bring one back, or give another --workdir to begin anew"
        )

    def delete_after(self, step: int) -> None:
        """Deletes all checkpoints of later steps, from the newest: those of a way that the run has left."""
        for each in reversed(self.steps):
            if each > step:
                self.delete(each)

    def delete(self, step: int) -> None:
        """Deletes a checkpoint; to be called in all processes."""
        self.settle()
        processes.on_first(lambda: files.delete(self.directory, step))
        self._steps.remove(step)

    def _read(self, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint and checks all of it; all processes come to the same end.

        Raises:
          reading.DamagedError: it is not what was written.
          UserError: it is another model's, or cannot be read for now.
        """
        state, notes, outcome = None, {}, "whole"
        try:
            with programs.memory_errors("restoring a checkpoint"):
                notes = self._read_notes(step)
                state = self._read_state(step)
        except reading.DamagedError as error:
            outcome = f"damaged {error}"
        except UserError as error:
            outcome = f"mistake {error}"
        outcomes = gather_texts(outcome)
        for kind, raised in (("mistake ", UserError), ("damaged ", reading.DamagedError)):
            for text in outcomes:
                if text.startswith(kind):
                    raise raised(text.removeprefix(kind))
        assert state is not None  # else our own outcome was raised
        reading.check_sums(notes, self._checksums.describe(self._checksums.start(state)))
        return state, reading.without_seal(notes)

    def _read_notes(self, step: int) -> dict[str, Any]:
        """Reads and checks the JSON of a checkpoint, and that it tells of a state like ours."""
        notes = reading.read_notes(self.directory, step)
        reading.check_arrays(notes, self._checksums.describe(), f"checkpoint {step} in {self.directory}")
        return notes

    def _read_state(self, step: int) -> TrainState:
        path = self.directory / str(step) / STATE
        try:
            # The handler by itself: around it Orbax waits for all processes, also for those that have failed.
            return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(self._abstract))
        except jax.errors.JaxRuntimeError:
            raise  # of the devices, not of the files
        except Exception as error:
            raise reading.reading_error(self.directory, step, error, f"its item {STATE!r} cannot be read") from error

    def close(self) -> None:
        """Waits for a save under way."""
        self.settle()
        self._checkpointer.close()
