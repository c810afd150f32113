"""Mistakes of every kind at the command line end in one line and status 2, before any device's memory is taken.

They are drawn by seeded makers (tests/mistakes.py, tests/mistaken_files.py); as many valid configs are drawn as well,
so that no check is stricter than it should be.
"""

import contextlib
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
from valid_configs import valid_config

from latentjax.config import flatten, set_key
from latentjax.errors import UserError, run_verb
from latentjax.training.start import prepare_run
from latentjax.validation import validate

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


@pytest.mark.parametrize("kind", ["wrong_type", "contradiction", "bad_recipe", "bad_path", "bad_flag", "other_verbs"])
def test_from_the_shell(kind, tmp_path):
    """The same in a process of its own: nothing on stdout, one line on stderr behind what was done until then."""
    mistake = mistaken_files.MAKERS[kind](random.Random(f"shell {kind}"), tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", f"latentjax.{mistake.verb}", *mistake.arguments],
        cwd=tmp_path,
        env=recipes.environment(8),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    *progress, line = result.stderr.splitlines()
    assert len(progress) <= 1 and "Traceback" not in result.stderr
    assert line.startswith(f"latentjax.{mistake.verb}: error: ") and any(name in line for name in mistake.names)


class _Reached(Exception):
    """The state would be made now."""


@pytest.mark.parametrize("part", range(4))
def test_valid_configs_pass(part):
    """Also when every value has gone through the command line."""
    for number in range(25):
        config = valid_config(random.Random(f"valid {part} {number}"))
        validate(config)
        read = recipes.get_config()
        for key, value in flatten(config).items():
            set_key(read, key, value if isinstance(value, str) else repr(value))
        assert flatten(read) == flatten(config)


@pytest.mark.parametrize("number", range(6))
def test_valid_configs_get_as_far_as_the_state(number, tmp_path, monkeypatch):
    """Data, mesh, directory and model take them too."""

    def reach(*arguments):
        raise _Reached

    monkeypatch.setattr("latentjax.training.start.create_state", reach)
    with pytest.raises(_Reached):
        prepare_run(valid_config(random.Random(f"start {number}")), tmp_path / "run", contextlib.ExitStack())


def test_the_checks_of_this_file_can_fail(tmp_path, monkeypatch, capsys):
    """A mistake that no check knows is one, and so is a line that does not name it."""
    mistake = Mistake("train", ["--config", str(tmp_path / "absent.py")], ("no recipe",))
    assert fault_of(mistake, monkeypatch, capsys) is None
    assert "characters" in fault_of(_renamed(mistake), monkeypatch, capsys)
    monkeypatch.setattr("latentjax.train.config_lib.load", lambda *arguments: 1 / 0)
    assert "ZeroDivisionError" in fault_of(mistake, monkeypatch, capsys)
    with pytest.raises(UserError, match="one line$"):
        raise UserError("of several\n lines\r\n one line\n")


def _renamed(mistake: Mistake) -> Mistake:
    return Mistake(mistake.verb, mistake.arguments, ("another name",))
