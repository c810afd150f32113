"""Text generated along the way, to be looked at."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from latentjax.data.tokenizers.base import Tokenizer
from latentjax.errors import UserError
from latentjax.recurrence.decoding import generate
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
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    prompts_BP = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens_BT = generate(
        model,
        params,
        prompts_BP,
        lengths_B,
        jax.random.fold_in(jax.random.key(train.seed), step),
        train.sample_temperature,
        num_tokens=int(lengths_B.max()) + train.sample_tokens,
    )
    if not tokens_BT.is_fully_addressable:
        tokens_BT = multihost_utils.process_allgather(tokens_BT, tiled=True)
    texts = []
    for prompt, row, length in zip(train.sample_prompts, np.asarray(tokens_BT), lengths_B, strict=True):
        continuation = row[length : length + train.sample_tokens].tolist()
        if tokenizer.eod_id in continuation:
            continuation = continuation[: continuation.index(tokenizer.eod_id)]
        texts.append((prompt, tokenizer.decode(continuation, continued=True)))
    return texts
