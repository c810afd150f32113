"""What is read of a run's directory: exact FLOPs, time from the logged rates, and whatever may be wrong with it."""

import json
import math

import numpy as np
import pytest
from made_runs import RATE, STEPS, diagnostics, made_config, made_run

from latentjax.errors import UserError
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.draw import draw_jacobi_iterations
from latentjax.recurrence.methods import make_recurrence
from latentjax.reporting.runs import read_run
from latentjax.training.cost import cost_of
from latentjax.training.flops import train_flops_per_token

TOKENS = 8 * 16  # of a step


def test_flops_are_those_of_the_cost_where_nothing_is_drawn(tmp_path):
    config = made_config("vanilla")
    run = read_run(str(made_run(tmp_path / "run", config, {10: 3.0, STEPS: 2.0})))
    assert run.cost == cost_of(config)
    assert run.training.flops[-1] == pytest.approx(run.cost.total_train_flops, rel=1e-12)
    np.testing.assert_allclose(run.training.flops, np.arange(1, STEPS + 1) * TOKENS * run.cost.train_flops)
    assert run.held_out.steps.tolist() == [10, STEPS] and run.held_out.loss.tolist() == [3.0, 2.0]
    assert run.held_out.bits_per_byte.tolist() == [4.5, 3.0]
    assert run.held_out.flops.tolist() == run.training.flops[[9, STEPS - 1]].tolist()
    assert run.is_finished and not run.diverged and not run.remarks and run.step == STEPS
    assert (run.wall_seconds, run.devices, run.versions["jax"]) == (99.5, "1 x cpu", "0.10.2")


def test_flops_follow_the_draws_of_r(tmp_path):
    """Each step has those of its own R; the seed says which."""
    config = made_config("latent", train__seed=7)
    drawn = [draw_jacobi_iterations((1, 2), 7, step) for step in range(STEPS)]
    assert len(set(drawn)) == 2
    spec, recurrence = ModelSpec(**config.model), make_recurrence(RecurrenceSpec(**config.recurrence))
    per_token = [train_flops_per_token(spec, recurrence, 16, each) for each in drawn]
    logged = {step: drawn[step - 1] for step in range(1, STEPS + 1)}
    run = read_run(str(made_run(tmp_path / "run", config, {STEPS: 2.0}, iterations=logged)))
    np.testing.assert_allclose(run.training.flops, np.cumsum(per_token) * TOKENS, rtol=1e-12)
    assert not run.remarks and run.iterates
    # What the config does not draw is said to be so.
    other = read_run(str(made_run(tmp_path / "other", config, {STEPS: 2.0}, iterations=logged | {3: 9})))
    assert "other R" in " ".join(other.remarks)


def test_time_is_that_of_the_logged_rates(tmp_path):
    """A line without a rate leaves its tokens to the next one that has it."""
    path = made_run(tmp_path / "run", made_config(), {STEPS: 2.0})
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[1]["tokens_per_second"] = None
    lines[2]["tokens_per_second"] = RATE / 2
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = read_run(str(path)).training.seconds * RATE / TOKENS
    assert seconds[0] == pytest.approx(1) and math.isnan(seconds[1])
    assert seconds[2] == pytest.approx(1 + 2 * 2) and seconds[-1] == pytest.approx(5 + STEPS - 3)


def test_unfinished_runs(tmp_path):
    """A kill cuts the last line off, and leaves an account of the time but no summary."""
    path = made_run(tmp_path / "run", made_config(), {10: 3.0}, until=25)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "tok')
    (path / "goodput.json").write_text(json.dumps({"seconds": {"steps": 5.0, "start": 2.5}}))
    run = read_run(str(path))
    assert not run.is_finished and run.step == 25 and run.wall_seconds == 7.5 and run.devices == ""
    assert "cut off" in run.remarks[0] and f"at step 25 of {STEPS}" in run.remarks[1]


def test_damage(tmp_path):
    """What is read is read up to the damage, and it is said how much is not."""
    path = made_run(tmp_path / "run", made_config(), {10: 3.0, STEPS: 2.0})
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[19] = '{"step": "twenty"}'
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "summary.json").write_text("[1, 2]")
    (path / "diagnostics.json").write_text('{"passes": [{}]}')
    run = read_run(str(path))
    assert run.step == 19 and run.held_out.steps.tolist() == [10]
    said = " | ".join(run.remarks)
    assert "line 20 of metrics.jsonl is damaged: it and the 20 after it" in said
    assert "summary.json is damaged" in said and "diagnostics.json is damaged" in said


@pytest.mark.parametrize("bad", ['"much"', "true", "[]", "1e400", "-1e40", "1" + "0" * 400, "NaN"])
def test_numbers_that_are_none(tmp_path, bad):
    path = made_run(tmp_path / "run", made_config(), {10: 3.0, STEPS: 2.0})
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('"loss": 4.95', f'"loss": {bad}').replace("1000.0", bad))
    run = read_run(str(path))
    assert math.isnan(run.training.loss[0]) and np.isnan(run.training.seconds).all()
    assert run.training.loss[1] == 4.9 and run.held_out.loss.tolist() == [3.0, 2.0]


def test_runs_that_diverged(tmp_path):
    run = read_run(str(made_run(tmp_path / "run", made_config(), {10: 3.0, STEPS: None})))
    assert run.diverged and run.held_out.steps.tolist() == [10] and "not finite" in run.remarks[0]


def test_runs_with_nothing_yet(tmp_path):
    run = read_run(str(made_run(tmp_path / "run", made_config(), {}, until=0)))
    assert run.step == 0 and len(run.training) == 0 and run.remarks == ("nothing is logged yet",)
    run = read_run(str(made_run(tmp_path / "other", made_config(), {})))
    assert run.is_finished and len(run.held_out) == 0 and "never evaluated" in run.remarks[0]


def test_a_batch_that_was_changed_on_the_way(tmp_path):
    path = made_run(tmp_path / "run", made_config(), {STEPS: 2.0})
    text = (path / "metrics.jsonl").read_text().replace(f'"tokens": {5 * TOKENS},', '"tokens": 7,')
    (path / "metrics.jsonl").write_text(text)
    assert "other numbers of tokens" in read_run(str(path)).remarks[0]


def test_diagnostics(tmp_path):
    path = made_run(tmp_path / "run", made_config("latent"), {STEPS: 2.0})
    (path / "diagnostics.json").write_text(json.dumps(diagnostics(2.5, 2.2, 2.0)))
    found = read_run(str(path)).diagnostics
    assert found.iterations.tolist() == [0, 1, 2] and found.loss.tolist() == [2.5, 2.2, 2.0]
    assert math.isnan(found.residual[0]) and found.residual[2] == pytest.approx(1 / 9)
    assert found.exact_loss == 2.0 and found.contraction["distance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("content", [None, "", "[]", '{"model_type": "llama"}', '{"model": {}, "recurrence": {}}'])
def test_what_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"is not a run|is not a latentjax config"):
        read_run(str(tmp_path))
