"""Damaged blocks: named, or left out so that batches stay a function of the step; and never read as tokens."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import recipes

from latentjax.config import default
from latentjax.data import windows
from latentjax.data.batches import eval_batches, train_batches
from latentjax.data.resolve import resolve_store
from latentjax.data.row import DamagedBlock
from latentjax.data.shards import BLOCK_TOKENS, ShardReader, ShardWriter
from latentjax.data.store import TokenSplit
from latentjax.errors import UserError
from latentjax.training import loop
from latentjax.training.metrics import read_metrics
from latentjax.training.signals import StopRequest

T, B, NUM_TOKENS = 1000, 4, 4 * BLOCK_TOKENS
DAMAGED_BLOCK = 1
IN_THE_BLOCK = 20_000  # a byte of the file: the block lies in 16.5 to 32.9 thousand
STRIDE = 45 + 8 + 2 * BLOCK_TOKENS  # from one record to the next, but for the format's own headers


def split_of(directory: Path) -> TokenSplit:
    description = {"tokens": NUM_TOKENS, "bytes": 0, "documents": 1}
    description["shards"] = [{"name": "train-00000.arrayrecord", "tokens": NUM_TOKENS, "bytes": 0, "sha256": ""}]
    return TokenSplit(directory, "train", description, "uint16", BLOCK_TOKENS)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("intact")
    writer = ShardWriter(directory / "train-00000.arrayrecord", "uint16")
    writer.add(np.random.default_rng(0).integers(1, 60_000, NUM_TOKENS).astype(np.int32))
    writer.close()
    return split_of(directory)


@pytest.fixture(scope="module")
def damaged(intact, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged")
    content = bytearray((intact.directory / "train-00000.arrayrecord").read_bytes())
    content[IN_THE_BLOCK] ^= 1
    (directory / "train-00000.arrayrecord").write_bytes(content)
    return split_of(directory)


def data_config(**changes):
    data = default().data
    data.update(sequence_length=T, batch_size=B, on_corrupt_block="skip")
    data.update(changes)
    return data


def batches_of(split, data, count, start_step=0, rows=None):
    batches = train_batches([(split, 1.0)], data, eod_id=0, start_step=start_step, rows=rows)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


READING = [{"prefetch_batches": 0}, {"num_threads": 3}, {"num_workers": 2}]


@pytest.mark.parametrize("reading", READING, ids=str)
def test_the_block_is_named_wherever_it_is_read(damaged, reading):
    with pytest.raises(DamagedBlock) as error:
        batches_of(damaged, data_config(on_corrupt_block="stop", **reading), 20)
    shard = damaged.directory / "train-00000.arrayrecord"
    assert str(error.value).startswith(f"block {DAMAGED_BLOCK} of the token store's shard {shard} is damaged: ")
    assert "restore the file from a copy" in str(error.value) and "on_corrupt_block=skip" in str(error.value)
    assert "\n" not in str(error.value)


def touches(tokens: np.ndarray, intact) -> np.ndarray:
    """Whether each window, found by its tokens in the intact row, has one of the block."""
    row = intact.read(0, NUM_TOKENS)
    found = [np.flatnonzero(row == window[0]) for window in tokens]
    starts = [
        next(int(at) for at in places if np.array_equal(row[at : at + T + 1], window))
        for places, window in zip(found, tokens)
    ]
    begin, end = DAMAGED_BLOCK * BLOCK_TOKENS, (DAMAGED_BLOCK + 1) * BLOCK_TOKENS
    return np.array([start < end and start + T + 1 > begin for start in starts])


@pytest.mark.parametrize("reading", READING, ids=str)
@pytest.mark.parametrize("mask_documents", [False, True])
def test_windows_of_the_block_weigh_nothing_and_all_others_are_the_same(
    intact, damaged, capsys, reading, mask_documents
):
    data = data_config(mask_documents=mask_documents, **reading)
    whole = batches_of(intact, data, 12)
    assert capsys.readouterr().err == ""
    left_out = 0
    for batch, expected in zip(batches_of(damaged, data, 12), whole, strict=True):
        assert batch.keys() == expected.keys()
        hit = touches(expected["tokens"], intact)
        left_out += hit.sum()
        assert not batch["loss_weights"][hit].any()
        for name in batch:
            np.testing.assert_array_equal(batch[name][~hit], expected[name][~hit])
            assert batch[name].dtype == expected[name].dtype and batch[name].shape == expected[name].shape
    assert 9 <= left_out < 48
    (line,) = capsys.readouterr().err.splitlines()  # once, though nine windows and more touch it
    assert line.startswith(f"block {DAMAGED_BLOCK} of ") and line.endswith("; the windows that touch it are left out")


def test_batches_stay_a_function_of_the_step(damaged):
    """Read by two hosts, and begun in the middle."""
    data = data_config()
    whole = batches_of(damaged, data, 12)
    halves = [batches_of(damaged, data, 12, rows=rows) for rows in (np.arange(2), np.arange(2, 4))]
    for batch, one, other in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([one[name], other[name]]), batch[name])
    for batch, again in zip(whole[5:], batches_of(damaged, data, 7, start_step=5), strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])


def test_components_of_a_mixture_suffer_only_their_own_damage(intact, damaged):
    data = data_config(shuffle=False)
    batches = train_batches([(damaged, 1.0), (intact, 1.0)], data, eod_id=0, start_step=0)
    with_weight = np.concatenate([batch["loss_weights"].any(axis=1) for batch in islice(batches, 16)])
    batches.close()
    assert not with_weight[0::2].all() and with_weight[1::2].all()


def test_evaluation_leaves_them_out_too(intact, damaged):
    data = data_config()
    bytes_per_id = np.full(60_000, 3)

    def read(split):
        batches = eval_batches(split, data, 8, eod_id=0, bytes_per_id=bytes_per_id)
        return {
            name: np.concatenate([batch[name] for batch in parts]) for parts in [list(batches)] for name in parts[0]
        }

    whole, rest = read(intact), read(damaged)
    hit = touches(whole["tokens"], intact)
    assert hit.sum() == 9  # windows 8 to 16, of which the first and the last lie across its ends
    for name in ("loss_weights", "target_bytes"):
        assert not rest[name][hit].any()
        np.testing.assert_array_equal(rest[name][~hit], whole[name][~hit])


def read_blocks(path: Path, tokens: np.ndarray) -> int:
    """Reads every block; each must be right or refused. Returns how many were refused."""
    reader, refused = ShardReader(path, NUM_TOKENS, "uint16", BLOCK_TOKENS), 0
    for block in range(NUM_TOKENS // BLOCK_TOKENS):
        window = np.empty(BLOCK_TOKENS, np.int32)
        try:
            reader.copy(block * BLOCK_TOKENS, window)
        except DamagedBlock as error:
            assert f"block {block} of the token store's shard {path} is damaged: " in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(window, tokens[block * BLOCK_TOKENS :][:BLOCK_TOKENS])
    return refused


def flip_each(places, intact, tmp_path) -> dict[int, int]:
    """By byte of the file: how many blocks are lost when one of its bits is flipped."""
    content = (intact.directory / "train-00000.arrayrecord").read_bytes()
    tokens, lost = intact.read(0, NUM_TOKENS), {}
    path = tmp_path / "train-00000.arrayrecord"
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        lost[place] = read_blocks(path, tokens)
    return lost


def test_a_flipped_bit_costs_one_block_at_most(intact, tmp_path):
    """In the file's header, chunk headers, checksums, tokens, the format's headers every 64 KiB, footer and padding."""
    size = (intact.directory / "train-00000.arrayrecord").stat().st_size
    second = 24 + 85 + STRIDE  # the checksum of the second record
    places = {
        *range(0, 130, 3), *range(second - 60, second + 20, 3), *range((1 << 16) - 10, (1 << 16) + 40, 3),
        *np.linspace(0, size - 1, 60, dtype=int).tolist(), *range(size - 120, size, 5),
    }  # fmt: skip
    lost = flip_each(sorted(places), intact, tmp_path)
    assert set(lost.values()) == {0, 1}
    # The tokens and their checksum are all that counts: what the library needs to find a record is not needed here.
    assert all(lost[place] == (place >= 109) for place in range(0, 130, 3))


@pytest.mark.long
def test_any_flipped_bit_costs_one_block_at_most(intact, tmp_path):
    size = (intact.directory / "train-00000.arrayrecord").stat().st_size
    assert set(flip_each(range(size), intact, tmp_path).values()) == {0, 1}


def test_damage_to_a_block_and_to_what_the_library_needs(intact, tmp_path):
    """The library cannot even open the file then."""
    content = bytearray((intact.directory / "train-00000.arrayrecord").read_bytes())
    path = tmp_path / "train-00000.arrayrecord"
    for others in ([], range(64), range(len(content) - 400, len(content))):
        changed = bytearray(content)
        for place in (IN_THE_BLOCK, *others):
            changed[place] ^= 0x55
        path.write_bytes(changed)
        assert read_blocks(path, intact.read(0, NUM_TOKENS)) == 1
    path.write_bytes(content[: 2 * STRIDE])
    assert read_blocks(path, intact.read(0, NUM_TOKENS)) == 3


@pytest.fixture
def damaged_store(tmp_path):
    """A store of the recipe's corpus, one of its blocks damaged."""
    config = recipes.get_config("vanilla")
    store = resolve_store(config.data.path, config.data, False)
    shutil.copytree(store.path, tmp_path / "store")
    shard = tmp_path / "store" / store.split("train").shards[0].name
    content = bytearray(shard.read_bytes())
    content[IN_THE_BLOCK] ^= 1
    shard.write_bytes(content)
    config.data.path = str(tmp_path / "store")
    config.train.update(num_steps=30, log_every_steps=10, eval_every_steps=0, sample_every_steps=0)
    return config


