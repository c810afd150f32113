"""What several processes agree on: whether one of them wishes something, what befell each, what the first has found."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latentjax.training import processes
from latentjax.training.mesh import put_shards

_TEXT_BYTES = 1024
_moments = itertools.count()


class Wish:
    """Something that any process may wish at a step, and that all then do at the same one: to stop, or to save."""

    def __init__(self, mesh: Mesh, every_steps: int):
        """Asks over this mesh, which all processes share, at every so many steps if there are several."""
        self._mesh, self._every_steps = mesh, every_steps
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def granted(self, step: int, wished: bool) -> bool:
        """Returns whether some process wished it: at once where there is one, `every_steps` late where there are more.

        Those ask on their devices, behind the step under way, and read the answer to the question before: that one has
        been there since the step before ended, so nobody waits.
        """
        if jax.process_count() == 1:
            return wished
        if step % self._every_steps:
            return False
        own = np.full((1,), wished, np.int32)  # of each device of this process
        asked = self._any(put_shards((self._mesh.size,), self._sharding, lambda place: own))
        before, self._asked = self._asked, asked
        return before is not None and bool(jax.device_get(before))

    def forget(self) -> None:
        """Drops the question under way: it was answered by what all have done meanwhile."""
        self._asked = None


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes (at most 1024 bytes of each), in order, in every one of them.

    All come here, at the same place of the program, and wait for the last.
    """
    if jax.process_count() == 1:
        return [text]
    processes.wait_for_all(f"agreement {next(_moments)}")
    sent = np.frombuffer(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(sent))
    return [bytes(row).decode(errors="ignore").rstrip() for row in rows]


def numbers_of_first(numbers: Sequence[int]) -> list[int]:
    """Returns the numbers (below 2^31) that the first process gave, in every process; the others' are ignored."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    if count == 0:
        return []
    sent = np.zeros((count,), np.int32)
    if processes.is_first():
        sent[:] = numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tolist()


def text_of_first(text: str) -> str:
    """Returns the text that the first process gave, of any length, in every process; the others' are ignored."""
    return bytes(numbers_of_first(list(text.encode()))).decode()
