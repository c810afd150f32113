"""The train loop: set up, resume, then step, log, evaluate, sample and save, in a fixed order."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.data.batches import eval_batches, train_batches
from latentjax.data.row import TokenRow
from latentjax.data.sources import Sources, open_sources
from latentjax.errors import UserError
from latentjax.recurrence.base import Recurrence
from latentjax.recurrence.draw import draw_jacobi_iterations
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import processes, programs, run_directory
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.evaluation import EVALUATION_KEYS, evaluate
from latentjax.training.feeding import put_ahead
from latentjax.training.flops import peak_flops, train_flops_per_token
from latentjax.training.host_memory import keep_freed_memory
from latentjax.training.mesh import make_mesh, rows_of_process
from latentjax.training.metrics import MetricsLog
from latentjax.training.optimizer import make_optimizer
from latentjax.training.progress import TrainProgress
from latentjax.training.sampling import encode_prompts, sample_text
from latentjax.training.signals import StopRequest
from latentjax.training.state import TrainState, abstract_state, create_state


@dataclasses.dataclass
class Run:
    """All that the loop works with, made by `prepare_run`."""

    config: ConfigDict
    workdir: Path
    sources: Sources
    model: LanguageModel
    recurrence: Recurrence
    mesh: Mesh
    checkpoints: Checkpoints
    train_steps: dict[int, Callable]
    eval_step: Callable | None
    state: TrainState | None
    num_params: int
    start_step: int
    earlier_seconds: float  # wall time that the run had before this start
    start_clock: "StartClock"
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def wall_seconds(self) -> float:
        """Wall time of the run over all its starts."""
        return self.earlier_seconds + time.monotonic() - self.started

    def checkpoint_notes(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides arrays. Data, draws of R and samples are functions of step and seeds."""
        return {
            "step": step,
            "data_position": {"sequences": step * self.config.data.batch_size, "seed": self.config.data.seed},
            "seed": self.config.train.seed,
            "tokenizer": self.sources.tokenizer.fingerprint,
            "wall_seconds": self.wall_seconds,
            "config": self.config.to_dict(),
            "versions": run_directory.package_versions(),
        }


def train(config: ConfigDict, workdir: Path, stop: StopRequest) -> dict[str, Any] | None:
    """Trains to `train.num_steps`, resuming where the run in `workdir` is.

    Args:
      config: validated (`latentjax.validation`).
      stop: entered for the steps and asked after each; when it says so the state is saved and None returned.

    Returns:
      The summary that the first process has written to summary.json ({} in the others), or None if it was stopped.

    Raises:
      UserError: anything about data, mesh or directory that the user can mend.
    """
    run = prepare_run(config, workdir)
    log = MetricsLog(workdir, run.start_step, writes=processes.is_first())
    progress = TrainProgress(run.start_step, config.train.num_steps, shows=processes.is_first())
    try:
        # Until here nothing would be lost: signals did what they always do.
        with stop:
            with contextlib.closing(_train_batches(run)) as batches, programs.memory_errors("training"):
                state, step = _steps(run, batches, log, progress, stop)
            run.checkpoints.save(state, step, run.checkpoint_notes(step))
            run.checkpoints.close()
        if step < config.train.num_steps:
            progress.note(f"saved step {step} to {workdir / 'checkpoints'}; the same command continues from there")
            return None
        if not processes.is_first():
            return {}
        summary = _summary(run, log)
        run_directory.write_summary(workdir, summary)
        return summary
    finally:
        progress.close()
        log.close()


