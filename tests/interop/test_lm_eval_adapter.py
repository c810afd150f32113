# ruff: noqa: E402  (packages that may be absent are asked for first)
"""The evaluation harness on local tasks: through our adapter as through its own `hf` model on the same weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from pathlib import Path
from typing import Any

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytest.importorskip("torch", reason="torch, with which the harness's own model computes, is not installed")
pytest.importorskip(
    "transformers", reason="transformers, with which the harness's own model computes, is not installed"
)

from harness_tasks import TASKS, VOCAB_SIZE, write_tasks, write_tokenizer
from lm_eval.models.huggingface import HFLM
from tiny import language_model, params_of

from latentjax.interop import writing
from latentjax.interop.exported_config import config_from_specs, is_vanilla
from latentjax.interop.harness import Tasks
from latentjax.interop.harness_text import TransformersText
from latentjax.interop.lm_eval_adapter import LatentjaxLM
from latentjax.opening import open_model
from latentjax.training.progress import counting
from latentjax.training.scoring import Refinement, Scorer

ROUNDS = 2  # R, of both sides


def write_folder(directory: Path, num_latent_thoughts: int, architecture: str, begins: bool = False) -> Path:
    """A model of two layers as a Hugging Face folder with a tokenizer."""
    model = language_model(
        num_latent_thoughts,
        architecture,
        method="latent" if num_latent_thoughts else "vanilla",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=64,
    )
    write_tokenizer(directory, begins=begins)
    writing.write_weights(directory, params_of(model), model.spec, "float32", 10**9)
    config = config_from_specs(model.spec, model.recurrence_spec, "float32", 0)
    writing.write_configs(directory, config | ({"bos_token_id": 1} if begins else {}))
    if not is_vanilla(model.recurrence_spec):
        writing.write_code(directory)
    return directory


def ours(folder: Path, batch_tokens: int = 512) -> LatentjaxLM:
    """The adapter of a folder's model."""
    opened = open_model(folder)
    scorer = Scorer(opened.model, opened.params, opened.mesh, refinement=Refinement(ROUNDS), batch_tokens=batch_tokens)
    return LatentjaxLM(scorer, TransformersText(folder), lambda label, total: counting(label, total, shows=False))


def theirs(folder: Path) -> HFLM:
    """The harness's own model."""
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, trust_remote_code=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    return Tasks(list(TASKS), str(write_tasks(tmp_path_factory.mktemp("tasks"))))


def run(model: Any, tasks: Tasks, num_fewshot: int) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=model, tasks=list(tasks.names), num_fewshot=num_fewshot, task_manager=tasks, bootstrap_iters=0
    )


@pytest.mark.parametrize(
    ("num_latent_thoughts", "architecture", "begins", "num_fewshot"),
    [(0, "gpt_neox", False, 0), (0, "llama", True, 2), (1, "gpt_neox", False, 2), (2, "llama", True, 0)],
)
def test_numbers_are_those_of_the_hf_model(
    tmp_path: Path, tasks: Tasks, num_latent_thoughts: int, architecture: str, begins: bool, num_fewshot: int
):
    folder = write_folder(tmp_path / "model", num_latent_thoughts, architecture, begins)
    results = [run(model, tasks, num_fewshot) for model in (ours(folder), theirs(folder))]
    for name in TASKS:
        samples, expected = (found["samples"][name] for found in results)
        assert len(samples) == len(expected) == 6
        for one, other in zip(samples, expected, strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "local_generate":
                assert one["resps"] == other["resps"]
                continue
            one_resps, other_resps = (np.ravel(np.array(each["resps"], np.float64)) for each in (one, other))
            # Each log-likelihood, and behind it whether the continuation is greedy.
            np.testing.assert_allclose(one_resps, other_resps, rtol=0, atol=1e-4)
        metrics, expected = (
            {key: value for key, value in found["results"][name].items() if not isinstance(value, str)}
            for found in results
        )
        assert metrics.keys() == expected.keys()
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, key)
    assert any(text for sample in results[0]["samples"]["local_generate"] for text in sample["resps"][0])
