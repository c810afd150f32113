"""The train loop: step, log, evaluate, sample and save, in a fixed order."""

import contextlib
import math
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax.data.batches import eval_batches, train_batches
from latentjax.data.row import TokenRow
from latentjax.data.skips import skips_to_json
from latentjax.training import preemption, processes, programs, run_directory
from latentjax.training.agreement import Wish
from latentjax.training.anomalies import Trouble
from latentjax.training.evaluation import EVALUATION_KEYS, evaluate
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import rows_of_process
from latentjax.training.metrics import MetricsLog
from latentjax.training.progress import TrainProgress
from latentjax.training.recorder import Recorder
from latentjax.training.rewinding import rewind
from latentjax.training.sampling import sample_text
from latentjax.training.scoring import Refinement, Scorer, ScoreTasks
from latentjax.training.signals import StopRequest
from latentjax.training.start import ReadParams, Run, prepare_run
from latentjax.training.state import TrainState
from latentjax.training.storage_errors import writing
from latentjax.training.watchdog import Watchdog


def train(
    config: ConfigDict,
    workdir: Path,
    stop: StopRequest,
    watchdog: Watchdog | None = None,
    initial_params: ReadParams | None = None,
    score_tasks: ScoreTasks | None = None,
) -> dict[str, Any] | None:
    """Trains to `train.num_steps`, resuming where the run in `workdir` is.

    Args:
      config: validated (`latentjax.validation`).
      stop: entered for the steps and asked after each; when it says so the state is saved and None returned.
      watchdog: is told where the loop is, so that others see whether it hangs; None where there are no others.
      initial_params: gives the parameters that a run begins with; None: random ones. A run that goes on has no use for
        it.
      score_tasks: runs `train.eval_tasks`, every `train.tasks_every_steps`; None: they are not run.

    Returns:
      The summary that the first process has written to summary.json ({} in the others), or None if it was stopped.

    Raises:
      UserError: anything about data, mesh or directory that the user can mend.
    """
    with contextlib.ExitStack() as resources:
        run = prepare_run(config, workdir, resources, initial_params)
        if watchdog is not None:
            run.at = watchdog.at
        run.score_tasks = score_tasks
        # Until here nothing would be lost: signals did what they always do.
        with stop:
            preemption.watch(stop.notice)
            while True:
                result = _train_on(run, stop)
                if not isinstance(result, Trouble):
                    return result
                with programs.memory_errors("going back"):
                    rewind(run, result)


def _train_on(run: Run, stop: StopRequest) -> dict[str, Any] | Trouble | None:
    """Trains from the run's state on; returns what `train` does, or the trouble that it should not go on from."""
    workdir, num_steps = run.workdir, run.config.train.num_steps
    log = MetricsLog(workdir, run.start_step, writes=processes.is_first())
    progress = TrainProgress(run.start_step, num_steps, shows=processes.is_first())
    run.checkpoints.note = progress.note
    try:
        with contextlib.closing(_train_batches(run)) as batches, programs.memory_errors("training"):
            state, step, trouble = _steps(run, batches, log, progress, stop)
        if state is None:
            return trouble
        with run.goodput.part("saving"):
            run.checkpoints.save_last(state, step, run.checkpoint_notes(step))
            run.checkpoints.close()
        progress.note(run.goodput.line())
        if step < num_steps:
            stop.note_others()
            progress.note(f"saved step {step} to {run.checkpoints.directory}; the same command continues from there")
            return None
        if not processes.is_first():
            return {}
        summary = _summary(run, log)
        with writing(workdir / "summary.json"):
            run_directory.write_summary(workdir, summary)
        return summary
    finally:
        if processes.is_first():
            run.goodput.write(workdir, at_once=True)
        progress.close()
        log.close()


