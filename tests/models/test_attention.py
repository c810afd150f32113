"""Attention against a float64 loop over batch, head and query."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.errors import UserError
from latentjax.models.attention import (
    BRANCHES,
    MAX_CHUNKS,
    QUERY_CHUNK,
    SHARED_PREFIX,
    check_backend,
    choose_backend,
    xla_attention,
)
from latentjax.models.attention_backend import AttentionRequest
from latentjax.models.slots import ALL_SLOTS, SlotRange


def naive_attention(q_BSHK, k_BSGK, v_BSGK, segment_ids_BS, prefix_ids_BS=None):
    """Softmax of scaled dot products over the slots at or before the query, of its segment, or of that before it."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BSHK, k_BSGK, v_BSGK))
    out = np.zeros_like(q)
    per_group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        visible = segment_ids_BS[b, : s + 1] == segment_ids_BS[b, s]
        if prefix_ids_BS is not None:
            visible |= segment_ids_BS[b, : s + 1] == prefix_ids_BS[b, s]
        scores = k[b, : s + 1, h // per_group][visible] @ q[b, s, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, : s + 1, h // per_group][visible]
    return out


def random_heads(num_slots, num_heads, num_kv_heads, batch_size=2, head_dim=4):
    rng = np.random.default_rng(num_slots)
    shapes = [(batch_size, num_slots, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [jnp.asarray(2 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


# Sizes around one chunk of queries, several, a ragged last one, and more slots than MAX_CHUNKS of QUERY_CHUNK hold.
@pytest.mark.parametrize("num_slots", [1, 63, 64, 65, 200, 600])
def test_grouped_queries_within_segments(num_slots):
    """Four query heads on two of keys, segments of uneven length that cross the chunks."""
    q, k, v = random_heads(num_slots, 4, 2)
    segment_ids_BS = np.stack([np.arange(num_slots) // 50, np.arange(num_slots) // 17 % 2]).astype(np.int32)
    out = jax.jit(xla_attention, static_argnames="queried")(q, k, v, segment_ids_BS=segment_ids_BS, queried=ALL_SLOTS)
    np.testing.assert_allclose(out, naive_attention(q, k, v, segment_ids_BS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_slots", "num_heads", "num_kv_heads"), [(65, 3, 3), (130, 4, 1), (600, 2, 2)])
def test_one_segment(num_slots, num_heads, num_kv_heads):
    """Without segment ids; a head of keys each, and one for all."""
    q, k, v = random_heads(num_slots, num_heads, num_kv_heads, batch_size=1)
    out = jax.jit(partial(xla_attention, segment_ids_BS=None, queried=ALL_SLOTS))(q, k, v)
    np.testing.assert_allclose(out, naive_attention(q, k, v, np.zeros((1, num_slots))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("queried", [ALL_SLOTS, SlotRange(2, 1, 2)])
def test_branches_see_the_prefix_of_their_tree(queried):
    """Trees of a prefix and three branches, each of 25 slots, one behind another."""
    q, k, v = random_heads(200, 2, 1)
    parts = np.broadcast_to(np.arange(200) // 25, (2, 200))
    trees, branches = parts // 4, parts % 4
    ids, prefixes = (BRANCHES * trees + branches).astype(np.int32), BRANCHES * trees
    attend = jax.jit(partial(SHARED_PREFIX.call, queried=queried))
    out = attend(queried.take(q), k, v, segment_ids_BS=ids)
    expected = naive_attention(q, k, v, ids, prefixes)[:, queried.indices(200)]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - naive_attention(q, k, v, ids)[:, queried.indices(200)]).max() > 0.1


@pytest.mark.parametrize("queried", [SlotRange(2, 0, 1), SlotRange(2, 1, 2), SlotRange(3, 0, 2), SlotRange(3, 2, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_some_slots_of_every_token_ask(queried, masked):
    """Each gets what it would get if all asked; over several chunks, with documents that do not end with tokens."""
    q, k, v = random_heads(600, 2, 1)
    segment_ids_BS = np.broadcast_to(np.arange(600) // 70, (2, 600)).astype(np.int32)
    out = jax.jit(partial(xla_attention, queried=queried))(
        queried.take(q), k, v, segment_ids_BS=segment_ids_BS if masked else None
    )
    expected = naive_attention(q, k, v, segment_ids_BS if masked else np.zeros((2, 600)))
    slots = [slot for slot in range(600) if queried.start <= slot % queried.period < queried.stop]
    np.testing.assert_allclose(out, expected[:, slots], rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    """Softmax subtracts the maximum, in float32 even for bfloat16 inputs."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_heads(5, 1, 1))
    out = xla_attention(100 * q, 100 * k, v, segment_ids_BS=None, queried=ALL_SLOTS)
    assert out.dtype == jnp.bfloat16
    expected = naive_attention(np.asarray(100 * q, np.float32), np.asarray(100 * k, np.float32), v, np.zeros((2, 5)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("num_slots", [64, 65, 600, 5000])
def test_number_of_chunks_is_bounded(num_slots):
    """The program has two matrix products a chunk, and stops growing at MAX_CHUNKS."""
    q, k, v = (jax.ShapeDtypeStruct((1, num_slots, 2, 4), jnp.float32) for _ in range(3))
    jaxpr = str(jax.make_jaxpr(partial(xla_attention, segment_ids_BS=None, queried=ALL_SLOTS))(q, k, v))
    assert jaxpr.count("dot_general[") == 2 * min(-(-num_slots // QUERY_CHUNK), MAX_CHUNKS)


def test_unknown_backend_is_the_users_error():
    """It names the key, the value and the choices."""
    with pytest.raises(UserError, match=r"model\.attention='flush'.*auto.*xla"):
        check_backend("flush")


def request(platform, **changes):
    return AttentionRequest(
        **{"platform": platform, "mask_documents": False, "head_dim": 64, "dtype": "bfloat16"} | changes
    )


def test_auto_takes_the_best_of_the_platform():
    """With its masks."""
    for masked in (False, True):
        assert choose_backend("auto", request("cpu", mask_documents=masked)) == "xla"
        assert choose_backend("auto", request("tpu", mask_documents=masked)) == "splash"


def test_a_backend_that_was_asked_for_is_never_replaced():
    """It serves, or the user is told."""
    assert choose_backend("xla", request("tpu")) == "xla"
    with pytest.raises(
        UserError, match=r"model\.attention='splash' serves tpu devices, but these are cpu: choose auto"
    ):
        choose_backend("splash", request("cpu"))


def test_configs_cannot_name_what_scoring_chooses():
    with pytest.raises(UserError, match="shared_prefix"):
        check_backend(SHARED_PREFIX.name)
