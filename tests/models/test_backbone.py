"""The last layer: all keys and values, and the rest for the slots that are kept alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.models.backbone import Backbone
from latentjax.models.slots import SlotRange

NUM_SLOTS = 12


def apply_backbone(architecture, num_layers, kept, segment_ids_BS=None, width=16):
    model = language_model(1, architecture, num_layers=num_layers, hidden_size=width)
    x_BSD = np.random.default_rng(0).standard_normal((2, NUM_SLOTS, width)).astype(np.float32)
    positions_BS = np.repeat(np.arange(NUM_SLOTS // kept.period), kept.period)[None]

    def apply(params):
        return Backbone(model.spec, 2).apply({"params": params}, x_BSD, positions_BS, segment_ids_BS, kept=kept)[0]

    return apply, params_of(model)["backbone"]


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])  # GPT-2 has the layers of GPT-NeoX
@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("kept", [SlotRange(2, 0, 1), SlotRange(2, 1, 2), SlotRange(3, 1, 3)])
def test_kept_slots_have_the_hidden_states_of_all(architecture, num_layers, kept):
    """In values, and in the gradients of a loss that reads them alone; documents end within a token's slots."""
    segment_ids_BS = np.stack([np.arange(NUM_SLOTS) // 5, np.zeros(NUM_SLOTS)]).astype(np.int32)
    everything = SlotRange(kept.period, 0, kept.period)
    some, params = apply_backbone(architecture, num_layers, kept, segment_ids_BS)
    whole, _ = apply_backbone(architecture, num_layers, everything, segment_ids_BS)
    np.testing.assert_allclose(jax.jit(some)(params), kept.take(jax.jit(whole)(params)), rtol=0, atol=1e-5)
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(some(params)))))(params)
    expected = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(kept.take(whole(params))))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gradients, expected)


def product_flops(jaxpr):
    """FLOPs of the matrix products in a program; those in the body of a scan count once a turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = np.prod([left[axis] for axis in contracted])
            total += 2 * size * np.prod(equation.outvars[0].aval.shape)
        for name in ("jaxpr", "call_jaxpr"):
            if name in equation.params:
                inner = equation.params[name]
                total += equation.params.get("length", 1) * product_flops(getattr(inner, "jaxpr", inner))
    return total


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_slots_that_are_thrown_away_cost_keys_and_values_alone(architecture):
    """A slot more of the last layer's matrices is all that keeping it costs, and its row of attention."""

    def flops(kept):
        apply, params = apply_backbone(architecture, 3, kept, width=64)
        return product_flops(jax.make_jaxpr(apply)(params).jaxpr)

    saved = flops(SlotRange(2, 0, 2)) - flops(SlotRange(2, 0, 1))
    spec = language_model(1, architecture, hidden_size=64).spec
    mlp = (3 if architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    per_slot = 2 * (2 * spec.hidden_size**2 + mlp)  # query, output and MLP
    attention = 2 * 2 * spec.hidden_size * NUM_SLOTS  # scores and weighted values, of one chunk
    # The chunk ends with the last query, so without the last slot's it sees a slot less.
    assert saved == pytest.approx(2 * NUM_SLOTS / 2 * (per_slot + attention), rel=0.02)
