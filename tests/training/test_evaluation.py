"""Evaluation against sums written out from logits."""

import jax
import numpy as np
from tiny import language_model, params_of, tokens

from latentjax.config import default
from latentjax.training.evaluation import evaluate
from latentjax.training.mesh import make_mesh
from latentjax.training.step import make_eval_step


def test_loss_bits_and_residual():
    model = language_model(1)
    params = params_of(model)
    config = default()
    config.data.batch_size = 2
    mesh = make_mesh(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    batches = [
        {
            "tokens": tokens(2, 9, seed=seed),
            "loss_weights": rng.integers(0, 2, (2, 8)).astype(np.float32),
            "target_bytes": rng.integers(0, 5, (2, 8)).astype(np.int32),
        }
        for seed in range(3)
    ]
    eval_step = jax.jit(make_eval_step(model, num_jacobi_iterations=2, loss_chunk_tokens=0))
    results = evaluate(eval_step, params, batches, mesh)

    nats = weight = 0.0
    for batch in batches:
        logits = model.apply({"params": params}, batch["tokens"][:, :-1], num_jacobi_iterations=2)
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        targets = batch["tokens"][:, 1:]
        for row, t in np.ndindex(2, 8):
            nats -= log_probs[row, t, targets[row, t]] * batch["loss_weights"][row, t]
            weight += batch["loss_weights"][row, t]
    text_bytes = sum(batch["target_bytes"].sum() for batch in batches)
    np.testing.assert_allclose(results["eval_loss"], nats / weight, rtol=1e-5)
    np.testing.assert_allclose(results["eval_bits_per_byte"], nats / np.log(2) / text_bytes, rtol=1e-5)
    residuals = [
        model.apply({"params": params}, batch["tokens"][:, :-1], num_jacobi_iterations=2, method="hidden")[1][-1]
        for batch in batches
    ]
    np.testing.assert_allclose(results["thought_residual"], np.mean(residuals), rtol=1e-5)
