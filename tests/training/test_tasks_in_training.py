"""Tasks on a schedule inside training: what the loop does with what it is handed, and the harness in that place."""

from pathlib import Path

import numpy as np
import pytest
import recipes
from harness_tasks import write_tasks

from latentjax.training.loop import train
from latentjax.training.metrics import read_metrics
from latentjax.training.signals import StopRequest


def config_with(directory: Path | None = None, **changes):
    config = recipes.get_config()
    config.train.update({"tasks_every_steps": 5, "eval_tasks": ("local_choice",), "sample_every_steps": 0} | changes)
    config.train.eval_tasks_path = "" if directory is None else str(directory)
    config.train.log_every_steps = 4
    return config


def test_results_are_logged_and_training_goes_on_as_without(whole_run: Path, tmp_path: Path):
    """After every fifth step and the last, with the parameters of that step; sharded over eight devices."""
    scored = []

    def score_tasks(scorer, tokenizer) -> dict[str, float]:
        requests = [([40 + number], list(tokenizer.encode("def"))) for number in range(3)]
        scored.append(scorer.score(requests))
        return {"task/made_up/acc": scored[-1][0][0]}

    config = config_with()
    config.mesh.update(data=1, fsdp=8)
    summary = train(config, tmp_path / "run", StopRequest(), None, None, score_tasks)
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert [step for step, line in lines.items() if "task/made_up/acc" in line] == [5, 10, 12]
    assert [lines[step]["task/made_up/acc"] for step in (5, 10, 12)] == [scores[0][0] for scores in scored]
    assert len({scores[0][0] for scores in scored}) == 3  # of other parameters each time
    assert summary["task/made_up/acc"] == scored[-1][0][0]
    assert "eval_loss" not in lines[5] and "eval_loss" in lines[12]
    plain = {line["step"]: line["loss"] for line in read_metrics(whole_run / "metrics.jsonl")}
    for step, line in lines.items():
        assert line["loss"] == pytest.approx(plain[step], abs=1e-4), step


def test_the_harness_in_that_place(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its tasks run on a run's model as they do through the evaluate verb; what cannot be run does not end training."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from latentjax.evaluating import EvaluationRequest
    from latentjax.interop.task_schedule import TaskSchedule
    from latentjax.opening import open_model
    from latentjax.training.scoring import Refinement, Scorer

    directory = write_tasks(tmp_path / "tasks")
    names = ("local_choice", "local_rolling")
    schedule = TaskSchedule(config_with(directory, eval_tasks=names, eval_tasks_num_fewshot=1).train, shows=True)
    opened = open_model(whole_run)
    scorer = Scorer(opened.model, opened.params, opened.mesh, refinement=Refinement(1), batch_tokens=1024)
    results = [schedule(scorer, opened.tokenizer) for _ in range(2)]
    assert results[0] == results[1]  # asked again, the same
    assert results[0].keys() >= {"task/local_choice/acc", "task/local_rolling/bits_per_byte"}
    assert all(np.isfinite(value) for value in results[0].values())

    request = EvaluationRequest(
        str(whole_run), None, (), None, None, False, (), "", None, names, (1,), None, str(directory), 512
    )
    from latentjax.evaluating import evaluate as evaluate_request
    from latentjax.evaluating import evaluation_config

    expected = {
        f"task/{each.task}/{metric}": value
        for each in evaluate_request(request, evaluation_config(request), lambda line: None).tasks
        for metric, value in each.metrics.items()
    }
    assert results[0] == pytest.approx(expected, rel=1e-5)

    too_long = TaskSchedule(config_with(directory, eval_tasks=("local_generate",)).train, shows=True)
    scorer.max_length = 12
    assert too_long(scorer, opened.tokenizer) == {}
    assert "tasks were not run: the task asks for 12 new tokens" in capsys.readouterr().err
