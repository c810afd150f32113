"""What saving costs a run: steps with a checkpoint every so many against steps with none, in turns."""

import dataclasses
import statistics
import time
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.errors import UserError
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.programs import compile_lowered, lower_train_step, make_model, schedule_of
from latentjax.training.state import abstract_state, create_state
from latentjax.training.step_benchmark import device_batch, time_steps

PROMISED = 0.05  # share of the throughput that saving may cost


@dataclasses.dataclass(frozen=True)
class SavingTimes:
    """A turn of either kind is `every` steps; with saving, a checkpoint is begun before them and whole behind them.

    Attributes:
      every: steps of a turn, and so from one checkpoint to the next.
      num_tokens: of a step.
      state_bytes: of all arrays of the state, over all devices, each counted once.
      plain_seconds, saving_seconds: of each turn; what was still to be written at the end of a turn is counted, because
        the next save would wait for it.
      blocked_seconds: of each save, until the next step could begin.
      written_seconds: from there on until the checkpoint was whole.
    """

    every: int
    num_tokens: int
    state_bytes: int
    plain_seconds: tuple[float, ...]
    saving_seconds: tuple[float, ...]
    blocked_seconds: tuple[float, ...]
    written_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Throughput with saving over that without: the median of the rounds' ratios."""
        return statistics.median(
            plain / saving for plain, saving in zip(self.plain_seconds, self.saving_seconds, strict=True)
        )

    @property
    def holds(self) -> bool:
        """Whether saving costs no more than is promised."""
        return self.ratio >= 1 - PROMISED

    def lines(self) -> list[str]:
        """The figures, for people."""
        tokens = self.every * self.num_tokens
        rows = [
            f"{'round':>5} {'none tokens/s':>14} {'saving tokens/s':>16} {'ratio':>6} {'blocked s':>10} {'whole s':>8}"
        ]
        rounds = zip(self.plain_seconds, self.saving_seconds, self.blocked_seconds, self.written_seconds, strict=True)
        for number, (plain, saving, blocked, written) in enumerate(rounds, 1):
            rows.append(
                f"{number:>5} {tokens / plain:>14,.0f} {tokens / saving:>16,.0f} {plain / saving:>6.3f} "
                f"{blocked:>10.3f} {written:>8.2f}"
            )
        verdict = ("within" if self.holds else "NOT within") + f" {PROMISED:.0%}"
        return [
            f"state {self.state_bytes / 1e9:.3f} GB, saved every {self.every} steps",
            *rows,
            f"median: saving keeps {self.ratio:.3f} of the throughput, {verdict}; it blocks for "
            f"{statistics.median(self.blocked_seconds):.3f} s",
        ]


def benchmark_saving(config: ConfigDict, directory: Path, every: int, rounds: int) -> SavingTimes:
    """Measures the step of the smallest R that the recipe draws, which has the least to hide a save behind.

    Args:
      config: validated; of the `checkpoint` group nothing is read.
      directory: where checkpoints go; all processes' own.
      every: steps from one checkpoint to the next; rounds: turns of each kind.

    Raises:
      UserError: the mesh does not fit the devices, the device memory does not suffice, or a save fails.
    """
    progress = Progress(jax.process_index() == 0)
    mesh = make_mesh(config, jax.devices())
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, config.train.num_steps)
    abstract = abstract_state(model, optimizer, mesh)
    batch = device_batch(config, mesh)
    settings = config.checkpoint.copy_and_resolve_references()
    settings.update(max_to_keep=1, keep_every_steps=0, every_minutes=0.0)
    checkpoints = Checkpoints(epath.Path(directory.absolute()), settings, abstract)
    work = schedule_of(config).works[0]
    progress.note(f"C={work.num_latent_thoughts} R={work.num_jacobi_iterations}: compiling")
    program = compile_lowered(lower_train_step(config, model, mesh, abstract, work), mesh)
    state = create_state(model, optimizer, mesh, config.train.seed)
    state, _ = time_steps(program, state, batch, 1)

    plain, saving, blocked, written = [], [], [], []
    for turn in range(rounds + 1):  # the first round warms up and is not counted
        state, seconds = time_steps(program, state, batch, every)
        begun = time.perf_counter()
        checkpoints.save(state, turn, {"step": turn})
        free = time.perf_counter()
        state, _ = time_steps(program, state, batch, every)
        whole = checkpoints.settle()
        ended = time.perf_counter()
        if not whole:
            raise UserError(f"a checkpoint could not be written to {directory}: what was measured means nothing")
        if turn:
            plain.append(seconds)
            saving.append(ended - begun)
            blocked.append(free - begun)
            written.append(checkpoints.last_save_seconds)
            progress.note(f"round {turn} of {rounds}: {seconds:.2f} s plain, {saving[-1]:.2f} s with a save")
    checkpoints.close()
    return SavingTimes(
        every=every,
        num_tokens=config.data.batch_size * config.data.sequence_length,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract)),
        plain_seconds=tuple(plain),
        saving_seconds=tuple(saving),
        blocked_seconds=tuple(blocked),
        written_seconds=tuple(written),
    )
