"""Generation: the reference's tokens; prompts at once, in batches, in stacked layers or separate ones, all the same."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.interop.pretrained import load_pretrained
from latentjax.recurrence import decoding
from latentjax.recurrence.choosing import Choice
from latentjax.recurrence.language_model import LanguageModel

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
VOCAB = 29
GREEDY = Choice.of(0.0, VOCAB)
NO_END = np.array([-1], np.int32)
# (method, C, architecture): the last has fewer heads of keys than of queries.
METHODS = [("latent", 1, "gpt_neox"), ("latent", 2, "llama"), ("pause", 1, "llama"), ("loop", 2, "gpt_neox")]
METHODS += [("ponder", 1, "gpt_neox"), ("vanilla", 0, "llama"), ("latent", 1, "gpt2")]
each_method = pytest.mark.parametrize(("method", "num_thoughts", "architecture"), METHODS)
LENGTHS = [7, 2, 5]


@functools.cache
def forms(model: LanguageModel) -> dict[bool, tuple[LanguageModel, Any]]:
    """{separates: (model, params)}."""
    params = params_of(model)
    return {
        False: (decoding.decoding_model(model, separates=False), params),
        True: (decoding.decoding_model(model, separates=True), decoding.separated(model, params)),
    }


def prompts_of(lengths: list[int], num_tokens: int, seed: int = 0) -> decoding.Prompts:
    ids = [row[:length].tolist() for row, length in zip(tokens(len(lengths), max(lengths)), lengths, strict=True)]
    return decoding.pad_prompts(ids, [decoding.row_key(seed, each, 0) for each in ids], num_tokens)


@functools.partial(jax.jit, static_argnames=("model", "token_by_token", "capacity"))
def prefill(model, params, prompts, tolerance, *, token_by_token=False, capacity=12):
    """Logits behind the prompts, and what came of them."""
    num_tokens = prompts.tokens_BT.shape[1]
    positions_BT = jnp.arange(num_tokens)[None] - (num_tokens - prompts.lengths_B[:, None])
    return model.apply(
        {"params": params},
        prompts.tokens_BT,
        jnp.maximum(positions_BT, 0),
        (positions_BT >= 0).astype(jnp.int32),
        model.apply({}, len(prompts.lengths_B), capacity, method="empty_cache"),
        tolerance=tolerance,
        token_by_token=token_by_token,
        method="prefill",
    )


def written(model: LanguageModel, cache, length: int, num_tokens: int) -> list[np.ndarray]:
    """Keys and values of the last `length` of so many tokens, without a batch's padding."""
    slots = model.apply({}, num_tokens, method="cache_slots")
    first = slots - model.apply({}, length, method="cache_slots")
    return [np.asarray(leaf)[..., first:slots, :] for leaf in jax.tree.leaves((cache.keys_NBGLK, cache.values_NBGLK))]


@pytest.mark.parametrize(
    ("method", "num_thoughts", "architecture", "separates"),
    [(*each, True) for each in METHODS] + [("latent", 1, "gpt_neox", False), ("loop", 2, "gpt_neox", False)],
)
def test_a_prompt_at_once_equals_token_by_token(method, num_thoughts, architecture, separates):
    """Logits, keys and values, of prompts of different lengths; slots that padding takes aside."""
    model, params = forms(language_model(num_thoughts, architecture, method=method))[separates]
    prompts = prompts_of(LENGTHS, 8)
    logits_BV, at_once = prefill(model, params, prompts, 0.0)
    expected_BV, one_by_one = prefill(model, params, prompts, 0.0, token_by_token=True)
    np.testing.assert_allclose(logits_BV, expected_BV, rtol=0, atol=1e-5)
    assert at_once.cache.length == one_by_one.cache.length == model.apply({}, 8, method="cache_slots")
    np.testing.assert_array_equal(at_once.cache.segment_ids_BL, one_by_one.cache.segment_ids_BL)
    for row, length in enumerate(LENGTHS):
        pairs = zip(written(model, at_once.cache, length, 8), written(model, one_by_one.cache, length, 8), strict=True)
        for mine, expected in pairs:
            np.testing.assert_allclose(mine[..., row, :, :, :], expected[..., row, :, :, :], rtol=0, atol=2e-5)


