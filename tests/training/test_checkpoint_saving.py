"""When checkpoints are written, which are kept, and what a save that fails does to a run: nothing but a line."""

import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import recipes
from small_checkpoints import opened, restored, save, state

from latentjax.config import default, set_key
from latentjax.errors import UserError
from latentjax.training import checkpoint
from latentjax.training.checkpoint_files import steps_to_delete
from latentjax.training.metrics import MetricsLog, read_metrics
from latentjax.validation import validate


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Saves fail, at once or in the background, as often as the list has entries."""
    failures: list[str] = []
    begin, finish = ocp.AsyncCheckpointer.save, ocp.AsyncCheckpointer.wait_until_finished

    def fail(moment: str) -> None:
        if failures and failures[0] == moment:
            failures.pop(0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    def failing_save(self, *arguments, **keywords):
        fail("at once")
        return begin(self, *arguments, **keywords)

    def failing_end(self):
        finish(self)
        if sys._getframe(1).f_code.co_name == "_finish":
            fail("in the background")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", failing_save)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", failing_end)
    return failures


def wait_for_failure(checkpoints: checkpoint.Checkpoints, step: int) -> None:
    deadline = time.monotonic() + 20
    while not checkpoints.due(step):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["at once", "in the background"])
def test_a_failed_save_is_told_and_tried_again(tmp_path: Path, full_disk: list[str], moment: str):
    checkpoints, said = opened(tmp_path)
    save(checkpoints, 3)
    checkpoints.settle()
    assert not checkpoints.due(4)
    full_disk += [moment, moment]
    save(checkpoints, 5)
    wait_for_failure(checkpoints, 6)  # the next step boundary
    save(checkpoints, 6)
    (line,) = said
    assert line == (
        f"saving step 5 to {tmp_path} failed (no space left on device); the last checkpoint is that of step 3"
    )
    time.sleep(0.2)
    assert not checkpoints.due(7)  # the second failure in a row: not at every step
    checkpoints.settle()
    checkpoints._retry_at = 0.0
    save(checkpoints, 8)
    assert checkpoints.settle()
    assert len(said) == 2 and checkpoints.latest_step == 8
    checkpoints.close()


def test_the_last_save_is_tried_more_than_once(tmp_path: Path, full_disk: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_LAST_WAITS", (0.0, 0.0))
    checkpoints, said = opened(tmp_path)
    full_disk += ["at once", "at once"]
    checkpoints.save_last(state(3), 3, {"step": 3, "seed": 0.1})
    assert (checkpoints.latest_step, len(said)) == (3, 2)
    full_disk += ["at once"] * 3
    message = r"step 4 cannot be saved to .* \(no space left on device\): free some space and .*is that of step 3$"
    with pytest.raises(UserError, match=message):
        checkpoints.save_last(state(4), 4, {"step": 4, "seed": 0.1})
    checkpoints.close()
    assert restored(opened(tmp_path)[0]) == 3


def test_a_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody goes on waiting for it: such a thread would keep the process from ending for minutes."""
    checkpoints, said = opened(tmp_path)
    save(checkpoints, 1)
    assert checkpoints.settle()
    before, make = set(threading.enumerate()), os.mkdir

    def mkdir(path: str, *arguments, **keywords) -> None:
        if "5.orbax" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *arguments, **keywords)

    monkeypatch.setattr(os, "mkdir", mkdir)
    save(checkpoints, 5)
    assert not checkpoints.settle()
    assert "saving step 5" in said[0] and "(no space left on device); the last checkpoint is that of step 1" in said[0]
    for thread in set(threading.enumerate()) - before:
        thread.join(5.0)
        assert not thread.is_alive(), thread
    checkpoints.close()


def test_the_last_good_one_is_kept_until_the_next_is_whole(tmp_path: Path, full_disk: list[str]):
    checkpoints, _ = opened(tmp_path, max_to_keep=1)
    save(checkpoints, 3)
    checkpoints.settle()
    full_disk.append("in the background")
    save(checkpoints, 4)
    assert not checkpoints.settle()
    assert (tmp_path / "3").exists()
    save(checkpoints, 5)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "4") == ["5"]


