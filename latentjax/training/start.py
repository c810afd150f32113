"""The start of a run: opening data, mesh and directory, compiling every program, restoring or making the state."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.data.sources import Sources, open_sources
from latentjax.errors import UserError
from latentjax.recurrence.base import Recurrence
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import processes, programs, run_directory
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.checkpoint_files import directory_of
from latentjax.training.host_memory import keep_freed_memory
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.sampling import encode_prompts
from latentjax.training.state import TrainState, abstract_state, create_state


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
    train_steps: dict[int, Callable]
    eval_step: Callable | None
    state: TrainState | None
    num_params: int
    start_step: int
    earlier_seconds: float  # wall time that the run had before this start
    start_clock: StartClock
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

    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    abstract = abstract_state(model, optimizer, mesh)
    checkpoints = Checkpoints(directory_of(config.checkpoint.directory, workdir), config.checkpoint, abstract)
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
        state, notes = checkpoints.restore()
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