def _steps(
    run: Run, batches: Iterator[dict[str, jax.Array]], log: MetricsLog, progress: TrainProgress, stop: StopRequest
) -> tuple[TrainState | None, int, Trouble | None]:
    """Runs steps until the end, a stop or trouble; returns the state (None after trouble), its step and the trouble."""
    config, train = run.config, run.config.train
    state, step = run.state, run.start_step
    assert state is not None  # `load_state` has set it
    recorder = Recorder(run, log, progress, int(jax.device_get(state.counts.skipped_updates)))
    run.state = None  # the first step takes its memory over
    stopping = Wish(run.mesh, every_steps=1)
    while step < train.num_steps and not stopping.granted(step, stop.requested):
        work = run.schedule.draw(train.seed, step)
        run.at(step + 1, "reading its batch")
        batch = next(batches)
        run.at(step + 1, "running the step")
        state, metrics = run.train_steps[work](state, batch)
        if run.start_clock.seconds_to_first_step is None:
            jax.block_until_ready(metrics)
            progress.note(run.start_clock.first_step())
        # Only now, with the next step under way, are the numbers of the one before waited for.
        run.at(step + 1, "waiting for the step")
        recorder.write()
        if recorder.trouble:
            return None, step, recorder.trouble
        step += 1
        recorder.advance(step, work, metrics)
        progress.advance()

        last = step == train.num_steps
        evaluates = last or step % train.eval_every_steps == 0 if train.eval_every_steps else False
        scores = run.score_tasks is not None and (last or step % train.tasks_every_steps == 0)
        samples = last or step % train.sample_every_steps == 0 if train.sample_every_steps else False
        samples = samples and train.sample_prompts
        saves = last or run.checkpoints.due(step)
        if last or step % train.log_every_steps == 0 or evaluates or scores:
            recorder.note(step, work, metrics)
        if not (evaluates or scores or samples or saves):
            continue
        run.at(step, "evaluating")
        # The log first: a checkpoint whose metrics are lost would leave a hole that no restart fills.
        recorder.write(partial(_judge, run, state.params, step, evaluates, scores) if evaluates or scores else None)
        if recorder.trouble:
            return None, step, recorder.trouble
        recorder.settle()
        if samples:
            run.at(step, "sampling")
            with run.goodput.part("sampling"):
                log.write_samples(step, sample_text(run.model, state.params, run.sources.tokenizer, config, step))
        # While updates are being skipped nobody knows if the state is one to go back to: the next time will do.
        if saves and not (recorder.skips_now and train.on_bad_numbers == "rewind"):
            run.at(step, "saving")
            with run.goodput.part("saving"):
                log.sync()
                run.checkpoints.save(state, step, run.checkpoint_notes(step))
        recorder.restart_clock()
    recorder.write()  # of the last step before a signal
    if recorder.trouble:
        return None, step, recorder.trouble
    recorder.settle()
    log.sync()
    return state, step, None


def _train_batches(run: Run) -> Generator[dict[str, jax.Array], None, None]:
    """The batches from the run's first step to its last, on the devices."""
    data = run.config.data
    rows = rows_of_process(run.mesh, data.batch_size)
    batches = train_batches(
        run.sources.train, data, eod_id=run.sources.eod_id, start_step=run.start_step, rows=rows, skips=run.skips
    )
    limit = run.config.train.num_steps - run.start_step
    return put_ahead(batches, run.mesh, data.device_prefetch, limit, rows, data.batch_size)


def _judge(run: Run, params: Any, step: int, evaluates: bool, scores: bool) -> dict[str, float]:
    """What the line of a step says of held-out text and of tasks, as far as either is due."""
    found = _evaluate(run, params) if evaluates else {}
    if scores:
        assert run.score_tasks is not None  # tasks are due only where there are some
        if run.scorer is None:
            run.scorer = Scorer(
                run.model,
                params,
                run.mesh,
                refinement=Refinement(run.config.recurrence.num_jacobi_iterations),
                batch_tokens=run.config.train.eval_tasks_batch_tokens,
            )
        run.scorer.params = params
        run.scorer.at = partial(run.at, step, "running tasks")
        with run.goodput.part("evaluation"):
            found |= run.score_tasks(run.scorer, run.sources.tokenizer)
        run.scorer.params = None  # the next step takes their memory over
    return found


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

    assert run.eval_step is not None  # compiled with the steps where evaluations are due
    with run.goodput.part("evaluation"):
        return evaluate(run.eval_step, params, {name: batches(row) for name, row in sources.eval_sets.items()})


def _summary(run: Run, log: MetricsLog) -> dict[str, Any]:
    devices = run.mesh.devices.flat
    # With several sets, also those of each: KEY/NAME.
    evaluation = {key: value for key, value in log.last_evaluation.items() if key.split("/")[0] in EVALUATION_KEYS}
    tasks = {key: value for key, value in log.last.items() if key.startswith("task/")}
    scores = {"loss": log.last["loss"], **evaluation, **tasks}
    return {
        "steps": log.last["step"],
        "tokens": log.last["tokens"],
        # The log has null where a number was not finite.
        **{key: math.nan if value is None else value for key, value in scores.items()},
        "skipped_updates": log.last["skipped_updates"],
        "damaged_windows": log.last.get("damaged_windows", 0),  # counted only with data.on_corrupt_block=skip
        "rewinds": skips_to_json(run.skips),
        "parameters": run.num_params,
        "wall_seconds": round(run.goodput.wall_seconds, 1),
        "goodput": run.goodput.summary(),
        # Of the last start; None where no step was left to do.
        "seconds_to_first_step": run.start_clock.seconds_to_first_step,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(run.mesh.shape),
        "versions": run_directory.package_versions(),
    }
