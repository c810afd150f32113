"""Batches go to the devices ahead of the step, and nothing else changes."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from latentjax.config import default
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import batch_sharding, make_mesh


class Reader:
    """Batches of 8 rows filled with their number; counts what was read, and may fail."""

    def __init__(self, count: int, bad: int = -1):
        self.count, self.bad, self.read, self.closed = count, bad, 0, False

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.read == self.count:
            raise StopIteration
        if self.read == self.bad:
            raise ValueError(f"batch {self.read}")
        self.read += 1
        return {"tokens": np.full((8, 3), self.read - 1, np.int32)}

    def close(self) -> None:
        """Remembers it."""
        self.closed = True


@pytest.fixture
def mesh():
    config = default()
    config.data.batch_size = 8
    return make_mesh(config, jax.devices())


def number(batch: dict[str, jax.Array]) -> int:
    return int(batch["tokens"][0, 0])


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
@pytest.mark.parametrize(("count", "limit"), [(7, None), (10**9, 7), (7, 10), (0, None), (10**9, 0)])
def test_all_batches_in_order(mesh, ahead: int, count: int, limit: int | None):
    reader = Reader(count)
    batches = list(put_ahead(reader, mesh, ahead, limit))
    assert [number(batch) for batch in batches] == list(range(min(count, 10**9 if limit is None else limit)))
    assert reader.read == len(batches) and reader.closed
    for batch in batches:
        assert batch["tokens"].sharding == batch_sharding(mesh) and batch["tokens"].shape == (8, 3)


@pytest.mark.parametrize("ahead", [0, 2])
def test_so_many_are_on_the_devices_besides_the_one_in_use(mesh, ahead: int):
    reader = Reader(100)
    batches = put_ahead(reader, mesh, ahead)
    for step in range(5):
        assert number(next(batches)) == step
        assert reader.read == step + 1 + ahead
    batches.close()
    assert reader.closed


@pytest.mark.parametrize("ahead", [0, 1, 9])
def test_an_error_comes_where_its_batch_was_due(mesh, ahead: int):
    reader = Reader(100, bad=4)
    batches = put_ahead(reader, mesh, ahead)
    assert [number(next(batches)) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="batch 4"):
        next(batches)
    assert reader.closed
