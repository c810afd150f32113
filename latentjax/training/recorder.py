"""Turning what a step computed into a line of the log, and into a word of warning."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from latentjax.recurrence.draw import Work
from latentjax.training import processes
from latentjax.training.anomalies import Trouble
from latentjax.training.flops import peak_flops, work_flops_per_token
from latentjax.training.goodput import STEPS
from latentjax.training.metrics import MetricsLog
from latentjax.training.progress import TrainProgress
from latentjax.training.start import Run

_COUNTERS = ("skipped_update", "skipped_updates", "skipped_in_a_row")


class Recorder:
    """Turns a step's metrics on the device into a line of the log, one step late so as not to wait for it.

    Attributes:
      trouble: set where the numbers of a logged step say that the run should not go on from them.
      skips_now: whether the update of the last step that was read was skipped.
    """

    def __init__(self, run: Run, log: MetricsLog, progress: TrainProgress, skipped_updates: int):
        """Begins with a state that has so many skipped updates behind it."""
        config = run.config
        self._run, self._log, self._progress, self._num_steps = run, log, progress, config.train.num_steps
        self._tokens_per_step = config.data.batch_size * config.data.sequence_length
        length, spec, recurrence = config.data.sequence_length, run.model.spec, run.model.recurrence_spec
        self._flops_per_token = functools.cache(lambda work: work_flops_per_token(spec, recurrence, length, work))
        peak = peak_flops(run.mesh.devices.flat[0])
        self._peak_flops = None if peak is None else peak * run.mesh.size
        self._pending: tuple[int, Work, dict[str, jax.Array]] | None = None
        self._unread: list[tuple[int, Work, dict[str, jax.Array]]] = []  # all steps since the counts were last read
        self._skipped_updates = skipped_updates
        self.skips_now = False
        self.trouble: Trouble | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last line (evaluating, sampling, saving) out of the rates."""
        self._clock, self._steps = time.monotonic(), 0
        # Of each step, its work, and how many passes there were if only the step itself knows.
        self._works: list[tuple[Work, jax.Array | None]] = []

    def advance(self, step: int, work: Work, metrics: dict[str, jax.Array]) -> None:
        """Counts a step (from 1) that was just dispatched. Its numbers stay where they are, mostly never read."""
        self._steps += 1
        self._works.append((work, metrics.get("num_jacobi_iterations")))
        self._unread.append((step, work, metrics))

    def note(self, step: int, work: Work, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics until `write`."""
        self._pending = (step, work, metrics)

    def write(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Writes the line kept by `note`, if there is one, with the results of an evaluation made now.

        Where the numbers are trouble nothing is evaluated.
        """
        if self._pending is None:
            return
        (step, work, metrics), self._pending = self._pending, None
        values = _read(metrics)  # waits for the step
        seconds = time.monotonic() - self._clock
        self._note_skipped(values, logged=step)
        self.trouble = self._run.monitor.judge(step, values["loss"])
        line = {
            **self._begun(step, work, values),
            "tokens_per_second": self._steps * self._tokens_per_step / seconds,
            "mfu": self._flops_since() / seconds / self._peak_flops if self._peak_flops else None,
            **(evaluate() if evaluate and not self.trouble else {}),
        }
        self._log.write(line)
        self._progress.show(line, seconds / self._steps * (self._num_steps - step))
        self._run.goodput.book(STEPS)
        if processes.is_first():
            self._run.goodput.write(self._run.workdir)
        self.restart_clock()

    def _flops_since(self) -> float:
        """Model FLOPs of all steps since the clock began."""
        works, passes = zip(*self._works, strict=True)
        passes = jax.device_get(passes)
        works = [
            work if each is None else work._replace(num_jacobi_iterations=each.item())
            for work, each in zip(works, passes, strict=True)
        ]
        return self._tokens_per_step * sum(map(self._flops_per_token, works))

    def settle(self) -> None:
        """Waits for the last step, and sees to it that no skipped update before it is missing in the log."""
        if self._unread:
            self._note_skipped(_read({name: self._unread[-1][2][name] for name in _COUNTERS}), logged=None)

    def _note_skipped(self, values: dict[str, Any], logged: int | None) -> None:
        """Looks for skipped updates up to the step with these counts; gives each a line unless it is to have one."""
        unread, self._unread = self._unread, []
        before, self._skipped_updates = self._skipped_updates, values["skipped_updates"]
        self.skips_now = values["skipped_in_a_row"] > 0
        if self._skipped_updates == before:
            return  # as nearly always: the numbers of the steps in between are not read
        for step, work, metrics in unread:
            found = _read(metrics)
            if not found["skipped_update"]:
                continue
            self._run.monitor.skipped(step, found["skipped_in_a_row"])
            self._progress.note(
                f"step {step}: update skipped, since the loss ({found['loss']}) or the gradients (norm "
                f"{found['grad_norm']}) are not finite; {found['skipped_updates']} so far"
            )
            if step != logged:
                self._log.write({**self._begun(step, work, found), "tokens_per_second": None, "mfu": None})

    def _begun(self, step: int, work: Work, values: dict[str, Any]) -> dict[str, Any]:
        """The part of a line that does not depend on the machine's speed."""
        shown = {name: value for name, value in values.items() if name != "skipped_in_a_row"}
        return {
            "step": step,
            "tokens": step * self._tokens_per_step,
            **shown,
            "num_jacobi_iterations": values.get("num_jacobi_iterations", work.num_jacobi_iterations),
            **({"num_latent_thoughts": work.num_latent_thoughts} if self._run.schedule.varies_thoughts else {}),
        }


def _read(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Metrics as Python's numbers; waits for the step."""
    return {name: value.item() for name, value in jax.device_get(metrics).items()}
