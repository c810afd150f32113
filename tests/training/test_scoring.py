"""Log-likelihoods of continuations against logits of each request alone."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.config import default
from latentjax.errors import UserError
from latentjax.recurrence.base import rounding_tolerance
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.mesh import arrange_mesh
from latentjax.training.scoring import Refinement, Scorer

MODEL = language_model(1)
R_IS_2 = Refinement(2)
POSITIONS = MODEL.spec.max_position_embeddings


def make_requests() -> list[tuple[list[int], list[int]]]:
    """Questions with choices, and one that is longer than the model's positions."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(7):
        context = rng.integers(0, 29, rng.integers(1, 50)).tolist()
        requests += [(context, rng.integers(0, 29, rng.integers(1, 6)).tolist()) for _ in range(rng.integers(1, 5))]
    return [*requests, (rng.integers(0, 29, 90).tolist(), rng.integers(0, 29, 7).tolist())]


REQUESTS = make_requests()


def alone(model: LanguageModel, num_jacobi_iterations: int, requests=REQUESTS) -> list[tuple[float, bool]]:
    """Each request in a row of its own, right padded, from all logits in float64."""
    tokens_BT = np.zeros((len(requests), POSITIONS), np.int32)
    cut = [([*context, *continuation])[-POSITIONS - 1 :] for context, continuation in requests]
    for row, ids in zip(tokens_BT, cut, strict=True):
        row[: len(ids) - 1] = ids[:-1]
    apply = jax.jit(partial(model.apply, num_jacobi_iterations=num_jacobi_iterations))
    logits_BTV = np.asarray(apply({"params": params_of(model)}, tokens_BT), np.float64)
    scores = []
    for logits_TV, ids, (_, targets) in zip(logits_BTV, cut, requests, strict=True):
        logits_tV = logits_TV[len(ids) - 1 - len(targets) : len(ids) - 1]
        log_probs_tV = logits_tV - np.log(np.exp(logits_tV).sum(axis=-1, keepdims=True))
        total = log_probs_tV[np.arange(len(targets)), targets].sum()
        scores.append((float(total), bool((logits_tV.argmax(axis=-1) == targets).all())))
    return scores


def mesh_of(**sizes: int):
    config = default().mesh
    config.update({"data": 1} | sizes)
    return arrange_mesh(config, jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])


def scorer(model=MODEL, mesh=None, refinement=R_IS_2, batch_tokens: int = 256) -> Scorer:
    return Scorer(model, params_of(model), mesh or mesh_of(), refinement=refinement, batch_tokens=batch_tokens)


def assert_same(scores, expected, tolerance: float = 1e-5):
    np.testing.assert_allclose([each[0] for each in scores], [each[0] for each in expected], rtol=0, atol=tolerance)
    assert [each[1] for each in scores] == [each[1] for each in expected]


@pytest.fixture(scope="module")
def expected() -> list[tuple[float, bool]]:
    """At R = 2."""
    return alone(MODEL, 2)


@pytest.mark.parametrize("batch_tokens", [1, 128, 4096])
def test_scores_are_those_of_each_request_alone(expected, batch_tokens: int):
    """Whatever the size of batches; and what is asked twice in one call has the same answer twice."""
    assert_same(scorer(batch_tokens=batch_tokens).score([*REQUESTS, REQUESTS[3]]), [*expected, expected[3]])


@pytest.mark.parametrize(
    ("method", "architecture"), [("latent", "gpt2"), ("pause", "llama"), ("loop", "gpt_neox"), ("ponder", "gpt_neox")]
)
def test_every_method_scores_in_shared_rows_as_alone(method: str, architecture: str):
    """Where thoughts, pauses and pondering see no more than they would by themselves; learned positions, too."""
    model = language_model(1, architecture, method=method)
    assert_same(scorer(model).score(REQUESTS[:12]), alone(model, 2, REQUESTS[:12]))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_scores_are_the_same_on_every_mesh(sizes: dict[str, int]):
    model = language_model(1, vocab_size=30, num_heads=2)
    assert_same(scorer(model, mesh_of(**sizes)).score(REQUESTS), alone(model, 2))


