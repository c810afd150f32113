"""The compiled programs of a run: one train step per R, one evaluation step, all made before step 1."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.models.attention import choose_backend
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence
from latentjax.training.mesh import RULES, batch_sharding, replicated
from latentjax.training.optimizer import learning_rate_schedule, make_optimizer
from latentjax.training.state import TrainState
from latentjax.training.step import Metrics, make_eval_step, make_train_step


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory`, so that a run that starts again need not wait; "": keeps none."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser()))


@contextlib.contextmanager
def sharded_tracing(mesh: Mesh) -> Iterator[None]:
    """Puts the mesh and the sharding rules in force for models traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def distinct_iterations(model: LanguageModel) -> list[int]:
    """The values of R that training can draw and that need a program of their own; [0] where R changes nothing."""
    if not make_recurrence(model.recurrence_spec).uses_jacobi_iterations:
        return [0]
    return sorted(set(model.recurrence_spec.train_jacobi_iterations))


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
    """The model that the config describes, with the attention backend that suits the mesh's devices.

    Raises:
      UserError: a backend was asked for that cannot serve there.
    """
    backend = choose_backend(config.model.attention, mesh.devices.flat[0].platform)
    spec = dataclasses.replace(ModelSpec(**config.model), attention=backend)
    return LanguageModel(spec, RecurrenceSpec(**config.recurrence))


def lower_train_step(
    config: ConfigDict, model: LanguageModel, mesh: Mesh, state: TrainState, num_jacobi_iterations: int
) -> jax.stages.Lowered:
    """Traces the train step for one R and says where everything lies; nothing is compiled yet.

    Args:
      state: abstract, with shardings. The step takes the state over: its memory is reused for the new one.
    """
    step = make_train_step(
        model,
        make_optimizer(config.optimizer, config.train.num_steps),
        learning_rate_schedule(config.optimizer, config.train.num_steps),
        num_jacobi_iterations=num_jacobi_iterations,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    with sharded_tracing(mesh):
        return jitted.lower(state, abstract_batch(config, mesh))


def compile_train_steps(
    config: ConfigDict, model: LanguageModel, mesh: Mesh, state: TrainState
) -> dict[int, Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]]:
    """Compiles the train step for every R that can be drawn, in parallel.

    Args:
      state: abstract, with shardings.

    Returns:
      {R: step}, see `lower_train_step`.
    """

    def compile_one(num_jacobi_iterations: int) -> Callable:
        return lower_train_step(config, model, mesh, state, num_jacobi_iterations).compile()

    iterations = distinct_iterations(model)
    with ThreadPoolExecutor(max_workers=len(iterations)) as pool:
        return dict(zip(iterations, pool.map(compile_one, iterations), strict=True))


def compile_eval_step(config: ConfigDict, model: LanguageModel, mesh: Mesh, state: TrainState) -> Callable:
    """Compiles the evaluation step, at the recipe's evaluation R."""
    evaluate = make_eval_step(
        model,
        num_jacobi_iterations=config.recurrence.num_jacobi_iterations,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
    )
    batch = abstract_batch(config, mesh)
    batch["target_bytes"] = jax.ShapeDtypeStruct(batch["loss_weights"].shape, jnp.int32, sharding=batch_sharding(mesh))
    with sharded_tracing(mesh):
        return jax.jit(evaluate, out_shardings=replicated(mesh)).lower(state.params, batch).compile()
