"""Mistakes of every kind at the command line end in one line and status 2, before any device's memory is taken.

They are drawn by seeded makers (tests/mistakes.py, tests/mistaken_files.py); as many valid configs are drawn as well,
so that no check is stricter than it should be.
"""

import importlib
import random
import signal
import subprocess
import sys

import jax
import mistaken_files
import pytest
import recipes
from mistakes import Mistake

from latentjax.errors import UserError, run_verb

OF_EACH_KIND = 50
LONGEST = 400
MOST_SECONDS = 20  # of one; a hundredth of it is usual


def _refuse(*arguments, **settings):
    raise AssertionError("the mistake was not found before the state was made")


def _too_slow(*arguments):
    raise TimeoutError(f"not found within {MOST_SECONDS} seconds")


@pytest.fixture
def no_state(monkeypatch):
    """Makes the first thing that takes devices' memory a failure."""
    for module in ("training.start", "training.step_benchmark"):
        monkeypatch.setattr(importlib.import_module(f"latentjax.{module}"), "create_state", _refuse)


def fault_of(mistake: Mistake, monkeypatch, capsys) -> str | None:
    """What is wrong with how a verb takes a mistake; None: nothing."""
    monkeypatch.setattr(sys, "argv", [mistake.verb, *mistake.arguments])
    capsys.readouterr()
    try:
        signal.alarm(MOST_SECONDS)
        run_verb(mistake.verb, importlib.import_module(f"latentjax.{mistake.verb}").main)
    except SystemExit as left:
        status = left.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    # Before it: the progress of a store that is made.
    *_, line = capsys.readouterr().err.splitlines() or [""]
    begin = f"latentjax.{mistake.verb}: error: "
    if status != 2 or not line.startswith(begin):
        return f"status {status}: {line}"
    message = line.removeprefix(begin)
    if not 20 <= len(message) <= LONGEST or not any(name in message for name in mistake.names):
        return f"{len(message)} characters: {message}"
    return None


@pytest.mark.parametrize("kind", mistaken_files.MAKERS)
def test_every_mistake_is_one_line_that_names_it(kind, no_state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, _too_slow)
    arrays = len(jax.live_arrays())
    faults = []
    for number in range(OF_EACH_KIND):
        directory = tmp_path / str(number)
        directory.mkdir()
        mistake = mistaken_files.MAKERS[kind](random.Random(f"{kind} {number}"), directory)
        if fault := fault_of(mistake, monkeypatch, capsys):
            faults.append(f"{' '.join(mistake.arguments)[-300:]!r}, {mistake.names}: {fault[:500]}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])
    assert len(jax.live_arrays()) == arrays
