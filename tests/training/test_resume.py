"""A run that is stopped or killed and started again is the run that never was, to the last bit."""

import random
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import recipes
from together import wait_for_step

from latentjax.training.loop import train
from latentjax.training.metrics import read_metrics
from latentjax.training.signals import StopRequest


def start_until(workdir: Path, step: int, *overrides: str) -> subprocess.Popen:
    """Starts a run and returns while it is running, once its log has reached `step`."""
    process = recipes.started(workdir, *overrides)
    wait_for_step(workdir, [process], step)
    return process


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 5)])
def test_signal_saves_and_the_same_command_continues(whole_run: Path, tmp_path: Path, number: int, step: int):
    workdir = tmp_path / "run"
    process = start_until(workdir, step)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out + err
    assert "Traceback" not in err
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"saved step {saved}" in err
    assert step <= saved < 12
    # Nothing is done twice: the log has each step up to the saved one, once, and goes on behind it.
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == list(range(1, saved + 1))
    recipes.trained(workdir)
    recipes.assert_same_run(workdir, whole_run)


class StopAtLook(StopRequest):
    """A signal that comes just before the loop looks for the n-th time; it looks once a step."""

    def __init__(self, look: int):
        super().__init__()
        self._looks_left = look

    @property
    def requested(self) -> bool:
        self._looks_left -= 1
        return self._looks_left <= 0


@pytest.mark.parametrize(
    ("look", "step"), [(2, 1), *[pytest.param(*each, marks=pytest.mark.long) for each in ((1, 0), (3, 2))]]
)
def test_no_moment_to_stop_loses_a_line_of_the_log(whole_run: Path, tmp_path: Path, look: int, step: int):
    config = recipes.get_config()
    config.mesh.data = 8  # this process has eight devices
    assert train(config, tmp_path / "run", StopAtLook(look)) is None
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]
    recipes.trained(tmp_path / "run", "mesh.data=-1")
    ours, whole = recipes.comparable_metrics(tmp_path / "run"), recipes.comparable_metrics(whole_run)
    assert [line["step"] for line in ours] == list(range(1, 13))
    # The first steps were taken on eight devices, which sum in another order.
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in whole], atol=1e-5)


def _kill_until_done(workdir: Path, kills: int, seed: int) -> int:
    """Kills the run at random moments, start-up included, then lets it finish; returns how often it met it alive."""
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            recipes.command(workdir),
            env=recipes.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=rng.uniform(2.0, 9.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    recipes.trained(workdir)
    return killed


def test_killed_again_and_again(whole_run: Path, tmp_path: Path):
    assert _kill_until_done(tmp_path / "run", kills=5, seed=0) > 0
    recipes.assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.long
def test_killed_a_hundred_times(whole_run: Path, tmp_path: Path):
    for seed in range(20):
        _kill_until_done(tmp_path / f"run{seed}", kills=5, seed=seed)
        recipes.assert_same_run(tmp_path / f"run{seed}", whole_run)


def _stop_until_done(workdir: Path, seed: int) -> int:
    """Stops the run by SIGTERM at random moments until it is done; returns how often it saved and left."""
    rng, saved, saves, longest = random.Random(seed), 0, 0, 9.0
    while True:
        process = recipes.started(workdir)
        try:
            out, err = process.communicate(timeout=rng.uniform(3.0, longest))
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        # Each start goes on where the one before has stopped: nothing is lost and nothing done twice.
        resumed = re.search(r"resuming after step (\d+)", out)
        assert int(resumed[1] if resumed else 0) == saved or "resuming" not in out
        if process.returncode == 0:
            return saves
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), err
        if process.returncode < 0:  # before the first step, or behind the last one
            longest *= 1.2  # a machine may be too busy to come to a step in the time
            saved = max((int(path.name) for path in (workdir / "checkpoints").glob("*[0-9]")), default=0)
        else:
            saved, saves = int(re.search(r"saved step (\d+) to", err)[1]), saves + 1
            assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == list(range(1, saved + 1))


@pytest.mark.long
def test_stopped_again_and_again(whole_run: Path, tmp_path: Path):
    saves = 0
    for seed in range(10):
        saves += _stop_until_done(tmp_path / f"run{seed}", seed)
        recipes.assert_same_run(tmp_path / f"run{seed}", whole_run)
    assert saves > 0


def test_killed_behind_its_newest_checkpoint(whole_run: Path, tmp_path: Path):
    """The log is ahead of the checkpoint then, and must not keep the steps that are done again."""
    workdir = tmp_path / "run"
    process = start_until(workdir, 8)
    process.kill()
    process.wait()
    recipes.trained(workdir)
    recipes.assert_same_run(workdir, whole_run)


def test_finished_run_is_left_as_it_is(tmp_path: Path, whole_run: Path):
    before = recipes.comparable_metrics(whole_run)
    result = recipes.run(whole_run)
    assert result.returncode == 0
    assert "done: 12 steps" in result.stdout
    assert recipes.comparable_metrics(whole_run) == before
