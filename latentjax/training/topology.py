"""TPU topologies that are not there: their chips as devices to compile for, from libtpu alone."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from latentjax.errors import UserError, brief, shown
from latentjax.training.hardware import Chip, chip_of


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips.

    Attributes:
      name: as "v5p:4x4x4", of one slice.
      num_slices: how many such slices there are.
      devices: of all slices; they can be compiled for, and nothing else.
      chip: what each device can do.
    """

    name: str
    num_slices: int
    devices: tuple[jax.Device, ...]
    chip: Chip


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of chip: dimensions of its torus, chips of its largest slice, and what libtpu is told beside the shape."""

    dimensions: int
    max_chips: int
    options: tuple[tuple[str, Any], ...] = ()


_KINDS = {
    "v4": _Kind(3, 4096, (("chip_config_name", "megacore"),)),  # both cores of a chip are one device, as on Cloud TPUs
    "v5e": _Kind(2, 256),
    "v5p": _Kind(3, 6144),
    "v6e": _Kind(2, 256),
    "tpu7x": _Kind(3, 9216),
}

_MOST_SLICES = 1024  # each of them is made, device by device

_LOOKS = "such as v5e:4x8 or v5p:4x4x4"


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Reads "v5p:4x4x4" as the kind of chip and the chips along each dimension.

    Raises:
      UserError: there is no such kind, or no slice of that shape.
    """
    kind, separator, shape = name.partition(":")
    kind = kind.lower()
    if not separator or kind not in _KINDS:
        raise UserError(
            f"--topology {shown(name)} is not known: it is a chip and its slice's shape, {_LOOKS}; "
            f"the chips are {', '.join(_KINDS)}"
        )
    dimensions, largest = _KINDS[kind].dimensions, _KINDS[kind].max_chips
    if not re.fullmatch("[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", shape) or len(sizes := _sizes(shape)) != dimensions:
        raise UserError(f"--topology {shown(name)}: a slice of {kind} has {dimensions} dimensions, {_LOOKS}")
    # A host has 2 x 2 chips, and a slice is made of whole hosts; but there are also hosts with one chip.
    if math.prod(sizes) > 1 and (sizes[0] % 2 or sizes[1] % 2):
        raise UserError(f"--topology {name!r}: slices are made of 2x2 chips, so the first two sizes must be even")
    if math.prod(sizes) > largest:
        raise UserError(
            f"--topology {name!r} has {math.prod(sizes)} chips, but {kind} has at most {largest} in a slice"
        )
    return kind, sizes


def _sizes(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split("x"))


def make_topology(name: str, num_slices: int = 1) -> Topology:
    """Makes the devices of `num_slices` slices, each of the shape that the name has.

    Needs no TPU, but libtpu, which it makes jax load in this process.

    Raises:
      UserError: no such topology, libtpu is not installed, or cannot be loaded.
    """
    kind, sizes = parse_topology(name)
    if not 1 <= num_slices <= _MOST_SLICES:
        raise UserError(f"--num_slices must be from 1 to {_MOST_SLICES}, not {shown(num_slices)}")
    if not os.environ.get("TPU_LIBRARY_PATH") and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu, which is not installed (it exists for Linux on x86-64): "
            "pip install -e '.[tpu]'"
        )
    _prepare_environment()
    options = dict(_KINDS[kind].options)
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:
        options["num_slices"] = num_slices
    shape = "x".join(map(str, sizes))
    try:
        devices = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(_reason(name, str(error))) from error
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise UserError(f"--topology {name!r}: nothing is known of the speed of a {devices[0].device_kind!r}")
    return Topology(f"{kind}:{shape}", num_slices, tuple(devices), chip)


def _reason(name: str, message: str) -> str:
    if "lockfile" in message or "already in use" in message:
        return (
            "another process is using libtpu, and ALLOW_MULTIPLE_LIBTPU_LOAD forbids a second one: wait for it, or "
            "unset that variable"
        )
    return f"libtpu does not make the topology {name!r}: {brief(message)}"


def _prepare_environment() -> None:
    """Tells libtpu that no TPU is wanted, before it is loaded."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud which TPU this machine has
        # libtpu lets one process in at a time, for the sake of the chips. Compiling touches none.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # unused, but missed aloud
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "2",
        "TPU_STDERR_LOG_LEVEL": "2",
    }.items():
        os.environ.setdefault(variable, value)
