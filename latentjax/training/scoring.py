"""Log-likelihoods of continuations, on the mesh: what choosing between answers and perplexity of texts are made of.

Few programs are compiled: one for each length of rows (`training.request_packing`). The head is applied to the tokens
that are scored and to no others, some at a time, so the logits of a batch are never all there at once.
"""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latentjax.data.tokenizers.base import Tokenizer
from latentjax.errors import UserError
from latentjax.models.attention import SHARED_PREFIX
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training import processes
from latentjax.training.completion import Completer, Sampling
from latentjax.training.mesh import BATCH_AXES, batch_sharding, put_shards, replicated
from latentjax.training.programs import compile_lowered, memory_errors, sharded_tracing
from latentjax.training.request_packing import (
    PackedBatch,
    filling_id,
    grow_trees,
    make_batches,
    pack_rows,
    row_length,
)

# Most logits that are held at once, as float32 numbers: 64 MB.
_LOGITS_AT_ONCE = 1 << 24
# Rows are at least so long: shorter trees share one, and attention to what they do not see costs little up to here.
_SHORTEST_PACKED, _SHORTEST_ALONE = 256, 64
_IN_FLIGHT = 2
_moments = itertools.count()

Request = tuple[Sequence[int], Sequence[int]]  # ids of the context, at least one, and of the continuation


@dataclasses.dataclass(frozen=True)
class Refinement:
    """How many refinement passes there are.

    Attributes:
      num_jacobi_iterations: R.
      tolerance: in place of R as many passes as are needed for this, see `Recurrence.forward_until`; None: R.
    """

    num_jacobi_iterations: int
    tolerance: float | None = None


