"""Whatever befalls a checkpoint: what is restored is what was saved, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import recipes
from small_checkpoints import faults, opened, restored, save
from test_processes import run_together

from latentjax.errors import UserError
from latentjax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 3 and 7."""
    directory = tmp_path_factory.mktemp("checkpoints") / "saved"
    checkpoints, said = opened(directory)
    for step in (3, 7):
        save(checkpoints, step)
    checkpoints.close()
    assert said == []
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restore_every_fault(saved: Path, directory: Path, flips: int, every: int) -> int:
    """Tries each file of checkpoint 7 with each fault (or every n-th of all); returns how often it was set aside."""
    files = sorted(path.relative_to(saved) for path in (saved / "7").rglob("*") if path.is_file())
    assert any("ocdbt" in str(path) for path in files)
    cases = [(name, fault) for name in files for fault in faults((saved / name).read_bytes(), flips)]
    set_aside = 0
    for name, fault in cases[::every]:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved, directory)
        if fault is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(fault)
        checkpoints, said = opened(directory)
        if restored(checkpoints) == 7:  # it was a file that the numbers do not need
            assert said == []
        else:
            set_aside += 1
            (line,) = said
            assert line.startswith("checkpoint 7 is damaged (") and "\n" not in line and len(line) < 600
            assert f"moved to {directory}/damaged/7; going back to step 3" in line
            assert sorted(path.name for path in directory.iterdir()) == ["3", "damaged"]
            assert (directory / "damaged" / "7" / "run").exists()
        checkpoints.close()
    return set_aside


def test_a_damaged_file_is_noticed_or_does_no_harm(saved: Path, tmp_path: Path):
    assert restore_every_fault(saved, tmp_path / "copy", flips=3, every=3) >= 8


@pytest.mark.long
def test_every_file_with_every_fault(saved: Path, tmp_path: Path):
    assert restore_every_fault(saved, tmp_path / "copy", flips=40, every=1) >= 100


def test_numbers_that_only_the_checksums_know_to_be_wrong(copy: Path):
    """The arrays of another step: whole files, of the right shapes."""
    shutil.rmtree(copy / "7" / "state")
    shutil.copytree(copy / "3" / "state", copy / "7" / "state")
    checkpoints, said = opened(copy)
    assert restored(checkpoints) == 3
    assert "the checksum of params.bias and of 2 more arrays is another than when it was saved" in said[0]


@pytest.mark.parametrize("item", ["run", "state"])
def test_a_missing_item(copy: Path, item: str):
    shutil.rmtree(copy / "7" / item)
    checkpoints, said = opened(copy)
    assert restored(checkpoints) == 3
    assert f"its item '{item}' cannot be read" in said[0]


def test_a_changed_number_in_the_notes(copy: Path):
    path = copy / "7" / "run" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 0.2}))
    checkpoints, said = opened(copy)
    assert restored(checkpoints) == 3
    assert "its item 'run' is not what was written" in said[0]


def test_a_wrong_step(copy: Path):
    (copy / "7").rename(copy / "9")
    checkpoints, said = opened(copy)
    assert restored(checkpoints) == 3
    assert "checkpoint 9 is damaged (it is that of step 7)" in said[0]


def test_set_aside_twice(copy: Path):
    """A step that was done again, and damaged again."""
    for name in ("7", "7-2"):
        shutil.rmtree(copy / "7" / "run")
        checkpoints, _ = opened(copy)
        assert restored(checkpoints) == 3
        assert (copy / "damaged" / name).exists()
        save(checkpoints, 7)
        checkpoints.close()
    assert restored(opened(copy)[0]) == 7


def test_none_is_whole(copy: Path):
    """A run must not begin anew by itself, not at the second start either."""
    for step in ("3", "7"):
        shutil.rmtree(copy / step / "state")
    for _ in range(2):
        checkpoints, said = opened(copy)
        with pytest.raises(UserError, match="all 2 are damaged, step 7 for one .*bring one back, or give another"):
            checkpoints.restore()
        assert said == []
    assert sorted(path.name for path in copy.iterdir()) == ["3", "7"]


def test_another_model_is_not_damage(copy: Path):
    checkpoints, said = opened(copy, width=18)
    message = r"another model's state: moments\.0 is float32\[33,17\] there and float32\[33,18\] here: give another"
    with pytest.raises(UserError, match=message):
        checkpoints.restore()
    assert said == []
    assert sorted(path.name for path in copy.iterdir()) == ["3", "7"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied", "x"), "Permission denied: x"),
        (ValueError("UNAVAILABLE: the network is down [tensorstore_spec='...']"), "UNAVAILABLE: the network is down"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_trouble_that_may_pass_is_not_damage(copy: Path, monkeypatch: pytest.MonkeyPatch, error, reason):
    def fail(*_: object, **__: object) -> None:
        raise Exception("Encountered error while reading") from error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
        checkpoints, said = opened(copy)
        with pytest.raises(UserError, match=rf"checkpoint 7 in .* cannot be read for now \({reason}\): nothing was"):
            checkpoints.restore()
    assert said == []
    assert sorted(path.name for path in copy.iterdir()) == ["3", "7"]
    assert restored(checkpoints) == 7


def test_going_back_within_a_run(copy: Path):
    checkpoints, _ = opened(copy, max_to_keep=3)
    save(checkpoints, 9)  # still being written when the run goes back
    checkpoints.delete_after(3)
    assert checkpoints.latest_step == restored(checkpoints) == 3
    assert [path.name for path in copy.iterdir()] == ["3"]
    save(checkpoints, 7)
    checkpoints.close()
    assert restored(opened(copy)[0]) == 7


def test_through_the_command_line(whole_run: Path, tmp_path: Path):
    """The newest is damaged; the log is cut to the one before, and the run ends as if nothing had been."""
    workdir = Path(shutil.copytree(whole_run, tmp_path / "run"))
    os.truncate(workdir / "checkpoints" / "12" / "run" / "metadata", 100)
    result = recipes.run(workdir)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "damaged" in line]
    assert "checkpoint 12 is damaged" in line and "going back to step 10" in line
    assert "resuming after step 10 of 12" in result.stdout
    assert (workdir / "checkpoints" / "damaged" / "12").is_dir()
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == list(range(1, 13))
    recipes.assert_same_run(workdir, whole_run)


@pytest.mark.long
def test_two_processes_go_back_together(tmp_path: Path):
    """By the clock of the first they save at the same steps; the second sees the damage that the first sees."""
    knobs = ("mesh.data=8", "checkpoint.every_steps=1000", "train.eval_every_steps=0", "train.sample_every_steps=0")
    clock = ("checkpoint.every_minutes=0.0001", "train.num_steps=45", "checkpoint.max_to_keep=9")
    for result in run_together(tmp_path / "run", *knobs, *clock):
        assert result.returncode == 0, result.stderr
    directory = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.name) for path in directory.iterdir()) == [20, 40, 45]
    shutil.rmtree(directory / "45" / "state" / "d")
    results = run_together(tmp_path / "run", *knobs, "train.num_steps=46", "checkpoint.max_to_keep=9")
    for result in results:
        assert result.returncode == 0, result.stderr
    assert "checkpoint 45 is damaged" in results[0].stdout and "resuming after step 40 of 46" in results[0].stdout
    assert sorted(path.name for path in directory.iterdir()) == ["20", "40", "46", "damaged"]
