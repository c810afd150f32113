"""Latent thoughts: causality, the fixed point, packed documents, cost, and how small the traced program stays."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import cross_entropy, language_model, model_spec, params_of, tokens

from latentjax.models import gpt_neox
from latentjax.models.slots import ALL_SLOTS
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.methods import make_recurrence


def logits_of(model, tokens_BT, num_jacobi_iterations, **packing):
    apply = jax.jit(functools.partial(model.apply, num_jacobi_iterations=num_jacobi_iterations))
    return np.asarray(apply({"params": params_of(model)}, tokens_BT, **packing))


def decoded_logits(model, tokens_BT):
    """What decoding one token after another gives, (B, T, V)."""
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache = model.empty_cache(*tokens_BT.shape)
    rows = []
    for position, token_B in enumerate(tokens_BT.T):
        logits_BV, cache = decode(
            {"params": params_of(model)}, jnp.asarray(token_B), jnp.full(len(token_B), position), cache
        )
        rows.append(logits_BV)
    return np.stack(rows, axis=1)


@pytest.mark.parametrize(
    ("num_thoughts", "iterations", "architecture"),
    [
        (0, 0, "gpt_neox"),
        *((c, r, "gpt_neox") for c in (1, 2, 3) for r in (0, 1, 3)),
        (0, 0, "llama"),
        (1, 3, "llama"),
        (0, 0, "gpt2"),
        (1, 3, "gpt2"),
    ],
)
def test_causality(num_thoughts, iterations, architecture):
    """Another token t leaves every logit before t as it was and moves all from t on."""
    num_tokens = 7
    original_T = tokens(1, num_tokens)[0]
    # Row 0 is the original, row t + 1 has token t replaced.
    tokens_BT = np.stack([original_T] * (num_tokens + 1))
    tokens_BT[np.arange(1, num_tokens + 1), np.arange(num_tokens)] = (original_T + 11) % 29
    logits_BTV = logits_of(language_model(num_thoughts, architecture, num_layers=1), tokens_BT, iterations)
    change_BT = np.abs(logits_BTV[1:] - logits_BTV[:1]).max(axis=-1)
    before = np.tri(num_tokens, k=-1, dtype=bool)  # row t, columns before t
    assert change_BT[before].max() <= 1e-6
    assert change_BT[~before].min() > 1e-4


@pytest.mark.parametrize(("num_thoughts", "iterations"), [(1, 2), (2, 3), (3, 3)])
def test_a_pass_more_makes_one_thought_more_exact(num_thoughts, iterations):
    """After C growing and R refinement passes the first C + R thoughts are exact: those of 1 + R // C whole tokens."""
    model, tokens_BT = language_model(num_thoughts), tokens(2, 6)
    error_BT = np.abs(logits_of(model, tokens_BT, iterations) - decoded_logits(model, tokens_BT)).max(axis=-1)
    exact = 1 + iterations // num_thoughts
    assert error_BT[:, :exact].max() < 1e-5
    assert error_BT[:, exact:].min() > 1e-4


@pytest.mark.parametrize(
    ("num_thoughts", "architecture"), [(1, "gpt_neox"), (2, "gpt_neox"), (1, "llama"), (2, "llama"), (1, "gpt2")]
)
def test_converged_training_forward_is_sequential_decoding(num_thoughts, architecture):
    """R >= C T passes, and the cached decoder, solve the same equations."""
    model, tokens_BT = language_model(num_thoughts, architecture), tokens(2, 6)
    logits_BTV = logits_of(model, tokens_BT, num_thoughts * 6)
    np.testing.assert_allclose(logits_BTV, decoded_logits(model, tokens_BT), rtol=0, atol=1e-5)


def test_residual_falls_with_passes_and_ends_at_zero():
    """By more than a third a pass at first, to 0 without rounding once all C T thoughts are exact."""
    model, num_tokens = language_model(2), 5
    _, residual_R = jax.jit(functools.partial(model.apply, num_jacobi_iterations=14, method="hidden"))(
        {"params": params_of(model)}, tokens(3, num_tokens)
    )
    residual_R = np.asarray(residual_R)
    assert residual_R.shape == (14,) and residual_R.dtype == np.float32
    assert residual_R[0] > 1e-2
    assert np.all(residual_R[1:5] < residual_R[:4] / 1.5)
    assert np.all(residual_R[11:] == 0)


def test_bfloat16_stays_close_to_float32():
    """Compute dtype changes logits by its rounding, not by more, and they are float32 all the same."""
    tokens_BT = tokens(2, 16)
    exact_BTV = logits_of(language_model(1), tokens_BT, 3)
    model = language_model(1, dtype="bfloat16")
    coarse_BTV = np.asarray(
        jax.jit(functools.partial(model.apply, num_jacobi_iterations=3))(
            {"params": params_of(language_model(1))}, tokens_BT
        )
    )
    assert coarse_BTV.dtype == np.float32
    relative = np.sqrt(np.mean((coarse_BTV - exact_BTV) ** 2) / np.mean(exact_BTV**2))
    assert 1e-4 < relative < 0.03
    assert abs(cross_entropy(coarse_BTV, tokens_BT) - cross_entropy(exact_BTV, tokens_BT)) < 0.02


