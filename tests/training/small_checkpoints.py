"""Checkpoints of a few small arrays, quick to write, to damage and to read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latentjax.config import default
from latentjax.training.checkpoint import Checkpoints
from latentjax.training.checkpoint_files import directory_of


def sharding(num_devices: int = 1, spec: tuple = ()) -> NamedSharding:
    """Over the first devices, on one axis."""
    return NamedSharding(Mesh(np.array(jax.devices()[:num_devices]), ("data",)), PartitionSpec(*spec))


def state(step: int, width: int = 17) -> dict[str, Any]:
    """A state with all that a real one has: a counter, parameters, zeros and tuples."""
    rng = np.random.default_rng(step)
    weights = rng.standard_normal((33, width)).astype(np.float32)
    params = {"weights": weights, "bias": rng.standard_normal(5).astype(np.float32)}
    arrays = {"step": np.int32(step), "params": params, "moments": (np.zeros((33, width), np.float32),)}
    return jax.device_put(arrays, sharding())


def opened(directory: Path | str, width: int = 17, **knobs: Any) -> tuple[Checkpoints, list[str]]:
    """The checkpoints of a directory, and the lines that they say."""
    config = default().checkpoint
    config.update(knobs)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, width))
    checkpoints, said = Checkpoints(directory_of(str(directory), None), config, abstract), []
    checkpoints.note = said.append
    return checkpoints, said


def save(checkpoints: Checkpoints, step: int) -> None:
    """Starts saving `state(step)`."""
    checkpoints.save(state(step), step, {"step": step, "seed": 0.1})


def restored(checkpoints: Checkpoints) -> int:
    """Restores and returns the step, having checked every number."""
    found, notes = checkpoints.restore()
    assert notes == {"step": notes["step"], "seed": 0.1}
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state(notes["step"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return notes["step"]


def faults(data: bytes, flips: int) -> Iterator[bytes | None]:
    """What a file may have become; None: deleted."""
    yield from (data[: len(data) // 2], data[:-1], b"", None)
    for number in range(flips):
        yield flipped(data, len(data) * number // flips, number % 8)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """With one bit of the byte at `place` turned over."""
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
