"""The train step and the evaluation step, each a pure function that is compiled once per C and R."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from latentjax.recurrence.draw import Work
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.loss import next_token_loss
from latentjax.training.optimizer import keep_unless
from latentjax.training.state import Counts, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    work: Work,
    gradient_accumulation_steps: int,
    loss_chunk_tokens: int,
    counts_damage: bool,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns step(state, batch) -> (state, metrics), for one C and one R.

    The batch holds `tokens` (B, T + 1) and `loss_weights` (B, T), and with document masks `segment_ids` and `positions`
    (B, T). Metrics are float32 scalars: `loss` in nats per token, `grad_norm` before clipping, `learning_rate`; and
    int32 scalars: `skipped_update` (0 or 1), and the state's counts after the step, see `Counts`. With
    `recurrence.train_tolerance` also `num_jacobi_iterations`, float32: refinement passes, the mean over microbatches.

    Where the loss or the gradients' norm is not finite the update is skipped: parameters and moments stay as they were,
    and the step counts all the same.

    Args:
      work: C and R.
      counts_damage: whether windows without any weight are counted, as `damaged_windows`.
    """
    thoughts, num_jacobi_iterations = work
    tolerance = model.recurrence_spec.train_tolerance if thoughts else 0.0

    def loss_sum(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        if not tolerance:
            total, _ = summed_loss(model, params, batch, num_jacobi_iterations, loss_chunk_tokens, thoughts)
            return total, {}
        hidden_BTD, passes = model.apply(
            {"params": params},
            batch["tokens"][:, :-1],
            num_jacobi_iterations=num_jacobi_iterations,
            num_latent_thoughts=thoughts,
            tolerance=tolerance,
            positions_BT=batch.get("positions"),
            segment_ids_BT=batch.get("segment_ids"),
            method="hidden_settled",
        )
        total = loss_of_hidden(model, params, hidden_BTD, batch, loss_chunk_tokens)
        return total, {"num_jacobi_iterations": passes.astype(jnp.float32) / gradient_accumulation_steps}

    def mean_loss(params: Any, batch: Batch, total_weight: jax.Array) -> tuple[jax.Array, Metrics]:
        total, found = loss_sum(params, batch)
        return total / total_weight, found

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The weights of the whole batch are known beforehand, so that microbatches add up to the full batch exactly.
        total_weight = jnp.maximum(jnp.sum(batch["loss_weights"]), 1.0)
        grad_fn = jax.value_and_grad(partial(mean_loss, total_weight=total_weight), has_aux=True)
        if gradient_accumulation_steps == 1:
            (loss, found), grads = grad_fn(state.params, batch)
        else:
            found = {"num_jacobi_iterations": jnp.zeros((), jnp.float32)} if tolerance else {}
            (loss, found), grads = _accumulate(grad_fn, state.params, batch, gradient_accumulation_steps, found)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.global_norm(grads)
        # Chosen leaf by leaf: that melts into the update, which has the old values at hand. A branch would copy them.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = keep_unless(finite, (params, opt_state), (state.params, state.opt_state))
        counts = _count(state.counts, ~finite, batch["loss_weights"] if counts_damage else None)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "skipped_update": (~finite).astype(jnp.int32),
            "skipped_updates": counts.skipped_updates,
            "skipped_in_a_row": counts.skipped_in_a_row,
            **found,
        }
        if counts_damage:
            metrics["damaged_windows"] = counts.damaged_windows
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, counts=counts), metrics

    return step


