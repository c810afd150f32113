"""The compiled programs of a run: one train step per C and R, one evaluation step, all made before step 1."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.models.attention import choose_backend
from latentjax.models.attention_backend import AttentionRequest, compute_capability
from latentjax.models.loops import choose_loops
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.draw import TrainSchedule, Work
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import train_recurrence
from latentjax.training.compiler_options import options_for
from latentjax.training.mesh import RULES, batch_sharding, replicated
from latentjax.training.optimizer import learning_rate_schedule, make_optimizer
from latentjax.training.state import TrainState
from latentjax.training.step import Metrics, make_eval_step, make_train_step

_HOW_TO_SAVE_MEMORY = (
    "raise train.gradient_accumulation_steps or mesh.fsdp, set model.remat=keep_layer_inputs, set a smaller "
    "train.loss_chunk_tokens, or lower data.batch_size"
)

TrainStep = Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory`, so that a run that starts again need not wait; "": keeps none."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))


@contextlib.contextmanager
def sharded_tracing(mesh: Mesh) -> Iterator[None]:
    """Puts the mesh and the sharding rules in force for models traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def schedule_of(config: ConfigDict) -> TrainSchedule:
    """What the steps of a run compute; the works that can be drawn each need a program of their own."""
    return TrainSchedule.of(RecurrenceSpec(**config.recurrence), config.train.num_steps)


def largest_work(config: ConfigDict) -> Work:
    """That of the steps which take the most forwards, and so the most memory."""
    spec, works = RecurrenceSpec(**config.recurrence), schedule_of(config).works
    return max(works, key=lambda work: train_recurrence(spec, work[0]).token_forwards(work.num_jacobi_iterations))


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a training batch, as `data.windows` makes it."""
    rows, length = config.data.batch_size, config.data.sequence_length
    sharding = batch_sharding(mesh)

    def array(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width), dtype, sharding=sharding)

    batch = {"tokens": array(length + 1, jnp.int32), "loss_weights": array(length, jnp.float32)}
    if config.data.mask_documents:
        batch |= {"segment_ids": array(length, jnp.int32), "positions": array(length, jnp.int32)}
    return batch


def make_model(config: ConfigDict, mesh: Mesh) -> LanguageModel:
    """The model that the config describes, with the attention backend and loops that suit the mesh's devices.

    Raises:
      UserError: a backend was asked for that cannot serve there.
    """
    spec = resolved(ModelSpec(**config.model), mesh, config.data.mask_documents)
    return LanguageModel(spec, RecurrenceSpec(**config.recurrence))


def resolved(spec: ModelSpec, mesh: Mesh, mask_documents: bool) -> ModelSpec:
    """A model's settings with the attention backend and loops that suit the mesh's devices.

    Raises:
      UserError: a backend was asked for that cannot serve there.
    """
    device = mesh.devices.flat[0]
    request = AttentionRequest(
        platform=device.platform,
        mask_documents=mask_documents,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        sequence_shards=mesh.shape["sequence"],
        compute_capability=compute_capability(device),
    )
    return dataclasses.replace(
        spec,
        attention=choose_backend(spec.attention, request),
        loops=choose_loops(spec.loops, device.platform, spec.num_layers),
    )


def lower_train_step(
    config: ConfigDict,
    model: LanguageModel,
    mesh: Mesh,
    state: TrainState,
    work: Work,
) -> jax.stages.Lowered:
    """Traces the train step for one C and R and says where everything lies; nothing is compiled yet.

    Args:
      state: abstract, with shardings. The step takes the state over: its memory is reused for the new one.
    """
    step = make_train_step(
        model,
        make_optimizer(config.optimizer, config.train.num_steps),
        learning_rate_schedule(config.optimizer, config.train.num_steps),
        work=work,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        counts_damage=config.data.on_corrupt_block == "skip",
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    with sharded_tracing(mesh):
        return jitted.lower(state, abstract_batch(config, mesh))


def lower_eval_step(
    config: ConfigDict, model: LanguageModel, mesh: Mesh, params: Any, tolerance: float | None = None
) -> jax.stages.Lowered:
    """Traces the evaluation step, at the recipe's evaluation R or to a tolerance (see `make_eval_step`).

    Args:
      params: abstract or not, with shardings.
    """
    evaluate = make_eval_step(
        model,
        num_jacobi_iterations=config.recurrence.num_jacobi_iterations,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        tolerance=tolerance,
    )
    return lower_on_held_out(evaluate, config, mesh, params)


def lower_on_held_out(
    program: Callable[[Any, dict[str, jax.Array]], Metrics], config: ConfigDict, mesh: Mesh, params: Any
) -> jax.stages.Lowered:
    """Traces a program of parameters and a batch of held-out text, whose results are wanted on every device.

    Args:
      params: abstract or not, with shardings.
    """
    batch = abstract_batch(config, mesh)
    batch["target_bytes"] = jax.ShapeDtypeStruct(batch["loss_weights"].shape, jnp.int32, sharding=batch_sharding(mesh))
    with sharded_tracing(mesh):
        return jax.jit(program, out_shardings=replicated(mesh)).lower(params, batch)


def compile_lowered(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a program for the mesh's devices with the options of their platform.

    Raises:
      UserError: the compiler sees that the program does not fit the devices' memory.
    """
    with memory_errors("compiling the program"):
        return lowered.compile(compiler_options=options_for(mesh.devices.flat[0].platform))


def compile_programs(
    config: ConfigDict, model: LanguageModel, mesh: Mesh, state: TrainState, evaluates: bool
) -> tuple[dict[Work, TrainStep], Callable[[Any, dict[str, jax.Array]], Metrics] | None]:
    """Compiles the train step for every C and R that can be drawn and the evaluation step, in parallel.

    Those of later stages too: that one of them does not fit the memory should not be found out after days.

    Args:
      state: abstract, with shardings.
      evaluates: whether an evaluation step is wanted.

    Returns:
      {work: step}, see `lower_train_step`, and the evaluation step or None.

    Raises:
      UserError: a program does not fit the devices' memory.
    """
    works = schedule_of(config).works
    lowerings = [partial(lower_train_step, config, model, mesh, state, work) for work in works]
    if evaluates:
        lowerings.append(partial(lower_eval_step, config, model, mesh, state.params))
    with ThreadPoolExecutor(max_workers=len(lowerings)) as pool:
        compiled = list(pool.map(lambda lower: compile_lowered(lower(), mesh), lowerings))
    return dict(zip(works, compiled, strict=False)), compiled[-1] if evaluates else None


@contextlib.contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turns the devices' running out of memory while `doing` something into a `UserError`; other errors pass."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, found, reason = str(error).partition("RESOURCE_EXHAUSTED")
        if not found:
            raise
        # The first line says how much was wanted; those behind it list buffers.
        reason = (reason.strip(" :\n").splitlines() or ["nothing more is known"])[0][:200]
        raise UserError(f"out of device memory while {doing} ({reason.rstrip('. ')}): {_HOW_TO_SAVE_MEMORY}") from error
