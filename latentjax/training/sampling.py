"""Text generated along the way, to be looked at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from latentjax.data.tokenizers.base import Tokenizer
from latentjax.errors import UserError
from latentjax.recurrence.base import rounding_tolerance
from latentjax.recurrence.choosing import Choice
from latentjax.recurrence.decoding import continue_prompts, decoding_model, pad_prompts, row_key
from latentjax.recurrence.language_model import LanguageModel


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, limit: int) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
      UserError: a prompt and `num_tokens` behind it are more than the model's `limit` of positions.
    """
    encoded = [list(tokenizer.encode(prompt)) for prompt in prompts]
    longest = max(map(len, encoded), default=0)
    if longest + num_tokens > limit:
        raise UserError(
            f"train.sample_tokens={num_tokens} behind a prompt of {longest} tokens is more than "
            f"model.max_position_embeddings={limit}: shorten one of them"
        )
    return encoded


def sample_text(
    model: LanguageModel, params: Any, tokenizer: Tokenizer, config: ConfigDict, step: int
) -> list[tuple[str, str]]:
    """Continues the prompts of the `train` group by exact sequential decoding: [(prompt, continuation)].

    What is drawn is a function of the parameters, `train.seed` and the step.
    """
    train = config.train
    prompts = encode_prompts(tokenizer, train.sample_prompts, train.sample_tokens, config.model.max_position_embeddings)
    batch = pad_prompts(prompts, [row_key(train.seed, each, step) for each in prompts], max(map(len, prompts)))
    tokens_Bn, count = continue_prompts(
        decoding_model(model, separates=False),
        params,
        batch,
        Choice.of(train.sample_temperature, num_ids=min(tokenizer.vocab_size, config.model.vocab_size)),
        np.array([tokenizer.eod_id], np.int32),
        num_tokens=train.sample_tokens,
        tolerance=rounding_tolerance(config.model.dtype),
    )
    if not tokens_Bn.is_fully_addressable:
        tokens_Bn, count = multihost_utils.process_allgather((tokens_Bn, count), tiled=True)
    texts = []
    for prompt, row in zip(train.sample_prompts, np.asarray(tokens_Bn), strict=True):
        continuation = row[: int(count)].tolist()
        if tokenizer.eod_id in continuation:
            continuation = continuation[: continuation.index(tokenizer.eod_id)]
        texts.append((prompt, tokenizer.decode(continuation, continued=True)))
    return texts
