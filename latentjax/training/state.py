"""The train state: all that a step changes."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.mesh import shardings_of


@flax.struct.dataclass
class Counts:
    """What went wrong in the steps that led to a state: int32 scalars, the same on every device.

    Attributes:
      skipped_updates: steps whose loss or gradients were not finite, so that they changed no parameter.
      skipped_in_a_row: of those, the ones since the last step that did.
      damaged_windows: windows left out because a block that they touch is damaged.
    """

    skipped_updates: jax.Array
    skipped_in_a_row: jax.Array
    damaged_windows: jax.Array


@flax.struct.dataclass
class TrainState:
    """A pytree.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: float32 parameters.
      opt_state: the optimizer's.
      counts: of what went wrong.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    counts: Counts


def no_counts() -> Counts:
    """Returns the counts of a run that begins."""
    return Counts(*(jnp.zeros((), jnp.int32) for _ in range(3)))


def _create(model: LanguageModel, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state whose parameters still carry their logical axis names."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), counts=no_counts()
    )


def abstract_state(model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on this mesh, without any memory taken."""
    return _with_shardings(jax.eval_shape(lambda: _create(model, optimizer, 0)), mesh)


def _with_shardings(boxed: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings_of(boxed, mesh),
    )


def abstract_params(model: LanguageModel, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters on this mesh, without any memory taken."""
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return _with_shardings(boxed, mesh)


def state_from_params(params: Any, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state of a run that begins with these parameters, whose memory it takes over.

    Args:
      abstract: of `abstract_state`; the parameters lie as it says.
    """

    def create(params: Any) -> TrainState:
        opt_state = optimizer.init(params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, counts=no_counts())

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, donate_argnums=0, out_shardings=shardings)(params)


def create_state(model: LanguageModel, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """Initialises directly into its shards; the same numbers on every mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    return jax.jit(lambda: nn.meta.unbox(_create(model, optimizer, seed)), out_shardings=shardings)()
