"""The train loop: step, log, evaluate, sample and save, in a fixed order."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax.data.batches import eval_batches, train_batches
from latentjax.data.row import TokenRow
from latentjax.recurrence.draw import draw_jacobi_iterations
from latentjax.training import processes, programs, run_directory
from latentjax.training.evaluation import EVALUATION_KEYS, evaluate
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import rows_of_process
from latentjax.training.metrics import MetricsLog
from latentjax.training.progress import TrainProgress
from latentjax.training.recorder import Recorder
from latentjax.training.sampling import sample_text
from latentjax.training.signals import StopRequest
from latentjax.training.start import Run, prepare_run
from latentjax.training.state import TrainState
from latentjax.training.storage_errors import writing


def train(config: ConfigDict, workdir: Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains to `train.num_steps`, resuming where the run in `workdir` is.

    Args:
      config: validated (`latentjax.validation`).
      stop: entered for the steps and asked after each; when it says so the state is saved and None returned.

    Returns:
      The summary that the first process has written to summary.json ({} in the others), or None if it was stopped.

    Raises:
      UserError: anything about data, mesh or directory that the user can mend.
    """
    run = prepare_run(config, workdir)
    log = MetricsLog(workdir, run.start_step, writes=processes.is_first())
    progress = TrainProgress(run.start_step, config.train.num_steps, shows=processes.is_first())
    run.checkpoints.note = progress.note
    try:
        # Until here nothing would be lost: signals did what they always do.
        with stop:
            with contextlib.closing(_train_batches(run)) as batches, programs.memory_errors("training"):
                state, step = _steps(run, batches, log, progress, stop)
            run.checkpoints.save_last(state, step, run.checkpoint_notes(step))
            run.checkpoints.close()
        if step < config.train.num_steps:
            progress.note(f"saved step {step} to {run.checkpoints.directory}; the same command continues from there")
            return None
        if not processes.is_first():
            return {}
        summary = _summary(run, log)
        with writing(workdir / "summary.json"):
            run_directory.write_summary(workdir, summary)
        return summary
    finally:
        progress.close()
        log.close()


def _steps(
    run: Run, batches: Iterator[dict[str, jax.Array]], log: MetricsLog, progress: TrainProgress, stop: StopRequest
) -> tuple[TrainState, int]:
    """Runs steps until the end or a stop; returns the state and its step."""
    config, train = run.config, run.config.train
    recorder = Recorder(run, log, progress)
    state, step = run.state, run.start_step
    run.state = None  # the first step takes its memory over
    agreement = processes.StopAgreement(run.mesh, stop)
    while step < train.num_steps and not agreement.reached():
        num_iterations = 0
        if run.recurrence.uses_jacobi_iterations:
            num_iterations = draw_jacobi_iterations(config.recurrence.train_jacobi_iterations, train.seed, step)
        state, metrics = run.train_steps[num_iterations](state, next(batches))
        if step == run.start_step:
            jax.block_until_ready(metrics)
            progress.note(run.start_clock.first_step())
        # Only now, with the next step under way, are the numbers of the one before waited for.
        recorder.write()
        recorder.advance(num_iterations)
        step += 1
        progress.advance()

        last = step == train.num_steps
        evaluates = last or step % train.eval_every_steps == 0 if train.eval_every_steps else False
        samples = last or step % train.sample_every_steps == 0 if train.sample_every_steps else False
        samples = samples and train.sample_prompts
        saves = last or run.checkpoints.due(step)
        if last or step % train.log_every_steps == 0 or evaluates:
            recorder.note(step, num_iterations, metrics)
        if not (evaluates or samples or saves):
            continue
        # The log first: a checkpoint whose metrics are lost would leave a hole that no restart fills.
        recorder.write((lambda params=state.params: _evaluate(run, params)) if evaluates else None)
        if samples:
            log.write_samples(step, sample_text(run.model, state.params, run.sources.tokenizer, config, step))
        if saves:
            log.sync()
            run.checkpoints.save(state, step, run.checkpoint_notes(step))
        recorder.restart_clock()
    recorder.write()  # of the last step before a signal
    log.sync()
    return state, step


def _train_batches(run: Run) -> Iterator[dict[str, jax.Array]]:
    """The batches from the run's first step to its last, on the devices."""
    data = run.config.data
    rows = rows_of_process(run.mesh, data.batch_size)
    batches = train_batches(run.sources.train, data, eod_id=run.sources.eod_id, start_step=run.start_step, rows=rows)
    limit = run.config.train.num_steps - run.start_step
    return put_ahead(batches, run.mesh, data.device_prefetch, limit, rows, data.batch_size)


def _evaluate(run: Run, params: Any) -> dict[str, float]:
    data, sources = run.config.data, run.sources
    rows = rows_of_process(run.mesh, data.batch_size)

    def batches(row: TokenRow) -> Iterator[dict[str, jax.Array]]:
        of_process = eval_batches(
            row,
            data,
            run.config.train.eval_batches,
            eod_id=sources.eod_id,
            bytes_per_id=sources.tokenizer.bytes_per_id,
            rows=rows,
        )
        return put_ahead(of_process, run.mesh, data.device_prefetch, rows=rows, batch_size=data.batch_size)

    return evaluate(run.eval_step, params, {name: batches(row) for name, row in sources.eval_sets.items()})


def _summary(run: Run, log: MetricsLog) -> dict[str, Any]:
    devices = run.mesh.devices.flat
    # With several sets, also those of each: KEY/NAME.
    evaluation = {key: value for key, value in log.last_evaluation.items() if key.split("/")[0] in EVALUATION_KEYS}
    return {
        "steps": log.last["step"],
        "tokens": log.last["tokens"],
        "loss": log.last["loss"],
        **evaluation,
        "parameters": run.num_params,
        "wall_seconds": round(run.wall_seconds, 1),
        # Of the last start; None where no step was left to do.
        "seconds_to_first_step": run.start_clock.seconds_to_first_step,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(run.mesh.shape),
        "versions": run_directory.package_versions(),
    }
