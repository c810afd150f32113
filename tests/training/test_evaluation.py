"""Evaluation against sums written out from logits."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.config import default
from latentjax.training.evaluation import evaluate
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import make_mesh
from latentjax.training.step import make_eval_step

MODEL = language_model(1)


@pytest.fixture(scope="module")
def evaluated():
    """What evaluates {name: batches}."""
    config = default()
    config.data.batch_size = 2
    mesh = make_mesh(config, jax.devices()[:1])
    eval_step = jax.jit(make_eval_step(MODEL, num_jacobi_iterations=2, loss_chunk_tokens=0))

    def run(sets: dict[str, list[dict[str, np.ndarray]]], ahead: int = 0) -> dict[str, float]:
        on_devices = {name: put_ahead(given(batches), mesh, ahead) for name, batches in sets.items()}
        return evaluate(eval_step, params_of(MODEL), on_devices)

    return run


def given(batches: list[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    yield from batches


def batches_of(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    """Batches with random weights, which differ from batch to batch in their sum."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": tokens(2, 9, seed=10 * seed + number),
            "loss_weights": rng.integers(0, 2 + number, (2, 8)).clip(0, 1).astype(np.float32),
            "target_bytes": rng.integers(0, 5, (2, 8)).astype(np.int32),
        }
        for number in range(count)
    ]


@jax.jit
def applied(params, inputs):
    """The logits, and the residual of the last pass."""
    residuals = MODEL.apply({"params": params}, inputs, num_jacobi_iterations=2, method="hidden")[1]
    return MODEL.apply({"params": params}, inputs, num_jacobi_iterations=2), residuals[-1]


def written_out(batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The loss, bits per byte and residual of batches, added up token by token."""
    nats = weight = residual = 0.0
    for batch in batches:
        logits, last_residual = applied(params_of(MODEL), batch["tokens"][:, :-1])
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        targets = batch["tokens"][:, 1:]
        for row, t in np.ndindex(2, 8):
            nats -= log_probs[row, t, targets[row, t]] * batch["loss_weights"][row, t]
            weight += batch["loss_weights"][row, t]
        residual += last_residual * batch["loss_weights"].sum()
    text_bytes = sum(batch["target_bytes"].sum() for batch in batches)
    return {
        "eval_loss": nats / weight,
        "eval_bits_per_byte": nats / np.log(2) / text_bytes,
        "thought_residual": residual / weight,
    }


@pytest.mark.parametrize("ahead", [0, 2])
def test_loss_bits_and_residual(evaluated, ahead: int):
    batches = batches_of(0, 3)
    results = evaluated({"heldout": batches}, ahead)
    expected = written_out(batches)
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(results[key], value, rtol=1e-5, err_msg=key)


def test_several_sets_together_and_each(evaluated):
    """Together as if they were one, so that every token counts alike, whichever set it is in."""
    sets = {"web": batches_of(1, 1), "books": batches_of(2, 4)}
    results = evaluated(sets)
    expected = written_out(sets["web"] + sets["books"])
    for name, batches in sets.items():
        own = written_out(batches)
        expected |= {f"{key}/{name}": own[key] for key in ("eval_loss", "eval_bits_per_byte")}
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(results[key], value, rtol=1e-5, err_msg=key)
    assert results["eval_loss/web"] != pytest.approx(results["eval_loss/books"], rel=1e-3)


def test_sums_do_not_depend_on_how_far_ahead_batches_are_put(evaluated):
    sets = {"web": batches_of(1, 3), "books": batches_of(2, 2)}
    assert evaluated(sets, 0) == evaluated(sets, 2)
