"""The train step computes the same on every mesh, and in microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, tokens

from latentjax.config import default
from latentjax.recurrence.draw import Work
from latentjax.training.mesh import make_mesh, put_batch, replicated
from latentjax.training.optimizer import learning_rate_schedule, make_optimizer
from latentjax.training.programs import sharded_tracing
from latentjax.training.state import create_state
from latentjax.training.step import make_eval_step, make_train_step

MODEL = language_model(1, vocab_size=32)
NUM_STEPS = 5
ONE_DEVICE = ()


def mesh_of(axes):
    config = default()
    config.model.update(hidden_size=16, num_heads=2, intermediate_size=24, vocab_size=32)
    config.mesh.update({"data": 1, **dict(axes)})
    config.data.update(batch_size=8, sequence_length=8)
    return make_mesh(config, jax.devices()[: 8 if axes else 1])


def optimizer_config():
    config = default().optimizer
    config.update(learning_rate=1e-2, warmup_ratio=0.2, eps=1e-4)
    return config


def batch_at(step):
    """Rows whose weights are uneven: some whole rows count for almost nothing."""
    weights_BT = np.random.default_rng(step).random((8, 8)).astype(np.float32)
    weights_BT[:3] *= 0.1
    weights_BT[5, 2:] = 0
    return {"tokens": tokens(8, 9, vocab_size=32, seed=step), "loss_weights": weights_BT}


@functools.cache
def trained(axes=ONE_DEVICE, microbatches=1, loss_chunk_tokens=0):
    """Metrics of each of five steps, and the parameters after them."""
    mesh = mesh_of(axes)
    optimizer = make_optimizer(optimizer_config(), NUM_STEPS)
    state = create_state(MODEL, optimizer, mesh, 0)
    step = make_train_step(
        MODEL,
        optimizer,
        learning_rate_schedule(optimizer_config(), NUM_STEPS),
        work=Work(MODEL.recurrence_spec.num_latent_thoughts, 1),
        gradient_accumulation_steps=microbatches,
        loss_chunk_tokens=loss_chunk_tokens,
        counts_damage=False,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    first = put_batch(batch_at(0), mesh)
    with sharded_tracing(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        compiled = jitted.lower(state, first).compile()
    history = []
    for n in range(NUM_STEPS):
        state, metrics = compiled(state, put_batch(batch_at(n), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    assert int(state.step) == NUM_STEPS
    return history, jax.tree.map(np.asarray, state.params)


def assert_same_training(one, other, tolerance=1e-5):
    (history, params), (expected_history, expected_params) = one, other
    for metrics, expected in zip(history, expected_history, strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert metrics[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), params, expected_params)


@pytest.mark.parametrize(
    "axes",
    [(("data", 8),), (("fsdp", 8),), (("data", 2), ("fsdp", 2), ("tensor", 2))],
    ids=lambda axes: ",".join(f"{axis}={size}" for axis, size in axes),
)
def test_every_mesh_trains_as_one_device(axes):
    """Losses, gradient norms and parameters of five steps."""
    assert_same_training(trained(axes), trained())


def test_microbatches_add_up_to_the_batch():
    """Four of them, though their weights differ, with the logits of three tokens of eight at a time."""
    assert_same_training(trained(microbatches=4, loss_chunk_tokens=3), trained())


def test_every_parameter_is_moved():
    """By the gradients or the decay; at the first step of the warm-up the rate is 0."""
    history, params = trained()
    start = create_state(MODEL, make_optimizer(optimizer_config(), NUM_STEPS), mesh_of(ONE_DEVICE), 0).params
    for (path, after), before in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(start)):
        assert np.abs(after - before).max() > 1e-5, path
    assert [metrics["learning_rate"] for metrics in history[:2]] == pytest.approx([0, 1e-2])


def test_metrics_are_those_of_the_batch():
    """The loss of the first step is the weighted mean, and the gradient norm is taken before clipping."""
    history, _ = trained()
    params = create_state(MODEL, make_optimizer(optimizer_config(), NUM_STEPS), mesh_of(ONE_DEVICE), 0).params
    batch = batch_at(0)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        logits_BTV = MODEL.apply({"params": params}, batch["tokens"][:, :-1], num_jacobi_iterations=1)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(log_probs * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

    loss, grads = mean_loss(params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    assert history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_eval_step_sums():
    """The sums give the batch's loss; the residual is that of the last refinement pass, if there is one."""
    params = trained()[1]
    batch = batch_at(7)
    batch["target_bytes"] = np.arange(batch["loss_weights"].size, dtype=np.int32).reshape(batch["loss_weights"].shape)
    sums = {
        passes: jax.jit(make_eval_step(MODEL, num_jacobi_iterations=passes, loss_chunk_tokens=0))(params, batch)
        for passes in (0, 2)
    }
    assert int(sums[0]["text_bytes"]) == batch["target_bytes"].sum()
    assert set(sums[0]) == {"loss_sum", "weight_sum", "text_bytes"} and set(sums[2]) == {*sums[0], "thought_residual"}
    assert float(sums[2]["weight_sum"]) == pytest.approx(float(batch["loss_weights"].sum()), rel=1e-6)
    hidden = jax.jit(functools.partial(MODEL.apply, num_jacobi_iterations=2, method="hidden"))
    _, residual_R = hidden({"params": params}, batch["tokens"][:, :-1])
    assert float(sums[2]["thought_residual"]) == pytest.approx(float(residual_R[1]), rel=1e-4)
    assert float(residual_R[1]) < float(residual_R[0])
