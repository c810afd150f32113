"""Checkpoints of a run, by Orbax: asynchronous, atomic, restored onto whatever mesh is there now."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.training.mesh import put_shards
from latentjax.training.state import Counts, TrainState

STATE, RUN = "state", "run"  # the two items of a checkpoint: arrays, and JSON about the run


class Checkpoints:
    """The `checkpoints/` directory of a run."""

    def __init__(self, directory: Path, config: ConfigDict):
        """Opens the directory, making it if need be.

        Args:
          config: the `checkpoint` group: how many are kept.
        """
        # Orbax logs every phase of every save; what a user needs to know is said by the loop.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=(STATE, RUN),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.max_to_keep,
                keep_period=config.keep_every_steps or None,
                enable_async_checkpointing=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def notes(self, step: int) -> dict[str, Any]:
        """Returns the JSON values of a checkpoint, without its arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(**{RUN: ocp.args.JsonRestore()}))[RUN]

    def remove(self, step: int) -> None:
        """Removes a checkpoint; to be called in all processes."""
        self._manager.delete(step)

    def save(self, state: TrainState, step: int, run: dict[str, Any]) -> None:
        """Starts saving and returns once the state has been copied off the devices; nothing if `step` is there.

        Args:
          run: JSON values that belong to the checkpoint (config, versions, data position, wall time).
        """
        if step == self.latest_step:
            return
        counts = jax.device_get(state.counts)
        counts = {field.name: int(getattr(counts, field.name)) for field in dataclasses.fields(counts)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{STATE: ocp.args.StandardSave(_arrays(state)), RUN: ocp.args.JsonSave(run | {"counts": counts})}
            ),
            force=True,
        )

    def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint into the shapes, dtypes and shardings of `abstract_state`.

        Raises:
          UserError: the checkpoint does not hold such a state.
        """
        step = self.latest_step
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardRestore(_arrays(abstract_state)), RUN: ocp.args.JsonRestore()}
                ),
            )
        except (ValueError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"checkpoint {step} in {self._manager.directory} does not hold this model's state ({first_line}): "
                "use another --workdir, or the config that made it"
            ) from error
        counts = restored[RUN].get("counts", {})  # a version that did not count wrote none
        return TrainState(**restored[STATE], counts=_put_counts(counts, abstract_state.counts)), restored[RUN]

    def close(self) -> None:
        """Waits for a save under way and reports its failure, if any."""
        self._manager.wait_until_finished()
        self._manager.close()


def _arrays(state: TrainState) -> dict[str, Any]:
    """What a checkpoint has as arrays: all but the counts, which are with the JSON values."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _put_counts(values: dict[str, int], abstract_counts: Counts) -> Counts:
    """Puts counts onto the devices, as `abstract_counts` wants them; 0 where there is no value."""

    def put(name: str) -> jax.Array:
        number = np.asarray(values.get(name, 0), np.int32)
        return put_shards((), getattr(abstract_counts, name).sharding, lambda index: number)

    return Counts(**{field.name: put(field.name) for field in dataclasses.fields(Counts)})
