"""Whoever dies or hangs is named by the others, which end."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import recipes

from latentjax.training.last_words import EVALUATE, TRAIN, last_words
from latentjax.training.watchdog import TRY_AGAIN, Watchdog

LOST_AFTER = 0.8  # seconds


class DictBoard:
    """A board of one process, as several watchdogs share it."""

    address = "coordinator:1234"

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.silent: set[int] = set()
        self.gone = False

    def write(self, process: int, text: str) -> None:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        if process not in self.silent:
            self.texts[process] = text

    def read(self) -> dict[int, str]:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        return dict(self.texts)


class Watched:
    """Watchdogs of several processes on one board; knows who left with which status."""

    def __init__(self, num_processes: int, hung_after: float = 0.0):
        self.board = DictBoard()
        self.left: dict[int, int] = {}
        self.dogs = [
            Watchdog(
                self.board,
                process,
                num_processes,
                lost_after=LOST_AFTER,
                hung_after=hung_after,
                leave=lambda status, process=process: self.left.setdefault(process, status),
            )
            for process in range(num_processes)
        ]

    def wait_until_left(self, processes: set[int]) -> None:
        deadline = time.monotonic() + 20
        while not processes <= self.left.keys():
            assert time.monotonic() < deadline, self.left
            time.sleep(0.02)


@pytest.fixture
def watched() -> Callable:
    made = []

    def make(*arguments, **options) -> Watched:
        made.append(Watched(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        for dog in each.dogs:
            dog.end("", 0)


def test_processes_that_move_or_have_ended_well_are_left_alone(watched: Callable):
    run = watched(3, hung_after=0.5)
    run.dogs[2].end("", 0)
    for step in range(1, 40):
        for dog in run.dogs[:2]:
            dog.at(step, "running the step")
        time.sleep(0.05)
    assert run.left == {}


def test_a_lost_process_is_named_by_all_others(watched: Callable, capsys: pytest.CaptureFixture):
    run = watched(3)
    for dog in run.dogs:
        dog.at(57, "reading its batch")
    time.sleep(3 * LOST_AFTER / 4)
    run.board.silent.add(1)
    run.wait_until_left({0, 2})
    assert run.left[0] == run.left[2] == TRY_AGAIN
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("latentjax.train: process 1:")
    ]
    assert len(lines) == 2
    for line in lines:
        assert f"nothing was heard of process 1 ({os.uname().nodename}, process id {os.getpid()}) for 0.8 s" in line
        assert "it was reading its batch (step 57)" in line and "the same command continues" in line


def test_the_process_that_the_others_wait_for_is_named(watched: Callable, capsys: pytest.CaptureFixture):
    run = watched(3, hung_after=1.0)
    run.dogs[0].at(58, "reading its batch")
    run.dogs[1].at(57, "reading its batch")
    run.dogs[2].at(57, "waiting for the step")
    run.wait_until_left({0})
    assert run.left[0] == TRY_AGAIN
    assert "no progress for 1 s: the one behind is process 1 (" in (said := capsys.readouterr().err)
    assert "), reading its batch (step 57); leaving" in said


def test_all_in_the_same_place_wait_for_their_devices(watched: Callable, capsys: pytest.CaptureFixture):
    run = watched(2, hung_after=1.0)
    for dog in run.dogs:
        dog.at(3, "waiting for the step")
    run.wait_until_left({0})
    assert "all are waiting for the step (step 3), so their devices wait for each other" in capsys.readouterr().err


def test_nothing_is_timed_before_the_first_step(watched: Callable):
    run = watched(2, hung_after=0.2)
    time.sleep(1.0)
    assert run.left == {}


def test_a_process_that_ends_in_an_error_takes_the_others_along(watched: Callable, capsys: pytest.CaptureFixture):
    run = watched(3)
    time.sleep(LOST_AFTER / 2)
    run.dogs[2].end("UserError: shard 7 is damaged", 2)
    run.wait_until_left({0, 1})
    assert run.left == {0: 2, 1: 2}
    assert capsys.readouterr().err.count("has ended: UserError: shard 7 is damaged") == 2


def test_process_0_waits_for_the_others_before_it_goes(watched: Callable):
    """With it goes the board, and then jax ends everyone."""
    run = watched(2)
    time.sleep(LOST_AFTER)
    done = threading.Event()
    threading.Thread(target=lambda: (run.dogs[0].end("UserError: no", 2), done.set())).start()
    run.wait_until_left({1})
    assert done.wait(LOST_AFTER)


def test_a_board_that_does_not_answer_is_process_0(watched: Callable, capsys: pytest.CaptureFixture):
    run = watched(2)
    time.sleep(LOST_AFTER / 2)
    run.board.gone = True
    run.wait_until_left({1})
    assert run.left[1] == TRY_AGAIN
    assert "process 0 at coordinator:1234, which connects the processes, has not answered" in capsys.readouterr().err


def test_last_words():
    assert last_words(io.StringIO("reading its batch (step 3)\ngoodbye\n"), "1", "localhost:1", TRAIN) is None
    words = last_words(io.StringIO("reading its batch (step 3)\n"), "1", "localhost:1", TRAIN)
    assert words == (
        "process 1 ended while reading its batch (step 3): process 0 at localhost:1, which connects the processes, is "
        "gone; the same command continues"
    )
    assert "before its first step: killed" in last_words(io.StringIO(""), "0", "localhost:1", TRAIN)
    said = last_words(io.StringIO(""), "0", "localhost:1", EVALUATE)
    assert said.startswith("process 0 ended while evaluating: killed") and "continues" not in said


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os.abort()", "witness.dismiss()"])
def test_the_witness_speaks_for_a_process_that_cannot(end: str):
    program = (
        "import os; from latentjax.training.last_words import TRAIN, Witness; "
        "witness = Witness(0, 'localhost:1', TRAIN); "
        f"witness.update('saving (step 9)'); {end}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=recipes.environment()
    )
    _, said = process.communicate(timeout=60)  # until the witness has ended too
    if "dismiss" in end:
        assert (process.returncode, said) == (0, "")
    else:
        assert process.returncode in (-signal.SIGKILL, -signal.SIGABRT)
        assert said.startswith("latentjax.train: process 0 ended while saving (step 9): killed")
