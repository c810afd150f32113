"""Continuing prompts of different lengths, many at a time: batches, cache sizes, and when a text is over.

Few programs are compiled: lengths of prompts and room in the cache are powers of two, and tokens are chosen some at a
time, behind which the caller is told what is new and may say that a text is over.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from latentjax.errors import UserError
from latentjax.recurrence.base import rounding_tolerance
from latentjax.recurrence.choosing import Choice
from latentjax.recurrence.decoding import (
    DecodingState,
    cache_room,
    decoding_model,
    extend,
    grow,
    pad_prompts,
    room,
    row_key,
    separated,
    start,
)
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.mesh import BATCH_AXES, replicated
from latentjax.training.programs import memory_errors, sharded_tracing

_SMALLEST_GROWTH = 64  # tokens that a cache has room for beyond the prompt, at first


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How next tokens are chosen.

    Attributes:
      temperature: divides the logits; 0: always the likeliest.
      top_k: of the k likeliest only; 0: of all.
      top_p: of the fewest that together have at least this probability; 1: of all.
      seed: of the draws. What a prompt becomes depends on it, on the prompt and on the number of the sample alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Checks the ranges.

        Raises:
          UserError: one is out of range.
        """
        if not 0 <= self.temperature <= 1000:
            raise UserError(f"temperature must be from 0 (greedy) to 1000, not {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k must be 0 (off) or a number of tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1 (off), not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")


# (index of the prompt, its new ids) to whether its text is over.
Watch = Callable[[int, list[int]], bool]


class Completer:
    """Continues prompts by exact sequential decoding with one model."""

    def __init__(self, model: LanguageModel, params: Any, mesh: Mesh, *, num_ids: int, end_ids: Sequence[int]):
        """Prepares for a model; nothing is compiled yet.

        Args:
          params: as the mesh's sharding rules lay them out.
          num_ids: ids from this on are never chosen: a vocabulary may be larger than its tokenizer's.
          end_ids: tokens that end a text.
        """
        self.max_length = model.spec.max_position_embeddings
        self._mesh, self._num_ids = mesh, min(num_ids, model.spec.vocab_size)
        self._end_ids_E = jnp.asarray(list(end_ids), jnp.int32)
        self._rows = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        separates = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        self._model = decoding_model(model, separates=separates)
        self._separate = separates and self._model.spec.separates
        self._params = separated(model, params) if self._separate else params
        self._tolerance = rounding_tolerance(model.spec.dtype)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        sampling: Sampling,
        *,
        samples: Sequence[int] | None = None,
        watch: Watch = lambda index, ids: False,
        done: Callable[[int], None] = lambda count: None,
        batch_tokens: int = 4096,
        tokens_at_once: int = 16,
        prefill_tolerance: float | None = None,
    ) -> list[list[int]]:
        """Continues prompts, the longest first.

        Args:
          prompts: ids, at least one each, that with `num_tokens` more fit the model's positions.
          num_tokens: most new tokens.
          samples: the number of each prompt's sample, which its draws depend on; None: 0 for all.
          watch: is called with the new ids of each prompt, `tokens_at_once` at most.
          done: is called with a number of prompts that are done.
          batch_tokens: most tokens of a batch, prompts and continuations together.
          prefill_tolerance: relative change of a prompt's thoughts that is let pass; None: rounding.

        Returns:
          The ids that follow each prompt, without a token that ends the text; to the end of the piece behind which
          `watch` said that it is over.

        Raises:
          UserError: a prompt is empty or too long, the sampling is out of range, memory does not suffice.
        """
        sampling.check()
        for prompt in prompts:
            if not 0 < len(prompt) <= self.max_length - num_tokens:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens and {num_tokens} new ones do not fit the model's "
                    f"{self.max_length} positions: shorten one of them"
                    if len(prompt)
                    else "a prompt is empty: give it at least one token"
                )
        tolerance = self._tolerance if prefill_tolerance is None else prefill_tolerance
        choice = Choice.of(sampling.temperature, self._num_ids, sampling.top_k, sampling.top_p)
        keys = [
            row_key(sampling.seed, prompt, 0 if samples is None else samples[index])
            for index, prompt in enumerate(prompts)
        ]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        continued: list[list[int]] = [[] for _ in prompts]
        first = 0
        with memory_errors("generating"), sharded_tracing(self._mesh):
            while first < len(order):
                longest = self._bucket(len(prompts[order[first]]), num_tokens)
                size = max(1, min(batch_tokens // (longest + num_tokens), len(order) - first))
                rows = order[first : first + size]
                size = -(-size // self._rows) * self._rows  # rows that fill the mesh up repeat the last one
                filled = [*rows, *[rows[-1]] * (size - len(rows))]
                batch = pad_prompts([prompts[row] for row in filled], [keys[row] for row in filled], longest)
                self._run(batch, rows, num_tokens, choice, tolerance, tokens_at_once, watch, continued)
                done(len(rows))
                first += len(rows)
        return continued

    def _bucket(self, length: int, num_tokens: int) -> int:
        """The length that a batch of prompts is padded to."""
        return min(room(length), self.max_length - num_tokens)

    def _run(
        self,
        batch: Any,
        rows: list[int],
        num_tokens: int,
        choice: Choice,
        tolerance: float,
        tokens_at_once: int,
        watch: Watch,
        continued: list[list[int]],
    ) -> None:
        """Continues one batch; `rows` are the indices of its first rows in `continued`, which is added to."""
        if num_tokens == 0:
            return
        held = batch.tokens_BT.shape[1]
        most = held + num_tokens
        capacity = min(cache_room(held + min(num_tokens, _SMALLEST_GROWTH)), most)
        state, _, _ = start(self._model, self._params, batch, choice, self._end_ids_E, tolerance, capacity)
        over = [False] * len(rows)
        state = self._tell(state, self._read(state.token_B)[:, None], rows, over, watch, continued)
        done = 1
        while done < num_tokens and not all(over):
            if held == capacity:
                capacity = min(cache_room(capacity + 1), most)
                state = grow(self._model, state, capacity)
            limit = min(tokens_at_once, num_tokens - done, capacity - held)
            state, tokens_Bn, count = extend(
                self._model, self._params, state, choice, self._end_ids_E, jnp.int32(limit), tokens_at_once
            )
            count = int(self._read(count))
            state = self._tell(state, self._read(tokens_Bn)[:, :count], rows, over, watch, continued)
            done, held = done + count, held + count

    def _tell(
        self,
        state: DecodingState,
        tokens_Bn: np.ndarray,
        rows: list[int],
        over: list[bool],
        watch: Watch,
        continued: list[list[int]],
    ) -> DecodingState:
        """Hands new tokens out and marks what is over, in `over` and in the state."""
        ends = set(np.asarray(self._end_ids_E).tolist())
        stopped = False
        for row, index in enumerate(rows):
            if over[row]:
                continue
            ids = tokens_Bn[row].tolist()
            ended = next((place for place, each in enumerate(ids) if each in ends), None)
            ids = ids[:ended]
            continued[index] += ids
            over[row] = watch(index, ids) or ended is not None
            stopped |= over[row] and ended is None
        if not stopped:
            return state
        filled = np.ones(state.finished_B.shape, bool)
        filled[: len(over)] = over
        finished_B = jax.device_put(filled, replicated(self._mesh))
        return state.replace(finished_B=finished_B)

    def _read(self, array: jax.Array) -> np.ndarray:
        """An array on the host, in every process."""
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)
