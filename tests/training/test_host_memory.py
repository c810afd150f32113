"""Memory that is freed is there for the next request, without the kernel."""

import subprocess
import sys

import pytest

# A process of its own: what is set holds for all of it, and for good. Reports the fewest page faults of a call: in the
# first ones the heap grows.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from latentjax.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
x = jnp.ones((16, 1024, 1024))
f = jax.jit(lambda x: jnp.cumsum(jnp.sin(x), axis=0)[-1])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(10)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is what is set")
def test_freed_memory_is_not_asked_for_again():
    """A program with 64 MiB of temporary memory faults on its pages at every call, or hardly any."""
    faults = {}
    for setting in ("keep", "leave"):
        command = [sys.executable, "-c", PROGRAM, setting]
        faults[setting] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 4 * faults["keep"] < faults["leave"]