@each_method
def test_separate_layers_are_the_same_model(method, num_thoughts, architecture):
    """The plain forward of either form, and greedy continuations."""
    (stacked, params), (separate, separate_params) = forms(
        language_model(num_thoughts, architecture, method=method)
    ).values()
    logits_BTV = jax.jit(stacked.apply)({"params": params}, tokens(2, 6))
    separate_BTV = jax.jit(separate.apply)({"params": separate_params}, tokens(2, 6))
    np.testing.assert_allclose(separate_BTV, logits_BTV, rtol=0, atol=1e-5)
    together, count = continued(stacked, params, prompts_of(LENGTHS, 8))
    assert count == 4
    np.testing.assert_array_equal(continued(separate, separate_params, prompts_of(LENGTHS, 8))[0], together)


def continued(model, params, prompts, *, choice=GREEDY, end_ids=NO_END, num_tokens=4) -> tuple[np.ndarray, int]:
    ids, count = decoding.continue_prompts(model, params, prompts, choice, end_ids, num_tokens=num_tokens)
    return np.asarray(ids), int(count)


@each_method
def test_prompts_of_different_lengths_equal_each_alone(method, num_thoughts, architecture):
    """Token for token, and logits."""
    model, params = forms(language_model(num_thoughts, architecture, method=method))[True]
    logits_BV, _ = prefill(model, params, prompts_of(LENGTHS, 8), 0.0)
    together, _ = continued(model, params, prompts_of(LENGTHS, 8))
    for row, length in enumerate(LENGTHS):
        ids = tokens(len(LENGTHS), max(LENGTHS))[row, :length].tolist()
        alone = decoding.pad_prompts([ids], [decoding.row_key(0, ids, 0)], 8)
        np.testing.assert_allclose(prefill(model, params, alone, 0.0)[0][0], logits_BV[row], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(continued(model, params, alone)[0][0], together[row])


@pytest.mark.parametrize("case", ["gpt_neox-latent-c1-r3", "llama-latent-c1-r3", "gpt_neox-latent-c2-r2"])
def test_greedy_continuation_is_the_references(case):
    """Eight tokens after a prompt of four: prefill, chunks of unequal size, and a cache that grows in between."""
    model, params = load_pretrained(CASES / case)
    with np.load(CASES / case / "expected.npz") as arrays:
        expected = arrays["greedy_ids"]
    params, model = decoding.separated(model, params), decoding.decoding_model(model, separates=True)
    ids = [row.tolist() for row in expected[:, :4]]
    prompts = decoding.pad_prompts(ids, [decoding.row_key(0, each, 0) for each in ids], 6)
    choice = Choice.of(0.0, model.spec.vocab_size)
    state, _, _ = decoding.start(model, params, prompts, choice, NO_END, 0.0, capacity=9)
    got = [np.asarray(state.token_B)[:, None]]
    for limit in (3, 4):  # of which the first fills the cache
        state, more_Bn, count = decoding.extend(model, params, state, choice, NO_END, limit, num_tokens=5)
        assert count == limit
        got.append(np.asarray(more_Bn)[:, :limit])
        state = decoding.grow(model, state, 16)
    np.testing.assert_array_equal(np.concatenate([expected[:, :4], *got], axis=1), expected)


def test_prefill_to_a_tolerance_meets_it():
    """Fewer passes than exactly, thoughts within the tolerance, logits near by; at most C T passes."""
    model, params = forms(language_model(2))[False]
    prompts = prompts_of([30, 22], 32)
    exact_BV, exact = prefill(model, params, prompts, 0.0, capacity=32)
    passes = {}
    for tolerance in (0.1, 1e-3, 1e-6):
        logits_BV, found = prefill(model, params, prompts, tolerance, capacity=32)
        passes[tolerance] = int(found.num_passes)
        assert np.all(found.residual_B <= tolerance)
        np.testing.assert_allclose(logits_BV, exact_BV, rtol=0, atol=10 * tolerance + 1e-5)
    assert 0 < passes[0.1] < passes[1e-3] < passes[1e-6] < exact.num_passes <= 2 * 32
    # One pass less would not have met it: the residual is that of the last pass, not a bound.
    _, early = prefill(model, params, prompts, 0.1, capacity=32)
    assert np.max(early.residual_B) > 1e-3


def test_a_text_ends_at_its_end_id():
    """Rows that have finished no longer keep the batch going; all tokens up to the last row's end are there."""
    model, params = forms(language_model(1))[True]
    prompts = prompts_of(LENGTHS, 8)
    whole, _ = continued(model, params, prompts, num_tokens=12)
    ends = [int(row[place]) for row, place in zip(whole, (2, 0, 4), strict=True)]
    first = [min(row.tolist().index(end) for end in ends if end in row) for row in whole]
    got, count = continued(model, params, prompts, end_ids=np.array(ends, np.int32), num_tokens=12)
    assert count == max(first) + 1 < 12
    for mine, expected, place in zip(got, whole, first, strict=True):
        np.testing.assert_array_equal(mine[: place + 1], expected[: place + 1])


def test_draws_depend_on_the_row_alone():
    """On seed, prompt and sample; not on its place, nor on what stands beside it."""
    model, params = forms(language_model(1))[True]
    choice = Choice.of(1.0, VOCAB)
    ids = tokens(1, 5)[0].tolist()

    def drawn(rows: list[tuple[int, list[int], int]]) -> np.ndarray:
        keys = [decoding.row_key(seed, prompt, sample) for seed, prompt, sample in rows]
        prompts = decoding.pad_prompts([prompt for _, prompt, _ in rows], keys, 8)
        return continued(model, params, prompts, choice=choice, num_tokens=12)[0]

    alone = drawn([(3, ids, 0), (3, ids, 1), (4, ids, 0)])
    beside = drawn([(0, ids[:2], 0), (3, ids, 0), (3, ids, 1)])
    np.testing.assert_array_equal(beside[1:], alone[:2])
    assert len({tuple(row) for row in alone}) == 3


def test_draws_have_the_models_distribution():
    """The first token of many samples, against the probabilities of the exact forward."""
    model, params = forms(language_model(1))[True]
    ids = tokens(1, 3)[0].tolist()
    prompts = decoding.pad_prompts([ids] * 600, [decoding.row_key(0, ids, sample) for sample in range(600)], 4)
    drawn, _ = continued(model, params, prompts, choice=Choice.of(0.7, VOCAB), num_tokens=1)
    logits_V, _ = prefill(model, params, dataclasses.replace(prompts_of([3], 3)), 0.0)
    expected = np.asarray(jax.nn.softmax(logits_V[0] / 0.7))
    observed = np.bincount(drawn[:, 0], minlength=VOCAB)
    # Pearson's statistic has 28 degrees of freedom: beyond 60 once in three thousand seeds, and the seed is fixed.
    assert np.sum((observed - 600 * expected) ** 2 / (600 * expected)) < 60


def test_the_cache_is_written_in_place():
    """No array of the cache is copied in a step: XLA would do so to write it in several places."""
    model, params = forms(language_model(1))[True]
    prompts = prompts_of(LENGTHS, 8)
    state, _, _ = decoding.start(model, params, prompts, GREEDY, NO_END, 0.0, capacity=16)
    shape = ",".join(map(str, state.cache.keys_NBGLK[0].shape))
    text = decoding.extend.lower(model, params, state, GREEDY, NO_END, 4, num_tokens=4).compile().as_text()
    assert f"[{shape}]" in text
    assert not [line for line in text.splitlines() if f"[{shape}]" in line.split(" copy(")[0] and " copy(" in line]