def test_a_backend_that_cannot_mask_has_each_request_in_its_row(expected):
    """As cuDNN's: no two share a row. Its place is taken by plain attention, which nothing hides from."""
    one = scorer()
    one._shares = one._masks = False
    one._model = MODEL
    assert_same(one.score(REQUESTS), expected)


def test_exact_is_what_many_passes_give():
    exact = scorer(refinement=Refinement(0, rounding_tolerance("float32"))).score(REQUESTS)
    assert_same(exact, alone(MODEL, 40))
    rough = scorer(refinement=Refinement(0, 0.02)).score(REQUESTS)
    differences = [abs(one[0] - other[0]) for one, other in zip(rough, exact, strict=True)]
    assert 1e-4 < max(differences) < 0.2


def test_greedy_continuations_are_known_as_such():
    """Grown token by token from the model's own choices; and a wrong last token shows."""
    context = [3, 1, 4, 1, 5]
    continuation: list[int] = []
    one = scorer(batch_tokens=64)
    for _ in range(3):
        scores = one.score([([*context, *continuation], [token]) for token in range(29)])
        assert np.exp([score for score, _ in scores]).sum() == pytest.approx(1, abs=1e-5)
        (best,) = [token for token, (_, greedy) in enumerate(scores) if greedy]
        assert best == int(np.argmax([score for score, _ in scores]))
        continuation.append(best)
    wrong = [*continuation[:-1], (continuation[-1] + 1) % 29]
    assert [greedy for _, greedy in one.score([(context, continuation), (context, wrong)])] == [True, False]


def test_few_programs_are_compiled_and_progress_is_told(expected):
    lines, counts = [], []
    one = Scorer(MODEL, params_of(MODEL), mesh_of(), refinement=Refinement(2), batch_tokens=256, note=lines.append)
    for _ in range(2):
        one.score(REQUESTS, counts.append)
    assert len(lines) == 1 and "rows of 64 tokens" in lines[0]
    assert sum(counts) == 2 * sum(len(continuation) for _, continuation in REQUESTS)


def test_parameters_may_be_replaced():
    """As training does between evaluations."""
    one = scorer()
    before = one.score(REQUESTS[:4])
    one.params = params_of(MODEL, seed=1)
    after = one.score(REQUESTS[:4])
    assert abs(before[0][0] - after[0][0]) > 1e-2
    one.params = params_of(MODEL)
    assert one.score(REQUESTS[:4]) == before


@pytest.mark.parametrize("request_", [([1], []), ([], [1]), ([1], [2] * (POSITIONS + 1))])
def test_what_cannot_be_scored_is_the_users_error(request_):
    with pytest.raises(UserError, match="cannot be scored"):
        scorer().score([request_])


def test_logits_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch, expected):
    """With room for few of them at once the numbers are the same."""
    from latentjax.training import scoring

    monkeypatch.setattr(scoring, "_LOGITS_AT_ONCE", 29 * 16)
    one = scorer()
    assert_same(one.score(REQUESTS), expected)
    jaxpr = str(jax.make_jaxpr(one._score_batch)(one.params, _batch(one)))
    assert "f32[1,16,29]" in jaxpr and "f32[1,32,29]" not in jaxpr and "f32[4,64,29]" not in jaxpr


def _batch(one: Scorer) -> dict[str, np.ndarray]:
    rows = {name: np.zeros((4, 64), np.int32) for name in ("tokens", "positions", "segment_ids")}
    return rows | {name: np.zeros((1, 256), np.int32) for name in ("places", "targets")} | {"count": np.int32(3)}


def test_dataclasses_are_hashable():
    assert hash(dataclasses.replace(Refinement(3), tolerance=0.1)) != hash(Refinement(3))
