"""A step whose numbers are not finite changes nothing but the count of steps."""

import jax
import numpy as np
import optax
import pytest
from tiny import language_model, tokens

from latentjax.config import default
from latentjax.recurrence.draw import Work
from latentjax.training.mesh import make_mesh, put_batch, replicated
from latentjax.training.optimizer import learning_rate_schedule, make_optimizer
from latentjax.training.programs import sharded_tracing
from latentjax.training.state import create_state
from latentjax.training.step import make_train_step

MODEL = language_model(0, method="vanilla", vocab_size=32)


def batch_of(seed: int, weight: float = 1.0) -> dict[str, np.ndarray]:
    """Eight rows; one token of them has this weight."""
    weights_BT = np.ones((8, 8), np.float32)
    weights_BT[2, 3] = weight
    return {"tokens": tokens(8, 9, vocab_size=32, seed=seed), "loss_weights": weights_BT}


@pytest.fixture(scope="module")
def training():
    """A mesh of eight devices that parameters and batch are spread over, the step on it, and how to begin."""
    config = default()
    config.model.update(hidden_size=16, num_heads=2, intermediate_size=24, vocab_size=32)
    config.mesh.update(fsdp=4, data=2)
    config.data.update(batch_size=8, sequence_length=8)
    config.optimizer.learning_rate = 1e-2
    mesh, optimizer = make_mesh(config, jax.devices()), make_optimizer(config.optimizer, 10)
    step = make_train_step(
        MODEL,
        optimizer,
        learning_rate_schedule(config.optimizer, 10),
        work=Work(MODEL.recurrence_spec.num_latent_thoughts, 0),
        gradient_accumulation_steps=1,
        loss_chunk_tokens=0,
        counts_damage=True,
    )
    state = create_state(MODEL, optimizer, mesh, 0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    with sharded_tracing(mesh):
        compiled = (
            jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
            .lower(state, put_batch(batch_of(0), mesh))
            .compile()
        )

    first = jax.device_get(state)  # the steps take over what they are given

    def run(batches):
        state, history = jax.device_put(first, shardings), []
        for batch in batches:
            state, metrics = compiled(state, put_batch(batch, mesh))
            history.append({name: value.item() for name, value in jax.device_get(metrics).items()})
        return jax.device_get(state), history

    return run


def schedules(opt_state):
    return [part for part in opt_state if isinstance(part, optax.ScaleByScheduleState)]


@pytest.mark.parametrize("weight", [np.nan, np.inf, 1e25], ids=str)
def test_parameters_and_moments_stay_to_the_bit(training, weight):
    """With 1e25 the loss and each gradient are numbers, but their squares add up to more than a float holds."""
    before, _ = training([batch_of(0)])
    bad = batch_of(1, weight)
    if weight == 1e25:
        bad["loss_weights"][2, 4] = -1e25  # the weights add up to 62
    after, (_, metrics) = training([batch_of(0), bad])
    assert np.isfinite(metrics["loss"]) == (weight == 1e25) and not np.isfinite(metrics["grad_norm"])
    assert (metrics["skipped_update"], metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (1, 1, 1)
    assert (int(before.step), int(after.step)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    ((scheduled,), (scheduled_before,)) = schedules(after.opt_state), schedules(before.opt_state)
    assert (int(scheduled_before.count), int(scheduled.count)) == (1, 2)
    for part, part_before in zip(after.opt_state, before.opt_state, strict=True):
        if part is not scheduled:
            jax.tree.map(np.testing.assert_array_equal, part, part_before)  # Adam's count among them


def test_what_follows_is_as_if_the_batch_had_not_been(training):
    """But for the learning rate, which is that of the step."""
    state, history = training([batch_of(0), batch_of(1, np.nan), batch_of(2), batch_of(3, np.inf), batch_of(4, np.nan)])
    _, plain = training([batch_of(0), batch_of(2)])
    assert history[2]["loss"] == plain[1]["loss"] and history[2]["grad_norm"] == plain[1]["grad_norm"]
    assert [each["skipped_update"] for each in history] == [0, 1, 0, 1, 1]
    assert [each["skipped_updates"] for each in history] == [0, 1, 1, 2, 3]
    assert [each["skipped_in_a_row"] for each in history] == [0, 1, 0, 1, 2]
    rates = [each["learning_rate"] for each in training([batch_of(0)] * 5)[1]]
    assert [each["learning_rate"] for each in history] == rates
    assert int(state.counts.skipped_updates) == 3


def test_windows_without_weight_are_counted(training):
    batch = batch_of(0)
    batch["loss_weights"][[1, 6]] = 0
    batch["loss_weights"][4, :7] = 0
    state, history = training([batch, batch_of(1), batch])
    assert [each["damaged_windows"] for each in history] == [2, 2, 4]
    assert int(state.counts.damaged_windows) == 4


def test_a_batch_without_any_weight_moves_nothing_but_by_decay(training):
    """Nothing is divided by 0 where every window of a batch is damaged."""
    batch = batch_of(0)
    batch["loss_weights"][:] = 0
    _, (metrics,) = training([batch])
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped_update"]) == (0, 0, 0)
