"""Which R a training step uses."""

from collections.abc import Sequence

import numpy as np


def draw_jacobi_iterations(choices: Sequence[int], seed: int, step: int) -> int:
    """Draws R for a step, uniformly from `choices` (PonderLM-2, section 3.3).

    A pure function of its arguments, made on the host: all hosts agree, and a resumed run draws what it would have
    drawn. `SeedSequence` hashes the same on every platform and NumPy version.
    """
    draw = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return int(choices[int(draw) % len(choices)])
