"""Where slots lie among each other."""

import jax.numpy as jnp
import numpy as np
import pytest

from latentjax.models.slots import ALL_SLOTS, SlotRange, interleave, split


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 4), (1, 5, 3, 2)])
def test_interleave_and_back(count, shape):
    """Slot by slot, as stacking on a new axis and merging it with T would."""
    parts = [np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i in range(count)]
    whole = interleave([jnp.asarray(part) for part in parts])
    np.testing.assert_array_equal(whole, np.stack(parts, axis=2).reshape(shape[0], count * 5, *shape[2:]))
    for part, other in zip(split(whole, count), parts, strict=True):
        np.testing.assert_array_equal(part, other)


def test_interleave_keeps_integers():
    """Ids too are laid out so."""
    whole = interleave([jnp.array([[1, 2]]), jnp.array([[3, 4]])])
    assert whole.dtype == jnp.int32 and whole.tolist() == [[1, 3, 2, 4]]


@pytest.mark.parametrize("queried", [ALL_SLOTS, SlotRange(2, 0, 1), SlotRange(3, 1, 3), SlotRange(4, 0, 3)])
def test_take_and_indices_agree(queried):
    """And are what they say, in order."""
    x_BS = np.arange(24).reshape(2, 12)
    slots = [slot for slot in range(12) if queried.start <= slot % queried.period < queried.stop]
    assert queried.indices(12).tolist() == slots
    np.testing.assert_array_equal(queried.take(jnp.asarray(x_BS)), x_BS[:, slots])
