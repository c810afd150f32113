"""A sequence fed to the cache in pieces comes out as if it were fed at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.models.backbone import Backbone
from latentjax.models.cache import KeyValueCache

NUM_SLOTS = 8
POSITIONS_BS = np.array([[0, 0, 1, 1, 2, 2, 3, 3]] * 2, np.int32)  # as with one thought a token
SEGMENT_IDS_BS = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 2, 2]], np.int32)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def backbone(request):
    """(apply(x, positions, segments, cache), the ModelSpec)."""
    model = language_model(1, request.param)
    apply = jax.jit(functools.partial(Backbone(model.spec, 2).apply, {"params": params_of(model)["backbone"]}))
    return apply, model.spec


def embeddings(spec):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, NUM_SLOTS, spec.hidden_size)), jnp.float32)


@pytest.mark.parametrize("pieces", [(8,), (3, 4, 1), (1,) * 8])
def test_pieces_equal_the_whole(backbone, pieces):
    """Hidden states equal those without a cache, segments told apart across pieces; spare room is not looked at."""
    apply, spec = backbone
    x_BSD = embeddings(spec)
    expected, no_cache = apply(x_BSD, POSITIONS_BS, SEGMENT_IDS_BS, None)
    assert no_cache is None
    cache = KeyValueCache.empty(spec, 2, NUM_SLOTS + 3)
    start = 0
    for piece in pieces:
        part = slice(start, start + piece)
        h_BSD, cache = apply(x_BSD[:, part], POSITIONS_BS[:, part], SEGMENT_IDS_BS[:, part], cache)
        np.testing.assert_allclose(h_BSD, expected[:, part], rtol=0, atol=1e-5)
        start += piece
        assert cache.length == start
    np.testing.assert_array_equal(cache.segment_ids_BL[:, :NUM_SLOTS], SEGMENT_IDS_BS)
    assert np.all(np.asarray(cache.keys_NBGLK[..., NUM_SLOTS:, :]) == 0)
    assert np.all(np.any(np.asarray(cache.values_NBGLK[..., :NUM_SLOTS, :]) != 0, axis=-1))


def test_without_segments_all_is_one(backbone):
    """No ids: every slot sees all before it."""
    apply, spec = backbone
    x_BSD = embeddings(spec)
    expected, _ = apply(x_BSD, POSITIONS_BS, None, None)
    cache = KeyValueCache.empty(spec, 2, NUM_SLOTS)
    _, cache = apply(x_BSD[:, :5], POSITIONS_BS[:, :5], None, cache)
    h_BSD, _ = apply(x_BSD[:, 5:], POSITIONS_BS[:, 5:], None, cache)
    np.testing.assert_allclose(h_BSD, expected[:, 5:], rtol=0, atol=1e-5)


def test_passes_over_the_same_slots_have_layers_of_their_own(backbone):
    """What the first pass makes of the slots before is nothing to the second; slots count after the last pass."""
    apply, spec = backbone
    first_BSD = embeddings(spec)
    inputs = first_BSD, jnp.flip(first_BSD, axis=-1)
    expected = [apply(x_BSD, POSITIONS_BS, SEGMENT_IDS_BS, None)[0] for x_BSD in inputs]
    cache = KeyValueCache.empty(spec, 2, NUM_SLOTS, num_passes=2)
    for slot in range(NUM_SLOTS):
        part = slice(slot, slot + 1)
        for x_BSD, expected_BSD in zip(inputs, expected, strict=True):
            assert cache.length == slot
            h_BSD, cache = apply(x_BSD[:, part], POSITIONS_BS[:, part], SEGMENT_IDS_BS[:, part], cache)
            np.testing.assert_allclose(h_BSD, expected_BSD[:, part], rtol=0, atol=1e-5)
    assert (cache.length, cache.first_layer, len(cache.keys_NBGLK)) == (NUM_SLOTS, 0, 2 * spec.num_layers)


def test_empty_cache_has_the_models_shape_and_dtype():
    """One head of keys per group of queries, room for every thought."""
    model = language_model(2, "llama", dtype="bfloat16")
    cache = model.empty_cache(3, 5)
    assert cache.keys_NBGLK.shape == cache.values_NBGLK.shape == (2, 3, 2, 15, 4)
    assert cache.keys_NBGLK.dtype == jnp.bfloat16
    assert cache.length == 0
