"""Putting tensors onto the devices, one at a time: a model is never held by the host.

A tensor is sent as it is stored, each device a part of it, and laid out there. Where a parameter holds several layers,
its memory is made once, on the devices, and each layer's tensor is written into its row. So the host holds one tensor,
and the devices the parameters and one tensor more.
"""

import functools
import gc
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from latentjax.errors import UserError, shown
from latentjax.interop.names import Entry, name_table, with_prefix
from latentjax.interop.tensor_files import DTYPES, Kind
from latentjax.models.spec import ModelSpec

# A tied head may be stored all the same; and what is derived from the config was once stored, too.
_HEADS = ("embed_out.weight", "lm_head.weight")
_DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias")
_MOST_WAITS, _WAIT_SECONDS = 200, 0.0005


class Plan:
    """Which tensor goes where, checked against the shapes that a model's parameters have.

    Attributes:
      names: the stored tensors that are read.
    """

    def __init__(self, kinds: Mapping[str, Kind], spec: ModelSpec, abstract_params: Any, source: str):
        """Compares what is stored with what the model needs.

        Args:
          kinds: of the stored tensors, by name.
          abstract_params: shapes and dtypes of the parameters, and shardings where they have any.

        Raises:
          UserError: a tensor is missing, left over, of another shape than the config says or of a dtype that is not
            read; `source` names the folder.
        """
        self._spec = spec
        self._abstract: dict[str, Any] = flatten_dict(abstract_params, sep="/")
        self._places: dict[str, tuple[Entry, str, int | None]] = {}  # by stored name
        stored = with_prefix({name: name for name in kinds}, spec)
        for entry in name_table(spec):
            for name, parameter, row in entry.places(spec):
                if name not in stored:
                    raise UserError(f"{source}: tensor {name!r} is missing")
                shape = self._abstract[parameter].shape[0 if row is None else 1 :]
                # Compared before it is laid out: a transposed matrix would fit as well, and mean nothing.
                expected = entry.write(np.broadcast_to(np.float32(0), shape), spec).shape
                kind = kinds[stored[name]]
                if kind.shape != expected:
                    raise UserError(
                        f"{source}: tensor {name!r} has shape {kind.shape}, but config.json makes it {expected}"
                    )
                if kind.dtype not in DTYPES:
                    raise UserError(
                        f"{source}: tensor {name!r} is stored as {shown(kind.dtype)}; only {', '.join(DTYPES)} are read"
                    )
                self._places[stored.pop(name)] = (entry, parameter, row)
        extra = sorted(
            name for name in stored if not name.endswith(_DERIVED) and not (spec.tie_embeddings and name in _HEADS)
        )
        if extra:
            raise UserError(f"{source}: tensor {extra[0]!r} is not part of this model ({len(extra)} such)")
        self.names = set(self._places)

    def place(self, tensors: Iterable[tuple[str, np.ndarray]], *, are_read: bool) -> dict[str, Any]:
        """Returns the params tree of tensors that come one after another, in any order, each of `names` once.

        Args:
          are_read: nobody else holds them, so that the next one is not asked for before the last is gone.
        """
        params: dict[str, jax.Array] = {}
        for name, array in tensors:
            entry, parameter, row = self._places[name]
            abstract = self._abstract[parameter]
            sent = _sent(array, abstract.sharding)
            settings = (entry, self._spec, abstract.dtype, abstract.sharding)
            if row is None:
                params[parameter] = _lay_out(*settings)(sent)
            else:
                if parameter not in params:
                    params[parameter] = _empty(abstract.shape, abstract.dtype, abstract.sharding)()
                params[parameter] = _write_row(*settings)(params[parameter], sent, row)
            if are_read:
                jax.block_until_ready((sent, params[parameter]))
                held = weakref.ref(array if array.base is None else array.base)
                del sent, array
                _wait_for_end_of(held)
        return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in params.items()})


def kinds_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Kind]:
    """Returns what `TensorFolder.kinds` would say of arrays."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return {name: Kind(array.shape, names.get(str(array.dtype), str(array.dtype))) for name, array in tensors.items()}


def each(tensors: Mapping[str, np.ndarray], names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of these names, as `TensorFolder.read` does."""
    return ((name, array) for name, array in tensors.items() if name in names)


def _wait_for_end_of(held: weakref.ref) -> None:
    """Returns when an array is gone, or after a moment: nothing but memory depends on it.

    The threads that have copied it let go of it some time later, and then jax waits for a collection of garbage.
    """
    for _ in range(_MOST_WAITS):
        if held() is None:
            return
        gc.collect(0)
        time.sleep(_WAIT_SECONDS)


def _sent(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """Puts a tensor onto the devices as it is, a part on each where an axis of it divides.

    It is copied on a CPU too, where jax could go on to use the array as its own.
    """
    if not isinstance(sharding, NamedSharding):
        return jax.device_put(array, sharding, may_alias=False)
    mesh = sharding.mesh
    axis = next((axis for axis, size in enumerate(array.shape) if size % mesh.size == 0), None)
    parts = () if axis is None else (*[None] * axis, mesh.axis_names)
    spread = NamedSharding(mesh, PartitionSpec(*parts))
    indices = spread.addressable_devices_indices_map(array.shape)
    shards = jax.device_put([array[index] for index in indices.values()], list(indices), may_alias=False)
    return jax.make_array_from_single_device_arrays(array.shape, spread, shards)


# Programs are made once for all layers and, in a process that loads several folders, for all of one form.
_once = functools.lru_cache(maxsize=256)


@_once
def _lay_out(entry: Entry, spec: ModelSpec, dtype: Any, sharding: Sharding | None) -> Any:
    return jax.jit(lambda tensor: entry.read(tensor, spec).astype(dtype), **_out(sharding))


@_once
def _write_row(entry: Entry, spec: ModelSpec, dtype: Any, sharding: Sharding | None) -> Any:
    def write(stack: jax.Array, tensor: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, entry.read(tensor, spec).astype(dtype), row, 0)

    return jax.jit(write, donate_argnums=0, **_out(sharding))


@_once
def _empty(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), **_out(sharding))


def _out(sharding: Sharding | None) -> dict[str, Any]:
    return {} if sharding is None else {"out_shardings": sharding}
