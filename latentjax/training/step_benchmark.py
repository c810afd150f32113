"""How long training steps take, for every C and R that a recipe draws or for several C, on the devices that are here.

The programs take turns, step by step, round by round: what a noisy machine adds to one it adds to all, so that ratios
of their times mean something where the times do not.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.data.windows import document_layout
from latentjax.errors import UserError
from latentjax.recurrence.methods import train_recurrence
from latentjax.training.flops import peak_flops, work_flops_per_token
from latentjax.training.mesh import make_mesh, put_batch, rows_of_process
from latentjax.training.optimizer import make_optimizer
from latentjax.training.programs import compile_lowered, lower_train_step, make_model, schedule_of
from latentjax.training.state import TrainState, abstract_state, create_state

PROMISED = 0.1  # step times are proportional to token-forwards within this share
_EOD = 0
_DOCUMENTS_PER_WINDOW = 4  # on average, where documents are masked


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """One program, measured.

    Attributes:
      num_latent_thoughts: C; num_jacobi_iterations: R.
      token_forwards: slots through the backbone per token in one training forward.
      model_flops: of a step, as MFU counts them.
      num_tokens: of a batch.
      peak_flops: FLOP/s that all devices could do; None: not known.
      seconds: of a step, the mean of each round.
      trace_seconds, compile_seconds: before the first step.
      planned_bytes: what the compiler says the program takes at most, on one device.
      peak_bytes: what was in use at most until this program's first step was done, and `peak_source`, where that was
        read; programs come in order of size, so it is this program's own. None: the platform does not tell.
    """

    num_latent_thoughts: int
    num_jacobi_iterations: int
    token_forwards: int
    model_flops: float
    num_tokens: int
    peak_flops: float | None
    seconds: tuple[float, ...]
    trace_seconds: float
    compile_seconds: float
    planned_bytes: int | None
    peak_bytes: int | None
    peak_source: str

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Seconds of a step in the fastest round."""
        return min(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.num_tokens / self.median

    @property
    def slots_per_second(self) -> float:
        """Slots that go forward through the backbone, by the median."""
        return self.token_forwards * self.tokens_per_second

    @property
    def mfu(self) -> float | None:
        """Share of the peak, by the median."""
        return self.model_flops / self.median / self.peak_flops if self.peak_flops else None

    def line(self) -> str:
        """The program as a row of a table; see `HEADER`."""
        mfu = "" if self.mfu is None else f"{self.mfu:.1%}"
        planned, peak = (
            "" if size is None else f"{size / 2**30:.2f}" for size in (self.planned_bytes, self.peak_bytes)
        )
        return (
            f"{self.num_latent_thoughts:>2} {self.num_jacobi_iterations:>2} {1e3 * self.median:>10,.1f} "
            f"{1e3 * self.best:>10,.1f} {self.tokens_per_second:>11,.0f} {self.slots_per_second:>11,.0f} "
            f"{mfu:>6} {planned:>12} {peak:>9} "
            f"{self.trace_seconds:>8.1f} {self.compile_seconds:>10.1f}"
        )


HEADER = (
    f"{'C':>2} {'R':>2} {'median ms':>10} {'best ms':>10} {'tokens/s':>11} {'slots/s':>11} {'MFU':>6} "
    f"{'planned GiB':>12} {'peak GiB':>9} {'trace s':>8} {'compile s':>10}"
)


@dataclasses.dataclass(frozen=True)
class Proportion:
    """Two programs' step times next to the work that they do, the larger in terms of the smaller.

    Attributes:
      small, large: their (C, R).
      time_median: the median of the rounds' ratios; time_best: the ratio of the fastest rounds.
      token_forwards, model_flops: the same ratio of the work.
      promised: whether time is promised to go with token-forwards: the two have the same C.
    """

    small: tuple[int, int]
    large: tuple[int, int]
    time_median: float
    time_best: float
    token_forwards: float
    model_flops: float
    promised: bool

    @property
    def holds(self) -> bool:
        """Whether the promise is kept, or none was given."""
        return not self.promised or abs(self.time_median / self.token_forwards - 1) <= PROMISED

    def line(self) -> str:
        """The comparison as a row of a table; see `PROPORTION_HEADER`."""
        names = (f"C={c} R={r}" for c, r in (self.large, self.small))
        verdict = ("within" if self.holds else "NOT within") + f" {PROMISED:.0%}" if self.promised else ""
        return (
            f"{' / '.join(names):<20} {self.time_median:>11.3f} {self.time_best:>9.3f} {self.token_forwards:>14.3f} "
            f"{self.model_flops:>11.3f} {self.time_median / self.token_forwards:>16.3f} "
            f"{self.time_median / self.model_flops:>13.3f}  {verdict}"
        )


PROPORTION_HEADER = (
    f"{'ratio of':<20} {'time median':>11} {'time best':>9} {'token-forwards':>14} {'model FLOPs':>11} "
    f"{'time / forwards':>16} {'time / FLOPs':>13}"
)


def benchmark_steps(config: ConfigDict, thoughts: Sequence[int], rounds: int, steps: int) -> list[StepTimes]:
    """Measures the step of every C and R that the recipe draws.

    Args:
      config: validated.
      thoughts: values of C in place of the recipe's, and of its stages; empty: the recipe's own.
      rounds: how often every program has its turn; steps: how many steps a turn has.

    Returns:
      One result for each program, in order of C and R.

    Raises:
      UserError: the mesh does not fit the devices, the method has no C, or the device memory does not suffice.
    """
    if thoughts and config.recurrence.method != "latent":
        raise UserError(f"--thoughts: recurrence.method={config.recurrence.method!r} has no thoughts; choose latent")
    progress = Progress(jax.process_index() == 0)
    mesh = make_mesh(config, jax.devices())
    configs = [_with_thoughts(config, count) for count in thoughts] or [config]
    batch = device_batch(config, mesh)
    peak = peak_flops(mesh.devices.flat[0])
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)

    programs, results = {}, {}
    for each in configs:
        model = make_model(each, mesh)
        abstract = abstract_state(model, optimizer, mesh)
        num_tokens = each.data.batch_size * each.data.sequence_length
        for work in schedule_of(each).works:
            iterations = work.num_jacobi_iterations
            of_work = train_recurrence(model.recurrence_spec, work.num_latent_thoughts)
            key = (of_work.forwards_per_token - 1, iterations)
            progress.note(f"C={key[0]} R={key[1]}: compiling")
            start = time.perf_counter()
            lowered = lower_train_step(each, model, mesh, abstract, work)
            traced = time.perf_counter()
            programs[key] = compile_lowered(lowered, mesh)
            compiled = time.perf_counter()
            progress.note(
                f"C={key[0]} R={key[1]}: traced in {traced - start:.1f} s, compiled in {compiled - traced:.1f} s"
            )
            flops = work_flops_per_token(model.spec, model.recurrence_spec, each.data.sequence_length, work)
            results[key] = StepTimes(
                num_latent_thoughts=key[0],
                num_jacobi_iterations=iterations,
                token_forwards=of_work.token_forwards(iterations),
                model_flops=flops * num_tokens,
                num_tokens=num_tokens,
                peak_flops=peak and peak * mesh.size,
                seconds=(),
                trace_seconds=traced - start,
                compile_seconds=compiled - traced,
                planned_bytes=_planned_bytes(programs[key]),
                peak_bytes=None,
                peak_source="",
            )

    # One state serves all programs: C and R change what is done with the parameters, not the parameters.
    state = create_state(make_model(configs[0], mesh), optimizer, mesh, config.train.seed)
    for key in sorted(programs, key=lambda key: results[key].planned_bytes or 0):
        state, _ = time_steps(programs[key], state, batch, 1)
        peak_bytes, source = _peak_bytes(mesh.devices.flat[0])
        results[key] = dataclasses.replace(results[key], peak_bytes=peak_bytes, peak_source=source)
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in programs}
    for turn in range(rounds):
        for key, program in programs.items():
            state, elapsed = time_steps(program, state, batch, steps)
            seconds[key].append(elapsed / steps)
        times = ", ".join(f"C={c} R={r} {1e3 * each[-1]:,.1f} ms" for (c, r), each in seconds.items())
        progress.note(f"round {turn + 1} of {rounds}: {times}")
    return [dataclasses.replace(results[key], seconds=tuple(seconds[key])) for key in sorted(results)]