@pytest.mark.parametrize("num_thoughts", [0, 1, 2])
def test_packed_documents_equal_each_alone(num_thoughts):
    """With segment ids and positions, nothing of one document reaches another, thoughts included."""
    model = language_model(num_thoughts)
    long_BT, short_BT = tokens(2, 5, seed=1), tokens(2, 3, seed=2)
    # Boundaries differ between the rows of the batch.
    packed_BT = np.stack([np.r_[long_BT[0], short_BT[0]], np.r_[short_BT[1], long_BT[1]]])
    segment_ids_BT = np.array([[1] * 5 + [2] * 3, [1] * 3 + [2] * 5], np.int32)
    positions_BT = np.array([[*range(5), *range(3)], [*range(3), *range(5)]], np.int32)
    packed = logits_of(model, packed_BT, 2, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT)
    long, short = logits_of(model, long_BT, 2), logits_of(model, short_BT, 2)
    np.testing.assert_allclose(packed[0], np.concatenate([long[0], short[0]]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[1], np.concatenate([short[1], long[1]]), rtol=0, atol=1e-5)


def test_without_thoughts_it_is_vanilla():
    """C = 0: the same parameters from the same seed, bit for bit, and the same logits."""
    latent, vanilla = language_model(0), language_model(0, method="vanilla")
    params = [jax.jit(model.init)(jax.random.key(3), tokens(1, 4)) for model in (latent, vanilla)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    np.testing.assert_array_equal(logits_of(latent, tokens(2, 6), 3), logits_of(vanilla, tokens(2, 6), 0))


class MarkedBackbone(nn.Module):
    """Stands in for a backbone: its tanh, which nothing else computes, marks where it is fed."""

    spec: ModelSpec = model_spec()

    @nn.compact
    def __call__(self, x_BSD, positions_BS, segment_ids_BS=None, cache=None, kept=ALL_SLOTS):
        scale = self.param("scale", nn.initializers.ones, ())
        assert positions_BS.shape[1] == x_BSD.shape[1]
        return kept.take(jnp.tanh(scale * x_BSD)), cache


def slots_fed(jaxpr):
    """Slots that go through the marked backbone when the program runs: the body of a scan counts once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "tanh":
            total += equation.outvars[0].aval.shape[1]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            total += equation.params.get("length", 1) * slots_fed(getattr(inner, "jaxpr", inner))
    return total


@pytest.mark.parametrize("num_thoughts", [0, 1, 2, 3])
@pytest.mark.parametrize("iterations", [0, 3])
def test_token_forwards_counts_the_slots_fed(num_thoughts, iterations):
    """C (C + 1) / 2 + (R + 1) (C + 1) per token, 1 where C = 0; decoding takes C + 1."""
    recurrence = make_recurrence(RecurrenceSpec("latent", num_thoughts, iterations, (iterations,), 0, True, -1, 0))
    variables = {"params": {"scale": jnp.ones(())}}
    x_BTD, positions_BT = jnp.ones((2, 5, 4)), jnp.arange(5)[None]

    def forward(backbone):
        return recurrence.forward(
            backbone, x_BTD, positions_BT, None, vocabulary=None, num_jacobi_iterations=iterations
        )

    def decode(backbone):
        return recurrence.decode(backbone, x_BTD[:, 0], jnp.zeros(2, jnp.int32), None, jnp.zeros(()), vocabulary=None)

    def count(function):
        return slots_fed(jax.make_jaxpr(nn.apply(function, MarkedBackbone()))(variables).jaxpr)

    expected = num_thoughts * (num_thoughts + 1) / 2 + (iterations + 1) * (num_thoughts + 1) if num_thoughts else 1
    assert count(forward) / 5 == recurrence.token_forwards(iterations) == expected
    assert count(decode) == recurrence.slots_per_token == num_thoughts + 1


def test_one_layer_is_traced_however_many_layers_and_passes(monkeypatch):
    """Scans keep the traced program, and so the compile time, the same for every N and R."""
    calls = []
    attention = gpt_neox.self_attention
    monkeypatch.setattr(gpt_neox, "self_attention", lambda *a, **k: (calls.append(1), attention(*a, **k))[1])

    def traced(num_layers, iterations):
        model = language_model(1, num_layers=num_layers)
        params = params_of(model)  # which traces layers as well
        calls.clear()
        apply = functools.partial(model.apply, num_jacobi_iterations=iterations)
        jaxpr = jax.make_jaxpr(apply)({"params": params}, tokens(1, 4))
        return len(calls), str(jaxpr).count("dot_general")

    small = traced(2, 1)
    assert small[0] > 0 and small[1] > 0
    assert traced(5, 1) == small
    assert traced(2, 9) == small
    assert traced(5, 9) == small