def test_the_next_start_deletes_the_rest_of_a_save(tmp_path: Path):
    """As a process that is killed while it writes, or while it deletes, leaves it behind."""
    checkpoints, _ = opened(tmp_path)
    save(checkpoints, 3)
    checkpoints.close()
    for name in ("5.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-deleted"):
        shutil.copytree(tmp_path / "3", tmp_path / name)
    checkpoints, said = opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["3"] and checkpoints.steps == [3] and said == []


@pytest.mark.parametrize(
    ("last", "multiples", "deleted"),
    [(2, 0, [5, 10, 15]), (1, 10, [5, 15]), (9, 0, []), (1, 100, [5, 10, 15, 20])],
)
def test_which_are_kept(last: int, multiples: int, deleted: list[int]):
    assert steps_to_delete([5, 10, 15, 20, 25], last, multiples) == deleted


def test_by_the_clock(tmp_path: Path):
    checkpoints, _ = opened(tmp_path, every_steps=100, every_minutes=0.005)
    assert checkpoints.due(100)
    assert not checkpoints.due(1)
    time.sleep(0.35)
    assert checkpoints.due(2)
    save(checkpoints, 2)
    assert not checkpoints.due(3)
    checkpoints.close()
    checkpoints, _ = opened(tmp_path, every_steps=100)
    checkpoints._last_save_at -= 1e9
    assert not checkpoints.due(3)
    checkpoints.close()


@contextlib.contextmanager
def small_disk(path: Path, megabytes: float) -> Iterator[Path]:
    """A file system of this size."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full(tmp_path: Path):
    """Room for one checkpoint and not for two; then there is more, and the same command goes on."""
    with small_disk(tmp_path / "disk", 1.0) as disk:
        never = ("train.eval_every_steps=0", "train.sample_every_steps=0")
        knobs = (f"checkpoint.directory={disk}/of-run", "checkpoint.max_to_keep=1", *never)
        recipes.trained(tmp_path / "run", *knobs, "train.num_steps=2")
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 20_000))
        result = recipes.run(tmp_path / "run", *knobs)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("latentjax.train: error: step 12 cannot be saved to ")
        assert "(no space left on device): free some space" in last and last.endswith("is that of step 2")
        assert "saving step 5 to" in result.stderr
        assert [path.name for path in (disk / "of-run").iterdir()] == ["2"]
        (disk / "filler").unlink()
        result = recipes.run(tmp_path / "run", *knobs)
        assert result.returncode == 0, result.stderr
        assert "resuming after step 2 of 12" in result.stdout
        assert [path.name for path in (disk / "of-run").iterdir()] == ["12"]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "tensorboard"])
def test_logs_on_a_full_disk(tmp_path: Path, name: str):
    log = MetricsLog(tmp_path, 0)
    full = Path("/dev/full")
    if name == "metrics.jsonl":
        log._file = full.open("a")
    elif name == "samples.txt":
        log._samples_path.symlink_to(full)
    else:
        log._tensorboard._writer._py_recordio_writer._writer = full.open("wb")
        log._tensorboard._flushed_at -= 1e9
    message = rf"cannot write .*{name} \(no space left on device\): free some and give the same command again"
    with pytest.raises(UserError, match=message):
        log.write({"step": 1, "loss": 1.0})
        log.write_samples(1, [("def ", "x")])
    log.close()


def test_stores_behind_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = default()
    set_key(config, "checkpoint.directory", "s4://bucket/run")
    with pytest.raises(UserError, match="checkpoint.directory='s4://bucket/run' must be a path, or a URL that begins"):
        validate(config)
    if importlib.util.find_spec("tensorflow"):
        pytest.skip("what reaches gs:// is installed")
    (tmp_path / "gcsfs.py").write_text("raise ImportError('not installed')\n")
    monkeypatch.setattr(recipes, "ROOT", f"{tmp_path}{os.pathsep}{recipes.ROOT}")
    result = recipes.run(tmp_path / "run", "checkpoint.directory=gs://no-such-bucket/run")
    assert result.returncode == 2
    assert "checkpoint.directory=gs://no-such-bucket/run needs the package gcsfs" in result.stderr.splitlines()[-1]
    assert result.stderr.count("\n") == 1


def test_the_last_save_waits_for_the_one_before(tmp_path: Path):
    """As after a signal that comes while a checkpoint is still being written; nothing is left half done."""
    checkpoints, _ = opened(tmp_path)
    save(checkpoints, 3)
    checkpoints.save_last(state(4), 4, {"step": 4, "seed": 0.1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    checkpoints.close()
