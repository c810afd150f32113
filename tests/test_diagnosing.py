"""`python -m latentjax.evaluate --diagnostics` through its command line, on a run of tests/recipes.py."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import recipes

from latentjax import evaluate, export
from latentjax.errors import UserError
from latentjax.training.metrics import read_metrics

FEW = ("--max_jacobi_iterations=3", "--rows=16")


@pytest.fixture(scope="module")
def run(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, to be written to."""
    place = tmp_path_factory.mktemp("diagnosed") / "run"
    return shutil.copytree(whole_run, place, ignore=shutil.ignore_patterns("tensorboard"))


def diagnosed(capsys: pytest.CaptureFixture, checkpoint: Path, *flags: str) -> dict[str, Any]:
    """What the verb prints as JSON; on eight devices."""
    assert evaluate.main(["--checkpoint", str(checkpoint), "--diagnostics", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_file_of_a_run(capsys, run: Path):
    """Windows and losses are those of the last evaluation in training: 16 windows, R = 1."""
    result = diagnosed(capsys, run, *FEW)
    assert json.loads((run / "diagnostics.json").read_text()) == result
    assert not list(run.glob("*.partial"))
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert (result["step"], result["rows"], result["num_tokens"], result["dtype"]) == (12, 16, 16 * 16, "float32")
    assert [each["num_jacobi_iterations"] for each in result["passes"]] == [0, 1, 2, 3]
    one = result["passes"][1]
    assert one["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert one["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)
    assert one["thought_residual"] == pytest.approx(last["thought_residual"], rel=0.01)  # there a mean of batches
    assert result["passes"][0]["thought_residual"] is None
    distances = [each["distance_from_exact"] for each in result["passes"]]
    assert all(after < 0.8 * before for before, after in itertools.pairwise(distances))
    assert 0 < result["contraction"]["distance"] < 0.8 and 0 < result["contraction"]["residual"] < 0.8
    assert result["exact"].keys() == {"loss", "bits_per_byte"}
    assert abs(result["exact"]["loss"] - result["passes"][3]["loss"]) < abs(result["exact"]["loss"] - one["loss"])
    assert [each["first_position"] for each in result["by_position"]] == [0, 4, 8]
    assert all(len(each["distance_from_exact"]) == 4 for each in result["by_position"])


def test_another_mesh_step_and_number_of_rows(capsys, run: Path):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.sequence=2", "--config.mesh.data=1")
    many, one = (
        diagnosed(capsys, run, "--step=10", "--max_jacobi_iterations=2", "--rows=5", *each) for each in (mesh, ())
    )
    assert many["rows"] == one["rows"] == 5 and many["num_tokens"] == one["num_tokens"] == 5 * 16
    assert many["step"] == 10
    for left, right in zip(many["passes"], one["passes"], strict=True):
        for name, value in right.items():
            assert left[name] == (None if value is None else pytest.approx(value, rel=1e-4)), name
    assert many["exact"]["loss"] == pytest.approx(one["exact"]["loss"], rel=1e-5)


def test_a_folder_is_left_as_it_is(capsys, run: Path, tmp_path: Path):
    folder = tmp_path / "exported"
    assert export.main(["--checkpoint", str(run), "--output", str(folder)]) == 0
    capsys.readouterr()
    before = sorted(folder.iterdir())
    length = ("--config.data.sequence_length=16", "--config.data.batch_size=8", "--data", str(recipes.CORPUS))
    cache = ('--config.data.include=("*.py",)', "--config.data.eval_fraction=0.3", "--split=eval")
    where = f"--config.data.store_cache={recipes.get_config().data.store_cache}"
    result = diagnosed(capsys, folder, *FEW, *length, *cache, where)
    assert sorted(folder.iterdir()) == before and result["step"] is None
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert result["passes"][1]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_the_table(capsys, run: Path):
    assert evaluate.main(["--checkpoint", str(run), "--diagnostics", *FEW]) == 0
    table, result = capsys.readouterr().out, json.loads((run / "diagnostics.json").read_text())
    for each in result["passes"]:
        assert f"{each['loss']:.4f}" in table and f"{each['distance_from_exact']:.2e}" in table
    for each in result["by_position"]:
        assert all(f"{distance:.2e}" in table for distance in each["distance_from_exact"])
    assert f"multiplied by {result['contraction']['residual']:.3f}" in table and "8 - 15" in table


def test_methods_that_do_not_iterate_are_refused(run: Path, tmp_path: Path):
    """Before anything but the configuration is read."""
    config = json.loads((run / "config.json").read_text())
    config["recurrence"] |= {"method": "vanilla", "num_latent_thoughts": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError) as error:
        evaluate.main(["--checkpoint", str(tmp_path), "--diagnostics"])
    assert "vanilla" in str(error.value) and "does not iterate" in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_status == 2 and not (tmp_path / "diagnostics.json").exists()


def test_a_run_that_cannot_be_written_to_says_so_after_the_results(capsys, run: Path, monkeypatch):
    (run / "diagnostics.json").unlink(missing_ok=True)
    (run / "diagnostics.json.partial").mkdir()
    with pytest.raises(UserError, match="diagnostics.json"):
        evaluate.main(["--checkpoint", str(run), "--diagnostics", "--json", *FEW])
    (run / "diagnostics.json.partial").rmdir()
    assert json.loads(capsys.readouterr().out)["rows"] == 16


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--diagnostics", "--exact"], ["--diagnostics and --exact", "--max_jacobi_iterations"]),
        (["--diagnostics", "--num_jacobi_iterations=3"], ["--num_jacobi_iterations", "--max_jacobi_iterations"]),
        (["--diagnostics", "--tasks=piqa"], ["--tasks"]),
        (["--diagnostics", "--eval_batches=2"], ["--eval_batches", "--rows"]),
        (["--diagnostics", "--rows=0"], ["--rows", "at least 1"]),
        (["--diagnostics", "--max_jacobi_iterations=0"], ["--max_jacobi_iterations", "at least 1"]),
        (["--diagnostics", "--max_jacobi_iterations=1000000"], ["--max_jacobi_iterations", "at most"]),
        (["--rows=3"], ["--rows is for --diagnostics"]),
        (["--max_jacobi_iterations=3"], ["--max_jacobi_iterations is for --diagnostics"]),
    ],
)
def test_mistakes_are_one_line(run: Path, flags: list[str], parts: list[str]):
    with pytest.raises(UserError) as error:
        evaluate.main(["--checkpoint", str(run), *flags])
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
