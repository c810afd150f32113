"""A few windows of real text to try a model on: what its run held out, or text that is always there."""

import numpy as np
from ml_collections import ConfigDict

from latentjax.data.megatron import is_megatron
from latentjax.data.resolve import existing_store
from latentjax.data.sample_text import PROSE, SOURCE
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.windows import Windows
from latentjax.errors import UserError


def held_out_windows(data: ConfigDict, fingerprint: str, count: int, num_tokens: int) -> np.ndarray | None:
    """Returns windows from the first of the data that a run was evaluated on, if they are on this machine.

    Args:
      data: the `data` group of a run's config.
      fingerprint: of the run's tokenizer; another's ids would mean nothing.

    Returns:
      int32 (count, num_tokens), spread over the text evenly; None where there are none to be had without making or
      fetching anything.
    """
    paths = [path for _, path in data.eval_sets] or [path for path, _ in data.mixture] or [data.path]
    try:
        if is_megatron(paths[0]):
            return None
        store = existing_store(paths[0], data)
        if store is None or store.fingerprint != fingerprint:
            return None
        windows = Windows(store.split("eval"), num_tokens - 1)
        return windows.read(np.arange(count) * len(windows) // count)
    except UserError:  # gone, damaged, too short: it is not this that the user has asked for
        return None


def sample_windows(tokenizer: Tokenizer | None, vocab_size: int, count: int, num_tokens: int) -> np.ndarray:
    """Returns windows of English and Python text, int32 (count, num_tokens), of fewer tokens where the text ends.

    Args:
      tokenizer: None: the bytes of the text are taken for ids, as far as there are so many.
    """
    if tokenizer is None:
        ids = np.frombuffer((PROSE + SOURCE).encode(), np.uint8).astype(np.int32) % vocab_size
    else:
        ids = np.concatenate(tokenizer.encode_batch([PROSE, SOURCE])).astype(np.int32)
    num_tokens = min(num_tokens, len(ids))
    starts = np.linspace(0, len(ids) - num_tokens, count).astype(np.int64)
    return np.stack([ids[start : start + num_tokens] for start in starts])
