"""Doing the tasks of a preparation in processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from queue import Empty
from typing import Any

from latentjax.data.progress import Stage
from latentjax.data.tasks import Job, Task, run_task
from latentjax.errors import UserError

_SECONDS_BETWEEN_REPORTS = 0.2


def run_in_processes(job: Job, tasks: Sequence[Task], stage: Stage, num_workers: int) -> None:
    """Does tasks in up to `num_workers` processes; one worker, or one task, needs no process of its own.

    Raises:
      UserError: as `run_task`, or a worker was killed.
    """
    if min(num_workers, len(tasks)) == 1:
        for task in tasks:
            run_task(job, task, stage.advance)
        return
    # Spawned, not forked: the parent may run threads (JAX, Grain), which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), context, _start, (job, reports, stop))
    try:
        # Begun in order: a worker's next task is further on in the same file.
        pending = {pool.submit(_run, task) for task in tasks}
        while pending:
            done, pending = wait(pending, _SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
            _show(reports, stage)
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed (out of memory? {num_workers} were to run): the same command continues where "
            "it was; lower --num_workers if it happens again"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        _show(reports, stage)
        reports.close()


def _show(reports, stage: Stage) -> None:
    while True:
        try:
            stage.advance(*reports.get_nowait())
        except Empty:
            return


class _Stopped(Exception):
    """The parent needs no more of this task."""


# Of a worker; `_start` sets them before there is any task.
_job: Any = None
_reports: Any = None
_stop: Any = None


def _start(job: Job, reports, stop) -> None:
    global _job, _reports, _stop
    _job, _reports, _stop = job, reports, stop
    # Ctrl-C reaches the whole group; the parent tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process was started by another
    parent.join()
    os._exit(1)


def _run(task: Task) -> None:
    run_task(_job, task, _report)


def _report(*counts: int) -> None:
    if _stop.is_set():
        raise _Stopped
    _reports.put(counts)
