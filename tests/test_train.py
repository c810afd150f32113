"""Mistakes at the train verb: one clear line, status 2, nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import recipes

from latentjax.errors import UserError
from latentjax.train import main


def error_of(capsys: pytest.CaptureFixture, tmp_path: Path, *overrides: str, recipe: str = str(recipes.RECIPE)) -> str:
    """The line that a training run with these overrides ends with."""
    flags = [f"--config.{override}" for override in overrides]
    with pytest.raises(UserError) as error:
        main(["--config", recipe, "--workdir", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run" / "checkpoints").exists() or list((tmp_path / "run" / "checkpoints").iterdir()) == []
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rat=1", ["optimizer.learning_rat", "optimizer.learning_rate"]),
        ("batch_size=4", ["'batch_size'", "data.batch_size"]),
        ("train.num_steps=many", ["train.num_steps", "whole number", "'many'"]),
        ("train.num_steps=0", ["train.num_steps", "from 1 to"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "at least 0"]),
        ("optimizer.warmup_ratio=2", ["optimizer.warmup_ratio", "from 0.0 to 1.0"]),
        ("model.architecture=gtp", ["model.architecture", "gpt_neox or llama"]),
        ("model.attention=flash", ["model.attention='flash'", "xla"]),
        ("model.hidden_size=17", ["model.hidden_size=17", "model.num_heads=2"]),
        ("model.rotary_fraction=0.4", ["model.rotary_fraction", "even"]),
        ("model.num_kv_heads=1", ["model.num_kv_heads=1", "gpt_neox"]),
        ("recurrence.train_jacobi_iterations=two", ["recurrence.train_jacobi_iterations", "(2, 3, 4)"]),
        ("train.gradient_accumulation_steps=3", ["data.batch_size=8", "train.gradient_accumulation_steps=3"]),
        ("data.sequence_length=65", ["data.sequence_length=65", "model.max_position_embeddings=64"]),
        ("data.path=", ["data.path", "latentjax.prepare"]),
        ("data.path=/no/corpus", ["/no/corpus", "latentjax.prepare"]),
        ("data.include=*.rst", ["*.rst", "no file"]),
        ("data.tokenizer=word", ["'word'", "sentencepiece"]),
        ("model.vocab_size=256", ["257", "model.vocab_size=256"]),
        ("train.sample_tokens=63", ["train.sample_tokens=63", "model.max_position_embeddings=64"]),
        ("mesh.data=3", ["mesh", "data=3", "8"]),
        ("mesh.fsdp=-1", ["mesh", "-1"]),
        ("data.batch_size=12", ["data.batch_size", "mesh.replica * mesh.data * mesh.fsdp = 8"]),
    ],
)
def test_every_mistake_is_named(capsys: pytest.CaptureFixture, tmp_path: Path, override: str, parts: list[str]):
    message = error_of(capsys, tmp_path, override)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_too_little_held_out(capsys: pytest.CaptureFixture, tmp_path: Path):
    """A lone document gives its tail, which here is a token: found out at once and not at the first evaluation."""
    message = error_of(capsys, tmp_path, f"data.path={recipes.CORPUS / 'tool.py'}", "data.eval_fraction=0.0001")
    assert "the eval split" in message
    assert "fewer than one window of data.sequence_length + 1 = 17" in message


def test_empty_corpus(capsys: pytest.CaptureFixture, tmp_path: Path):
    (tmp_path / "empty.py").touch()
    message = error_of(capsys, tmp_path, f"data.path={tmp_path}")
    assert "empty" in message
    assert str(tmp_path) in message


def test_directory_of_another_model(whole_run: Path, capsys: pytest.CaptureFixture):
    before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another model: model.num_layers was 2 there and is 3 now"):
        main(["--config", str(recipes.RECIPE), "--workdir", str(whole_run), "--config.model.num_layers=3"])
    assert {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config", "configs/pile_1b.py"], ["data/pile", "python -m latentjax.prepare", "--output data/pile"]),
        (["--config", "configs/pile_1.py"], ["no recipe at 'configs/pile_1.py'"]),
        (["--config", "configs/quickstart.py:ponderous"], ["recurrence.method='ponderous'"]),
        (["--config", "configs/quickstart.py", "--workdri", "x"], ["--workdri"]),
        (["--config", "configs/quickstart.py", "--config.train.num_steps"], ["--config.train.num_steps=VALUE"]),
        ([], ["--config"]),
    ],
)
def test_from_the_shell_one_line_and_status_2(tmp_path: Path, arguments: list[str], parts: list[str]):
    result = subprocess.run(
        [sys.executable, "-m", "latentjax.train", *arguments],
        cwd=recipes.ROOT,
        env=recipes.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("latentjax.train: error: ")
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("recipe", sorted(path.name for path in (recipes.ROOT / "configs").glob("*.py")))
def test_every_recipe_is_valid(recipe: str):
    from latentjax.config import load
    from latentjax.validation import validate

    validate(load(str(recipes.ROOT / "configs" / recipe)))
