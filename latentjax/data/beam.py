"""Doing the tasks of a preparation as an Apache Beam pipeline, for a corpus that outgrows one machine.

The tasks, and so the shards, are those of local processes, byte for byte. All workers write to one output, which they
must share: a network directory or a URL.
"""

import contextlib
import io
import logging
import shlex
from collections.abc import Sequence

from latentjax.data.preparation import RunTasks
from latentjax.data.progress import Stage
from latentjax.data.tasks import RECORDS_DIRECTORY, Job, Task, run_task
from latentjax.errors import UserError, shown

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")


def beam_tasks(runner: str, options: str, num_workers: int) -> RunTasks:
    """Returns what does tasks on a Beam runner.

    Args:
      runner: one of `RUNNERS`.
      options: of the pipeline, as on a command line.
      num_workers: processes of the DirectRunner; the other runners have options of their own.

    Raises:
      UserError: apache-beam is not installed, or an option has a value that it does not take.
    """
    try:
        import apache_beam  # noqa: F401  (an extra, and slow to import)
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam_runner needs Apache Beam: pip install 'latentjax[beam]'") from error
    try:
        arguments = [f"--runner={runner}", *shlex.split(options)]
    except ValueError as error:
        raise UserError(f"--beam_options={shown(options)}: {error}; quote it as a shell wants it") from error
    if runner == "DirectRunner":
        arguments += [f"--direct_num_workers={num_workers}", "--direct_running_mode=multi_processing"]
        # Every process of it would tell on stderr, at length, that it begins and ends.
        arguments += ["--default_sdk_harness_log_level=ERROR"]
        logging.getLogger("apache_beam").setLevel(logging.ERROR)
    parsed = PipelineOptions(arguments, save_main_session=False)
    said = io.StringIO()
    try:
        # Beam reads them with argparse, which would print its usage and leave, and not before the pipeline is made.
        with contextlib.redirect_stderr(said):
            parsed.get_all_options()
    except SystemExit as error:
        raise UserError(f"--beam_options={shown(options)}: {said.getvalue().strip().splitlines()[-1]}") from error

    def run(job: Job, tasks: Sequence[Task], stage: Stage) -> None:
        _run(parsed, job, tasks, stage)

    return run


def _run(options, job: Job, tasks: Sequence[Task], stage: Stage) -> None:
    import apache_beam as beam

    pipeline = beam.Pipeline(options=options)
    # Shuffled between, so that the runner spreads the tasks instead of fusing them into one step on one worker.
    _ = (
        pipeline
        | "tasks" >> beam.Create(list(tasks))
        | "spread" >> beam.Reshuffle()
        | "tokenise" >> beam.Map(lambda task: _attempt(job, task))
    )
    pipeline.run().wait_until_finish()
    names = [_error_name(task) for task in tasks]
    errors = [error for name in names if (error := job.output.read_json(name)) is not None]
    for name in names if errors else ():
        job.output.remove(name)
    if errors:
        raise UserError(errors[0])
    stage.advance(sum(task.input_bytes for task in tasks))


def _attempt(job: Job, task: Task) -> None:
    """Does a task; a mistake of the user is noted for `_run` to raise, since a runner would try again and again."""
    try:
        run_task(job, task, lambda *counts: None)
    except UserError as error:
        job.output.write_json(_error_name(task), str(error))


def _error_name(task: Task) -> str:
    return f"{RECORDS_DIRECTORY}/{task.number:05d}.error"
