"""Our generation against `generate` of transformers, on our export of the same weights.

Both continue the same prompts greedily by as many tokens, with a cache, on the same device and as many threads, and
must come to the same text before anything is timed. Then they take turns.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.errors import UserError
from latentjax.interop import torch_peer
from latentjax.interop.exported_config import is_vanilla
from latentjax.scoring_benchmark import write_model
from latentjax.training.completion import Completer, Sampling
from latentjax.training.optimizer import make_optimizer
from latentjax.training.peer_benchmark import single_device_mesh
from latentjax.training.programs import make_model
from latentjax.training.state import create_state

WANTED = 2.0  # our tokens per second in terms of the peer's
# The share of tokens that must be the same. Rounding may turn a choice between two tokens that are as likely, and what
# follows in that text with it.
_ALIKE = 0.9


@dataclasses.dataclass(frozen=True)
class GenerationTimes:
    """Both, measured, for one batch size.

    Attributes:
      batch_size, prompt_tokens, new_tokens: what was continued.
      alike: the share of tokens that are the same.
      compile_seconds: what our first run took longer than the fastest.
      seconds, peer_seconds: of each round, prompts included.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    alike: float
    compile_seconds: float
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios of tokens per second."""
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
        tokens = self.batch_size * self.new_tokens
        rows = [
            f"batch {self.batch_size}: {self.new_tokens} tokens behind {self.prompt_tokens}; {self.alike:.1%} of them "
            f"alike; compiling took {self.compile_seconds:.1f} s",
            f"{'':<14} {'tokens/s, best':>15} {'median':>10}",
        ]
        for name, seconds in (("ours", self.seconds), ("transformers", self.peer_seconds)):
            rows.append(f"{name:<14} {tokens / min(seconds):>15.1f} {tokens / statistics.median(seconds):>10.1f}")
        best = min(self.peer_seconds) / min(self.seconds)
        return [*rows, f"{'ratio':<14} {best:>15.2f} {self.ratio:>10.2f}   wanted {WANTED}"]


def benchmark_generation(
    config: ConfigDict, batch_sizes: Sequence[int], prompt_tokens: int, new_tokens: int, rounds: int
) -> list[GenerationTimes]:
    """Checks that both write the same, and times the two in turns.

    Args:
      config: validated; its model is filled with random weights.

    Raises:
      UserError: torch or transformers is not installed, the two do not write the same, or the model has too few
        positions.
    """
    progress = Progress(True)
    mesh = single_device_mesh(config)
    model = make_model(config, mesh)
    params = create_state(model, make_optimizer(config.optimizer, 1), mesh, config.train.seed).params
    with tempfile.TemporaryDirectory(prefix="latentjax-bench-") as name:
        write_model(Path(name), model, params)
        peer = _Peer(Path(name), not is_vanilla(model.recurrence_spec), jax.devices()[0].platform)
    ours = Completer(model, params, mesh, num_ids=model.spec.vocab_size, end_ids=[-1])
    results = []
    for batch_size in batch_sizes:
        rng = np.random.default_rng(batch_size)
        prompts = rng.integers(0, model.spec.vocab_size, (batch_size, prompt_tokens))

        def run(prompts: np.ndarray = prompts) -> np.ndarray:
            room = prompts.size + len(prompts) * new_tokens
            found = ours.complete(prompts.tolist(), new_tokens, Sampling(), batch_tokens=2 * room)
            return np.asarray(found)

        first_seconds, found = _timed(run)
        _, expected = _timed(lambda prompts=prompts: peer.generate(prompts, new_tokens))
        alike = float(np.mean(found == expected))
        if alike < _ALIKE:
            raise UserError(
                f"the two do not write the same: {alike:.1%} of {found.size} tokens are alike; nothing was timed (both "
                "must compute in float32: --config.model.dtype=float32)"
            )
        seconds, peer_seconds = [], []
        for turn in range(rounds):
            seconds.append(_timed(run)[0])
            peer_seconds.append(_timed(lambda prompts=prompts: peer.generate(prompts, new_tokens))[0])
            progress.note(
                f"batch {batch_size}, round {turn + 1} of {rounds}: ours {seconds[-1]:.2f} s, transformers "
                f"{peer_seconds[-1]:.2f} s"
            )
        measured = (alike, first_seconds - min(seconds), tuple(seconds), tuple(peer_seconds))
        results.append(GenerationTimes(batch_size, prompt_tokens, new_tokens, *measured))
    return results


class _Peer:
    """An exported folder in transformers."""

    def __init__(self, folder: Path, has_code: bool, platform: str):
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise UserError("the peer needs torch and transformers: pip install 'latentjax[peer]'") from error
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._torch, self._device = torch, torch_peer.use_device(platform, threads)
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=has_code, dtype=torch.float32)
        model = cast(Any, loaded)  # the class that transformers declares is not what comes
        self._model = model.eval().to(self._device)
        self._model.generation_config.eos_token_id = None  # every text has its full length

    def generate(self, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """The greedy continuations, (B, new_tokens)."""
        ids = self._torch.from_numpy(prompts).to(self._device)
        with self._torch.inference_mode():
            mask = self._torch.ones_like(ids)
            found = self._model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
            )
        return found[:, prompts.shape[1] :].cpu().numpy()


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found
