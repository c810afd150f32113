"""One of two real processes is killed or stopped: the other one says so and ends, and the same commands continue."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import recipes
from together import losses, run_together, start_together, wait_for_step

from latentjax.training.watchdog import TRY_AGAIN

LOST_AFTER = 5.0
PATIENCE = f"train.lost_after_seconds={LOST_AFTER}"
# What is said to end within that time does so on a machine that has nothing else to do.
SLACK = 40.0


def lose(workdir: Path, victim: int, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Sends one process a signal in mid-run; returns the other one's status and what it said."""
    started = start_together(workdir, "mesh.data=8", PATIENCE, *overrides)
    wait_for_step(workdir, started, 6)
    began = time.monotonic()
    started[victim].send_signal(number)
    out, err = started[1 - victim].communicate(timeout=LOST_AFTER + SLACK + 60)
    assert time.monotonic() - began < LOST_AFTER + SLACK, out + err
    started[victim].kill()
    started[victim].communicate()
    return started[1 - victim].returncode, err


def test_killed_process_is_named_and_the_run_continues(whole_run: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    status, said = lose(workdir, 1, signal.SIGKILL)
    assert status == TRY_AGAIN, said
    assert "latentjax.train: process 0: nothing was heard of process 1 (" in said
    assert "for 5 s; when last heard of, it was " in said
    for result in run_together(workdir, "mesh.data=8", PATIENCE):
        assert result.returncode == 0, result.stdout + result.stderr
    np.testing.assert_allclose(losses(workdir), losses(whole_run), rtol=1e-6)


def test_killed_process_0_is_named(tmp_path: Path):
    """It connects the processes: jax ends the others at once, and what stands beside them says why."""
    status, said = lose(tmp_path / "run", 0, signal.SIGKILL)
    assert status in (TRY_AGAIN, -signal.SIGABRT), said
    assert "process 0 at localhost:" in said and "which connects the processes, is gone" in said


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_process_is_named(tmp_path: Path, victim: int):
    status, said = lose(tmp_path / "run", victim, signal.SIGSTOP, "train.num_steps=100000")
    assert status == TRY_AGAIN, said
    assert ("nothing was heard of process 1" if victim else "process 0 at localhost:") in said


def test_a_run_that_moves_between_machines(whole_run: Path, tmp_path: Path):
    """Killed on eight devices, killed on four, ended by two processes of four."""
    workdir = tmp_path / "run"
    for devices, step in ((8, 6), (4, 11)):
        process = recipes.started(workdir, f"mesh.data={devices}", num_devices=devices)
        wait_for_step(workdir, [process], step)
        process.kill()
        process.communicate()
    for result in run_together(workdir, "mesh.data=8"):
        assert result.returncode == 0, result.stdout + result.stderr
    np.testing.assert_allclose(losses(workdir), losses(whole_run), rtol=1e-6)