def test_a_run_on_a_damaged_store(damaged_store, tmp_path, capsys, monkeypatch):
    """It stops with a line, or goes on, counts what it left out, and takes the count up again."""
    config = damaged_store
    with pytest.raises(UserError, match="block 1 of .* is damaged: .*; restore the file") as error:
        loop.train(config, tmp_path / "stopped", StopRequest())
    assert "\n" not in str(error.value)

    left_out = [0]
    leave_out = windows._leave_out

    def watched(batch, damaged):
        left_out.append(left_out[-1] + len(damaged))
        return leave_out(batch, damaged)

    monkeypatch.setattr(windows, "_leave_out", watched)
    config.data.on_corrupt_block, config.data.prefetch_batches, config.data.device_prefetch = "skip", 0, 0
    config.train.num_steps = 15
    loop.train(config, tmp_path / "run", StopRequest())
    config.train.num_steps = 30
    summary = loop.train(config, tmp_path / "run", StopRequest())
    counts = [line["damaged_windows"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert counts == [left_out[step] for step in (10, 15, 20, 30)] and counts[-1] > counts[0] > 0
    assert summary["damaged_windows"] == counts[-1]
    assert np.isfinite(summary["loss"])
    assert capsys.readouterr().err.count("; the windows that touch it are left out") == 2  # starts
