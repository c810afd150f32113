"""Processes that read ahead: in order, to the end, and gone with the run whatever happens to it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latentjax.data.reading_processes import read_in_processes
from latentjax.errors import UserError


class Items:
    """Item i is i and the process that read it; every other one takes longer. One may be bad, one very slow."""

    def __init__(self, count, bad=-1, slow=-1):
        self.count, self.bad, self.slow = count, bad, slow

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.bad:
            raise UserError(f"item {index} is damaged")
        time.sleep(60 if index == self.slow else 0.02 * (index % 2 == 0))
        return index, os.getpid()


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # where nobody collects orphans, the dead stay listed: as Z
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize(("num_workers", "ahead", "count"), [(1, 0, 5), (2, 3, 30), (2, 10, 4), (2, 0, 0)])
def test_items_come_in_order_and_to_the_end(num_workers, ahead, count):
    items = list(read_in_processes(Items(count), num_workers, ahead))
    assert [index for index, _ in items] == list(range(count))
    assert len({pid for _, pid in items} - {os.getpid()}) <= num_workers
    assert not multiprocessing.active_children()


class LargeItems(Items):
    """Far more than a pipe holds: whoever sends one is mostly in the midst of it."""

    def __getitem__(self, index):
        return bytes(20_000_000)


def test_closed_while_items_are_being_sent_it_does_not_wait_for_the_rest():
    for _ in range(4):
        items = read_in_processes(LargeItems(10**9), 1, 4)
        next(items)
        closing = threading.Thread(target=items.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()


def test_closed_early_nothing_is_left():
    items = read_in_processes(Items(10**9), 2, 8)
    assert next(items)[0] == 0
    items.close()
    assert not multiprocessing.active_children()


def test_an_error_comes_where_its_item_was_due():
    items = read_in_processes(Items(100, bad=7), 2, 20)
    assert [next(items)[0] for _ in range(7)] == list(range(7))
    with pytest.raises(UserError, match="^item 7 is damaged$"):
        next(items)
    assert not multiprocessing.active_children()


def test_the_signal_that_stops_a_run_stops_no_reading():
    """It goes to the whole group of processes, and the run may need a batch before it can stop; at any moment."""
    items = read_in_processes(Items(100), 1, 2)
    _, pid = next(items)
    for sign in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, sign)
    assert [next(items) for _ in range(5)] == [(index, pid) for index in range(1, 6)]
    items.close()

    children = set(multiprocessing.active_children())
    first, results = read_in_processes(Items(100), 1, 2), []
    reader = threading.Thread(target=lambda: results.append(next(first)))
    reader.start()
    wait_until(lambda: set(multiprocessing.active_children()) - children)
    (new,) = set(multiprocessing.active_children()) - children
    os.kill(new.pid, signal.SIGTERM)  # it can hardly have begun
    reader.join()
    assert results == [(0, new.pid)]
    first.close()


def test_closing_waits_for_no_reading():
    items = read_in_processes(Items(100, slow=3), 2, 8)
    assert [next(items)[0] for _ in range(3)] == [0, 1, 2]
    began = time.monotonic()
    items.close()
    assert time.monotonic() - began < 10
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_killed_process_is_the_users_to_mend(num_workers):
    """Memory that ran out, most likely; any other way to end would be a bug's traceback."""
    items = read_in_processes(Items(10**9), num_workers, 4)
    _, pid = next(items)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a process that reads data was killed: .* data\.num_workers"):
        for _ in range(10):
            next(items)
    assert not multiprocessing.active_children()


SCRIPT = """
import sys
from latentjax.data.reading_processes import read_in_processes
from test_reading_processes import Items

if __name__ == "__main__":
    items = read_in_processes(Items(10**9), 2, 4)
    print(*{pid for _, pid in (next(items) for _ in range(20))}, flush=True)
    if "wait" in sys.argv:
        sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_the_processes_end_with_the_run(tmp_path, killed):
    """Killed with no chance to clean up, or ended without closing the iterator."""
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [path for path in (os.getcwd(), os.path.dirname(__file__), os.environ.get("PYTHONPATH")) if path]
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *(["wait"] if killed else [])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = list(map(int, run.stdout.readline().split()))
    assert pids
    if killed:
        assert all(map(is_running, pids))
        run.kill()
    _, errors = run.communicate(timeout=30)
    assert killed or (run.returncode, errors) == (0, "")
    wait_until(lambda: not any(map(is_running, pids)))
