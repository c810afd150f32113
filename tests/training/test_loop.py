"""What a whole run leaves behind, and what it does not depend on."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from megatron_files import write

from latentjax.errors import UserError
from latentjax.recurrence.draw import Work, draw_jacobi_iterations
from latentjax.training import loop, programs, start
from latentjax.training.metrics import MetricsLog, read_metrics
from latentjax.training.progress import TrainProgress
from latentjax.training.signals import StopRequest


def test_the_log_has_every_step_and_its_keys(whole_run: Path):
    lines = read_metrics(whole_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [step * 8 * 16 for step in range(1, 13)]
    # 12 steps of which 1 % are warm-up: the rate starts at its peak and ends a step before the floor of a tenth.
    rates = [line["learning_rate"] for line in lines]
    expected = [1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 12)) / 2) for step in range(12)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert [line["num_jacobi_iterations"] for line in lines] == [
        draw_jacobi_iterations((1, 2), 0, step) for step in range(12)
    ]
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1.5 for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 12]
    for line in lines:
        if "eval_loss" in line:
            assert 0 < line["thought_residual"] < 1
            # A byte is a token here, but for the ends of documents.
            assert line["eval_bits_per_byte"] == pytest.approx(line["eval_loss"] / math.log(2), rel=0.01)


def test_it_learns(whole_run: Path):
    lines = read_metrics(whole_run / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(257), abs=0.5)  # knows nothing at first
    assert lines[-1]["eval_loss"] < lines[0]["loss"] - 1.0


def test_the_other_files_of_a_run(whole_run: Path):
    summary = json.loads((whole_run / "summary.json").read_text())
    last = read_metrics(whole_run / "metrics.jsonl")[-1]
    assert summary["steps"] == 12
    assert (summary["loss"], summary["eval_loss"]) == (last["loss"], last["eval_loss"])
    assert summary["versions"]["jax"]
    assert 0 < summary["seconds_to_first_step"] < 300
    config = json.loads((whole_run / "config.json").read_text())
    assert config["train"]["num_steps"] == 12
    assert config["recurrence"]["train_jacobi_iterations"] == [1, 2]
    samples = (whole_run / "samples.txt").read_text()
    assert samples.count("=== step ") == 2
    assert samples.count("--- 'def '\n    def ") == 2
    # The last two checkpoints, of steps 5, 10 and 12.
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["10", "12"]
    assert list((whole_run / "tensorboard").glob("events.*"))


def losses(workdir: Path) -> np.ndarray:
    """Training losses and evaluations, in order."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return np.array([line[key] for line in lines for key in ("loss", "grad_norm", "eval_loss") if key in line])


def test_a_run_keeps_its_tokenizer(tmp_path: Path):
    vocabulary = ("model.vocab_size=400", "train.eval_every_steps=0", "train.sample_every_steps=0")
    workdir = recipes.trained(tmp_path / "run", *vocabulary, "train.num_steps=1")
    other = ("data.tokenizer=sentencepiece", "data.tokenizer_vocab_size=400")
    result = recipes.run(workdir, *vocabulary, *other, "train.num_steps=2")
    assert result.returncode == 2
    assert "was trained with another tokenizer" in result.stderr.splitlines()[-1]


def test_masked_documents_without_evaluation_or_samples(tmp_path: Path):
    never = ("train.eval_every_steps=0", "train.sample_every_steps=0")
    workdir = recipes.trained(tmp_path / "run", "data.mask_documents=true", "train.num_steps=2", *never)
    assert len(losses(workdir)) == 2 * 2  # loss and gradient norm of every step, no evaluation
    assert np.isfinite(losses(workdir)).all()
    assert not (workdir / "samples.txt").exists()


def test_gradient_accumulation_changes_no_loss(whole_run: Path, tmp_path: Path):
    workdir = recipes.trained(tmp_path / "run", "train.gradient_accumulation_steps=4", "train.loss_chunk_tokens=5")
    np.testing.assert_allclose(losses(workdir), losses(whole_run), atol=2e-5)


def test_processes_and_prefetching_change_no_number(whole_run: Path, tmp_path: Path):
    workdir = recipes.trained(tmp_path / "run", "data.num_workers=2", "data.device_prefetch=0")
    recipes.assert_same_run(workdir, whole_run)


