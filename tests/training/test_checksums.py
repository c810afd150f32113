"""Checksums see every change, and do not see how an array lies on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import sharding

from latentjax.training.checksums import StateChecksums, checksum


def written_out(array: np.ndarray) -> int:
    """The checksum in Python's integers, for elements of 1, 2 or 4 bytes."""
    total = 0
    for place, word in enumerate(array.view(f"u{array.dtype.itemsize}").ravel().tolist()):
        word ^= place * 0x9E3779B1 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        total += word ^ word >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_as_written_out(dtype: str, shape: tuple[int, ...]):
    array = np.asarray(jax.random.normal(jax.random.key(1), shape) * 9).astype(jnp.dtype(dtype))
    assert int(jax.jit(checksum)(array)) == written_out(array)


def test_every_change_is_seen():
    array = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    changed = [array.T.reshape(6, 8), array[::-1], np.roll(array, 1), np.zeros_like(array), -array]
    swapped = array.copy()
    swapped[2, 3], swapped[5, 1] = array[5, 1], array[2, 3]
    changed.append(swapped)
    for bit in range(32):
        for place in ([5], [5, 6]):  # two flips of the same bit might cancel
            words = array.copy().view(np.uint32)
            words.ravel()[place] ^= np.uint32(1 << bit)
            changed.append(words.view(np.float32))
    run = jax.jit(checksum)
    sums = [int(run(np.ascontiguousarray(each))) for each in [array, *changed]]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize(("devices", "spec"), [(1, ()), (8, ()), (8, ("data",)), (4, (None, "data")), (2, ("data",))])
def test_they_do_not_depend_on_the_mesh(devices: int, spec: tuple):
    numbers = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    counter = jax.device_put(np.int32(3), sharding(devices))
    tree = {"weights": jax.device_put(numbers, sharding(devices, spec)), "step": counter}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    checksums = StateChecksums(abstract)
    assert checksums.describe(checksums.start(tree)) == {
        "step": [[], "int32", written_out(np.int32([3]))],
        "weights": [[16, 8], "float32", written_out(numbers)],
    }
    # Each device sums its own part: nothing of an array's size is sent.
    assert "all-gather" not in checksums.program.as_text()
