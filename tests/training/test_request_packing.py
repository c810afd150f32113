"""Laying out requests: every target keeps its own past, and rows waste little."""

import numpy as np
import pytest

from latentjax.models.attention import BRANCHES
from latentjax.training.request_packing import filling_id, grow_trees, make_batches, pack_rows, row_length

LENGTH = 64


def random_requests(seed: int, count: int = 40) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets: questions with choices, some alike to the last token, some with nothing in common."""
    rng = np.random.default_rng(seed)
    requests = []
    while len(requests) < count:
        question = rng.integers(0, 9, rng.integers(1, 40)).tolist()
        for _ in range(rng.integers(1, 6)):
            answer = rng.integers(0, 9, rng.integers(1, 9)).tolist()
            requests.append(((question + answer)[:-1], answer))
    return requests


def read_back(batches, num_requests: int):
    """What each request's targets are and what they are conditioned on, read from the arrays alone."""
    found = [[] for _ in range(num_requests)]
    for batch in batches:
        groups, capacity = batch.places_GK.shape
        tokens, positions, segments = (
            array.reshape(groups, capacity) for array in (batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        )
        length = batch.tokens_BT.shape[1]
        for group in range(groups):
            assert len(batch.requests[group]) == batch.counts_G[group]
            for number, request in enumerate(batch.requests[group]):
                place = batch.places_GK[group, number]
                row = slice(place // length * length, place + 1)
                own = segments[group, place]
                seen = (segments[group, row] == own) | (segments[group, row] == own // BRANCHES * BRANCHES)
                assert own < filling_id(length)
                past = tokens[group, row][seen]
                np.testing.assert_array_equal(positions[group, row][seen], np.arange(len(past)))
                found[request].append((past.tolist(), int(batch.targets_GK[group, number])))
    return [sorted(targets, key=lambda target: len(target[0])) for targets in found]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("batch_tokens", "groups"), [(64, 1), (512, 1), (512, 4)])
def test_every_target_has_its_own_past(share: bool, batch_tokens: int, groups: int):
    requests = random_requests(0)
    rows = pack_rows(grow_trees(requests, LENGTH, share=share), 64, together=True)
    batches = list(make_batches(rows, batch_tokens, groups, segmented=True))
    expected = [
        [(inputs[: len(inputs) - len(targets) + place + 1], target) for place, target in enumerate(targets)]
        for inputs, targets in requests
    ]
    assert read_back(batches, len(requests)) == expected
    assert all(batch.tokens_BT.size <= max(batch_tokens, groups * row.length) for batch in batches for row in rows[:1])
    assert len({batch.tokens_BT.shape for batch in batches}) <= len({row.length for row in rows})


def test_segments_never_fall_along_a_row():
    """Which attention backends count on."""
    rows = pack_rows(grow_trees(random_requests(1), LENGTH, share=True), 128, together=True)
    for batch in make_batches(rows, 512, 2, segmented=True):
        assert (np.diff(batch.segment_ids_BT, axis=1) >= 0).all()


def test_what_choices_have_in_common_is_there_once():
    question, answers = list(range(30)), [[40, 41], [42, 43, 44], [45], [46], [40, 47]]
    trees = grow_trees([((question + answer)[:-1], answer) for answer in answers], LENGTH, share=True)
    (tree,) = trees
    assert tree.num_tokens == 30 + 1 + 2 + 0  # two begin with 40, and two are a single token behind the question
    assert tree.num_targets == sum(map(len, answers))
    assert sum(each.num_tokens for each in grow_trees([(question, [1]), (question, [2])], LENGTH, share=False)) == 30


def test_a_short_beginning_does_not_tie_questions_together():
    rng = np.random.default_rng(2)
    requests = [([1, 2, *rng.integers(3, 999, 20).tolist()], [5]) for _ in range(10)]
    assert len(grow_trees(requests, LENGTH, share=True)) == 10


@pytest.mark.parametrize("choices", [3, 500])
def test_a_tree_that_grows_too_large_is_divided(choices: int):
    question = list(range(50))
    requests = [([*question, 100 + number, 7], [7, 8]) for number in range(choices)]
    trees = grow_trees(requests, LENGTH, share=True)
    assert all(tree.num_tokens <= LENGTH and tree.num_targets <= LENGTH for tree in trees)
    assert sum(tree.num_targets for tree in trees) == 2 * choices
    # Single-token answers share all their input, but a row has only so many places for targets.
    single = grow_trees([(question, [number]) for number in range(choices)], LENGTH, share=True)
    assert sum(tree.num_targets for tree in single) == choices
    assert all(tree.num_targets <= LENGTH for tree in single)


def test_rows_are_filled_and_few_lengths():
    requests = random_requests(3, 300)
    trees = grow_trees(requests, LENGTH, share=True)
    rows = pack_rows(trees, 64, together=True)
    assert {row.length for row in rows} <= {64, 128}
    assert sum(row.num_tokens for row in rows) > 0.9 * sum(row.length for row in rows)
    alone = pack_rows(trees, 16, together=False)
    assert len(alone) == len(trees) and all(len(row.trees) == 1 for row in alone)
    assert [row.length for row in alone] == sorted((row.length for row in alone), reverse=True)  # memory trouble first


def test_a_row_has_room_for_its_targets():
    """Short questions with many answers of one token: there are more targets than tokens."""
    requests = [([question, 9, 9], [answer]) for question in range(20) for answer in range(30)]
    rows = pack_rows(grow_trees(requests, LENGTH, share=True), 64, together=True)
    (batch,) = make_batches(rows, 4096, 1, segmented=True)
    assert batch.counts_G.tolist() == [600] and sorted(batch.requests[0]) == list(range(600))
    assert max(row.num_targets for row in rows) <= 64 and len(rows) == 10


def test_row_lengths_are_powers_of_two():
    assert [row_length(count, 1) for count in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert row_length(3, 256) == 256
