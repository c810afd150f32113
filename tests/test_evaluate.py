"""`python -m latentjax.evaluate` through its command line, on a run of tests/recipes.py."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recipes
from harness_tasks import write_tasks
from together import ended, start_processes

from latentjax import evaluate
from latentjax.config import default
from latentjax.data.sources import open_sources
from latentjax.errors import UserError
from latentjax.training.metrics import read_metrics

CACHE = "--config.data.store_cache="
FOLDER = Path(__file__).parent / "fixtures" / "parity" / "gpt_neox-latent-c1-r3"

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


def result_of(capsys: pytest.CaptureFixture, run: Path, *flags: str) -> dict[str, Any]:
    """What the verb prints as JSON; on eight devices, over which the batch is spread."""
    assert evaluate.main(["--checkpoint", str(run), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_trainers_own_evaluation_to_the_last_bit(whole_run: Path, tmp_path: Path):
    """On as many devices as the trainer had."""
    output = tmp_path / "made" / "results.json"
    command = [sys.executable, "-m", "latentjax.evaluate", "--checkpoint", str(whole_run), "--eval_batches", "2"]
    result = subprocess.run(
        [*command, "--output", str(output)],
        env=recipes.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found, last = json.loads(output.read_text()), read_metrics(whole_run / "metrics.jsonl")[-1]
    (one,) = found["text"]["sets"]
    assert one["loss"] == last["eval_loss"] and one["bits_per_byte"] == last["eval_bits_per_byte"]
    assert found["text"]["thought_residual"] == last["thought_residual"]
    assert found["text"]["tokens"] == 2 * 8 * 16 and found["step"] == 12 and found["num_jacobi_iterations"] == 1
    assert f"{last['eval_loss']:.4f}" in result.stdout and f"{math.exp(last['eval_loss']):.3f}" in result.stdout
    assert "Traceback" not in result.stderr


def test_step_and_mesh_can_be_chosen(capsys, whole_run: Path):
    found = result_of(
        capsys, whole_run, "--eval_batches=2", "--step=10", "--config.mesh.fsdp=4", "--config.mesh.tensor=1"
    )
    assert found["step"] == 10
    last = read_metrics(whole_run / "metrics.jsonl")[-1]
    spread = result_of(capsys, whole_run, "--eval_batches=2", "--config.mesh.fsdp=8", "--config.mesh.data=1")
    assert spread["text"]["sets"][0]["loss"] == pytest.approx(last["eval_loss"], abs=1e-5)
    assert found["text"]["sets"][0]["loss"] > last["eval_loss"] + 1e-3  # two steps of training earlier


def test_many_passes_a_tolerance_and_exact(capsys, whole_run: Path):
    """On all held-out windows, not only those of an evaluation in training."""
    settings = ("--num_jacobi_iterations=16", "--tolerance=1e-3", "--exact", "--num_jacobi_iterations=0")
    many, near, exact, none = (result_of(capsys, whole_run, flag) for flag in settings)
    losses = [found["text"]["sets"][0]["loss"] for found in (many, near, exact, none)]
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert losses[1] == pytest.approx(losses[0], abs=1e-3) and abs(losses[3] - losses[0]) > 1e-4
    assert near["text"]["thought_residual"] < 1e-3 and exact["text"]["thought_residual"] < 1e-6
    assert 1 < near["text"]["mean_jacobi_iterations"] < exact["text"]["mean_jacobi_iterations"] < 16
    assert exact["exact"] and near["tolerance"] == 1e-3 and near["num_jacobi_iterations"] is None
    config = recipes.get_config()
    (row,) = open_sources(config.data, progress=False, needs_evaluation=True).eval_sets.values()
    assert exact["text"]["tokens"] == (row.num_tokens - 1) // 16 * 16 == many["text"]["tokens"]


def test_other_text_is_tokenised_as_the_model_has_learnt_it(capsys, whole_run: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"Text number {number}, of the same length as every other one." * 2)
    cache = f"{CACHE}{tmp_path / 'stores'}"
    include = '--config.data.include=("*.txt",)'
    whole = result_of(capsys, whole_run, "--data", str(corpus), cache, include)
    names = [each["name"] for each in whole["text"]["sets"]]
    assert names == ["corpus-train", "corpus-eval", "all"]
    (store,) = (tmp_path / "stores").iterdir()
    held_out = result_of(capsys, whole_run, "--data", str(store))
    by_name = {each["name"]: each for each in whole["text"]["sets"]}
    (one,) = held_out["text"]["sets"]
    assert one["loss"] == by_name["corpus-eval"]["loss"]
    total = whole["text"]["tokens"]
    part = held_out["text"]["tokens"] / total
    expected = part * by_name["corpus-eval"]["loss"] + (1 - part) * by_name["corpus-train"]["loss"]
    assert by_name["all"]["loss"] == pytest.approx(expected, rel=1e-6) and 0.1 < part < 0.6
    train = result_of(capsys, whole_run, "--data", str(store), "--split=train", "--eval_batches=1")
    assert train["text"]["tokens"] == 128


@needs_harness
def test_tasks(capsys, whole_run: Path, tmp_path: Path):
    directory = write_tasks(tmp_path / "tasks")
    tasks = ["--tasks", "local_choice,local_generate", "--include_path", str(directory), "--batch_tokens=512"]
    found = result_of(capsys, whole_run, *tasks, "--num_fewshot", "0", "1", "--limit", "4")
    assert found["text"] is None
    results = {(each["task"], each["num_fewshot"]): each for each in found["tasks"]}
    assert list(results) == [("local_choice", 0), ("local_generate", 0), ("local_choice", 1), ("local_generate", 1)]
    for (task, _), each in results.items():
        assert each["num_questions"] == 4
        assert each["metrics"].keys() == ({"acc", "acc_norm"} if task == "local_choice" else {"exact_match"})
        assert all(value * 4 in range(5) for value in each["metrics"].values())
        assert each["errors"].keys() <= each["metrics"].keys()
    assert evaluate.main(["--checkpoint", str(whole_run), *tasks[:3], str(directory), "--limit=2"]) == 0
    table = capsys.readouterr().out
    assert "local_choice" in table and "acc_norm" in table and "+/-" in table


@pytest.mark.parametrize("kind", ["text", pytest.param("tasks", marks=[pytest.mark.long, needs_harness])])
def test_two_processes_have_the_numbers_of_one(capsys, whole_run: Path, tmp_path: Path, kind: str):
    """The first says them, once, and the second nothing."""
    tasks = ["--tasks=local_choice,local_generate", "--include_path", str(write_tasks(tmp_path / "tasks")), "--limit=3"]
    flags = {"text": ["--eval_batches=2", "--exact"], "tasks": [*tasks, "--batch_tokens=512", "--tolerance=1e-3"]}[kind]
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "latentjax.evaluate", "--checkpoint", str(whole_run), "--output", str(output)]
    results = ended(start_processes([[*command, *flags, "--config.mesh.fsdp=2"]] * 2, num_devices=4))
    for result in results:
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    one, two = result_of(capsys, whole_run, *flags), json.loads(output.read_text())
    assert (one["text"] is None) == (kind == "tasks")
    if kind == "text":
        assert two["text"]["sets"] == [pytest.approx(each, abs=1e-4) for each in one["text"]["sets"]]
        assert two["text"]["tokens"] == one["text"]["tokens"] == 2 * 8 * 16
    for mine, expected in zip(two["tasks"], one["tasks"], strict=True):
        assert mine["metrics"] == pytest.approx(expected["metrics"], abs=1e-4)
    said, nothing = (
        [line for line in result.stdout.splitlines() if not line.startswith("[Gloo]")] for result in results
    )
    assert nothing == [] and sum(line.startswith(f"{kind.removesuffix('s')} ") for line in said) == 1


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--exact", "--tolerance=0.1"], ["--tolerance and --exact"]),
        (["--tolerance=0"], ["--tolerance", "--exact"]),
        (["--tolerance=nan"], ["--tolerance"]),
        (["--num_jacobi_iterations=-1"], ["--num_jacobi_iterations", "at least 0"]),
        (["--num_jacobi_iterations=1000000"], ["--num_jacobi_iterations", "--exact"]),
        (["--eval_batches=0"], ["--eval_batches"]),
        (["--limit=3"], ["--limit is for --tasks"]),
        (["--split=train"], ["--split is for --data"]),
        (["--split=test", "--data", "x"], ["--split", "eval"]),
        (["--num_fewshot=-1", "--tasks=piqa"], ["--num_fewshot"]),
        (["--step=11"], ["11"]),
        (["--coordinator=localhost:1"], ["--num_processes and --process_id go together"]),
        (["--data", "/no/such/store"], ["/no/such/store"]),
        (["--config.model.num_layers=3"], ["model.num_layers", "model.dtype"]),
        (["--config.data.batch_siz=3"], ["data.batch_size"]),
        (["--config.data.batch_size=12"], ["data.batch_size", "= 8"]),
        (["--config.mesh.fsdp=3"], ["mesh", "3"]),
        (["--config.data.sequence_length=65"], ["data.sequence_length=65", "64"]),
    ],
)
def test_mistakes_are_one_line(whole_run: Path, flags: list[str], parts: list[str]):
    with pytest.raises(UserError) as error:
        evaluate.main(["--checkpoint", str(whole_run), *flags])
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_folder_has_no_held_out_text(whole_run: Path):
    with pytest.raises(UserError, match="no run with held-out text of its own: give --data or --tasks"):
        evaluate.main(["--checkpoint", str(FOLDER)])
    with pytest.raises(UserError, match="has no tokenizer"):
        evaluate.main(["--checkpoint", str(FOLDER), "--data", str(recipes.CORPUS)])


def test_ids_of_another_tokenizer_are_refused(whole_run: Path, tmp_path: Path):
    config = recipes.get_config()
    config.data.update(tokenizer="sentencepiece", tokenizer_vocab_size=400, store_cache=str(tmp_path / "stores"))
    open_sources(config.data, progress=False, needs_evaluation=False)
    (store,) = (tmp_path / "stores").iterdir()
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate.main(["--checkpoint", str(whole_run), "--data", str(store)])


def test_a_run_that_lost_its_data_says_so(whole_run: Path, tmp_path: Path):
    moved = shutil.copytree(whole_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    text = (moved / "config.json").read_text()
    (moved / "config.json").write_text(text.replace(str(recipes.CORPUS), "/gone"))
    with pytest.raises(UserError, match="/gone"):
        evaluate.main(["--checkpoint", str(moved)])


@needs_harness
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tasks=piqqa"], ["'piqqa'", "'piqa'"]),
        (["--tasks=piqa", "--include_path=/no/directory"], ["/no/directory"]),
    ],
)
def test_mistakes_about_tasks(whole_run: Path, flags: list[str], parts: list[str]):
    with pytest.raises(UserError) as error:
        evaluate.main(["--checkpoint", str(whole_run), *flags])
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("verb", ["evaluate", "train"])
def test_a_missing_harness_is_said_before_anything_is_done(whole_run: Path, tmp_path: Path, monkeypatch, verb: str):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "task_schedule", "lm_eval_adapter"):
        monkeypatch.delitem(sys.modules, f"latentjax.interop.{name}", raising=False)
    from latentjax import train

    tasks = ["--config.train.tasks_every_steps=5", "--config.train.eval_tasks=('piqa',)"]
    command = {
        "evaluate": (evaluate.main, ["--checkpoint", str(whole_run), "--tasks=piqa"]),
        "train": (train.main, ["--config", str(recipes.RECIPE), "--workdir", str(tmp_path / "run"), *tasks]),
    }
    main, arguments = command[verb]
    with pytest.raises(UserError, match="lm-evaluation-harness, which is not installed"):
        main(arguments)
    assert not (tmp_path / "run").exists()


def test_the_papers_tasks_stand_for_their_names():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from latentjax.interop.harness import PAPER_SHOTS, PAPER_TASKS, Tasks

    assert Tasks(["paper", "copa"], None).names == [*PAPER_TASKS, "copa"]  # each of them is known to the harness
    assert len(PAPER_TASKS) == 9 and PAPER_SHOTS == (0, 5)
    assert default().train.eval_tasks_num_fewshot == 0
