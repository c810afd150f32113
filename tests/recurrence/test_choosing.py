"""Which tokens may be chosen, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.recurrence.choosing import Choice, choose, keep_top

VOCAB = 300


def logits(rows: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, VOCAB)).astype(np.float32) * 3


def expected_top(logits_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """By sorting, in float64."""
    order = np.argsort(-logits_V, kind="stable")[:top_k]
    weights = np.exp(logits_V[order].astype(np.float64) - logits_V.max())
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    return set(order[before < top_p].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (VOCAB, 0.5), (VOCAB, 0.999), (20, 0.6), (VOCAB, 1.0), (VOCAB, 1e-9)]
)
def test_the_likeliest_are_kept(top_k, top_p):
    """What sorting would keep, with its logits unchanged."""
    kept_BV = np.asarray(jax.jit(keep_top)(logits(), jnp.int32(top_k), jnp.float32(top_p)))
    for kept_V, logits_V in zip(kept_BV, logits(), strict=True):
        places = np.flatnonzero(np.isfinite(kept_V))
        assert set(places.tolist()) == expected_top(logits_V, top_k, top_p)
        np.testing.assert_array_equal(kept_V[places], logits_V[places])


def test_equals_are_kept_together():
    """Also negative numbers, zeros of both signs and what may not be chosen are put in their order."""
    logits_BV = np.array([[-1.0, -2.0, -2.0, -3.0, -np.inf], [0.0, 5.0, -1.0, -np.inf, -1.0]], np.float32)
    kept_BV = keep_top(logits_BV, jnp.int32(2), jnp.float32(1))
    np.testing.assert_array_equal(np.isfinite(kept_BV), [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 40, 1.0), (1.5, 0, 0.8), (1.5, 30, 0.9)]
)
def test_draws_have_the_exact_distribution(temperature, top_k, top_p):
    """Frequencies of 20,000 draws, by Pearson's statistic; nothing is drawn that is left out."""
    num_draws, num_ids = 20_000, VOCAB - 10
    logits_V = logits(1)[0]
    keys = jax.random.split(jax.random.key(1), num_draws)
    choice = Choice.of(temperature, num_ids, top_k, top_p)
    draw = jax.jit(
        lambda keys: jax.lax.map(lambda key: choose(jnp.asarray(logits_V)[None], key[None], choice)[0], keys)
    )
    observed = np.bincount(np.asarray(draw(keys)), minlength=VOCAB)
    scaled = logits_V[:num_ids].astype(np.float64) / temperature
    allowed = sorted(expected_top(scaled, top_k or num_ids, top_p))
    weights = np.exp(scaled[allowed] - scaled.max())
    expected = np.zeros(VOCAB)
    expected[allowed] = num_draws * weights / weights.sum()
    assert not observed[expected == 0].any()
    likely = expected >= 5
    rest = (observed[~likely].sum(), expected[~likely].sum())
    statistic = np.sum((observed[likely] - expected[likely]) ** 2 / expected[likely])
    statistic += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    freedom = likely.sum()
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_greedy_takes_the_largest_that_is_a_token():
    """Ids from `num_ids` on are not, however large their logit; the key does not matter."""
    logits_BV = logits()
    logits_BV[:, -1] = 100
    chosen_B = choose(jnp.asarray(logits_BV), jax.random.split(jax.random.key(0), 4), Choice.of(0.0, VOCAB - 1))
    np.testing.assert_array_equal(chosen_B, np.argmax(logits_BV[:, :-1], axis=1))


def test_greedy_takes_the_first_of_equals():
    """As argmax does; and where no number is largest, still a token."""
    logits_BV = np.array([[0.0, 2.0, 2.0, -1.0], [-np.inf, -np.inf, -3.0, -np.inf], [np.nan, 0.0, 0.0, 0.0]])
    chosen_B = choose(jnp.float32(logits_BV), jax.random.split(jax.random.key(0), 3), Choice.of(0.0, 4))
    np.testing.assert_array_equal(chosen_B[:2], [1, 2])
    assert 0 <= chosen_B[2] < 4
