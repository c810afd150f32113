"""Shards: any range reads as a slice of what was written, fast or by the library, and damage never reads as tokens."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from latentjax.data import shards
from latentjax.data.row import DamagedBlock
from latentjax.data.shards import BLOCK_TOKENS, ShardReader, ShardWriter
from latentjax.errors import UserError

# Records of 16 KiB of uint16 (32 KiB of uint32) at changing places between the format's headers; the last is short.
NUM_TOKENS = 40 * BLOCK_TOKENS + 1234


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def written(request, tmp_path_factory):
    tokens = np.random.default_rng(0).integers(0, 60_000, NUM_TOKENS).astype(np.int32)
    path = tmp_path_factory.mktemp("shard") / "train-00000.arrayrecord"
    writer = ShardWriter(path, request.param)
    for start in range(0, NUM_TOKENS, 5000):
        writer.add(tokens[start : start + 5000])
    writer.close()
    assert writer.tokens == NUM_TOKENS
    return path, request.param, tokens


def reader_of(written, path=None):
    return ShardReader(path or written[0], NUM_TOKENS, written[1], BLOCK_TOKENS)


def read_all(reader, num_tokens=NUM_TOKENS):
    tokens, filled = np.full(num_tokens, -1, np.int32), 0
    while filled < num_tokens:
        filled += reader.copy(filled, tokens[filled:])
    return tokens


def test_all_blocks_come_back_and_nearly_all_by_a_computed_place(written, monkeypatch):
    by_library = []
    read_by_library = ShardReader._read_by_library
    monkeypatch.setattr(
        ShardReader,
        "_read_by_library",
        lambda self, block, length: by_library.append(block) or read_by_library(self, block, length),
    )
    np.testing.assert_array_equal(read_all(reader_of(written)), written[2])
    assert set(by_library) <= {NUM_TOKENS // BLOCK_TOKENS}  # only the short one at the end


@pytest.mark.parametrize("wrong", [{"_FIRST_RECORD": 84}, {"_RECORD_OVERHEAD": 44}, {"_RECORD_OVERHEAD": 45 + 8192}])
def test_a_wrong_guess_of_the_place_costs_time_but_no_token(written, monkeypatch, wrong):
    for name, value in wrong.items():
        monkeypatch.setattr(shards, name, value)
    np.testing.assert_array_equal(read_all(reader_of(written)), written[2])


def test_another_blocks_bytes_do_not_pass(written, monkeypatch):
    """With a stride of two records, the place computed for block 1 is exactly that of block 2."""
    item = np.dtype(written[1]).itemsize
    monkeypatch.setattr(shards, "_RECORD_OVERHEAD", 2 * 45 + 8 + BLOCK_TOKENS * item)
    np.testing.assert_array_equal(read_all(reader_of(written)), written[2])


def test_ranges_within_and_up_to_the_end_of_a_block(written):
    reader, tokens = reader_of(written), written[2]
    for offset, wanted, copied in [
        (0, 5, 5),
        (BLOCK_TOKENS - 3, 10, 3),
        (3 * BLOCK_TOKENS + 7, BLOCK_TOKENS, BLOCK_TOKENS - 7),
        (NUM_TOKENS - 2, 9, 2),
    ]:
        window = np.zeros(wanted, np.int32)
        assert reader.copy(offset, window) == copied
        np.testing.assert_array_equal(window[:copied], tokens[offset : offset + copied])


def test_threads_and_pickled_copies_read_the_same(written):
    reader, tokens = pickle.loads(pickle.dumps(reader_of(written))), written[2]

    def read(offset):
        window = np.empty(300, np.int32)
        return window[: reader.copy(offset, window)]

    offsets = np.random.default_rng(1).integers(0, NUM_TOKENS, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for offset, window in zip(offsets, pool.map(read, offsets), strict=True):
            np.testing.assert_array_equal(window, tokens[offset : offset + len(window)])


def test_the_library_reads_the_files_too(written):
    reader = ArrayRecordReader(str(written[0]), "readahead_buffer_size:0")
    assert reader.num_records() == -(-NUM_TOKENS // BLOCK_TOKENS)
    (record,) = reader.read(2, 3)
    tokens = np.frombuffer(record, np.dtype(written[1]).newbyteorder("<"), offset=8)
    np.testing.assert_array_equal(tokens, written[2][2 * BLOCK_TOKENS : 3 * BLOCK_TOKENS])


def test_no_damage_reads_as_tokens(written, tmp_path):
    """Every block either comes back right or is refused, wherever a bit is flipped or the file ends."""
    content, tokens = written[0].read_bytes(), written[2]
    rng = np.random.default_rng(2)
    damaged = tmp_path / "train-00000.arrayrecord"
    refused = 0
    for case in range(60):
        changed = bytearray(content)
        if case % 3 == 0:
            del changed[int(rng.integers(len(content))) :]
        else:
            changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(changed)
        reader = reader_of(written, damaged)
        for block in range(NUM_TOKENS // BLOCK_TOKENS + 1):
            window = np.empty(BLOCK_TOKENS, np.int32)
            try:
                count = reader.copy(block * BLOCK_TOKENS, window)
            except UserError as error:
                assert f"block {block} of the token store's shard {damaged} is damaged: " in str(error)
                refused += 1
            else:
                np.testing.assert_array_equal(window[:count], tokens[block * BLOCK_TOKENS :][:count])
    assert refused > 60


def test_a_missing_file_is_named(written, tmp_path):
    with pytest.raises(UserError, match=r"cannot open .*gone\.arrayrecord: No such file") as error:
        reader_of(written, tmp_path / "gone.arrayrecord").copy(0, np.empty(3, np.int32))
    assert not isinstance(error.value, DamagedBlock)  # all of it is missing: nobody wants to skip that


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write the token store: .*; free space"):
        writer = ShardWriter("/dev/full", "uint16")
        for _ in range(100):
            writer.add(np.arange(BLOCK_TOKENS))
        writer.close()
