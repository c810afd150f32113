"""Batches on their way from the host to the devices."""

import itertools
from collections import deque
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from latentjax.training.mesh import put_batch


def put_ahead(
    batches: Generator[dict[str, Any], None, None],
    mesh: Mesh,
    ahead: int,
    limit: int | None = None,
    rows: np.ndarray | None = None,
    batch_size: int | None = None,
) -> Generator[dict[str, jax.Array], None, None]:
    """Puts batches onto the devices before they are needed: transfers are asynchronous, and go on beside a step.

    The order and the arrays are those of `batches`, which is closed in the end, whether it was used up or this iterator
    was closed. An error in making a batch is raised where that batch was due, not before.

    Args:
      batches: this process's rows; `rows` and `batch_size` say which, as in `put_batch`.
      ahead: how many batches are on the devices besides the one that was given out last.
      limit: how many to take from `batches`; None: all.

    Yields:
      Global arrays, spread over the mesh.
    """
    waiting: deque[dict[str, jax.Array]] = deque()
    error = None
    try:
        try:
            for batch in itertools.islice(batches, limit):
                waiting.append(put_batch(batch, mesh, rows, batch_size))
                if len(waiting) > ahead:
                    yield waiting.popleft()
        except Exception as raised:
            error = raised
        while waiting:
            yield waiting.popleft()
        if error is not None:
            raise error
    finally:
        batches.close()
