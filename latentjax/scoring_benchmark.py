"""Our scoring of requests against the evaluation harness's own `hf` model, on our export of the same weights.

Both get the same requests as token ids, on the same device and as many threads, and must give the same numbers before
anything is timed. Then they take turns.
"""

import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.data.sample_text import PROSE, SOURCE
from latentjax.errors import UserError
from latentjax.interop import torch_peer, writing
from latentjax.interop.exported_config import config_from_specs, is_vanilla
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.optimizer import make_optimizer
from latentjax.training.peer_benchmark import single_device_mesh
from latentjax.training.programs import make_model
from latentjax.training.scoring import Refinement, Scorer
from latentjax.training.state import create_state

WANTED = 1.5  # our throughput in terms of the harness's
TOLERANCE = 1e-3  # of a log-likelihood, which sums tens of log-probabilities, in nats
_PEER_BATCHES = (1, 8)  # of which the fastest is taken

# Tokens of a context and of a continuation, lowest and highest, and continuations of each: as a byte-pair vocabulary of
# 50,000 makes them of the paper's tasks, and of two of them with five examples.
_SHAPES = {
    "lambada": ((60, 110), (1, 2), 1),
    "piqa": ((8, 25), (10, 35), 2),
    "arc": ((15, 45), (1, 10), 4),
    "sciq": ((60, 180), (1, 4), 4),
    "hellaswag": ((35, 110), (15, 40), 4),
    "race": ((300, 450), (5, 15), 4),
    "arc, five examples": ((170, 320), (1, 10), 4),
    "hellaswag, five examples": ((450, 650), (15, 40), 4),
}
Request = tuple[None, list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class ScoringTimes:
    """Both, measured.

    Attributes:
      num_requests, num_tokens: of the requests, each counted whole.
      compile_seconds: of our programs, which are not in the times; first_seconds: the first scoring, compilation in it.
      difference: the largest of a log-likelihood, in nats.
      peer_batch: requests of its batches.
      seconds, peer_seconds: of each round.
    """

    num_requests: int
    num_tokens: int
    compile_seconds: float
    first_seconds: float
    difference: float
    peer_batch: int
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios of throughput."""
        return statistics.median(peer / ours for ours, peer in zip(self.seconds, self.peer_seconds, strict=True))

    @property
    def holds(self) -> bool:
        """Whether it is as wanted."""
        return self.ratio >= WANTED

    def as_json(self) -> dict[str, Any]:
        """Returns it for a program."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "wanted": WANTED, "holds": self.holds}

    def lines(self) -> list[str]:
        """Returns it as a table."""
        rows = [
            f"{self.num_requests} requests of {self.num_tokens:,} tokens; log-likelihoods differ by at most "
            f"{self.difference:.1e}; compiling took {self.compile_seconds:.1f} s",
            f"{'':<22} {'requests/s, best':>17} {'median':>10} {'seconds, best':>14} {'median':>10}",
        ]
        for name, seconds in (("ours", self.seconds), (f"hf, batches of {self.peer_batch}", self.peer_seconds)):
            best, median = min(seconds), statistics.median(seconds)
            rows.append(
                f"{name:<22} {self.num_requests / best:>17.2f} {self.num_requests / median:>10.2f} {best:>14.2f} "
                f"{median:>10.2f}"
            )
        best = min(self.peer_seconds) / min(self.seconds)
        return [*rows, f"{'ratio':<22} {best:>17.2f} {self.ratio:>10.2f}   wanted {WANTED}"]


def benchmark_scoring(config: ConfigDict, questions: int, batch_tokens: int, rounds: int) -> ScoringTimes:
    """Checks the harness's model against ours, and times the two in turns.

    Args:
      config: validated; R is `recurrence.num_jacobi_iterations`, of both.
      questions: of each of the shapes.

    Raises:
      UserError: the harness, torch or transformers is not installed, or the two do not compute the same.
    """
    progress = Progress(True)
    mesh = single_device_mesh(config)
    model = make_model(config, mesh)
    requests = make_requests(questions, model.spec.vocab_size, model.spec.max_position_embeddings)
    params = create_state(model, make_optimizer(config.optimizer, 1), mesh, config.train.seed).params
    refinement = Refinement(config.recurrence.num_jacobi_iterations)
    scorer = Scorer(model, params, mesh, refinement=refinement, batch_tokens=batch_tokens, note=progress.note)
    pairs = [(context, continuation) for _, context, continuation in requests]
    began = time.perf_counter()
    scores = scorer.score(pairs)
    first_seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="latentjax-bench-") as name:
        _write_folder(Path(name), model, params)
        peers = _Peers(Path(name), model.spec.dtype, jax.devices()[0].platform)
    seconds_of = {}
    for size in _PEER_BATCHES:
        began = time.perf_counter()
        expected = peers.score(requests, size)
        seconds_of[size] = time.perf_counter() - began
        progress.note(f"hf, batches of {size}: {seconds_of[size]:.2f} s")
    difference = max(abs(one[0] - other[0]) for one, other in zip(scores, expected, strict=True))
    if not difference <= TOLERANCE:
        raise UserError(
            f"the harness's own model does not compute the same: a log-likelihood differs by {difference:.1e}, more "
            f"than {TOLERANCE:.0e}; nothing was timed (both must compute in float32: --config.model.dtype=float32)"
        )
    size = min(seconds_of, key=seconds_of.__getitem__)
    ours, theirs = [], []
    for turn in range(rounds):
        ours.append(_seconds(lambda: scorer.score(pairs)))
        theirs.append(_seconds(lambda: peers.score(requests, size)))
        progress.note(f"round {turn + 1} of {rounds}: ours {ours[-1]:.2f} s, hf {theirs[-1]:.2f} s")
    num_tokens = sum(len(context) + len(continuation) for context, continuation in pairs)
    measured = (difference, size, tuple(ours), tuple(theirs))
    return ScoringTimes(len(requests), num_tokens, scorer.seconds_compiling, first_seconds, *measured)


