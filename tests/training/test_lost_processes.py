"""One of two real processes is killed or stopped: the other one says so and ends, and the same commands continue."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import recipes
from together import losses, run_together, start_together, wait_for_step

from latentjax.training.checkpoint import ARRAYS, RUN
from latentjax.training.watchdog import TRY_AGAIN

LOST_AFTER = 5.0
PATIENCE = f"train.lost_after_seconds={LOST_AFTER}"
# What is said to end within that time does so on a machine that has nothing else to do.
SLACK = 40.0


def lose(workdir: Path, victim: int, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Sends one process a signal in mid-run; returns the other one's status and what it said."""
    started = start_together(workdir, "mesh.data=8", PATIENCE, *overrides)
    wait_for_step(workdir, started, 9)
    began = time.monotonic()
    started[victim].send_signal(number)
    out, err = started[1 - victim].communicate(timeout=LOST_AFTER + SLACK + 60)
    assert time.monotonic() - began < LOST_AFTER + SLACK, out + err
    started[victim].kill()
    started[victim].communicate()
    return started[1 - victim].returncode, err


@pytest.mark.parametrize("in_between", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_that_moves_between_machines_and_loses_a_process(whole_run: Path, tmp_path: Path, in_between: bool):
    """Killed on eight devices, then as one of two processes of four, and ended on four devices of another mesh."""
    workdir = tmp_path / "run"
    process = recipes.started(workdir, "mesh.data=8", num_devices=8)
    wait_for_step(workdir, [process], 6)
    process.kill()
    process.communicate()
    if in_between:
        status, said = lose(workdir, 1, signal.SIGKILL)
        assert status == TRY_AGAIN, said
        assert "latentjax.train: process 0: nothing was heard of process 1 (" in said
        assert "for 5 s; when last heard of, it was " in said
    result = recipes.run(workdir, "mesh.fsdp=2", "mesh.sequence=2", "mesh.data=1", num_devices=4)
    assert result.returncode == 0, result.stdout + result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("first step after ")]
    assert "compiling" in line and "first batch and step" in line
    np.testing.assert_allclose(losses(workdir), losses(whole_run), rtol=1e-6)


def test_killed_process_0_is_named(tmp_path: Path):
    """It connects the processes: jax ends the others at once, and what stands beside them says why."""
    status, said = lose(tmp_path / "run", 0, signal.SIGKILL)
    assert status in (TRY_AGAIN, -signal.SIGABRT), said
    assert "process 0 at localhost:" in said and "which connects the processes, is gone" in said


@pytest.mark.long
def test_two_processes_of_which_one_is_killed_again_and_again(tmp_path: Path):
    """The numbers are those of two processes that nobody killed, to the last bit."""
    for result in run_together(tmp_path / "whole", "mesh.data=8"):
        assert result.returncode == 0, result.stderr
    rng, workdir = random.Random(0), tmp_path / "run"
    for _ in range(6):
        started = start_together(workdir, "mesh.data=8", PATIENCE)
        time.sleep(rng.uniform(8.0, 30.0))
        victim = rng.randrange(2)
        started[victim].kill()
        for process in started:
            _, err = process.communicate(timeout=400)  # one that finds no other to connect with waits for 300 s
            assert process.returncode in (0, TRY_AGAIN, -signal.SIGABRT, -signal.SIGKILL), err
    for result in run_together(workdir, "mesh.data=8", PATIENCE):
        assert result.returncode == 0, result.stderr
    whole = tmp_path / "whole"
    assert recipes.comparable_metrics(workdir) == recipes.comparable_metrics(whole)
    assert (workdir / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    # Arrays by their checksums: Orbax restores those of other processes only onto a mesh that it is given.
    notes = [ocp.JsonCheckpointHandler().restore(each / "checkpoints" / "12" / RUN) for each in (workdir, whole)]
    assert notes[0][ARRAYS] == notes[1][ARRAYS]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_process_is_named(tmp_path: Path, victim: int):
    status, said = lose(tmp_path / "run", victim, signal.SIGSTOP, "train.num_steps=100000")
    assert status == TRY_AGAIN, said
    assert ("nothing was heard of process 1" if victim else "process 0 at localhost:") in said