class Scorer:
    """Scores requests with one model; its programs are compiled when they are first needed, and kept."""

    def __init__(
        self,
        model: LanguageModel,
        params: Any,
        mesh: Mesh,
        *,
        refinement: Refinement,
        batch_tokens: int,
        note: Callable[[str], None] = lambda line: None,
        at: Callable[[], None] = lambda: None,
    ):
        """Prepares for a model; nothing is compiled yet.

        Args:
          model: its attention backend decides how requests share rows: with xla they share common beginnings too, a
            kernel that tells documents apart takes several a row, and one that does not takes one.
          params: as the mesh's sharding rules lay them out; may be replaced between calls, by others laid out alike.
          batch_tokens: tokens of a batch, padding included.
          note: is told when a program is compiled; at: is called after every batch.
        """
        self.params, self.mesh, self.max_length = params, mesh, model.spec.max_position_embeddings
        self._refinement, self._batch_tokens, self._note, self.at = refinement, batch_tokens, note, at
        self._shares = model.spec.attention in ("xla", SHARED_PREFIX.name)
        self._masks = self._shares or model.spec.attention != "cudnn"
        spec = dataclasses.replace(
            model.spec, attention=SHARED_PREFIX.name if self._shares else model.spec.attention, remat="none"
        )
        self._decoder = model
        self._model = LanguageModel(spec, model.recurrence_spec)
        self._groups = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
        self._programs: dict[tuple[int, ...], Callable] = {}
        self.seconds_compiling = 0.0

    def score(self, requests: Sequence[Request], advance: Callable[[int], None] = lambda count: None) -> list:
        """Scores continuations.

        A request longer than the model's positions loses tokens from its beginning.

        Args:
          advance: called with a number of targets that have been scored, now and then.

        Returns:
          (log-likelihood in nats, whether the continuation is what greedy decoding would give) of each request; a token
          counts as greedy where no logit is above its own.

        Raises:
          UserError: a continuation is longer than the model's positions; the device memory does not suffice.
        """
        trees = grow_trees([self._cut(*request) for request in requests], self.max_length, share=self._shares)
        shortest = min(_SHORTEST_PACKED if self._masks else _SHORTEST_ALONE, row_length(self.max_length, 1))
        shortest = max(shortest, self.mesh.shape["sequence"])
        rows = pack_rows(trees, shortest, together=self._masks)
        total, is_greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        waiting: deque[tuple[PackedBatch, tuple]] = deque()

        def finish() -> None:
            batch, results = waiting.popleft()
            log_probs_GK, greedy_GK = jax.device_get(results)
            for group, numbers in enumerate(batch.requests):
                np.add.at(total, numbers, log_probs_GK[group, : len(numbers)].astype(np.float64))
                np.logical_and.at(is_greedy, numbers, greedy_GK[group, : len(numbers)])
            advance(int(batch.counts_G.sum()))
            self.at()

        with memory_errors("scoring"):
            for batch in make_batches(rows, self._batch_tokens, self._groups, segmented=self._masks):
                waiting.append((batch, self._run(batch)))
                if len(waiting) > _IN_FLIGHT:
                    finish()
            while waiting:
                finish()
        return list(zip(total.tolist(), is_greedy.tolist(), strict=True))

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        end_id: int,
        sampling: dict[str, float],
        stops: Callable[[Sequence[int]], bool],
        advance: Callable[[int], None] = lambda count: None,
    ) -> list[list[int]]:
        """Continues prompts with the same model, exactly, whatever the refinement.

        Args:
          sampling: `temperature`, `top_k`, `top_p`; empty: greedy.
          stops: whether a continuation, so far, is over.
          advance: is called with a number of prompts that are done.

        Returns:
          The ids that follow each prompt, without the end of text, up to the first of them with which it was over.
        """
        ids_of: list[list[int]] = [[] for _ in prompts]

        def watch(index: int, ids: list[int]) -> bool:
            self.at()
            for each in ids:
                ids_of[index].append(each)
                if stops(ids_of[index]):
                    return True
            return False

        completer = Completer(
            self._decoder, self.params, self.mesh, num_ids=self._decoder.spec.vocab_size, end_ids=[end_id]
        )
        # Who asks for the likeliest tokens only, and for no temperature, asks for draws among them.
        settings: dict[str, Any] = {"temperature": 1.0} | sampling if sampling else {}
        choice = Sampling(**settings)
        completer.complete(prompts, num_tokens, choice, watch=watch, batch_tokens=self._batch_tokens, done=advance)
        return ids_of

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        """The inputs and targets of a request; as many of its last inputs as the model has positions."""
        if not 0 < len(continuation) <= self.max_length or not len(context):
            raise UserError(
                f"a continuation of {len(continuation)} tokens behind a context of {len(context)} cannot be scored: "
                f"both must have some, and the continuation at most {self.max_length}, the model's positions"
            )
        ids = [*context, *continuation]
        return ids[-self.max_length - 1 : -1], list(continuation)

    def _run(self, batch: PackedBatch) -> tuple:
        arrays = {
            "tokens": batch.tokens_BT,
            "positions": batch.positions_BT,
            "segment_ids": batch.segment_ids_BT,
            "places": batch.places_GK,
            "targets": batch.targets_GK,
        }
        sharding = batch_sharding(self.mesh)
        on_devices = {
            name: put_shards(array.shape, sharding, lambda index, array=array: array[index])
            for name, array in arrays.items()
            if array is not None
        }
        count = batch.counts_G.max()
        on_devices["count"] = put_shards((), replicated(self.mesh), lambda index: np.asarray(count, np.int32))
        return self._program(on_devices)(self.params, on_devices)

    def _program(self, batch: dict[str, jax.Array]) -> Callable:
        shape = batch["tokens"].shape
        if shape not in self._programs:
            began = time.monotonic()
            with sharded_tracing(self.mesh):
                lowered = jax.jit(self._score_batch, out_shardings=replicated(self.mesh)).lower(self.params, batch)
            self._programs[shape] = compile_lowered(lowered, self.mesh)
            processes.wait_for_all(f"compiled for scoring {next(_moments)}")
            seconds = time.monotonic() - began
            self.seconds_compiling += seconds
            self._note(f"compiled for {shape[0]} rows of {shape[1]} tokens in {seconds:.1f} s")
        return self._programs[shape]

    def _score_batch(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of the targets, float32 (G, K), and whether each is greedy, bool (G, K)."""
        settings = {"positions_BT": batch["positions"], "segment_ids_BT": batch.get("segment_ids")}
        variables = {"params": params}
        if self._refinement.tolerance is None:
            settings["num_jacobi_iterations"] = self._refinement.num_jacobi_iterations
            hidden_BTD, _ = self._model.apply(variables, batch["tokens"], **settings, method="hidden")
        else:
            if "segment_ids" in batch:
                # The segment that fills a row up is its last and highest; it need not settle.
                settings["counted_BT"] = batch["segment_ids"] < filling_id(batch["tokens"].shape[1])
            hidden_BTD, _, _ = self._model.apply(
                variables, batch["tokens"], tolerance=self._refinement.tolerance, **settings, method="hidden_until"
            )
        hidden_GND = hidden_BTD.reshape(self._groups, -1, hidden_BTD.shape[-1])
        chunk = max(16, 1 << (_LOGITS_AT_ONCE // self._groups // self._model.spec.vocab_size).bit_length() - 1)
        chunk = min(chunk, row_length(batch["places"].shape[1], 1))
        num_targets = batch["places"].shape[1]
        padding = ((0, 0), (0, -num_targets % chunk))
        places_GK, targets_GK = jnp.pad(batch["places"], padding), jnp.pad(batch["targets"], padding)

        def score_chunk(number: jax.Array, results: tuple) -> tuple:
            places_Gk, targets_Gk = (
                jax.lax.dynamic_slice_in_dim(array, number * chunk, chunk, axis=1) for array in (places_GK, targets_GK)
            )
            hidden_GkD = jnp.take_along_axis(hidden_GND, places_Gk[..., None], axis=1)
            logits_GkV = self._model.apply(variables, hidden_GkD, method="logits")
            target_Gk = jnp.take_along_axis(logits_GkV, targets_Gk[..., None], axis=-1)[..., 0]
            found = (target_Gk - jax.nn.logsumexp(logits_GkV, axis=-1), target_Gk >= jnp.max(logits_GkV, axis=-1))
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(array, part, number * chunk, axis=1)
                for array, part in zip(results, found, strict=True)
            )

        start = (jnp.zeros(places_GK.shape, jnp.float32), jnp.zeros(places_GK.shape, bool))
        log_probs_GK, greedy_GK = jax.lax.fori_loop(0, -(-batch["count"] // chunk), score_chunk, start)
        return log_probs_GK[:, :num_targets], greedy_GK[:, :num_targets]


# (scorer, the run's tokenizer) to what is logged of tasks, by key.
ScoreTasks = Callable[[Scorer, Tokenizer], dict[str, float]]
