"""Windows of a row, and where documents begin and end in them."""

import subprocess
import sys

import numpy as np
import pytest
from rows import ArrayRow

from latentjax.data.windows import Windows, document_layout
from latentjax.errors import UserError

T = 24


def every(windows):
    return windows.read(np.arange(len(windows)))


def test_windows_share_one_token_and_spell_the_row():
    row = ArrayRow(np.random.default_rng(0).integers(0, 256, 1000))
    windows = every(Windows(row, T))
    assert windows.shape == (999 // T, T + 1) and windows.dtype == np.int32
    joined = np.concatenate([windows[0, :1], windows[:, 1:].ravel()])
    np.testing.assert_array_equal(joined, row.tokens[: len(joined)])
    np.testing.assert_array_equal(Windows(row, T).read([5, 5, 2]), windows[[5, 5, 2]])


@pytest.mark.parametrize("num_tokens", [80, 97, 121])
def test_there_are_as_many_windows_as_fit_whatever_their_length(num_tokens):
    row = ArrayRow(np.arange(num_tokens))
    for length in range(1, num_tokens):
        last = every(Windows(row, length))[-1]
        assert last[-1] < num_tokens <= last[-1] + length


def test_sequences_packed_by_others_are_windows():
    """Of T + 1 tokens each: none is shared, and none is cut; sequences of another length are one row as any."""
    row = ArrayRow(np.arange(7 * (T + 1)), sequence_tokens=T + 1)
    np.testing.assert_array_equal(every(Windows(row, T)), row.tokens.reshape(7, T + 1))
    plain = ArrayRow(row.tokens)
    for length in (T - 1, T + 1):
        np.testing.assert_array_equal(every(Windows(row, length)), every(Windows(plain, length)))


def test_too_few_tokens_for_a_window():
    for sequence_tokens in (None, T + 1):
        row = ArrayRow(np.arange(T), "the eval split of stores/x", sequence_tokens)
        message = f"the eval split of stores/x has {T} tokens, fewer than one window .* {T + 1}: shorten"
        with pytest.raises(UserError, match=message):
            Windows(row, T)
        assert len(Windows(ArrayRow(np.arange(T + 1), "", sequence_tokens), T)) == 1
    with pytest.raises(UserError, match="has 0 tokens"):
        Windows(ArrayRow([]), 1)


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


def test_what_reads_batches_needs_no_jax():
    """Processes that read would each take seconds and hundreds of megabytes more."""
    script = "import sys, latentjax.data.windows, latentjax.data.megatron, latentjax.data.store, "
    script += "latentjax.data.reading_processes; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