def make_requests(questions: int, vocab_size: int, longest: int) -> list[Request]:
    """Requests in the shapes of tasks: as the harness has them, (strings, context ids, continuation ids)."""
    draw = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        # Words of a text are not evenly spread: few are frequent, most are rare.
        count = min(draw.randint(low, high), longest // 2)
        return [int(vocab_size ** draw.random()) % vocab_size for _ in range(count)]

    requests: list[Request] = []
    for context_range, continuation_range, choices in _SHAPES.values():
        for _ in range(questions):
            context = ids(*context_range)
            requests += [(None, context, ids(*continuation_range)) for _ in range(choices)]
    return requests


class _Peers:
    """The harness's own model, with batches of any size."""

    def __init__(self, folder: Path, dtype: str, platform: str):
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise UserError(
                "the harness's own model needs lm_eval, torch, transformers and accelerate: pip install "
                "'latentjax[tasks,peer]'"
            ) from error
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        device = torch_peer.use_device(platform, threads)
        self._model = HFLM(pretrained=str(folder), device=device, dtype=dtype, batch_size=1, trust_remote_code=True)

    def score(self, requests: Sequence[Request], size: int) -> list[tuple[float, bool]]:
        """As `HarnessScorer.score`."""
        self._model.batch_size_per_gpu = size
        return self._model._loglikelihood_tokens(list(requests), disable_tqdm=True)


def write_model(folder: Path, model: LanguageModel, params: Any) -> None:
    """Writes a Hugging Face folder with the weights in float32."""
    writing.write_weights(folder, params, model.spec, "float32", 10**10)
    writing.write_configs(folder, config_from_specs(model.spec, model.recurrence_spec, "float32", 0))
    if not is_vanilla(model.recurrence_spec):
        writing.write_code(folder)


def _write_folder(folder: Path, model: LanguageModel, params: Any) -> None:
    """The same with a tokenizer, which is asked for but not used."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    write_model(folder, model, params)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([PROSE, SOURCE], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    (folder / "tokenizer_config.json").write_text(config)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
