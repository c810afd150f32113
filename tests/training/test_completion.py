"""Batches of prompts, when a text is over, and how much of it is handed out; greedy ids against all logits at once."""

from collections.abc import Callable, Sequence
from itertools import chain

import jax
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.config import default
from latentjax.errors import UserError
from latentjax.training import completion
from latentjax.training.completion import Completer, Sampling
from latentjax.training.mesh import arrange_mesh

MODEL = language_model(1, max_position_embeddings=128)
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in (3, 20, 7, 16)]
NEW, AT_ONCE = 8, 4  # the sizes of all tests but one: they share programs
GREEDY = Sampling()


def completer(end_ids: Sequence[int] = (-1,), num_ids: int = 29) -> Completer:
    sizes = default().mesh
    sizes.data = 1
    mesh = arrange_mesh(sizes, jax.devices()[:1])
    return Completer(MODEL, params_of(MODEL), mesh, num_ids=num_ids, end_ids=end_ids)


@pytest.fixture(scope="module")
def complete() -> Callable[..., list[list[int]]]:
    """Continues the prompts with a model in which no token ends a text."""
    endless = completer()

    def run(sampling: Sampling = GREEDY, prompts: Sequence[Sequence[int]] = PROMPTS, **settings) -> list[list[int]]:
        return endless.complete(prompts, NEW, sampling, tokens_at_once=AT_ONCE, **settings)

    return run


