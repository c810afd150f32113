"""Batches: a pure function of the step, the same for any hosts, threads, processes and restarts."""

from itertools import islice

import numpy as np
import pytest
from rows import ArrayRow

from latentjax.config import default
from latentjax.data.batches import eval_batches, train_batches
from latentjax.data.windows import Windows, document_layout
from latentjax.errors import UserError

T, B, EOD = 24, 8, 0


def row_of(num_tokens, seed=0, **details):
    """Documents of 20 tokens on average, told apart from those of other seeds by their tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 1000, num_tokens) + 1000 * seed
    return ArrayRow(np.where(rng.random(num_tokens) < 0.05, EOD, tokens), **details)


@pytest.fixture
def row():
    return row_of(1500)


@pytest.fixture
def mixture(row):
    return [(row, 0.6), (row_of(400, 1), 0.3), (row_of(7 * (T + 1), 2, sequence_tokens=T + 1), 0.1)]


@pytest.fixture
def data():
    data = default().data
    data.sequence_length, data.batch_size, data.mask_documents, data.seed = T, B, True, 3
    return data


def rows_of_host(data, host_index, num_hosts):
    share = data.batch_size // num_hosts
    return np.arange(host_index * share, (host_index + 1) * share)


def train(mixture, data, count, start_step=0, host_index=0, num_hosts=1):
    rows = rows_of_host(data, host_index, num_hosts)
    batches = train_batches(mixture, data, eod_id=EOD, start_step=start_step, rows=rows)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)
        assert left[key].dtype == right[key].dtype


def windows_of(row):
    windows = Windows(row, T)
    return windows.read(np.arange(len(windows)))


def test_every_window_comes_once_per_epoch_in_another_order(row, data):
    windows = windows_of(row)
    count = len(windows)
    rows = joined(train([(row, 1.0)], data, -(-3 * count // B)))["tokens"]
    epochs = [rows[start : start + count].tolist() for start in range(0, 3 * count, count)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(windows.tolist())
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and epochs[0] != windows.tolist()
    data.seed = 4
    assert not np.array_equal(joined(train([(row, 1.0)], data, 2))["tokens"], rows[: 2 * B])


def test_without_shuffling_batches_follow_each_other(data):
    """As Pythia was trained: batch i is sequences i B to (i+1) B of its packed data."""
    row = row_of(100 * (T + 1), sequence_tokens=T + 1)
    data.shuffle = False
    sequences = row.tokens.reshape(100, T + 1)
    for step, batch in enumerate(train([(row, 1.0)], data, 30, start_step=2), start=2):
        np.testing.assert_array_equal(batch["tokens"], sequences[np.arange(step * B, (step + 1) * B) % 100])


def test_a_mixture_keeps_its_shares_and_goes_through_each_component(mixture, data):
    """To a window in every ten, all windows of a component once before any of them again."""
    rows = joined(train(mixture, data, 100))["tokens"]
    component = rows.max(axis=1) // 1000
    for tenth in component.reshape(-1, 10):
        np.testing.assert_array_equal(np.bincount(tenth, minlength=3), [6, 3, 1])
    for number, (row, _) in enumerate(mixture):
        windows = sorted(windows_of(row).tolist())
        epoch = rows[component == number][: len(windows)].tolist()
        assert sorted(epoch) == windows
    # One component alone is read as without a mixture.
    alone = joined(train(mixture[:1], data, 30))["tokens"]
    np.testing.assert_array_equal(rows[component == 0][:200], alone[:200])


def test_batches_have_the_promised_shapes(mixture, data):
    (batch,) = train(mixture, data, 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((B, T + 1), "int32"),
        "loss_weights": ((B, T), "float32"),
        "segment_ids": ((B, T), "int32"),
        "positions": ((B, T), "int32"),
    }
    layout = document_layout(batch["tokens"], EOD)
    for key, expected in zip(("segment_ids", "positions", "loss_weights"), layout, strict=True):
        np.testing.assert_array_equal(batch[key], expected)
    data.mask_documents = False
    (plain,) = train(mixture, data, 1)
    assert plain.keys() == {"tokens", "loss_weights"}
    np.testing.assert_array_equal(plain["tokens"], batch["tokens"])
    assert (plain["loss_weights"] == 1).all() and plain["loss_weights"].shape == (B, T)


@pytest.mark.parametrize("num_hosts", [1, 2, 8])
@pytest.mark.parametrize("prefetch", [0, 1, 9])
def test_hosts_threads_and_restarts_see_the_same_batches(mixture, data, num_hosts, prefetch):
    reference = train(mixture, data, 60)  # more than an epoch of each
    data.prefetch_batches = prefetch
    for start in (0, 1, 37):
        hosts = [train(mixture, data, 20, start, host, num_hosts) for host in range(num_hosts)]
        for step, parts in enumerate(zip(*hosts, strict=True), start=start):
            assert_same(joined(parts), reference[step])


@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 0), (2, 5)])
def test_processes_read_the_same_batches(mixture, data, num_workers, prefetch):
    reference = train(mixture, data, 12, start_step=5)
    data.num_workers, data.prefetch_batches = num_workers, prefetch
    for batch, expected in zip(train(mixture, data, 12, start_step=5), reference, strict=True):
        assert_same(batch, expected)
    second = train(mixture, data, 3, start_step=7, host_index=1, num_hosts=2)
    for batch, expected in zip(second, reference[2:], strict=False):
        assert_same(batch, {key: value[B // 2 :] for key, value in expected.items()})


def test_any_step_is_as_near_as_the_first_and_reads_only_its_rows(data):
    reads = []

    class CountingRow(ArrayRow):
        def read_windows(self, starts, length):
            reads.extend(starts)
            return super().read_windows(starts, length)

    row = CountingRow(np.arange(10_000))
    data.prefetch_batches = 0
    train([(row, 1.0)], data, 5, start_step=10**9, host_index=1, num_hosts=4)
    assert len(reads) == 5 * B / 4
    stream = 10**9 * B + 2  # the place of the first row that the second of four hosts reads
    earlier = train([(row, 1.0)], data, 1, start_step=10**9 - 3)[0]["tokens"]
    assert len(set(earlier[:, 0].tolist())) == B and stream % B == 2


def test_rows_need_not_be_neighbours(mixture, data):
    """As where the mesh deals a process's devices rows from all over the batch."""
    rows = np.array([1, 2, 5])
    batches = train_batches(mixture, data, eod_id=EOD, start_step=3, rows=rows)
    (whole,) = train(mixture, data, 1, start_step=3)
    assert_same(next(batches), {key: value[rows] for key, value in whole.items()})
    batches.close()


