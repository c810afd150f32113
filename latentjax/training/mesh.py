"""The device mesh and the one table that says what is sharded along it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from latentjax.errors import UserError

AXES = ("replica", "data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")  # what the rows of a batch are split over

# Logical axis name -> mesh axes. A name that is absent is not sharded.
RULES: tuple[tuple[str, Any], ...] = (
    # activations
    ("batch", BATCH_AXES),
    ("slots", "sequence"),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # parameters, and with them the optimizer's moments
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)


def mesh_shape(config: ConfigDict, num_devices: int) -> tuple[int, ...]:
    """Resolves the `mesh` group to one size per axis of AXES.

    Raises:
      UserError: the sizes do not make up the number of devices.
    """
    sizes = [config[axis] for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    written = ", ".join(f"{axis}={config[axis]}" for axis in AXES if config[axis] != 1)
    if -1 in sizes and num_devices % fixed == 0:
        sizes[sizes.index(-1)] = num_devices // fixed
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"config group 'mesh' ({written or 'all 1'}) needs "
            f"{'a multiple of ' if -1 in sizes else ''}{fixed} devices, but there are {num_devices}: "
            "change the sizes, or set one of them to -1 to take the rest"
        )
    return tuple(sizes)


def check_divisible(config: ConfigDict, shape: Sequence[int]) -> None:
    """Checks that everything sharded divides evenly over a mesh of this shape.

    Raises:
      UserError: names the size that does not divide and the mesh axis it is split over.
    """
    size = dict(zip(AXES, shape, strict=True))
    rows = math.prod(size[axis] for axis in BATCH_AXES)
    demands = [
        ("data.batch_size / train.gradient_accumulation_steps",
         config.data.batch_size // config.train.gradient_accumulation_steps, rows,
         "mesh.replica * mesh.data * mesh.fsdp"),
        ("data.sequence_length", config.data.sequence_length, size["sequence"], "mesh.sequence"),
    ]  # fmt: skip
    _check_demands(demands)
    check_model_divisible(config.model, shape)


def check_model_divisible(model: Any, shape: Sequence[int]) -> None:
    """Checks that the sizes of a model divide evenly over a mesh of this shape.

    Args:
      model: the `model` group of a config, or a ModelSpec.

    Raises:
      UserError: names the size that does not divide and the mesh axis it is split over.
    """
    size = dict(zip(AXES, shape, strict=True))
    demands = [
        ("model.hidden_size", model.hidden_size, size["fsdp"], "mesh.fsdp"),
        ("model.num_heads", model.num_heads, size["tensor"], "mesh.tensor"),
        ("model.num_kv_heads", model.num_kv_heads or model.num_heads, size["tensor"], "mesh.tensor"),
        ("model.intermediate_size", model.intermediate_size, size["tensor"], "mesh.tensor"),
        ("model.vocab_size", model.vocab_size, size["tensor"], "mesh.tensor"),
    ]
    _check_demands(demands)


def _check_demands(demands: Sequence[tuple[str, int, int, str]]) -> None:
    for name, number, divisor, axes in demands:
        if number % divisor:
            mend = "change one of them"
            if name == "model.vocab_size":
                # Rows beyond the tokenizer's are harmless, so there is always an easy way out.
                mend = f"raise it to {-(-number // divisor) * divisor}, or change mesh.tensor"
            raise UserError(f"{name} is {number}, which {axes} = {divisor} does not divide: {mend}")


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """Arranges devices into the mesh that the config asks for, neighbours on the innermost axes.

    TPU slices lie one after another along the `replica` axis: every other axis stays within a slice, whose chips a fast
    network connects. With mesh.replica a multiple of the number of slices, each slice holds several replicas. GPUs of
    several nodes keep the order of their ids, so the innermost axes stay within a node as far as they fit.

    Raises:
      UserError: the sizes do not fit the devices or their slices, or the model and batch do not fit the sizes.
    """
    check_divisible(config, mesh_shape(config.mesh, len(devices)))
    return arrange_mesh(config.mesh, devices)


def arrange_mesh(sizes: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """As `make_mesh`, of the `mesh` group of a config alone; what it is for is not checked.

    Raises:
      UserError: the sizes do not fit the devices or their slices.
    """
    shape = mesh_shape(sizes, len(devices))
    slices = _slices(devices)
    check_slices(shape, [len(each) for each in slices])
    replicas, *rest = shape
    arranged = [_arrange((replicas // len(slices), *rest), each) for each in slices]
    # Sharding is left to the compiler and steered by constraints: Auto axes, on every jax version.
    return Mesh(np.concatenate(arranged), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def check_slices(shape: Sequence[int], sizes: Sequence[int]) -> None:
    """Checks that a mesh of this shape can be laid over slices of these numbers of devices.

    Raises:
      UserError: says which mesh.replica is needed.
    """
    count, replicas = len(sizes), shape[AXES.index("replica")]
    if len(set(sizes)) > 1:
        raise UserError(f"the slices have {', '.join(map(str, sizes))} devices: a mesh needs slices of one size")
    if replicas % count:
        raise UserError(
            f"the devices are in {count} slices, over which mesh.replica={replicas} does not spread: set mesh.replica="
            f"{count} or a multiple of it, so that only gradients cross the slow network between slices"
        )


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each TPU slice; of anything else, all of them: what GPUs call a slice is a node."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(index, []).append(device)
    return [slices[index] for index in sorted(slices)]


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices that one fast network connects, as an array of this shape."""
    if len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    # An axis of the chips' torus is split only where the mesh fits no other way; without leave to, that is an error.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a pytree of (possibly abstract) arrays whose parameters still carry their logical axis names."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the batch axes; tokens are not split here (T + 1 of them rarely divides)."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, each once, in order: (n,) int64.

    Processes that differ only along the sequence and tensor axes hold the same rows.
    """
    indices = _own_parts(batch_sharding(mesh), (batch_size,)).values()
    rows = {row for (part,) in indices for row in range(*part.indices(batch_size))}
    return np.array(sorted(rows), np.int64)


def _own_parts(sharding: NamedSharding, shape: tuple[int, ...]) -> Mapping[jax.Device, tuple[slice, ...]]:
    """The part of an array that each device of this process holds; jax's None is for other kinds of sharding."""
    return cast(Mapping[jax.Device, tuple[slice, ...]], sharding.addressable_devices_indices_map(shape))


def put_shards(
    shape: tuple[int, ...], sharding: NamedSharding, shard: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Makes a global array of what `shard(index)` returns for the part that each device of this process holds.

    As `jax.make_array_from_callback`, but an explicit transfer, so that loops can forbid all others.
    """
    indices = _own_parts(sharding, shape)
    shards = jax.device_put([shard(index) for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, rows: np.ndarray | None = None, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Turns this process's rows into global arrays, spread over the mesh.

    Args:
      batch: arrays of (n, ...).
      rows: (n,) which rows of the global batch these are, as `rows_of_process` has them, and `batch_size`, how many
        there are in all; None: all of them.

    Raises:
      ValueError: `rows` without `batch_size`.
    """
    sharding = batch_sharding(mesh)
    if rows is None:
        return {name: jax.device_put(array, sharding) for name, array in batch.items()}
    if batch_size is None:
        raise ValueError("rows of a global batch are given, but not how many rows there are in all")

    def global_array(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            place = int(np.searchsorted(rows, start))
            return array[place : place + stop - start]

        return put_shards((batch_size, *array.shape[1:]), sharding, shard)

    return {name: global_array(array) for name, array in batch.items()}
