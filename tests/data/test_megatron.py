"""Megatron data: files of its own writers, and files laid out by hand, read as the sequences that were put in."""

import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from megatron_files import CODES, write

from latentjax.data import megatron
from latentjax.data.megatron import MegatronRow, is_megatron
from latentjax.errors import UserError


def check(row, sequences):
    """Every window of several lengths is the part of the joined sequences that it should be."""
    joined = np.concatenate([np.zeros(0, np.int32), *(np.asarray(sequence, np.int32) for sequence in sequences)])
    assert row.num_tokens == len(joined)
    assert row.num_sequences == len(sequences)
    for length in {1, 2, 5, len(joined)}:
        starts = np.random.default_rng(length).permutation(len(joined) - length + 1).astype(np.int64)
        windows = row.read_windows(starts, length)
        assert windows.dtype == np.int32 and windows.shape == (len(starts), length)
        np.testing.assert_array_equal(windows, joined[starts[:, np.newaxis] + np.arange(length)])
    np.testing.assert_array_equal(row.read(0, len(joined)), joined)


@pytest.fixture
def sequences():
    """Of different lengths, some empty, at both ends too."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, length).tolist() for length in (0, 3, 0, 0, 7, 1, 12, 5, 0)]


# What MegatronTokenizedFile of datatrove 0.10.1 and IndexedDatasetBuilder of megatron-core 0.16.1 both wrote for
# [[1, 2, 65535], [300], [7, 8, 9, 10]] in uint16: the same bytes.
FOREIGN_BIN = "01000200ffff2c010700080009000a00"
FOREIGN_IDX = (
    "4d4d494449445800000100000000000000080300000000000000040000000000000003000000010000000400000000000000"
    "0000000006000000000000000800000000000000000000000000000001000000000000000200000000000000030000000000"
    "0000"
)


def test_files_of_other_writers(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes.fromhex(FOREIGN_BIN))
    (tmp_path / "data.idx").write_bytes(bytes.fromhex(FOREIGN_IDX))
    check(MegatronRow(tmp_path / "data", 65536), [[1, 2, 65535], [300], [7, 8, 9, 10]])
    written = write(tmp_path / "ours", [[1, 2, 65535], [300], [7, 8, 9, 10]])
    assert written.read_bytes() == (tmp_path / "data.idx").read_bytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("chunk", "kept"), [(2, 1), (4, 2), (3, 3), (1 << 16, 2), (1 << 16, 1 << 10)])
def test_sequences_in_a_row(tmp_path, sequences, dtype, chunk, kept, monkeypatch):
    """Of every integer dtype, whatever the number of sequences looked at together."""
    monkeypatch.setattr(megatron, "_CHUNK", chunk)
    monkeypatch.setattr(megatron, "_KEPT", kept)
    row = MegatronRow(write(tmp_path / "data", sequences, dtype), 100)
    check(row, sequences)
    assert row.sequence_tokens is None


@pytest.mark.parametrize(("chunk", "kept"), [(2, 1), (4, 2), (3, 3), (1 << 16, 2), (1 << 16, 1 << 10)])
def test_sequences_anywhere(tmp_path, sequences, chunk, kept, monkeypatch):
    """With gaps between them, of an odd number of bytes too, or in another order than in the file."""
    monkeypatch.setattr(megatron, "_CHUNK", chunk)
    monkeypatch.setattr(megatron, "_KEPT", kept)
    check(MegatronRow(write(tmp_path / "gaps", sequences, gaps=[4, 0, 3, 0, 2, 0, 0, 5, 1]), 100), sequences)
    order = [sequence for sequence in sequences if sequence]
    path = write(tmp_path / "order", order)
    content = bytearray(path.read_bytes())
    count, places = len(order), slice(34 + 4 * len(order), 34 + 12 * len(order))
    lengths, pointers = list(map(len, order)), struct.unpack(f"<{count}q", content[places])
    content[34 : 34 + 4 * count] = struct.pack(f"<{count}i", *lengths[::-1])
    content[places] = struct.pack(f"<{count}q", *pointers[::-1])
    path.write_bytes(content)
    check(MegatronRow(path, 100), order[::-1])


@pytest.mark.parametrize("gaps", [None, [2, 0, 0, 6, 0]])
def test_sequences_of_one_length(tmp_path, gaps):
    """Are known to be; a window of that length is one of them."""
    sequences = np.random.default_rng(0).integers(0, 2**16, (5, 9))
    row = MegatronRow(write(tmp_path / "data", sequences.tolist(), gaps=gaps), 2**16)
    assert row.sequence_tokens == 9
    check(row, sequences)
    np.testing.assert_array_equal(row.read_windows(np.arange(5) * 9, 9), sequences)


def test_without_a_sequence_or_a_token(tmp_path):
    for sequences in ([], [[]], [[], []]):
        row = MegatronRow(write(tmp_path / "data", sequences), 10)
        assert (row.num_tokens, row.sequence_tokens) == (0, None)
        with pytest.raises(IndexError):
            row.read(0, 1)


def test_windows_beyond_the_row(tmp_path, sequences):
    row = MegatronRow(write(tmp_path / "data", sequences), 100)
    assert row.read_windows(np.zeros(0, np.int64), 3).shape == (0, 3)
    for start, length in ((-1, 2), (row.num_tokens, 1), (row.num_tokens - 2, 3)):
        with pytest.raises(IndexError):
            row.read_windows(np.array([0, start]), length)


def test_pickled_and_from_many_threads(tmp_path, sequences):
    row = pickle.loads(pickle.dumps(MegatronRow(write(tmp_path / "data", sequences, gaps=[1] * 9), 100)))
    check(row, sequences)
    expected = row.read(0, row.num_tokens)
    with ThreadPoolExecutor(8) as pool:
        assert all(
            np.array_equal(tokens, expected) for tokens in pool.map(lambda _: row.read(0, row.num_tokens), range(200))
        )


def test_names_of_a_data_set(tmp_path, sequences):
    """PREFIX, PREFIX.bin or PREFIX.idx, the prefix with dots of its own; a directory of that name is not it."""
    write(tmp_path / "pile_0.87_text", sequences)
    for name in ("pile_0.87_text", "pile_0.87_text.bin", "pile_0.87_text.idx"):
        assert is_megatron(tmp_path / name) and is_megatron(str(tmp_path / name))
        assert MegatronRow(tmp_path / name, 100).label == f"the Megatron data {tmp_path}/pile_0.87_text"
    assert not is_megatron(tmp_path / "pile_0.87") and not is_megatron(tmp_path)
    assert not is_megatron(tmp_path / "none.idx")
    (tmp_path / "pile_0.87_text").mkdir()
    assert not is_megatron(tmp_path / "pile_0.87_text")


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 100), ("int32", -1), ("int64", 2**33), ("int32", 2**31 - 1)])
@pytest.mark.parametrize("gaps", [None, [0, 1, 0, 2]])
def test_a_token_beyond_the_vocabulary(tmp_path, dtype, token, gaps):
    """Is told with its place, and only when it is met."""
    row = MegatronRow(write(tmp_path / "data", [[1, 2, 99], [], [5, 6, token, 7], [8]], dtype, gaps), 100)
    np.testing.assert_array_equal(row.read(0, 5), [1, 2, 99, 5, 6])
    with pytest.raises(UserError, match=rf"data\.bin: token {token}, number 2 of sequence 2, is beyond .* of 100"):
        row.read_windows(np.array([0, 3, 4]), 4)


def test_damaged_files(tmp_path, sequences):
    """Each named, with what is wrong with it."""
    index = write(tmp_path / "data", sequences)
    data = tmp_path / "data.bin"
    good, tokens = index.read_bytes(), data.read_bytes()

    def error(content=good, binary=tokens):
        index.write_bytes(content)
        data.write_bytes(binary)
        with pytest.raises(UserError) as caught:
            MegatronRow(tmp_path / "data", 100)
        return str(caught.value)

    assert f"{index} is no index of Megatron data" in error(b"TNTIDX\x00\x00" + good[8:])
    assert f"{index} is no index of Megatron data" in error(b"")
    assert f"{index} is truncated: it has 20 bytes" in error(good[:20])
    assert f"{index} is damaged: it has {len(good) - 1} bytes" in error(good[:-1])
    assert f"{index} is damaged: it has {len(good) + 4} bytes" in error(good + b"1234")
    assert "version 2 of the Megatron format" in error(good[:9] + struct.pack("<Q", 2) + good[17:])
    assert "dtype 6 is not one of whole numbers" in error(good[:17] + b"\x06" + good[18:])
    assert f"{data} is truncated: it has 54 bytes, but sequence 7 ends at byte 56" in error(binary=tokens[:-2])
    negative = good[: 34 + 4] + struct.pack("<i", -3) + good[34 + 8 :]
    assert f"{index} is damaged: sequence 1 has -3 tokens at byte 0" in error(negative)
    index.write_bytes(good)
    data.unlink()
    with pytest.raises(UserError, match=r"cannot read .*data\.bin: No such file"):
        MegatronRow(tmp_path / "data", 100)
    index.unlink()
    with pytest.raises(UserError, match=r"cannot read .*data\.idx: No such file"):
        MegatronRow(tmp_path / "data", 100)


def test_a_file_cut_short_while_it_is_read(tmp_path, sequences):
    row = MegatronRow(write(tmp_path / "data", sequences), 100)
    with (tmp_path / "data.bin").open("r+b") as file:
        file.truncate(20)
    np.testing.assert_array_equal(row.read(0, 10), np.concatenate(sequences)[:10])
    with pytest.raises(UserError, match=r"data\.bin is truncated: 2 bytes instead of 4 at byte 18"):
        row.read(9, 2)


def test_modes_at_the_end_of_the_index(tmp_path, sequences):
    """As Megatron writes for several modalities; they are not tokens' business."""
    check(MegatronRow(write(tmp_path / "data", sequences, modes=bytes(len(sequences))), 100), sequences)
