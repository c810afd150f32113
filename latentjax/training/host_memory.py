"""How the C library gives memory back, which on a CPU costs a training step a tenth of its time."""

import ctypes
import glob
import sys

import jax

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


# What drivers of accelerators leave in /dev, by jax's name of the platform.
_DEVICE_FILES = {"cuda": ("/dev/nvidiactl",), "rocm": ("/dev/kfd",), "tpu": ("/dev/accel*", "/dev/vfio/*")}


def computes_on_cpu() -> bool:
    """Whether jax will compute on this machine's CPU; for those who must know before it starts."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # options are set as jax loads
    named = (platforms or "").split(",")[0]
    if named:
        return named == "cpu"
    return not any(glob.glob(pattern) for patterns in _DEVICE_FILES.values() for pattern in patterns)


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed for the next request, in this process; returns whether it could be done.

    To be called before jax is asked for its devices: it starts threads then, and those that have come by an arena of
    their own keep it, so that every step faults in its memory again (a third of the time of a step of `pile_70m`).

    XLA on a CPU asks for a program's temporary memory anew at every step. Large requests are mapped from the kernel and
    given back, so that every step the kernel zeroes gigabytes, page by page. For this: no mapping, no giving back, and
    one arena for all threads, because the others cannot grow beyond 64 MiB. The process keeps the memory of its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])