def make_eval_step(
    model: LanguageModel, *, num_jacobi_iterations: int, loss_chunk_tokens: int, tolerance: float | None = None
) -> Callable[[Any, Batch], Metrics]:
    """Returns evaluate(params, batch) -> sums over the batch, float32 scalars.

    `loss_sum` in nats and `weight_sum` give the loss; `text_bytes` (int32) is the sum of the batch's `target_bytes`;
    `thought_residual` is that of the last refinement pass, present where the method has any.

    With a `tolerance` there are, in place of R, as many passes as `Recurrence.forward_until` needs for it: `passes`
    says how many, and the residual is that of the row that was last to settle.
    """

    def evaluate_until(params: Any, batch: Batch) -> Metrics:
        hidden_BTD, residual_B, passes = model.apply(
            {"params": params},
            batch["tokens"][:, :-1],
            tolerance=tolerance,
            positions_BT=batch.get("positions"),
            segment_ids_BT=batch.get("segment_ids"),
            method="hidden_until",
        )
        total = loss_of_hidden(model, params, hidden_BTD, batch, loss_chunk_tokens)
        return _sums(total, batch) | {"thought_residual": jnp.max(residual_B), "passes": passes}

    def evaluate(params: Any, batch: Batch) -> Metrics:
        total, residual_R = summed_loss(model, params, batch, num_jacobi_iterations, loss_chunk_tokens)
        sums = _sums(total, batch)
        if residual_R is not None and residual_R.shape[0]:
            sums["thought_residual"] = residual_R[-1]
        return sums

    return evaluate if tolerance is None else evaluate_until


def _sums(loss_sum: jax.Array, batch: Batch) -> Metrics:
    return {
        "loss_sum": loss_sum,
        "weight_sum": jnp.sum(batch["loss_weights"]),
        "text_bytes": jnp.sum(batch["target_bytes"]),
    }


def summed_loss(
    model: LanguageModel,
    params: Any,
    batch: Batch,
    num_jacobi_iterations: int,
    loss_chunk_tokens: int,
    num_latent_thoughts: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The batch's weighted sum of next-token cross-entropy, float32 nats, and the thought residuals (R,) or None.

    Args:
      num_latent_thoughts: C; None: the model's own.
    """
    hidden_BTD, residual_R = model.apply(
        {"params": params},
        batch["tokens"][:, :-1],
        num_jacobi_iterations=num_jacobi_iterations,
        num_latent_thoughts=num_latent_thoughts,
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        method="hidden",
    )
    return loss_of_hidden(model, params, hidden_BTD, batch, loss_chunk_tokens), residual_R


def loss_of_hidden(
    model: LanguageModel, params: Any, hidden_BTD: jax.Array, batch: Batch, loss_chunk_tokens: int
) -> jax.Array:
    """The weighted sum of cross-entropy of the batch's targets, float32 nats, where the head reads hidden_BTD."""
    return next_token_loss(
        lambda hidden: model.apply({"params": params}, hidden, method="logits"),
        hidden_BTD,
        batch["tokens"][:, 1:],
        batch["loss_weights"],
        chunk_tokens=loss_chunk_tokens,
    )


def _count(counts: Counts, skipped: jax.Array, weights_BT: jax.Array | None) -> Counts:
    """The counts after a step; without weights, damage is not counted."""
    damaged = counts.damaged_windows
    if weights_BT is not None:
        damaged += jnp.sum(jnp.all(weights_BT == 0, axis=1), dtype=jnp.int32)
    return Counts(
        skipped_updates=counts.skipped_updates + skipped.astype(jnp.int32),
        skipped_in_a_row=jnp.where(skipped, counts.skipped_in_a_row + 1, 0),
        damaged_windows=damaged,
    )


def _accumulate(grad_fn: Callable, params: Any, batch: Batch, microbatches: int, found: Metrics) -> tuple[tuple, Any]:
    """Sums losses, what is found beside them (`found`: zeros), and gradients over microbatches, as a scan."""

    def split(rows: jax.Array) -> jax.Array:
        # Microbatch m takes every microbatches-th row: the rows that a device holds stay on that device.
        return rows.reshape(rows.shape[0] // microbatches, microbatches, *rows.shape[1:]).swapaxes(0, 1)

    def add(total: tuple, part: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

    zeros = ((jnp.zeros((), jnp.float32), found), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
    return total
