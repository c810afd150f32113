"""Processes that read batches ahead, for rows whose reading keeps more than one CPU busy.

Not Grain's `mp_prefetch`: that wants absl flags parsed, leaves workers behind when closed early, hands arrays over in
/dev/shm (64 MB in a container), and its workers die of the signal that asks the run to save and stop.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from latentjax.errors import UserError

Item = TypeVar("Item", covariant=True)

# Sent to the whole group, they ask the run to stop, and for that it may need another batch.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Source(Protocol[Item]):
    """Items by number. It is pickled once for every process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


def read_in_processes(source: Source[Item], num_workers: int, ahead: int) -> Generator[Item, None, None]:
    """Iterates over a source in order, read by `num_workers` processes, `ahead` items (at least one each) in advance.

    An exception that reading raises is raised here, when the iterator comes to its item. The processes end when the
    iterator is closed, and with the process that made them, however it ends.

    Raises:
      UserError: a process was killed.
    """
    # Spawned, not forked: the threads of jax would be missing in a fork.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _begin, (source,))
    pending = deque()
    try:
        for index in range(min(max(ahead, num_workers), len(source))):
            pending.append(_submit(pool, index))
        for index in range(len(pending), len(source)):
            yield pending.popleft().result()
            pending.append(_submit(pool, index))
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that reads data was killed: if memory ran out, lower data.num_workers or data.prefetch_batches"
        ) from error
    finally:
        # Killed, since they have nothing to lose, and reading may hang. Python 3.14 has a public method for it.
        for process in list((pool._processes or {}).values()):
            process.kill()
        # One that was killed while it was sending leaves the pool's thread waiting for the rest, as long as there is
        # anybody who could send it. The processes are gone; this is the last end of the pipe.
        pool._result_queue._writer.close()  # pyright: ignore[reportAttributeAccessIssue]
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, index: int) -> Future:
    """Has an item read; the process that this may start is deaf to signals, as it inherits, until `_begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        return pool.submit(_read, index)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_source: Any = None  # of this process, where it is a worker


def _begin(source: Source) -> None:
    global _source
    _source = source
    for sign in _IGNORED:
        signal.signal(sign, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_run, daemon=True).start()


def _leave_with_the_run() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process was started by another
    parent.join()  # returns when it is gone, killed or not
    os._exit(1)


def _read(index: int) -> Any:
    return _source[index]