@pytest.fixture(scope="module")
def greedy(complete) -> list[list[int]]:
    return complete()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of the batches that are begun."""
    shapes, start = [], completion.start

    def noted(model, params, prompts, *others):
        shapes.append(prompts.tokens_BT.shape)
        return start(model, params, prompts, *others)

    monkeypatch.setattr(completion, "start", noted)
    return shapes


def test_each_prompt_goes_on_with_the_likeliest_token(greedy):
    """Of logits that are computed for whole texts at once, with as many passes as make them exact."""
    texts = [prompt + ids for prompt, ids in zip(PROMPTS, greedy, strict=True)]
    tokens_BT = np.zeros((len(texts), 28), np.int32)
    for row, text in zip(tokens_BT, texts, strict=True):
        row[: len(text)] = text
    apply = jax.jit(lambda params, tokens_BT: MODEL.apply({"params": params}, tokens_BT, num_jacobi_iterations=28))
    likeliest_BT = np.asarray(apply(params_of(MODEL), tokens_BT)).argmax(axis=-1)
    for prompt, ids, likeliest_T in zip(PROMPTS, greedy, likeliest_BT, strict=True):
        assert len(ids) == NEW
        assert ids == likeliest_T[len(prompt) - 1 : len(prompt) - 1 + NEW].tolist()


def test_the_longest_come_first_and_batches_are_small_enough(complete, greedy, started):
    """32 + 8 tokens a row for the two longest, 16 + 8 for the others; results stay in the order of the prompts."""
    done: list[int] = []
    assert complete(batch_tokens=80, done=done.append) == greedy
    assert started == [(2, 32), (2, 16)] and done == [2, 2]
    started.clear(), done.clear()
    assert (
        complete(batch_tokens=1, prompts=PROMPTS[:1], done=done.append) == greedy[:1]
    )  # too few, but one row there is
    assert started == [(1, 16)] and done == [1]


def test_a_text_ends_before_a_token_that_ends_it(greedy):
    """Where any of several stands for the end, and without touching the other texts."""
    ends = (greedy[1][3], 28)
    seen: dict[int, list[int]] = {index: [] for index in range(len(PROMPTS))}

    def watch(index: int, ids: list[int]) -> bool:
        seen[index] += ids
        return False

    found = completer(ends).complete(PROMPTS, NEW, GREEDY, watch=watch, tokens_at_once=AT_ONCE)
    assert found == [_until(ids, ends) for ids in greedy]
    assert len(found[1]) <= 3 and any(len(ids) > 3 for ids in found)
    assert seen == dict(enumerate(found))


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((place for place, each in enumerate(ids) if each in ends), None)]


def test_whoever_watches_says_when_a_text_is_over(complete, greedy):
    """At the end of a piece: the first token by itself, then four at a time."""
    pieces: dict[int, list[list[int]]] = {index: [] for index in range(len(PROMPTS))}

    def watch(index: int, ids: list[int]) -> bool:
        pieces[index].append(ids)
        return index == 2 and sum(map(len, pieces[index])) >= 3

    found = complete(watch=watch)
    assert found == [*greedy[:2], greedy[2][:5], greedy[3]]
    assert [[len(piece) for piece in pieces[index]] for index in range(4)] == [[1, 4, 3], [1, 4, 3], [1, 4], [1, 4, 3]]
    assert [list(chain.from_iterable(pieces[index])) for index in range(4)] == found
    assert complete(watch=lambda index, ids: True) == [ids[:1] for ids in greedy]


def test_a_cache_grows_with_its_text(monkeypatch: pytest.MonkeyPatch):
    """From room for 96 tokens to all 116, and nothing of the text depends on it."""
    grown, grow = [], completion.grow
    monkeypatch.setattr(completion, "grow", lambda model, state, size: grown.append(size) or grow(model, state, size))
    growing = completer().complete(PROMPTS[:1], 100, GREEDY)
    assert grown == [116] and len(growing[0]) == 100
    monkeypatch.setattr(completion, "_SMALLEST_GROWTH", 1000)
    assert completer().complete(PROMPTS[:1], 100, GREEDY) == growing and len(grown) == 1


def test_draws_depend_on_the_seed_the_prompt_and_the_number_of_the_sample(complete, greedy):
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    sampling = Sampling(temperature=2.0, top_k=5, seed=1)
    drawn = complete(sampling, twice, samples=[0, 1, 0, 1])
    assert len({tuple(ids) for ids in drawn}) == 4
    assert complete(sampling, twice, samples=[1, 0, 1, 0]) == [drawn[1], drawn[0], drawn[3], drawn[2]]
    assert complete(sampling, twice) == [drawn[0], drawn[0], drawn[2], drawn[2]]
    assert complete(Sampling(temperature=2.0, top_k=5, seed=2), twice, samples=[0, 1, 0, 1]) != drawn
    # Of the likeliest alone, or of as few as have next to no mass, nothing is left to chance.
    assert complete(Sampling(temperature=2.0, top_k=1, seed=1)) == greedy
    assert complete(Sampling(temperature=2.0, top_p=1e-6, seed=1)) == greedy


def test_ids_that_the_tokenizer_has_not_are_never_chosen(greedy):
    most = max(map(max, greedy))
    found = completer(num_ids=most).complete(PROMPTS, NEW, GREEDY, tokens_at_once=AT_ONCE)
    assert max(map(max, found)) < most
    for ids, before in zip(found, greedy, strict=True):
        same = next((place for place, each in enumerate(before) if each == most), NEW)
        assert ids[:same] == before[:same]


def test_nothing_may_be_asked_for(complete, started):
    assert completer().complete(PROMPTS, 0, GREEDY) == [[]] * 4 and complete(prompts=[]) == []
    assert started == []


@pytest.mark.parametrize(
    ("sampling", "prompts", "parts"),
    [
        (GREEDY, [[1], []], ["empty"]),
        (GREEDY, [[1] * 121], ["121", "8 new ones", "128 positions"]),
        (Sampling(temperature=-1.0), [[1]], ["temperature", "-1.0"]),
        (Sampling(temperature=float("nan")), [[1]], ["temperature", "nan"]),
        (Sampling(top_k=-1), [[1]], ["top_k"]),
        (Sampling(top_p=0.0), [[1]], ["top_p"]),
        (Sampling(seed=2**32), [[1]], ["seed"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_computed(complete, started, sampling, prompts, parts):
    with pytest.raises(UserError) as error:
        complete(sampling, prompts)
    assert all(part in str(error.value) for part in parts) and started == []
