"""Batches: a pure function of the step, the same for any hosts, threads, restarts; every token predicted once."""

import json
from itertools import islice

import numpy as np
import pytest

from latentjax.config import default
from latentjax.data import store_writer
from latentjax.data.progress import Progress
from latentjax.data.resolve import build_store, open_corpus
from latentjax.data.windows import Windows, document_layout, eval_batches, train_batches
from latentjax.errors import UserError

TEXTS = [f"{n}: " + "äbc 日本\n" * (n % 5) for n in range(120)]
T, B = 24, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of TEXTS in bytes, with blocks shorter than a window, and its config."""
    directory = tmp_path_factory.mktemp("windows")
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = default().data
    data.path, data.tokenizer, data.eval_fraction = str(directory / "corpus.jsonl"), "bytes", 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "BLOCK_TOKENS", 16)
        store = build_store(data, open_corpus(data), directory / "store", num_workers=1, progress=Progress(False))
    return store, data


@pytest.fixture
def store(made):
    return made[0]


@pytest.fixture
def data(made):
    data = made[1].copy_and_resolve_references()
    data.sequence_length, data.batch_size, data.mask_documents, data.seed = T, B, True, 3
    return data


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)
        assert left[key].dtype == right[key].dtype


def take(batches, count):
    return list(islice(batches, count))


def test_windows_share_one_token_and_spell_the_split(store):
    split = store.split("train")
    windows = Windows(split, T)
    assert len(windows) == (split.num_tokens - 1) // T
    joined = np.concatenate([windows[0][:1], *(windows[index][1:] for index in range(len(windows)))])
    np.testing.assert_array_equal(joined, split.read(0, len(windows) * T + 1))
    texts = store.tokenizer.decode_bytes(split.read(0, split.num_tokens)).decode()
    assert texts.startswith(store.tokenizer.decode(joined)[:-2])  # the last character may be cut


def test_there_are_as_many_windows_as_fit_whatever_their_length(store):
    split = store.split("eval")
    fits = set()
    for length in range(1, 80):
        windows = Windows(split, length)
        end = len(windows) * length + 1  # behind the last token of the last window
        np.testing.assert_array_equal(windows[len(windows) - 1], split.read(end - length - 1, length + 1))
        assert end <= split.num_tokens < end + length
        fits.add(split.num_tokens - end)
    assert 0 in fits  # a last window that ends with the split


def test_too_few_tokens_for_a_window(store, data):
    split = store.split("eval")
    assert len(Windows(split, split.num_tokens - 1)) == 1
    data.sequence_length = split.num_tokens
    message = f"the eval split of .* has {split.num_tokens} tokens, fewer than one window .* {split.num_tokens + 1}"
    with pytest.raises(UserError, match=message):
        eval_batches(store, data, 1)
    data.sequence_length = 10**6
    with pytest.raises(UserError, match="the train split of"):
        train_batches(store, data, start_step=0)


def test_every_window_comes_once_per_epoch_in_another_order(store, data):
    windows = Windows(store.split("train"), T)
    count = len(windows)
    rows = np.concatenate([batch["tokens"] for batch in take(train_batches(store, data, start_step=0), 3 * count)])
    expected = sorted(windows[index].tolist() for index in range(count))
    epochs = [rows[start : start + count].tolist() for start in range(0, 3 * count, count)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    assert epochs[0] != [windows[index].tolist() for index in range(count)]


def test_the_seed_decides_the_order(store, data):
    rows = {}
    for seed in (0, 1):
        data.seed = seed
        count = len(Windows(store.split("train"), T))
        batches = take(train_batches(store, data, start_step=0), -(-2 * count // B))
        rows[seed] = np.concatenate([batch["tokens"] for batch in batches])
    assert not np.array_equal(rows[0][:count], rows[1][:count])
    assert not np.array_equal(rows[0][count : 2 * count], rows[1][:count])  # nor an epoch of another seed


def test_batches_have_the_promised_shapes(store, data):
    batch = next(train_batches(store, data, start_step=0))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((B, T + 1), "int32"),
        "loss_weights": ((B, T), "float32"),
        "segment_ids": ((B, T), "int32"),
        "positions": ((B, T), "int32"),
    }
    data.mask_documents = False
    plain = next(train_batches(store, data, start_step=0))
    assert plain.keys() == {"tokens", "loss_weights"}
    np.testing.assert_array_equal(plain["tokens"], batch["tokens"])
    assert (plain["loss_weights"] == 1).all()


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 1, 9])
def test_hosts_threads_and_restarts_see_the_same_batches(store, data, num_hosts, prefetch):
    reference = take(train_batches(store, data, start_step=0), 60)  # more than an epoch
    data.prefetch_batches = prefetch
    for start in (0, 1, 37):
        hosts = [
            take(train_batches(store, data, start_step=start, host_index=host, num_hosts=num_hosts), 20)
            for host in range(num_hosts)
        ]
        for step, parts in enumerate(zip(*hosts, strict=True), start=start):
            whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_same(whole, reference[step])


def test_a_host_reads_only_its_rows(store, data, monkeypatch):
    reads = []
    original = Windows.__getitem__
    monkeypatch.setattr(Windows, "__getitem__", lambda self, index: reads.append(index) or original(self, index))
    data.prefetch_batches = 0
    take(train_batches(store, data, start_step=10**9, host_index=1, num_hosts=4), 5)
    assert len(reads) == 5 * B / 4


def test_the_batch_must_divide_among_the_hosts(store, data):
    for make in (
        lambda: train_batches(store, data, start_step=0, num_hosts=3),
        lambda: eval_batches(store, data, 1, num_hosts=3),
    ):
        with pytest.raises(UserError, match="data.batch_size = 4 is not a multiple of the 3 hosts"):
            make()


def test_evaluation_windows_are_spread_evenly_and_fixed(store, data):
    windows = Windows(store.split("eval"), T)
    assert len(windows) > 2 * B
    data.seed = 99
    batches = list(eval_batches(store, data, 2))
    rows = np.concatenate([batch["tokens"] for batch in batches])
    chosen = [int(place * len(windows) / (2 * B)) for place in range(2 * B)]
    np.testing.assert_array_equal(rows, [windows[index] for index in chosen])
    data.seed = 0
    for left, right in zip(batches, eval_batches(store, data, 2), strict=True):
        assert_same(left, right)
    halves = [list(eval_batches(store, data, 2, host_index=host, num_hosts=2)) for host in (0, 1)]
    for batch, first, second in zip(batches, *halves, strict=True):
        assert_same(batch, {key: np.concatenate([first[key], second[key]]) for key in batch})


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("num_hosts", [1, 4])
def test_a_short_split_is_used_whole_and_padded_with_weight_0(store, data, mask_documents, num_hosts):
    data.mask_documents = mask_documents
    windows = Windows(store.split("eval"), T)
    data.batch_size = B = next(size for size in (4, 8, 12, 20) if len(windows) % size)
    hosts = [list(eval_batches(store, data, 1000, host_index=host, num_hosts=num_hosts)) for host in range(num_hosts)]
    batches = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in zip(*hosts, strict=True)
    ]
    assert len(batches) == -(-len(windows) // B)
    assert all(batch["tokens"].shape == (B, T + 1) for batch in batches)
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    padding = len(joined["tokens"]) - len(windows)
    assert padding > 0
    np.testing.assert_array_equal(joined["tokens"][: len(windows)], [windows[index] for index in range(len(windows))])
    assert (joined["loss_weights"][-padding:] == 0).all() and (joined["target_bytes"][-padding:] == 0).all()
    assert joined["target_bytes"].dtype == np.int32 and joined["loss_weights"].dtype == np.float32
    # Bytes are of the text predicted: the whole split but its first token, its incomplete last window and, where
    # documents are kept apart, the first token of each.
    tokens = store.split("eval").read(0, len(windows) * T + 1)
    counted = tokens[1:] != store.eod_id
    if mask_documents:
        counted &= tokens[:-1] != store.eod_id
    assert joined["target_bytes"].sum() == counted.sum()


def slow_layout(tokens, eod_id):
    segments, positions, weights = [], [], []
    for row in tokens:
        segment, position = 1, 0
        for token in row[:-1]:
            segments.append(segment)
            positions.append(position)
            weights.append(0.0 if token == eod_id else 1.0)
            segment, position = (segment + 1, 0) if token == eod_id else (segment, position + 1)
    return [np.reshape(values, (len(tokens), -1)) for values in (segments, positions, weights)]


@pytest.mark.parametrize("seed", range(5))
def test_document_layout_agrees_with_a_plain_loop(seed):
    tokens = np.random.default_rng(seed).integers(0, 2 + seed, (6, 40)).astype(np.int32)  # from every other id on
    for fast, slow, dtype in zip(
        document_layout(tokens, 1), slow_layout(tokens, 1), ("int32", "int32", "float32"), strict=True
    ):
        np.testing.assert_array_equal(fast, slow)
        assert fast.dtype == dtype


def test_document_layout_by_hand():
    tokens = np.array([[5, 5, 0, 6, 0, 0, 7, 7]], np.int32)
    segment_ids, positions, loss_weights = document_layout(tokens, 0)
    assert segment_ids.tolist() == [[1, 1, 1, 2, 2, 3, 4]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert loss_weights.tolist() == [[1, 1, 0, 1, 0, 0, 1]]
