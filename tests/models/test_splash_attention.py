"""The splash kernel, its program interpreted on the CPU, against attention written out for XLA."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from latentjax.config import default
from latentjax.errors import UserError
from latentjax.models.attention import xla_attention
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.models.splash_attention import SlotCausalMask, splash_attention
from latentjax.training.mesh import RULES, make_mesh

interpreted = functools.partial(splash_attention, interpret=True)


def random_inputs(num_slots: int, queried: SlotRange, masked: bool):
    """Queries of four heads on two of keys; documents that end anywhere."""
    rng = np.random.default_rng(num_slots)
    num_queries = num_slots // queried.period * queried.count
    shapes = [(4, num_queries, 4, 8), (4, num_slots, 2, 8), (4, num_slots, 2, 8)]
    segments = np.sort(rng.integers(0, 5, (4, num_slots)), axis=1).astype(np.int32)
    return *(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes), segments if masked else None


def value_and_gradients(attention, queried, inputs):
    def summed(q, k, v, segments):
        return jnp.sum(jnp.sin(attention(q, k, v, segment_ids_BS=segments, queried=queried)))

    return jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2)))(*inputs)


def assert_equal_attention(queried: SlotRange, inputs, mesh=None):
    expected, expected_gradients = value_and_gradients(xla_attention, queried, inputs)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext(), nn.logical_axis_rules(RULES):
        value, gradients = value_and_gradients(interpreted, queried, inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, other in zip(gradients, expected_gradients):
        np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-4)


# One whole block, two, and rows that have to be filled up.
@pytest.mark.parametrize(
    ("num_slots", "queried", "masked"),
    [
        (128, ALL_SLOTS, False),
        (256, SlotRange(2, 1, 2), True),
        (150, SlotRange(3, 0, 2), True),
        (70, SlotRange(2, 0, 1), False),
    ],
)
def test_values_and_gradients(num_slots, queried, masked):
    """Grouped queries, documents, and ranges of slots."""
    assert_equal_attention(queried, random_inputs(num_slots, queried, masked))


@pytest.mark.parametrize(
    ("sizes", "queried"),
    [({"fsdp": 4, "tensor": 2}, SlotRange(2, 0, 1)), ({"data": 2, "fsdp": 2, "sequence": 2}, SlotRange(2, 1, 2))],
)
def test_on_a_mesh(sizes, queried):
    """Rows, heads and queries spread over devices; with `sequence`, a device's queries do not begin at slot 0."""
    mesh = make_mesh(mesh_config(sizes), jax.devices())
    assert_equal_attention(queried, random_inputs(512, queried, True), mesh)


def mesh_config(sizes: dict[str, int]) -> ConfigDict:
    config = default()
    config.mesh.update({"data": 1} | sizes)
    return config


def test_too_few_slots_for_the_sequence_axis():
    """A device's queries must fill blocks."""
    mesh = make_mesh(mesh_config({"sequence": 8}), jax.devices())
    inputs = random_inputs(256, ALL_SLOTS, False)
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(RULES),
        pytest.raises(UserError, match=r"256 queries over mesh\.sequence=8 devices are not whole blocks of 128"),
    ):
        interpreted(*inputs[:3], segment_ids_BS=None, queried=ALL_SLOTS)


@pytest.mark.parametrize("queried", [ALL_SLOTS, SlotRange(2, 0, 1), SlotRange(2, 1, 2), SlotRange(4, 1, 4)])
def test_mask_is_causal_by_slot(queried):
    """Row i of the mask ends at the slot where query i stands."""
    slots_Q = queried.indices(64)
    mask = SlotCausalMask(len(slots_Q), 64, queried)
    np.testing.assert_array_equal(mask[:, :], np.arange(64) <= slots_Q[:, None])