def prepare_run(config: ConfigDict, workdir: Path) -> Run:
    """Opens data, mesh and directory, compiles every program, and restores or initialises the state."""
    start_clock = StartClock()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sources = open_sources(
        config.data, progress=processes.is_first(), needs_evaluation=config.train.eval_every_steps > 0
    )
    if sources.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the data ({sources.description}) have a vocabulary of {sources.vocab_size}, larger than "
            f"model.vocab_size={config.model.vocab_size}: raise that, or use a tokenizer with fewer pieces"
        )
    encode_prompts(
        sources.tokenizer, config.train.sample_prompts, config.train.sample_tokens, config.model.max_position_embeddings
    )
    start_clock.note("opening the data")
    mesh = make_mesh(config, jax.devices())
    programs.use_compilation_cache(config.train.compilation_cache)
    model = programs.make_model(config, mesh)
    for change in processes.on_first(lambda: run_directory.claim(workdir, config)) or ():
        processes.say(f"config changed since the run was last started: {change}")

    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    abstract = abstract_state(model, optimizer, mesh)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    processes.say(
        f"{config.recurrence.method} {model.spec.architecture}, {num_params:,} parameters, on {mesh.size} "
        f"{jax.devices()[0].device_kind}{hosts} ({sizes}), attention by {model.spec.attention}; "
        f"{sources.description}"
    )
    if checkpoints.latest_step is None:
        start_step, earlier_seconds = 0, 0.0
        with programs.memory_errors("initialising the parameters"):
            state = jax.block_until_ready(create_state(model, optimizer, mesh, config.train.seed))
    else:
        state, notes = checkpoints.restore(abstract)
        start_step, earlier_seconds = int(notes["step"]), notes["wall_seconds"]
        if notes["tokenizer"] != sources.tokenizer.fingerprint:
            raise UserError(
                f"the run in {workdir} was trained with another tokenizer than that of {sources.description}, so its "
                "ids mean different text: give the data that it was begun with, or data prepared with that tokenizer"
            )
        processes.say(f"resuming after step {start_step} of {config.train.num_steps}")

    start_clock.note("making the state")
    run = Run(
        config=config,
        workdir=workdir,
        sources=sources,
        model=model,
        recurrence=make_recurrence(model.recurrence_spec),
        mesh=mesh,
        checkpoints=checkpoints,
        train_steps={},
        eval_step=None,
        state=state,
        num_params=num_params,
        start_step=start_step,
        earlier_seconds=earlier_seconds,
        start_clock=start_clock,
    )
    if start_step < config.train.num_steps:
        began = time.monotonic()
        iterations = ", ".join(map(str, programs.distinct_iterations(model)))
        processes.say(f"compiling the step for R = {iterations}")
        evaluates = config.train.eval_every_steps > 0
        run.train_steps, run.eval_step = programs.compile_programs(config, model, mesh, abstract, evaluates)
        processes.wait_for_all("compiled")
        processes.say(f"compiled in {time.monotonic() - began:.1f} s")
        start_clock.note("compiling")
    return run


def _steps(
    run: Run, batches: Iterator[dict[str, jax.Array]], log: MetricsLog, progress: TrainProgress, stop: StopRequest
) -> tuple[TrainState, int]:
    """Runs steps until the end or a stop; returns the state and its step."""
    config, train = run.config, run.config.train
    recorder = _Recorder(run, log, progress)
    state, step = run.state, run.start_step
    run.state = None  # the first step takes its memory over
    agreement = processes.StopAgreement(run.mesh, stop)
    while step < train.num_steps and not agreement.reached():
        num_iterations = 0
        if run.recurrence.uses_jacobi_iterations:
            num_iterations = draw_jacobi_iterations(config.recurrence.train_jacobi_iterations, train.seed, step)
        state, metrics = run.train_steps[num_iterations](state, next(batches))
        if step == run.start_step:
            jax.block_until_ready(metrics)
            progress.note(run.start_clock.first_step())
        # Only now, with the next step under way, are the numbers of the one before waited for.
        recorder.write()
        recorder.advance(num_iterations)
        step += 1
        progress.advance()

        last = step == train.num_steps
        evaluates = last or step % train.eval_every_steps == 0 if train.eval_every_steps else False
        samples = last or step % train.sample_every_steps == 0 if train.sample_every_steps else False
        samples = samples and train.sample_prompts
        saves = last or step % config.checkpoint.every_steps == 0
        if last or step % train.log_every_steps == 0 or evaluates:
            recorder.note(step, num_iterations, metrics)
        if not (evaluates or samples or saves):
            continue
        # The log first: a checkpoint whose metrics are lost would leave a hole that no restart fills.
        recorder.write((lambda params=state.params: _evaluate(run, params)) if evaluates else None)
        if samples:
            log.write_samples(step, sample_text(run.model, state.params, run.sources.tokenizer, config, step))
        if saves:
            log.sync()
            run.checkpoints.save(state, step, run.checkpoint_notes(step))
        recorder.restart_clock()
    recorder.write()  # of the last step before a signal
    log.sync()
    return state, step


