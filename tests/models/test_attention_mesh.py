"""A kernel run on each device's part of the work gives what it gives on the whole of it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.models.attention_mesh import sequence_shards, shard_attention
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.training.mesh import AXES, RULES
from latentjax.training.programs import sharded_tracing

MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "sequence": 2}]
EVERY_SECOND, TWO_OF_FOUR = SlotRange(2, 1, 2), SlotRange(4, 1, 3)


def make_mesh(sizes):
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=jax.devices()[: math.prod(shape)])


def plain_kernel(q_BQHK, k_BSGK, v_BSGK, slots_Q, segment_ids_BS):
    """Attention as a kernel sees it, written out; grouped queries."""
    group = q_BQHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = jnp.repeat(k_BSGK, group, axis=2), jnp.repeat(v_BSGK, group, axis=2)
    logits_BHQS = jnp.einsum("BQHK,BSHK->BHQS", q_BQHK, k_BSHK) * q_BQHK.shape[3] ** -0.5
    visible = jnp.arange(k_BSGK.shape[1]) <= jnp.asarray(slots_Q)[:, None]
    if segment_ids_BS is not None:
        ids_BQ = jnp.take(segment_ids_BS, slots_Q, axis=1)
        visible = (visible & (ids_BQ[:, :, None] == segment_ids_BS[:, None, :]))[:, None]
    return jnp.einsum("BHQS,BSHK->BQHK", jax.nn.softmax(jnp.where(visible, logits_BHQS, -1e30)), v_BSHK)


def inputs(queried, batch_size=8, num_slots=16, num_heads=4, num_kv_heads=2):
    """Queries, keys, values, weights of the result, and segment ids that differ from row to row."""
    rng = np.random.default_rng(0)
    num_queries = len(queried.indices(num_slots))
    sizes = [(num_queries, num_heads), (num_slots, num_kv_heads), (num_slots, num_kv_heads), (num_queries, num_heads)]
    arrays = [rng.standard_normal((batch_size, *size, 4)).astype(np.float32) for size in sizes]
    starts = rng.random((batch_size, num_slots)) < 0.3
    return *arrays, np.cumsum(starts, axis=1, dtype=np.int32)


def loss_and_gradients(queried, masked, kernel=plain_kernel):
    """A jitted function of q, k, v, weights, segment ids that runs `shard_attention` forward and backward."""

    def loss(q, k, v, weights, segment_ids):
        segment_ids = segment_ids if masked else None
        attended = shard_attention(kernel, q, k, v, segment_ids_BS=segment_ids, queried=queried)
        return jnp.sum(attended * weights), attended

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def on_the_whole(queried, masked):
    return loss_and_gradients(queried, masked)(*inputs(queried))


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("queried", "masked"), [(ALL_SLOTS, False), (ALL_SLOTS, True), (EVERY_SECOND, True), (TWO_OF_FOUR, True)], ids=str
)
def test_equals_the_kernel_on_the_whole(sizes, queried, masked):
    """Results and gradients, with grouped queries; and a device is handed no more than its part."""
    parts = []

    def kernel(q, k, v, slots_Q, segment_ids):
        parts.append((q.shape, k.shape, slots_Q.shape, None if segment_ids is None else segment_ids.shape))
        return plain_kernel(q, k, v, slots_Q, segment_ids)

    arguments = inputs(queried)
    expected = on_the_whole(queried, masked)
    with sharded_tracing(make_mesh(sizes)):
        actual = loss_and_gradients(queried, masked, kernel)(*arguments)
    assert_close(actual, expected)

    rows = 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1))
    queries = len(queried.indices(16)) // sizes.get("sequence", 1)
    heads, kv_heads = 4 // sizes.get("tensor", 1), 2 // sizes.get("tensor", 1)
    part = ((rows, queries, heads, 4), (rows, 16, kv_heads, 4), (queries,), (rows, 16) if masked else None)
    assert set(parts) == {part}


def test_what_does_not_divide_stays_whole():
    """Three rows over two devices, and one head of keys over two: no error, and the same numbers."""
    arguments = inputs(ALL_SLOTS, batch_size=3, num_kv_heads=1)
    expected = loss_and_gradients(ALL_SLOTS, True)(*arguments)
    with sharded_tracing(make_mesh({"data": 2, "tensor": 2})):
        actual = loss_and_gradients(ALL_SLOTS, True)(*arguments)
    assert_close(actual, expected)


def test_slots_are_known_while_tracing_unless_spread():
    """A kernel may specialise on them; spread over devices they are an array of the program."""
    known = []

    def kernel(q, k, v, slots_Q, segment_ids):
        known.append(isinstance(slots_Q, np.ndarray))
        return plain_kernel(q, k, v, slots_Q, segment_ids)

    q, k, v, *_ = inputs(EVERY_SECOND)
    for sizes in [{}, {"data": 8}, {"sequence": 4}]:
        with sharded_tracing(make_mesh(sizes)):
            jax.eval_shape(lambda: shard_attention(kernel, q, k, v, segment_ids_BS=None, queried=EVERY_SECOND))
    assert known == [True, True, False]


def test_tables_are_split_as_their_specs_say():
    """What a kernel wants to know besides reaches it split over the queries, made for its number of heads."""
    made_for, met = [], []

    def tables(num_shards, num_heads):
        made_for.append((num_shards, num_heads))
        return jnp.arange(4 * 16).reshape(4, 16), lambda sharding: sharding.spec

    def kernel(q, k, v, slots_Q, segment_ids, table):
        met.append(table.shape)
        return plain_kernel(q, k, v, slots_Q, segment_ids)

    q, k, v, *_ = inputs(ALL_SLOTS)
    for sizes in [{}, {"tensor": 2, "sequence": 2}]:
        with sharded_tracing(make_mesh(sizes)):
            jax.eval_shape(
                lambda: shard_attention(kernel, q, k, v, segment_ids_BS=None, queried=ALL_SLOTS, tables=tables)
            )
    assert made_for == [(1, 4), (2, 2)]
    assert met == [(4, 16), (4, 8)]


def test_sequence_shards_are_those_of_the_rules_in_force():
    """One where there is no mesh, or no rules."""
    mesh = make_mesh({"sequence": 4, "data": 2})
    with jax.set_mesh(mesh):
        assert sequence_shards() == 1
        with nn.logical_axis_rules(RULES):
            assert sequence_shards() == 4
    assert sequence_shards() == 1
