"""What methods say that they feed to the backbone is what they feed to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from tiny import model_spec

from latentjax.models.embedding import Vocabulary
from latentjax.models.slots import ALL_SLOTS
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.methods import make_recurrence

NUM_TOKENS = 5


class MarkedBackbone(nn.Module):
    """Stands in for a backbone: its tanh, which nothing else computes, marks where it is fed."""

    spec: ModelSpec = model_spec()

    @nn.compact
    def __call__(self, x_BSD, positions_BS, segment_ids_BS=None, cache=None, kept=ALL_SLOTS, begins=True, ends=True):
        scale = self.param("scale", nn.initializers.ones, ())
        assert positions_BS.shape[1] == x_BSD.shape[1]
        return kept.take(jnp.tanh(scale * x_BSD)), cache


def slots_fed(jaxpr):
    """Slots that go through the marked backbone when the program runs: the body of a scan counts once a turn."""
    return count(jaxpr, lambda equation: equation.outvars[0].aval.shape[1] if equation.primitive.name == "tanh" else 0)


def products_with(size):
    """Counts tokens times products with an axis of this size, which is the vocabulary's alone."""

    def tokens(equation):
        shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
        is_one = equation.primitive.name == "dot_general" and any(size in shape for shape in shapes)
        return equation.outvars[0].aval.shape[1] if is_one else 0

    return lambda jaxpr: count(jaxpr, tokens)


def count(jaxpr, value_of):
    total = 0
    for equation in jaxpr.eqns:
        total += value_of(equation)
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if inner is not None:
            total += equation.params.get("length", 1) * count(getattr(inner, "jaxpr", inner), value_of)
    return total


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["vanilla", "latent", "ponder", "loop", "pause"])
def test_passes_and_products(method, number):
    """Slots of a forward, slots of decoding a token, and products with the vocabulary, in a program and as told."""
    iterations = 3 if number != 2 else 0
    recurrence = make_recurrence(
        RecurrenceSpec(method, number, iterations, (iterations,), 0, True, -1, 2, (), 0.0, 0.0, "full")
    )
    variables, ids = {"params": {"scale": jnp.ones(())}}, jnp.arange(NUM_TOKENS)[None]
    x_BTD, vocabulary = jnp.ones((2, NUM_TOKENS, 4)), Vocabulary(jnp.ones((29, 4)), jnp.ones((4, 29)), 1.0, "float32")

    def forward(backbone):
        return recurrence.forward(backbone, x_BTD, ids, None, vocabulary=vocabulary, num_jacobi_iterations=iterations)

    def decode(backbone):
        arguments = x_BTD[:, 0], jnp.zeros(2, jnp.int32), None, jnp.zeros(())
        return recurrence.decode(backbone, *arguments, vocabulary=vocabulary)

    programs = [jax.make_jaxpr(nn.apply(each, MarkedBackbone()))(variables).jaxpr for each in (forward, decode)]
    number = 0 if method == "vanilla" else number
    forwards = {"latent": number * (number + 1) / 2 + (iterations + 1) * (number + 1)} if number else {}
    assert (
        slots_fed(programs[0]) / NUM_TOKENS == recurrence.token_forwards(iterations) == forwards.get(method, number + 1)
    )
    assert slots_fed(programs[1]) == recurrence.forwards_per_token == number + 1
    # Chunks of two tokens each fill five up to six.
    per_token = [products_with(29)(programs[0]) / (NUM_TOKENS + 1), products_with(29)(programs[1])]
    assert per_token == [recurrence.vocabulary_products] * 2 == [2 * number if method == "ponder" else 0] * 2
    hidden_BTD = nn.apply(forward, MarkedBackbone())(variables)[0]
    assert hidden_BTD.shape == x_BTD.shape