def _train_batches(run: Run) -> Iterator[dict[str, jax.Array]]:
    """The batches from the run's first step to its last, on the devices."""
    data = run.config.data
    rows = rows_of_process(run.mesh, data.batch_size)
    batches = train_batches(run.sources.train, data, eod_id=run.sources.eod_id, start_step=run.start_step, rows=rows)
    limit = run.config.train.num_steps - run.start_step
    return put_ahead(batches, run.mesh, data.device_prefetch, limit, rows, data.batch_size)


def _evaluate(run: Run, params: Any) -> dict[str, float]:
    data, sources = run.config.data, run.sources
    rows = rows_of_process(run.mesh, data.batch_size)

    def batches(row: TokenRow) -> Iterator[dict[str, jax.Array]]:
        of_process = eval_batches(
            row,
            data,
            run.config.train.eval_batches,
            eod_id=sources.eod_id,
            bytes_per_id=sources.tokenizer.bytes_per_id,
            rows=rows,
        )
        return put_ahead(of_process, run.mesh, data.device_prefetch, rows=rows, batch_size=data.batch_size)

    return evaluate(run.eval_step, params, {name: batches(row) for name, row in sources.eval_sets.items()})


class StartClock:
    """Tells where the time goes from its making to the end of the first step."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._parts: list[str] = []
        self.seconds_to_first_step: float | None = None

    def note(self, part: str) -> None:
        """Ends a part of the start."""
        now = time.monotonic()
        self._parts.append(f"{part} {now - self._last:.1f} s")
        self._last = now

    def first_step(self) -> str:
        """Ends the last part; returns a line about all of them."""
        self.note("first batch and step")
        self.seconds_to_first_step = self._last - self._began
        return f"first step after {self.seconds_to_first_step:.1f} s: {', '.join(self._parts)}"


class _Recorder:
    """Turns a step's metrics on the device into a line of the log, one step late so as not to wait for it."""

    def __init__(self, run: Run, log: MetricsLog, progress: TrainProgress):
        config = run.config
        self._log, self._progress, self._num_steps = log, progress, config.train.num_steps
        self._tokens_per_step = config.data.batch_size * config.data.sequence_length
        self._flops_per_step = {
            iterations: self._tokens_per_step
            * train_flops_per_token(run.model.spec, run.recurrence, config.data.sequence_length, iterations)
            for iterations in run.train_steps
        }
        peak = peak_flops(run.mesh.devices.flat[0])
        self._peak_flops = None if peak is None else peak * run.mesh.size
        self._pending: tuple[int, int, dict[str, jax.Array]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last line (evaluating, sampling, saving) out of the rates."""
        self._clock, self._steps, self._flops = time.monotonic(), 0, 0.0

    def advance(self, num_iterations: int) -> None:
        """Counts a step that was just dispatched."""
        self._steps += 1
        self._flops += self._flops_per_step[num_iterations]

    def note(self, step: int, num_iterations: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics until `write`."""
        self._pending = (step, num_iterations, metrics)

    def write(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Writes the line kept by `note`, if there is one, with the results of an evaluation made now."""
        if self._pending is None:
            return
        (step, num_iterations, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the step
        seconds = time.monotonic() - self._clock
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            **values,
            "num_jacobi_iterations": num_iterations,
            "tokens_per_second": self._steps * self._tokens_per_step / seconds,
            "mfu": self._flops / seconds / self._peak_flops if self._peak_flops else None,
            **(evaluate() if evaluate else {}),
        }
        self._log.write(line)
        self._progress.show(line, seconds / self._steps * (self._num_steps - step))
        self.restart_clock()


def _summary(run: Run, log: MetricsLog) -> dict[str, Any]:
    devices = run.mesh.devices.flat
    # With several sets, also those of each: KEY/NAME.
    evaluation = {key: value for key, value in log.last_evaluation.items() if key.split("/")[0] in EVALUATION_KEYS}
    return {
        "steps": log.last["step"],
        "tokens": log.last["tokens"],
        "loss": log.last["loss"],
        **evaluation,
        "parameters": run.num_params,
        "wall_seconds": round(run.wall_seconds, 1),
        # Of the last start; None where no step was left to do.
        "seconds_to_first_step": run.start_clock.seconds_to_first_step,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "mesh": dict(run.mesh.shape),
        "versions": run_directory.package_versions(),
    }
