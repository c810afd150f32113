"""Documents packed into a window cost what each costs in a window of its own, thoughts and all."""

import jax
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.data.windows import document_layout
from latentjax.training.step import summed_loss

EOD = 0


def batch_of(tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """A batch with document masks, as `data.windows` makes it."""
    segment_ids, positions, loss_weights = document_layout(tokens_BT, EOD)
    return {"tokens": tokens_BT, "segment_ids": segment_ids, "positions": positions, "loss_weights": loss_weights}


@pytest.mark.parametrize(
    ("architecture", "method", "num_thoughts", "chunk_tokens"),
    [
        ("gpt_neox", "vanilla", 0, 0),
        ("gpt_neox", "latent", 1, 6),
        ("gpt_neox", "latent", 2, 0),
        ("llama", "latent", 1, 0),
    ],
)
def test_packed_documents_cost_what_they_cost_alone(
    architecture: str, method: str, num_thoughts: int, chunk_tokens: int
):
    """The first one cut at its beginning, the last one at its end, one of a single token and one of none."""
    model = language_model(num_thoughts, architecture, method=method)
    compiled = jax.jit(lambda params, batch: summed_loss(model, params, batch, 2, chunk_tokens)[0])

    def loss(batch: dict[str, np.ndarray], weights: np.ndarray) -> float:
        return float(compiled(params_of(model), batch | {"loss_weights": batch["loss_weights"] * weights}))

    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 29, length).tolist(), EOD] for length in (5, 9, 1, 0, 6)]
    documents.append(rng.integers(1, 29, 9).tolist())
    packed = batch_of(np.array([[token for document in documents for token in document]], np.int32))
    assert packed["segment_ids"].max() == len(documents)
    # Each in a row of its own, without masks. What is behind a document is of no concern to it.
    alone = rng.integers(1, 29, (len(documents), packed["tokens"].shape[1])).astype(np.int32)
    counts = np.array([len(document) - 1 for document in documents])  # tokens predicted
    for row, document in zip(alone, documents, strict=True):
        row[: len(document)] = document
    places = np.arange(alone.shape[1] - 1)
    rows = {"tokens": alone, "loss_weights": (places < counts[:, np.newaxis]).astype(np.float32)}

    costs = [loss(rows, (np.arange(len(documents)) == number)[:, np.newaxis]) for number in range(len(documents))]
    for number, (cost, count) in enumerate(zip(costs, counts, strict=True), start=1):
        in_document = packed["segment_ids"] == number
        assert (packed["loss_weights"] * in_document).sum() == count
        np.testing.assert_allclose(loss(packed, in_document), cost, rtol=1e-5, atol=1e-5)
        assert (cost > 1) == (count > 0)
    np.testing.assert_allclose(loss(packed, np.float32(1)), sum(costs), rtol=1e-5)
    # And it is the mask that does it.
    unmasked = {name: packed[name] for name in ("tokens", "loss_weights")}
    assert abs(loss(unmasked, np.float32(1)) - sum(costs)) > 1e-2
