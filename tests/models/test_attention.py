"""Attention against a float64 loop over batch, head and query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.errors import UserError
from latentjax.models.attention import MAX_CHUNKS, QUERY_CHUNK, check_backend, choose_backend, xla_attention


def naive_attention(q_BSHK, k_BSGK, v_BSGK, segment_ids_BS):
    """Softmax of scaled dot products over the slots at or before the query, of its segment."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BSHK, k_BSGK, v_BSGK))
    out = np.zeros_like(q)
    per_group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(q.shape[:3]):
        visible = segment_ids_BS[b, : s + 1] == segment_ids_BS[b, s]
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
    out = jax.jit(xla_attention)(q, k, v, segment_ids_BS=segment_ids_BS)
    np.testing.assert_allclose(out, naive_attention(q, k, v, segment_ids_BS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_slots", "num_heads", "num_kv_heads"), [(65, 3, 3), (130, 4, 1), (600, 2, 2)])
def test_one_segment(num_slots, num_heads, num_kv_heads):
    """Without segment ids; a head of keys each, and one for all."""
    q, k, v = random_heads(num_slots, num_heads, num_kv_heads, batch_size=1)
    out = jax.jit(xla_attention, static_argnames="segment_ids_BS")(q, k, v, segment_ids_BS=None)
    np.testing.assert_allclose(out, naive_attention(q, k, v, np.zeros((1, num_slots))), rtol=0, atol=1e-5)


def test_large_logits_do_not_overflow():
    """Softmax subtracts the maximum, in float32 even for bfloat16 inputs."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_heads(5, 1, 1))
    out = xla_attention(100 * q, 100 * k, v, segment_ids_BS=None)
    assert out.dtype == jnp.bfloat16
    expected = naive_attention(np.asarray(100 * q, np.float32), np.asarray(100 * k, np.float32), v, np.zeros((2, 5)))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("num_slots", [64, 65, 600, 5000])
def test_number_of_chunks_is_bounded(num_slots):
    """The program has two matrix products a chunk, and stops growing at MAX_CHUNKS."""
    q, k, v = (jax.ShapeDtypeStruct((1, num_slots, 2, 4), jnp.float32) for _ in range(3))
    jaxpr = str(jax.make_jaxpr(lambda q, k, v: xla_attention(q, k, v, segment_ids_BS=None))(q, k, v))
    assert jaxpr.count("dot_general[") == 2 * min(-(-num_slots // QUERY_CHUNK), MAX_CHUNKS)


def test_unknown_backend_is_the_users_error():
    """It names the key, the value and the choices, and is never replaced in silence."""
    with pytest.raises(UserError, match=r"model\.attention='flush'.*auto.*xla"):
        check_backend("flush")
    assert choose_backend("xla", "gpu") == "xla"
    assert choose_backend("auto", "cpu") == "xla"
