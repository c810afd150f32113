"""Attention kernels over a mesh: the compiler cannot split a kernel, so each device is handed its own part of the work.

Rows of the batch and heads are independent. Slots are not: each device takes some of the queries and meets all keys and
values, which are gathered for it.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from latentjax.models.slots import SlotRange

# kernel(q_BQHK, k_BSGK, v_BSGK, slots_Q, segment_ids_BS) -> (B, Q, H, K): slots_Q, (Q,) int32, says at which slot each
# query stands. It is a NumPy array, known while tracing, unless the queries are spread over the mesh.
Kernel = Callable[..., jax.Array]

# tables(num_shards, num_heads) -> (pytree of arrays, specs_of): what a kernel wants to know besides, for queries spread
# over `num_shards` devices and `num_heads` query heads on each. specs_of(sharding) gives the pytree's partition specs,
# where `sharding` is that of an array of (heads, queries).
Tables = Callable[[int, int], tuple[Any, Callable[[NamedSharding], Any]]]


def shard_attention(
    kernel: Kernel,
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segment_ids_BS: jax.Array | None,
    queried: SlotRange,
    tables: Tables | None = None,
) -> jax.Array:
    """Runs an attention kernel on each device's part of the rows, heads and queries; whole where no mesh is in force.

    Which mesh axes the logical axes "batch", "slots" and "act_heads" lie along is read from the sharding rules in
    force. An axis that does not divide evenly stays whole: then several devices do the same work.

    Args:
      kernel: see `Kernel`; it meets a device's part of each array, with whole groups of query heads.
      q_BQHK: queries of the slots of `queried`; k_BSGK, v_BSGK: keys and values of all slots.
      segment_ids_BS: (B, S) int32 or None.
      tables: makes what the kernel is handed as its sixth argument; None: there is none.

    Returns:
      (B, Q, H, K).
    """
    slots_Q = queried.indices(k_BSGK.shape[1])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.empty:
        made = [] if tables is None else [tables(1, q_BQHK.shape[2])[0]]
        return kernel(q_BQHK, k_BSGK, v_BSGK, slots_Q, segment_ids_BS, *made)
    batch, slots, heads = (_mesh_axes(mesh, name) for name in ("batch", "slots", "act_heads"))
    batch = _if_divides(mesh, batch, q_BQHK.shape[0])
    slots = _if_divides(mesh, slots, q_BQHK.shape[1])
    heads = _if_divides(mesh, heads, k_BSGK.shape[2])  # G divides H: a head stays with its group

    queries = PartitionSpec(batch, slots, heads, None)
    keys = PartitionSpec(batch, None, heads, None)
    arguments: list[tuple[Any, Any]] = [(q_BQHK, queries), (k_BSGK, keys), (v_BSGK, keys)]
    if slots:
        arguments.append((slots_Q, PartitionSpec(slots)))
    if segment_ids_BS is not None:
        arguments.append((segment_ids_BS, PartitionSpec(batch, None)))

    if tables is not None:
        num_shards, head_shards = (math.prod(mesh.shape[axis] for axis in axes) for axes in (slots, heads))
        made, specs_of = tables(num_shards, q_BQHK.shape[2] // head_shards)
        arguments.append((made, specs_of(NamedSharding(mesh, PartitionSpec(None, slots or None)))))

    def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
        remaining = list(rest)
        own_slots = remaining.pop(0) if slots else slots_Q
        own_segments = remaining.pop(0) if segment_ids_BS is not None else None
        return kernel(q, k, v, own_slots, own_segments, *remaining)

    arrays, specs = zip(*arguments)
    # Kernels do not say along which axes their results vary, so that cannot be checked.
    return jax.shard_map(on_one_device, in_specs=specs, out_specs=queries, check_vma=False)(*arrays)


def sequence_shards() -> int:
    """Over how many devices the mesh and the sharding rules in force spread the slots of a sequence."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _mesh_axes(mesh, "slots"))


def _mesh_axes(mesh: AbstractMesh, logical_axis: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that a logical axis lies along."""
    spec = nn.logical_to_mesh_axes((logical_axis,))
    assert spec is not None  # it is None for None alone
    (axes,) = spec
    names = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def _if_divides(mesh: AbstractMesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
