"""Windows to try a model on."""

from pathlib import Path

import numpy as np
import pytest
import recipes

from latentjax.data.held_out import held_out_windows, sample_windows
from latentjax.data.resolve import existing_store, resolve_store
from latentjax.data.sample_text import PROSE
from latentjax.data.tokenizers.byte_level import ByteTokenizer


@pytest.fixture
def data():
    return recipes.get_config().data


def test_windows_of_the_held_out_documents(data):
    """They are stretches of what the store holds out; a store of another tokenizer is not read."""
    store = resolve_store(data.path, data, progress=False)
    assert existing_store(data.path, data).path == store.path
    found = held_out_windows(data, store.fingerprint, 3, 20)
    assert found.shape == (3, 20) and found.dtype == np.int32
    row = store.split("eval")
    everything = row.read_windows(np.array([0]), row.num_tokens)[0].astype(np.int32).tobytes()
    for window in found:
        assert window.tobytes() in everything
    assert held_out_windows(data, "another", 3, 20) is None
    assert held_out_windows(data, store.fingerprint, 3, row.num_tokens + 1) is None


@pytest.mark.parametrize("path", ["/nowhere", "gs://bucket/store", "tfds:x/train", ""])
def test_nothing_is_made_for_it(data, path, tmp_path):
    """Where no store is, none is made, and nothing is fetched."""
    data.path = path
    assert held_out_windows(data, ByteTokenizer().fingerprint, 1, 8) is None
    data.path, data.store_cache = str(recipes.CORPUS), str(tmp_path / "cache")
    assert held_out_windows(data, ByteTokenizer().fingerprint, 1, 8) is None
    assert not Path(data.store_cache).exists()


def test_text_that_is_always_there():
    """Prose and source; with no tokenizer its bytes, of which no id is outside the vocabulary."""
    windows = sample_windows(ByteTokenizer(), 257, 4, 32)
    assert windows.shape == (4, 32)
    assert ByteTokenizer().decode(windows[0]) == PROSE[:32] and ByteTokenizer().decode(windows[-1]).endswith("3})\n")
    assert sample_windows(None, 29, 2, 10).max() < 29
    assert sample_windows(ByteTokenizer(), 257, 2, 10**6).shape[0] == 2
