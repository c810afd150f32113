"""Memory that is freed is there for the next request, without the kernel."""

import fnmatch
import subprocess
import sys

import jax
import pytest

from latentjax.training import host_memory

# A process of its own: what is set holds for all of it, and for good. Reports the fewest page faults of a call: in the
# first ones the heap grows.
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from latentjax.training import host_memory
if sys.argv[1] == "keep":
    assert host_memory.keep_freed_memory()
jax.devices()
if sys.argv[1] == "too late":
    assert host_memory.keep_freed_memory()
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


@pytest.mark.parametrize(
    ("platforms", "files", "expected"),
    [
        ("cpu", ["/dev/nvidiactl"], True),
        ("cuda,cpu", [], False),
        (None, ["/dev/nvidiactl"], False),
        (None, ["/dev/accel0"], False),
        (None, ["/dev/null"], True),
    ],
)
def test_whether_jax_will_compute_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, platforms: str | None, files: list[str], expected: bool
):
    monkeypatch.setattr(host_memory.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)  # read when jax starts, which it has
    try:
        assert host_memory.computes_on_cpu() is expected
    finally:
        jax.config.update("jax_platforms", before)