def proportions(results: Sequence[StepTimes]) -> list[Proportion]:
    """Compares each program with the first of its C, and the first of each C with the first of all."""
    compared = []
    for result in results[1:]:
        siblings = [other for other in results if other.num_latent_thoughts == result.num_latent_thoughts]
        base = results[0] if result is siblings[0] else siblings[0]
        rounds = [large / small for large, small in zip(result.seconds, base.seconds, strict=True)]
        compared.append(
            Proportion(
                small=(base.num_latent_thoughts, base.num_jacobi_iterations),
                large=(result.num_latent_thoughts, result.num_jacobi_iterations),
                time_median=statistics.median(rounds),
                time_best=result.best / base.best,
                token_forwards=result.token_forwards / base.token_forwards,
                model_flops=result.model_flops / base.model_flops,
                promised=base is siblings[0],
            )
        )
    return compared


def time_steps(
    program: Callable[[TrainState, Any], tuple[TrainState, Any]], state: TrainState, batch: Any, steps: int
) -> tuple[TrainState, float]:
    """Takes steps one after another, as training does; returns the state and the seconds that all took."""
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = program(state, batch)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - start


def random_batch(config: ConfigDict, rows: int) -> dict[str, np.ndarray]:
    """A batch of so many rows as training has them: random tokens and, if masked, documents of random lengths."""
    data, rng = config.data, np.random.default_rng(config.data.seed)
    shape = (rows, data.sequence_length + 1)
    tokens = rng.integers(min(1, config.model.vocab_size - 1), config.model.vocab_size, shape).astype(np.int32)
    if not data.mask_documents:
        return {"tokens": tokens, "loss_weights": np.ones((rows, data.sequence_length), np.float32)}
    ends = rng.random(shape) < _DOCUMENTS_PER_WINDOW / data.sequence_length
    tokens = np.where(ends, np.int32(_EOD), tokens)
    segment_ids, positions, loss_weights = document_layout(tokens, _EOD)
    return {"tokens": tokens, "loss_weights": loss_weights, "segment_ids": segment_ids, "positions": positions}


def device_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A random global batch on the mesh."""
    rows = rows_of_process(mesh, config.data.batch_size)
    batch = random_batch(config, config.data.batch_size)
    return put_batch({name: array[rows] for name, array in batch.items()}, mesh, rows, config.data.batch_size)


def _with_thoughts(config: ConfigDict, num_latent_thoughts: int) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.recurrence.update(num_latent_thoughts=num_latent_thoughts, train_schedule=(), handover_ratio=0.0)
    return changed


def _planned_bytes(program: Any) -> int | None:
    """What the compiler says that a program takes at most on a device, arguments and results included."""
    plan = program.memory_analysis()
    if plan is None:
        return None
    shared = plan.alias_size_in_bytes  # of results that lie where arguments were
    return plan.argument_size_in_bytes + plan.output_size_in_bytes - shared + plan.temp_size_in_bytes


def _peak_bytes(device: jax.Device) -> tuple[int | None, str]:
    """The most memory that was ever in use, and where that was read."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "the device's allocator"
    if device.platform != "cpu" or sys.platform == "win32":
        return None, ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the resident memory of the process"
