"""The start of a run: opening data, mesh and directory, compiling every program, restoring or making the state."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.data.skips import Skip, batch_of_step, skips_from_json, skips_to_json
from latentjax.data.sources import Sources, open_sources
from latentjax.errors import UserError
from latentjax.recurrence.base import Recurrence
from latentjax.recurrence.draw import TrainSchedule, Work
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import processes, programs, run_directory
from latentjax.training.anomalies import Monitor
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.checkpoint_files import directory_of
from latentjax.training.data_position import remove_abandoned, skips_of_run
from latentjax.training.goodput import Goodput
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.sampling import encode_prompts
from latentjax.training.scoring import Scorer, ScoreTasks
from latentjax.training.signals import ending_at_once
from latentjax.training.state import TrainState, abstract_state, create_state, state_from_params

# From shapes, dtypes and shardings to parameters that are so; raises `UserError`.
ReadParams = Callable[[Any], Any]


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
    schedule: TrainSchedule
    train_steps: dict[Work, Callable]
    eval_step: Callable | None
    abstract_state: TrainState
    skips: tuple[Skip, ...]  # stretches of batches that are stepped over
    start_clock: StartClock
    goodput: Goodput
    initial_params: ReadParams | None = None  # what the run begins with; None: random ones
    at: Callable[[int, str], None] = lambda step, doing: None  # is told where the loop is (`Watchdog.at`)
    score_tasks: ScoreTasks | None = None  # runs tasks, with a scorer made when it is first needed
    scorer: Scorer | None = None
    # From here on set by `load_state`.
    state: TrainState | None = None  # the loop takes it over
    start_step: int = 0
    monitor: Monitor = dataclasses.field(init=False)

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    def checkpoint_notes(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds besides arrays.

        Data are a function of the step, the seed and the stretches that are stepped over; draws of C and R and samples
        of step and seed.
        """
        sequences = batch_of_step(step, self.skips) * self.config.data.batch_size
        return {
            "step": step,
            "data_position": {"sequences": sequences, "seed": self.config.data.seed},
            "data_skips": skips_to_json(self.skips),
            "monitor": self.monitor.notes(),
            "goodput": self.goodput.to_json(),
            "seed": self.config.train.seed,
            "tokenizer": self.sources.tokenizer.fingerprint,
            "config": self.config.to_dict(),
            "versions": run_directory.package_versions(),
        }


def load_state(run: Run) -> dict[str, Any]:
    """Sets the state of a run and its step to those of the newest checkpoint or, without one, of the beginning.

    Returns:
      what was noted with the checkpoint, nothing without one.

    Raises:
      UserError: the checkpoint holds another model's state, or that of a run with another tokenizer.
    """
    config, notes = run.config, {}
    if run.checkpoints.latest_step is None:
        optimizer = make_optimizer(config.optimizer, config.train.num_steps)
        with programs.memory_errors("initialising the parameters"):
            if run.initial_params is None:
                state = create_state(run.model, optimizer, run.mesh, config.train.seed)
            else:
                state = state_from_params(run.initial_params(run.abstract_state.params), optimizer, run.abstract_state)
            run.state = jax.block_until_ready(state)
    else:
        run.state, notes = run.checkpoints.restore()
        if notes["tokenizer"] != run.sources.tokenizer.fingerprint:
            raise UserError(
                f"the run in {run.workdir} was trained with another tokenizer than that of {run.sources.description}, "
                "so its ids mean different text: give the data that it was begun with, or data prepared with that "
                "tokenizer"
            )
    run.start_step = int(notes.get("step", 0))
    run.monitor = Monitor(config.train, notes.get("monitor"))
    # More than the file has only if that was removed.
    run.skips = max(run.skips, skips_from_json(notes.get("data_skips", [])), key=len)
    return notes


def prepare_run(
    config: ConfigDict, workdir: Path, resources: contextlib.ExitStack, initial_params: ReadParams | None = None
) -> Run:
    """Opens data, mesh and directory, compiles every program, and restores or initialises the state.

    What has to be given back when the run ends, well or not, is pushed onto `resources`.
    """
    start_clock, goodput = StartClock(), Goodput()
    sources = open_sources(
        config.data, progress=processes.is_first(), needs_evaluation=config.train.eval_every_steps > 0
    )
    if sources.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the data ({sources.description}) have a vocabulary of {sources.vocab_size}, larger than "
            f"model.vocab_size={config.model.vocab_size}: raise that, or use a tokenizer with fewer pieces"
        )
    recurrence = config.recurrence
    pauses = recurrence.method == "pause" and recurrence.num_latent_thoughts > 0 and recurrence.pause_token_id == -1
    if pauses and sources.vocab_size == config.model.vocab_size:
        raise UserError(
            f"recurrence.pause_token_id=-1 is the last of model.vocab_size={config.model.vocab_size} tokens, but the "
            f"data ({sources.description}) have as many: raise model.vocab_size by one or more, or name a token"
        )
    if config.train.sample_every_steps:
        train, limit = config.train, config.model.max_position_embeddings
        encode_prompts(sources.tokenizer, train.sample_prompts, train.sample_tokens, limit)
    start_clock.note("opening the data")
    mesh = make_mesh(config, jax.devices())
    programs.use_compilation_cache(config.train.compilation_cache)
    model = programs.make_model(config, mesh)
    if (claimed := processes.on_first(lambda: run_directory.claim(workdir, config))) is not None:
        changes, lock = claimed
        resources.callback(lock.close)
        for change in changes:
            processes.say(f"config changed since the run was last started: {change}")

    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    abstract = abstract_state(model, optimizer, mesh)
    checkpoints = Checkpoints(directory_of(config.checkpoint.directory, workdir), config.checkpoint, abstract)
    run = Run(
        config=config,
        workdir=workdir,
        sources=sources,
        model=model,
        recurrence=make_recurrence(model.recurrence_spec),
        mesh=mesh,
        checkpoints=checkpoints,
        schedule=programs.schedule_of(config),
        train_steps={},
        eval_step=None,
        abstract_state=abstract,
        skips=skips_of_run(workdir),
        start_clock=start_clock,
        goodput=goodput,
        initial_params=initial_params,
    )
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    processes.say(
        f"{config.recurrence.method} {model.spec.architecture}, {run.num_params:,} parameters, on {mesh.size} "
        f"{jax.devices()[0].device_kind}{hosts} ({sizes}), attention by {model.spec.attention}; "
        f"{sources.description}"
    )
    remove_abandoned(checkpoints, run.skips)
    notes = load_state(run)
    processes.on_first(lambda: run_directory.keep_tokenizer(workdir, sources.tokenizer))
    if notes:
        processes.say(f"resuming after step {run.start_step} of {config.train.num_steps}")
    start_clock.note("making the state")
    goodput.take_up(workdir, notes.get("goodput"))
    goodput.book("start")
    if run.start_step < config.train.num_steps:
        began = time.monotonic()
        most = " at most" if config.recurrence.train_tolerance else ""
        processes.say(f"compiling the step for {run.schedule.description}{most}")
        evaluates = config.train.eval_every_steps > 0
        with ending_at_once():
            run.train_steps, run.eval_step = programs.compile_programs(config, model, mesh, abstract, evaluates)
        processes.wait_for_all("compiled")
        processes.say(f"compiled in {time.monotonic() - began:.1f} s")
        start_clock.note("compiling")
        goodput.book("compile")
    if processes.is_first():
        goodput.write(workdir, at_once=True)
    return run
