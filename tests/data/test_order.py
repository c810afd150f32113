"""The order of windows: permutations, epochs and mixtures, and what nothing may change."""

import itertools

import numpy as np
import pytest

from latentjax.data.order import PERIOD, Order, interleaving, permute


def permutation(length, seed):
    return permute(np.arange(length), np.full(length, length), np.full(length, seed, np.uint64))


@pytest.mark.parametrize("length", [*range(1, 40), 99, 100, 101, 4096, 99_991])
def test_every_seed_is_a_permutation(length):
    for seed in (0, 1, 2**64 - 1):
        np.testing.assert_array_equal(np.sort(permutation(length, seed)), np.arange(length))


def test_lengths_up_to_the_largest():
    """The square root of a length is only nearly right in floating point."""
    lengths = np.array([2**62, 2**62 - 1, 2**53 + 1, (2**31 - 1) ** 2, (2**31 - 1) ** 2 + 1])
    for indices in (np.zeros(5, np.int64), lengths - 1):
        results = permute(indices, lengths, np.arange(5, dtype=np.uint64))
        assert ((results >= 0) & (results < lengths)).all()


def test_all_permutations_are_equally_likely():
    """Chi-square over the 120 permutations of five, and over pairs of places of a thousand; it is 1 on average."""
    seeds = np.random.default_rng(0).integers(0, 2**64, 24_000, np.uint64)
    five = permute(np.tile(np.arange(5), len(seeds)), np.full(5 * len(seeds), 5), np.repeat(seeds, 5)).reshape(-1, 5)
    _, counts = np.unique(five, axis=0, return_counts=True)
    assert len(counts) == 120
    assert ((counts - 200) ** 2 / 200).sum() / 119 < 2.5
    n, seeds = 1000, seeds[:1000]
    thousand = permute(np.tile(np.arange(n), 1000), np.full(n * 1000, n), np.repeat(seeds, n)).reshape(-1, n)
    for left, right in ((np.broadcast_to(np.arange(n), thousand.shape), thousand), (thousand[:, :-1], thousand[:, 1:])):
        cells, *_ = np.histogram2d(left.ravel(), right.ravel(), bins=[25, 25])
        assert ((cells - cells.mean()) ** 2 / cells.mean()).sum() / 25**2 == pytest.approx(1, abs=0.25)


def test_the_order_is_the_same_for_ever():
    """Numbers written down once: a run must read the same text after an upgrade."""
    order = Order([1000, 10], [0.9, 0.1], seed=3, shuffle=True)
    components, indices = order.locate(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10**15]))
    assert components.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert indices.tolist() == [663, 57, 313, 21, 214, 7, 34, 253, 274, 502, 833]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [3, 1], [1, 1, 1], [0.98765, 0.00001, 0.2], [1e300, 1e299]])
def test_shares_are_kept_everywhere(weights):
    """To 1 / PERIOD in a whole period, to less than a window too many at any place of it."""
    pattern, counts = interleaving(weights)
    shares = np.array(weights) / max(weights)
    shares /= shares.sum()
    np.testing.assert_array_equal(np.bincount(pattern), counts)
    assert len(pattern) <= PERIOD + len(weights) and counts.min() >= 1
    assert np.abs(counts / len(pattern) - shares).max() <= 1 / PERIOD
    so_far = np.cumsum(pattern[:, np.newaxis] == np.arange(len(weights)), axis=0)
    ahead = so_far - np.arange(1, len(pattern) + 1)[:, np.newaxis] * counts / len(pattern)
    assert ahead.max() < 1


def test_simple_shares_make_short_periods():
    assert [len(interleaving(weights)[0]) for weights in ([5], [1, 1], [0.7, 0.3], [0.999, 0.001])] == [1, 2, 10, 1000]


@pytest.mark.parametrize("shuffle", [True, False])
def test_components_go_through_epochs_of_their_own(shuffle):
    lengths = [17, 100, 31]
    order = Order(lengths, [0.5, 0.2, 0.3], seed=1, shuffle=shuffle)
    components, indices = order.locate(np.arange(3000))
    for component, length in enumerate(lengths):
        mine = indices[components == component]
        epochs = mine[: len(mine) // length * length].reshape(-1, length)
        assert len(epochs) >= 6 and len(mine) > len(epochs)
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(length), epochs.shape))
        different = {tuple(epoch) for epoch in epochs.tolist()}
        assert len(different) == (len(epochs) if shuffle else 1)
        if not shuffle:
            assert different == {tuple(range(length))}


def test_seeds_epochs_and_components_have_orders_of_their_own():
    """No epoch of a seed is an epoch of another one, or of another component with as many windows."""
    seen = set()
    for seed in range(20):
        components, indices = Order([50, 50], [1, 1], seed=seed, shuffle=True).locate(np.arange(2 * 50 * 5))
        for component in (0, 1):
            seen |= {tuple(epoch) for epoch in indices[components == component].reshape(5, 50).tolist()}
    assert len(seen) == 20 * 2 * 5
    small, large = (Order([9], [1], seed=seed, shuffle=True).locate(np.arange(9))[1] for seed in (1, 2**64 + 1))
    np.testing.assert_array_equal(small, large)  # seeds count modulo 2^64, and no larger one is an error


def test_the_others_in_a_mixture_change_no_order():
    """What a component gives depends on its own place in the mixture alone, not on the others or the weights."""
    orders = [
        Order([40, 30], [1, 1], seed=5, shuffle=True),
        Order([40, 30, 70], [0.6, 0.1, 0.3], seed=5, shuffle=True),
        Order([40, 99], [0.01, 0.99], seed=5, shuffle=True),
        Order([40], [123.0], seed=5, shuffle=True),
    ]
    streams = []
    for order in orders:
        components, indices = order.locate(np.arange(20_000))
        streams.append(indices[components == 0][:200].tolist())
    assert all(stream == streams[0] for stream in streams)


def test_places_are_found_one_by_one_or_together():
    order = Order([1234, 77], [0.7, 0.3], seed=0, shuffle=True)
    for start in (0, 10**6, 10**17):
        together = np.array(order.locate(np.arange(start, start + 50)))
        alone = np.array([order.locate(np.array([place])) for place in range(start, start + 50)])[:, :, 0].T
        np.testing.assert_array_equal(together, alone)
    assert len(set(itertools.chain(*order.locate(np.arange(5)[:0])))) == 0
