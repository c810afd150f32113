"""Turning what a step computed into a line of the log."""

import time
from collections.abc import Callable

import jax

from latentjax.training.flops import peak_flops, train_flops_per_token
from latentjax.training.metrics import MetricsLog
from latentjax.training.progress import TrainProgress
from latentjax.training.start import Run


class Recorder:
    """Turns a step's metrics on the device into a line of the log, one step late so as not to wait for it."""

    def __init__(self, run: Run, log: MetricsLog, progress: TrainProgress):
        config = run.config
        self._log, self._progress, self._num_steps = log, progress, config.train.num_steps
        self._tokens_per_step = config.data.batch_size * config.data.sequence_length
        self._flops_per_step = {
            iterations: self._tokens_per_step
            * train_flops_per_token(run.model.spec, run.recurrence, config.data.sequence_length, iterations)
            for iterations in run.train_steps
        }
        peak = peak_flops(run.mesh.devices.flat[0])
        self._peak_flops = None if peak is None else peak * run.mesh.size
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last line (evaluating, sampling, saving) out of the rates."""
        self._clock, self._steps, self._flops = time.monotonic(), 0, 0.0

    def advance(self, num_iterations: int) -> None:
        """Counts a step that was just dispatched."""
        self._steps += 1
        self._flops += self._flops_per_step[num_iterations]

    def note(self, step: int, num_iterations: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics until `write`."""
        self._pending = (step, num_iterations, metrics)

    def write(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Writes the line kept by `note`, if there is one, with the results of an evaluation made now."""
        if self._pending is None:
            return
        (step, num_iterations, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the step
        seconds = time.monotonic() - self._clock
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            **values,
            "num_jacobi_iterations": num_iterations,
            "tokens_per_second": self._steps * self._tokens_per_step / seconds,
            "mfu": self._flops / seconds / self._peak_flops if self._peak_flops else None,
            **(evaluate() if evaluate else {}),
        }
        self._log.write(line)
        self._progress.show(line, seconds / self._steps * (self._num_steps - step))
        self.restart_clock()