def test_a_mixture_and_several_sets_to_evaluate_on(whole_run: Path, tmp_path: Path):
    """Of raw corpora and Megatron data; the log and the summary have every set's numbers beside those of all."""
    write(tmp_path / "packed", np.random.default_rng(0).integers(0, 256, (20, 17)).tolist())
    other = recipes.CORPUS.parent / "email"
    workdir = recipes.trained(
        tmp_path / "run",
        "data.path=",
        f"data.mixture=(({str(recipes.CORPUS)!r}, 3), ({str(other)!r}, 1))",
        f"data.eval_sets=(('json', {str(recipes.CORPUS)!r}), ('noise', {str(tmp_path / 'packed')!r}))",
        "train.eval_batches=4",
        "train.num_steps=4",
    )
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    # Bytes that follow no rule are harder, and what is learned of Python is no help with them.
    assert last["eval_loss/noise"] > last["eval_loss/json"] + 0.2
    sets = ("json", "noise")
    for key in ("eval_loss", "eval_bits_per_byte"):
        low, high = sorted(last[f"{key}/{name}"] for name in sets)
        assert low < last[key] < high
    # Of json 4 batches of 8 windows, of the noise 20 windows: one sequence each.
    expected = sum(last[f"eval_loss/{name}"] * count for name, count in zip(sets, (32, 20), strict=True)) / 52
    assert last["eval_loss"] == pytest.approx(expected, rel=1e-6)
    summary = json.loads((workdir / "summary.json").read_text())
    evaluation = {key: value for key, value in last.items() if key.startswith(("eval_", "thought_"))}
    assert len(evaluation) == 3 + 4 and evaluation.items() <= summary.items()


class StopAfter(StopRequest):
    """Asks for a stop after so many steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps_left = steps

    @property
    def requested(self) -> bool:
        self.steps_left -= 1
        return self.steps_left < 0


@pytest.fixture
def plain_steps(tmp_path: Path) -> Callable:
    """Runs steps that are neither evaluated nor saved: (steps, log_every_steps, change the run) -> final step."""

    def run_steps(steps: int, log_every_steps: int, change: Callable[[start.Run], None] = lambda run: None) -> int:
        config = recipes.get_config()
        config.train.update(num_steps=1000, eval_every_steps=0, sample_every_steps=0, log_every_steps=log_every_steps)
        config.checkpoint.every_steps = 1000
        guard = contextlib.ExitStack()
        run = start.prepare_run(config, tmp_path, guard)
        change(run)

        def guarded(compiled: Callable) -> Callable:
            def step(state, batch):
                # From the first step on. What is asked for by name is allowed: `device_put` of a batch, `device_get` of
                # metrics.
                guard.enter_context(jax.transfer_guard("disallow"))
                return compiled(state, batch)

            return step

        run.train_steps = {iterations: guarded(compiled) for iterations, compiled in run.train_steps.items()}
        log, progress = MetricsLog(tmp_path, 0), TrainProgress(0, 1000)
        batches = loop._train_batches(run)
        try:
            with guard:
                _, step, _ = loop._steps(run, batches, log, progress, StopAfter(steps))
        finally:
            batches.close()
            log.close()
            run.checkpoints.close()
        return step

    return run_steps


def test_a_plain_step_moves_nothing_but_its_batch(plain_steps: Callable):
    with pytest.raises(jax.errors.JaxRuntimeError, match="isallowed"), jax.transfer_guard("disallow"):
        jnp.sin(np.ones(3))  # the guard sees such things here
    assert plain_steps(8, log_every_steps=2) == 8


@pytest.mark.parametrize(
    ("log_every_steps", "events"),
    [(1, "s1 s2 r1 s3 r2 s4 r3 s5 r4 r5"), (2, "s1 s2 s3 r2 s4 s5 r4 r5"), (100, "s1 s2 s3 s4 s5 r5")],
)
def test_the_next_step_is_under_way_before_metrics_are_read(plain_steps: Callable, log_every_steps: int, events: str):
    """s: dispatched; r: its numbers are waited for. Those of the last before a stop are, as its state is saved."""
    found = []

    class Watched:
        def __init__(self, step: int, value: jax.Array):
            self.step, self.value = step, value

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            if f"r{self.step}" not in found:
                found.append(f"r{self.step}")
            return jax.device_get(self.value)

    def watch(run: start.Run) -> None:
        def watched(compiled: Callable) -> Callable:
            def step(state, batch):
                found.append(f"s{1 + sum(event[0] == 's' for event in found)}")
                state, metrics = compiled(state, batch)
                return state, {name: Watched(int(found[-1][1:]), value) for name, value in metrics.items()}

            return step

        run.train_steps = {iterations: watched(compiled) for iterations, compiled in run.train_steps.items()}

    plain_steps(5, log_every_steps, watch)
    assert " ".join(found) == events


def test_out_of_memory_at_a_step_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def step(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.")

    monkeypatch.setattr(programs, "compile_programs", lambda *_: ({Work(1, 1): step, Work(1, 2): step}, None))
    config = recipes.get_config()
    with pytest.raises(UserError, match="out of device memory while training .*allocate 12345 bytes.*model.remat") as e:
        loop.train(config, tmp_path, StopRequest())
    assert "\n" not in str(e.value)
