"""Pondering, loops and pauses on a mesh that splits rows, parameters, slots and the vocabulary."""

import jax
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.config import default
from latentjax.training.mesh import make_mesh, put_batch
from latentjax.training.programs import sharded_tracing
from latentjax.training.state import abstract_params
from latentjax.training.step import summed_loss


@pytest.mark.parametrize(
    "method", ["ponder", *[pytest.param(each, marks=pytest.mark.long) for each in ("loop", "pause")]]
)
def test_a_mesh_changes_neither_loss_nor_gradients(method: str):
    """Documents kept apart, logits and predictions two tokens at a time."""
    config = default()
    config.mesh.update(data=1, fsdp=2, sequence=2, tensor=2)
    config.model.update(hidden_size=16, num_heads=4, intermediate_size=24, vocab_size=32)
    config.data.update(batch_size=2, sequence_length=6)
    mesh = make_mesh(config, jax.devices())
    model = language_model(2, "llama", method=method, vocab_size=32, ponder_chunk_tokens=2)
    params = params_of(model)
    batch = {
        "tokens": tokens(2, 7),
        "loss_weights": np.ones((2, 6), np.float32),
        "segment_ids": np.array([[1] * 6, [1, 1, 2, 2, 2, 2]], np.int32),
        "positions": np.array([[*range(6)], [0, 1, *range(4)]], np.int32),
    }
    function = jax.value_and_grad(lambda params, batch: summed_loss(model, params, batch, 0, 2)[0])
    expected_loss, expected = jax.jit(function)(params, batch)
    spread = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh)))
    assert not spread["embedding"]["embedding"].sharding.is_fully_replicated
    with sharded_tracing(mesh):
        loss, gradients = jax.jit(function)(spread, put_batch(batch, mesh, np.arange(2), 2))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