def test_what_is_wrong_with_the_rows_is_said_before_anything_is_read(row, data):
    short = ArrayRow(np.arange(T), "the train split of stores/short")
    with pytest.raises(UserError, match="the train split of stores/short has 24 tokens"):
        train_batches([(row, 1.0), (short, 1.0)], data, eod_id=EOD, start_step=0)
    with pytest.raises(UserError, match="has 24 tokens"):
        eval_batches(short, data, 1, eod_id=EOD, bytes_per_id=np.ones(1000))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_told_when_its_batch_is_due(data, num_workers):
    """As the error that reading raised, in whichever process it was; the batches before it are given out."""
    tokens = np.arange(100 * (T + 1))
    row = ArrayRow(tokens, "the train split of stores/x", sequence_tokens=T + 1, bad=(T + 1) * 3 * B + 5)
    data.shuffle, data.num_workers = False, num_workers
    batches = train_batches([(row, 1.0)], data, eod_id=-1, start_step=0)
    np.testing.assert_array_equal(np.concatenate([next(batches)["tokens"] for _ in range(3)]).ravel(), tokens[:600])
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == "the train split of stores/x is damaged"  # Grain adds a note, which no user sees
    batches.close()


def evaluated(row, data, num_batches, bytes_per_id, host_index=0, num_hosts=1):
    rows = rows_of_host(data, host_index, num_hosts)
    return list(eval_batches(row, data, num_batches, eod_id=EOD, bytes_per_id=bytes_per_id, rows=rows))


@pytest.fixture
def bytes_per_id():
    """The end of a document stands for no text."""
    return np.where(np.arange(1000) == EOD, 0, np.arange(1000) % 7 + 1).astype(np.int32)


def test_evaluation_windows_are_spread_evenly_and_fixed(row, data, bytes_per_id):
    windows = windows_of(row)
    assert len(windows) > 2 * B
    batches = evaluated(row, data, 2, bytes_per_id)
    chosen = [place * len(windows) // (2 * B) for place in range(2 * B)]
    np.testing.assert_array_equal(joined(batches)["tokens"], windows[chosen])
    data.seed, data.shuffle, data.prefetch_batches = 99, False, 0
    for left, right in zip(batches, evaluated(row, data, 2, bytes_per_id), strict=True):
        assert_same(left, right)
    halves = [evaluated(row, data, 2, bytes_per_id, host, 2) for host in (0, 1)]
    for batch, *parts in zip(batches, *halves, strict=True):
        assert_same(batch, joined(parts))


def test_windows_of_any_number_are_the_same_in_batches_of_any_size(row, data, bytes_per_id):
    windows, wanted = windows_of(row), B + 1
    data.mask_documents = False
    chosen = windows[[place * len(windows) // wanted for place in range(wanted)]]
    for size in (B, 2 * B):
        data.batch_size = size
        batches = eval_batches(row, data, 2, eod_id=EOD, bytes_per_id=bytes_per_id, num_windows=wanted)
        whole = joined(list(batches))
        assert len(whole["tokens"]) == 2 * B
        np.testing.assert_array_equal(whole["tokens"][:wanted], chosen)
        assert (whole["loss_weights"][:wanted] == 1).all() and (whole["loss_weights"][wanted:] == 0).all()


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("num_hosts", [1, 4])
def test_a_short_row_is_used_whole_and_padded_with_weight_0(row, data, bytes_per_id, mask_documents, num_hosts):
    data.mask_documents = mask_documents
    windows = windows_of(row)
    data.batch_size = size = next(size for size in (8, 12, 20) if len(windows) % size)
    hosts = [evaluated(row, data, 1000, bytes_per_id, host, num_hosts) for host in range(num_hosts)]
    batches = [joined(parts) for parts in zip(*hosts, strict=True)]
    assert len(batches) == -(-len(windows) // size)
    assert all(batch["tokens"].shape == (size, T + 1) for batch in batches)
    whole = joined(batches)
    padding = len(whole["tokens"]) - len(windows)
    assert padding > 0
    np.testing.assert_array_equal(whole["tokens"][: len(windows)], windows)
    assert (whole["loss_weights"][-padding:] == 0).all() and (whole["target_bytes"][-padding:] == 0).all()
    assert whole["target_bytes"].dtype == np.int32 and whole["loss_weights"].dtype == np.float32
    # Bytes are of the text predicted: the whole row but its first token, its incomplete last window and, where
    # documents are kept apart, the first token of each.
    tokens = row.tokens[: len(windows) * T + 1]
    counted = bytes_per_id[tokens[1:]] * (tokens[:-1] != EOD if mask_documents else 1)
    assert whole["target_bytes"].sum() == counted.sum()
