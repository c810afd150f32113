"""Schedule, decay and clipping, and AdamW against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.config import default
from latentjax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def optimizer_config(**changes):
    config = default().optimizer
    config.update(changes)
    return config


def test_schedule_at_key_steps():
    """0, half the peak in mid-warm-up, the peak at its end, midway of the cosine, the floor at the end and after."""
    config = optimizer_config(learning_rate=2e-3, min_learning_rate_ratio=0.1, warmup_ratio=0.1)
    rate = learning_rate_schedule(config, 1000)
    assert float(rate(0)) == 0
    expected = {50: 1e-3, 100: 2e-3, 325: 2e-4 + 1.8e-3 * (1 + np.cos(np.pi / 4)) / 2, 550: 1.1e-3, 1000: 2e-4}
    for step, value in {**expected, 5000: 2e-4}.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5), step


def test_schedule_of_nothing_but_warmup():
    """The peak is reached in the last step."""
    schedule = learning_rate_schedule(optimizer_config(learning_rate=1e-3, warmup_ratio=1.0), 10)
    np.testing.assert_allclose([schedule(step) for step in range(10)], np.arange(10) / 9 * 1e-3, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    """A ratio of 0, or one that rounds to no step."""
    for ratio in (0.0, 0.004):
        rate = learning_rate_schedule(optimizer_config(learning_rate=1e-3, warmup_ratio=ratio), 100)
        assert float(rate(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_decay_moves_matrices_only(architecture):
    """Without gradients: matrices shrink by rate * decay; biases and norm scales stay, stacked to 2-D or not."""
    params = params_of(language_model(1, architecture))
    config = optimizer_config(learning_rate=0.1, weight_decay=0.5, warmup_ratio=0.0)
    optimizer = make_optimizer(config, 10)
    zero_step = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])
    updates = zero_step(params)
    stacked = 0
    for (path, update), param in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
        name = path[-1].key
        assert name in ("kernel", "embedding", "bias", "scale")
        expected = -0.05 * param if name in ("kernel", "embedding") else 0 * param
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=0, err_msg=str(path))
        stacked += name in ("bias", "scale") and param.ndim >= 2
    assert stacked >= 2


def test_decay_mask_looks_at_names():
    """Not at the number of axes."""
    mask = decay_mask({"a": {"kernel": jnp.ones(3), "bias": jnp.ones((2, 3)), "scale": jnp.ones((2, 3))}})
    assert mask == {"a": {"kernel": True, "bias": False, "scale": False}}


def adamw(params, grads_by_step, rates, config, clip):
    """AdamW (arXiv 1711.05101) after clipping by the global norm, in float64."""
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    for t, (grads, rate) in enumerate(zip(grads_by_step, rates), start=1):
        norm = sum(np.sum(g**2) for g in grads.values()) ** 0.5
        factor = min(1.0, clip / norm) if clip else 1.0
        for name in params:
            g = grads[name] * factor
            first[name] = config.b1 * first[name] + (1 - config.b1) * g
            second[name] = config.b2 * second[name] + (1 - config.b2) * g**2
            step = first[name] / (1 - config.b1**t) / (np.sqrt(second[name] / (1 - config.b2**t)) + config.eps)
            decay = config.weight_decay * params[name] if name == "kernel" else 0.0
            params = {**params, name: params[name] - rate * (step + decay)}
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_two_steps_of_adamw(clip):
    """Against the formula: not clipped, clipped, and with a limit out of reach."""
    rng = np.random.default_rng(0)
    draw = lambda: {"kernel": rng.standard_normal((3, 2)), "bias": rng.standard_normal(2)}  # noqa: E731
    params, grads_by_step = draw(), [draw(), draw()]
    # A large eps shows whether it is added outside of the root, and clipping whether it comes before the moments.
    config = optimizer_config(learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.3, clip_norm=clip, b1=0.8, eps=0.1)
    optimizer = make_optimizer(config, 10)
    schedule = learning_rate_schedule(config, 10)
    new = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state = optimizer.init(new)
    for grads in grads_by_step:
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, new)
        new = jax.tree.map(jnp.add, new, updates)
    expected = adamw(params, grads_by_step, [float(schedule(0)), float(schedule(1))], config, clip)
    for name in params:
        np.testing.assert_allclose(new[name], expected[name], rtol=1e-5, atol=1e-6)
