"""AdamW with a warm-up and cosine schedule, on the parameters' own shardings."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

MATRICES = ("kernel", "embedding")  # parameters of these names are decayed: not biases, not norm scales


def learning_rate_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine to the floor at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(round(config.warmup_ratio * num_steps), num_steps - 1),
        decay_steps=num_steps,
        end_value=config.learning_rate * config.min_learning_rate_ratio,
    )


def decay_mask(params: Any) -> Any:
    """True for matrices. By name, since layers are stacked and a stack of biases has two axes as well."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)) in MATRICES,
        params,
    )


def keep_unless(taken: jax.Array, after: Any, before: Any) -> Any:
    """Chooses parameters and optimizer state `after` an update where it was `taken`, else those `before`.

    A skipped update leaves the moments as they are, and with them Adam's count of the updates in them, by which their
    bias is corrected. The schedule's count goes on, for it is the number of the step: the learning rate is a function
    of the step alone, and reaches its floor at the last one whatever was skipped.

    Args:
      taken: bool scalar, on the devices.
    """

    def choose(after: Any, before: Any) -> Any:
        if isinstance(after, optax.ScaleByScheduleState):
            return after
        return jax.tree.map(lambda new, old: jnp.where(taken, new, old), after, before)

    return jax.tree.map(choose, after, before, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm (unless `clip_norm` is 0), then AdamW with decay on matrices only."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    )
