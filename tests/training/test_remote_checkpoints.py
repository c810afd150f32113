"""Checkpoints behind gs://, against a stand-in of Google Cloud Storage on this machine."""

import importlib.util
from pathlib import Path

import pytest
import recipes
from fake_gcs import Bucket, served

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="gcsfs is not installed")


def checkpoint_steps(bucket: Bucket) -> set[str]:
    return {name.split("/")[1] for name in bucket.objects if name.startswith("run/")}


def test_a_run_that_keeps_its_checkpoints_there(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begun where nothing is; the last two are kept, and the numbers are those of a run that saves on a disk."""
    with served() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        workdir, place = tmp_path / "run", "checkpoint.directory=gs://bucket/run"
        recipes.trained(workdir, place)
        recipes.assert_same_log(workdir, whole_run)
        assert checkpoint_steps(bucket) == {"10", "12"}


def test_a_bucket_that_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One line, and what is there stays."""
    with served() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        never = ("train.eval_every_steps=0", "train.sample_every_steps=0")
        knobs = ("checkpoint.directory=gs://bucket/run", *never)
        recipes.trained(tmp_path / "run", *knobs, "train.num_steps=2")
        bucket.room = 0
        result = recipes.run(tmp_path / "run", *knobs, "train.num_steps=3")
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert "step 3 cannot be saved to gs://bucket/run" in result.stderr.splitlines()[-1]
        assert checkpoint_steps(bucket) == {"2"}
