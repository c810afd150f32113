"""Who may continue a run, and what is said about it."""

import json
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from latentjax.config import default, to_json
from latentjax.errors import UserError
from latentjax.training import run_directory


def claim(workdir: Path, config: ConfigDict) -> list[str]:
    """Claims the directory and gives it back."""
    changes, lock = run_directory.claim(workdir, config)
    lock.close()
    return changes


def test_first_claim_writes_the_config(tmp_path: Path):
    assert claim(tmp_path / "run", default()) == []
    assert (tmp_path / "run" / "config.json").read_text() == to_json(default())
    assert claim(tmp_path / "run", default()) == []


def test_changed_knobs_are_reported_and_kept(tmp_path: Path):
    claim(tmp_path, default())
    config = default()
    config.optimizer.learning_rate = 5e-4
    config.recurrence.train_jacobi_iterations = (3,)
    assert claim(tmp_path, config) == [
        "optimizer.learning_rate: 0.001 before, 0.0005 from here on",
        "recurrence.train_jacobi_iterations: (2, 3, 4) before, (3,) from here on",
    ]
    assert claim(tmp_path, config) == []


@pytest.mark.parametrize(
    ("key", "value"), [("model.hidden_size", 256), ("recurrence.num_latent_thoughts", 2), ("model.rope_theta", 5e5)]
)
def test_another_model_is_refused(tmp_path: Path, key: str, value: float):
    claim(tmp_path, default())
    config = default()
    group, name = key.split(".")
    config[group][name] = value
    with pytest.raises(UserError, match=f"another model: {key} was .* there and is {value!r} now"):
        claim(tmp_path, config)
    assert (tmp_path / "config.json").read_text() == to_json(default())


@pytest.mark.parametrize("method", ["pause", "loop"])
def test_the_token_of_a_pause_is_part_of_the_model(tmp_path: Path, method: str):
    """Of a model that pauses; for the others it is a knob like any other."""
    config = default()
    config.recurrence.method = method
    claim(tmp_path, config)
    config.recurrence.pause_token_id = 7
    if method == "pause":
        with pytest.raises(UserError, match=r"another model: recurrence\.pause_token_id was -1 there and is 7 now"):
            claim(tmp_path, config)
    else:
        assert claim(tmp_path, config) == ["recurrence.pause_token_id: -1 before, 7 from here on"]


def test_a_knob_that_the_run_began_without(tmp_path: Path):
    claim(tmp_path, default())
    stored = json.loads(to_json(default()))
    del stored["train"]["loss_chunk_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert claim(tmp_path, default()) == ["train.loss_chunk_tokens: not known before, 0 from here on"]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to --workdir .*file"):
        claim(tmp_path / "file" / "run", default())


def test_a_directory_in_use_is_refused_until_it_is_given_back(tmp_path: Path):
    _, lock = run_directory.claim(tmp_path, default())
    config = default()
    config.optimizer.learning_rate = 5e-4
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} on .*: wait until that run"):
        run_directory.claim(tmp_path, config)
    assert (tmp_path / "config.json").read_text() == to_json(default())
    lock.close()
    assert claim(tmp_path, config) != []
