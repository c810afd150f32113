"""Runs whose steps differ in C and R, or find R by themselves: the log, resumption, accumulation, FLOPs."""

from pathlib import Path

import numpy as np
import pytest
import recipes
from ml_collections import ConfigDict
from test_resume import StopAtLook

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.draw import Work
from latentjax.training import programs
from latentjax.training.flops import work_flops_per_token
from latentjax.training.loop import train
from latentjax.training.metrics import read_metrics
from latentjax.training.signals import StopRequest
from latentjax.validation import validate


def config_of(**changes: object) -> ConfigDict:
    config = recipes.get_config()
    config.recurrence.update(changes)
    config.train.update(eval_every_steps=0, sample_every_steps=0)
    config.mesh.update(data=2, fsdp=2, sequence=2)
    validate(config)
    return config


def assert_mfu_counts(config: ConfigDict, lines: list[dict], works: list[Work]) -> None:
    """MFU over speed is the FLOPs of a token, but for the peak."""
    spec, recurrence = ModelSpec(**config.model), RecurrenceSpec(**config.recurrence)
    flops = np.array([work_flops_per_token(spec, recurrence, config.data.sequence_length, work) for work in works])
    ratios = np.array([line["mfu"] / line["tokens_per_second"] for line in lines])
    np.testing.assert_allclose(ratios / ratios[0], flops / flops[0], rtol=1e-9)


STAGES = {"train_schedule": ((0.0, 0, (0,)), (0.25, 1, (0, 1))), "handover_ratio": 0.5}


@pytest.fixture(scope="module")
def staged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages, on a mesh, that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "staged"
    assert train(config_of(**STAGES), workdir, StopRequest())["steps"] == 12
    return workdir


def test_the_log_says_what_each_step_computed(staged_run: Path):
    lines, config = read_metrics(staged_run / "metrics.jsonl"), config_of(**STAGES)
    plan = programs.schedule_of(config)
    drawn = [plan.draw(0, step) for step in range(12)]
    assert [(line["num_latent_thoughts"], line["num_jacobi_iterations"]) for line in lines] == drawn
    assert set(drawn) == {(0, 0), (1, 0), (1, 1)} and drawn[:3] == [(0, 0)] * 3
    # MFU over speed is the FLOPs of a token, but for the peak.
    assert_mfu_counts(config, lines, drawn)


def test_stopped_within_a_hand_over_it_goes_on_the_same(staged_run: Path, tmp_path: Path):
    assert train(config_of(**STAGES), tmp_path / "run", StopAtLook(6)) is None
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5
    train(config_of(**STAGES), tmp_path / "run", StopRequest())
    assert recipes.comparable_metrics(tmp_path / "run") == recipes.comparable_metrics(staged_run)
    for one, other in zip(recipes.final_arrays(tmp_path / "run"), recipes.final_arrays(staged_run), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tolerance_finds_r_at_every_step(tmp_path: Path):
    """Between what gradients flow through and the most; microbatches find it each by themselves."""
    settings = {"train_tolerance": 0.15, "backprop_passes": 2, "train_jacobi_iterations": (6,)}
    config = config_of(refinement="alternating", **settings)
    config.data.mask_documents = True
    config.train.update(num_steps=6, gradient_accumulation_steps=2)
    train(config, tmp_path / "run", StopRequest())
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [line["num_jacobi_iterations"] for line in lines]
    assert all(2 <= passes <= 6 and (2 * passes).is_integer() for passes in found) and min(found) < 6
    assert_mfu_counts(config, lines, [Work(1, passes) for passes in found])


@pytest.mark.long
def test_alternating_passes_on_a_mesh(tmp_path: Path):
    """With documents apart, the losses on devices that share sequences are those on devices that do not."""
    found = []
    for mesh in ({"data": 2, "fsdp": 1, "sequence": 2, "tensor": 2}, {"data": 8, "fsdp": 1, "sequence": 1}):
        config = config_of(refinement="alternating", backprop_passes=2, train_jacobi_iterations=(2,))
        config.model.vocab_size = 258
        config.data.mask_documents = True
        config.train.num_steps = 4
        config.mesh.update(mesh)
        workdir = tmp_path / str(len(found))
        train(config, workdir, StopRequest())
        lines = read_metrics(workdir / "metrics.jsonl")
        found.append([line[key] for line in lines for key in ("loss", "grad_norm")])
    np.testing.assert_allclose(found[0], found[1], rtol=2e-4)
