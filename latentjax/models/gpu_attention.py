"""Attention on NVIDIA GPUs: cuDNN's kernel, and tokamax's where documents are kept apart (docs/gpu_attention.md)."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.models.attention_backend import AttentionBackend, AttentionRequest, compute_capability
from latentjax.models.attention_mesh import shard_attention
from latentjax.models.slots import SlotRange

MAX_HEAD_DIM = 128
OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 tensor cores
# Queries and keys are filled up to whole tiles of the largest kernel: bounds of a part of a tile are not served by all.
TILE = 128


def cudnn_attention(
    q_BQHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, *, segment_ids_BS: jax.Array | None, queried: SlotRange
) -> jax.Array:
    """Causal attention as `models.attention_backend` defines it, by cuDNN.

    Args:
      segment_ids_BS: None; queried: all slots (see `CUDNN`).

    Raises:
      ValueError: the caller asked for what `CUDNN` says it does not serve.
    """
    if segment_ids_BS is not None or not queried.is_all:
        raise ValueError("cuDNN attention serves neither segments nor part of the queries")

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, slots_Q: jax.Array | np.ndarray, _: None) -> jax.Array:
        if not isinstance(slots_Q, np.ndarray):
            raise ValueError("cuDNN attention does not serve queries that are spread over devices")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return shard_attention(attend, q_BQHK, k_BSGK, v_BSGK, segment_ids_BS=None, queried=queried)


def tokamax_attention(
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    segment_ids_BS: jax.Array | None,
    queried: SlotRange,
    kernel: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Causal attention as `models.attention_backend` defines it, by a kernel of tokamax.

    Args:
      kernel: one of tokamax's attention ops; None: the one that suits the GPU (`tokamax_kernel`).
    """
    kernel = kernel or tokamax_kernel(compute_capability(jax.local_devices()[0]))
    attend = functools.partial(_attend_by_bounds, kernel)
    return shard_attention(attend, q_BQHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS, queried=queried)


def tokamax_kernel(capability: tuple[int, int] | None) -> Callable[..., jax.Array]:
    """Returns tokamax's attention op for GPUs of a compute capability: Mosaic for Hopper and Blackwell, else Triton.

    An op raises where it cannot serve; tokamax's own choice of one would turn to attention of (S, S) arrays instead.
    """
    from absl import flags
    from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_triton

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else it reads our command line as its own flags, and ends the program
    logging.getLogger("absl").addFilter(_is_no_cache_miss)
    # Other Blackwells (12.x) lack the instructions, and the older library the backward pass for K > 64 on 10.x.
    served = {9, 10} if _tokamax_version() >= (0, 0, 17) else {9}
    if capability is not None and capability[0] in served:
        return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
    return pallas_triton.PallasTritonFlashAttention()


def _tokamax_version() -> tuple[int, ...]:
    import tokamax

    return tuple(int(part) for part in tokamax.__version__.split(".")[:3])


def _is_no_cache_miss(record: logging.LogRecord) -> bool:
    """Drops a warning for every shape that nobody has tuned block sizes for; the built-in ones serve."""
    return not str(record.msg).startswith("Autotuning cache miss")


def _attend_by_bounds(
    kernel: Callable[..., jax.Array],
    q_BQHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    slots_Q: jax.Array | np.ndarray,
    segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """One device's part: each query sees one run of keys, from where its segment begins to its own slot."""
    from tokamax._src.ops.attention.base import Mask

    num_queries, num_slots = q_BQHK.shape[1], k_BSGK.shape[1]
    bounds: dict[str, Any] = {}
    if isinstance(slots_Q, np.ndarray) and num_queries == num_slots:
        # Said so, causality spares the backward pass half its work too, which bounds do not.
        bounds["is_causal"] = True
    else:
        bounds["k_end"] = _fill((jnp.asarray(slots_Q) + 1)[None, None], 2, mode="edge")
    if segment_ids_BS is not None:
        starts_BQ = jnp.take(segment_starts(segment_ids_BS), slots_Q, axis=1)
        bounds["k_start"] = _fill(starts_BQ[:, None], 2, mode="edge")
    attended_BQHK = kernel(_fill(q_BQHK, 1), _fill(k_BSGK, 1), _fill(v_BSGK, 1), mask=Mask(**bounds))
    return attended_BQHK[:, :num_queries]


def segment_starts(segment_ids_BS: jax.Array) -> jax.Array:
    """Returns the slot at which each slot's segment begins, (B, S) int32."""
    slots_S = jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32)
    differs_BS = jnp.pad(segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], [(0, 0), (1, 0)])
    return jax.lax.cummax(jnp.where(differs_BS, slots_S, 0), axis=1)


def _fill(x: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
    """Fills an axis up to whole tiles, behind what is there: no real query sees it."""
    missing = -x.shape[axis] % TILE
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if each == axis else 0) for each in range(x.ndim)], mode=mode)


def _common_limit(request: AttentionRequest) -> str | None:
    capability = request.compute_capability
    if capability is not None and capability < OLDEST_CAPABILITY:
        has = "these are not NVIDIA's" if capability == (0, 0) else f"these have {capability[0]}.{capability[1]}"
        return f"needs NVIDIA GPUs of compute capability 8.0 or newer, but {has}: set model.attention=xla"
    if request.dtype not in ("bfloat16", "float16"):
        return f"needs model.dtype=bfloat16 or float16, not {request.dtype}: change it, or set model.attention=xla"
    if request.head_dim % 8 or request.head_dim > MAX_HEAD_DIM:
        return (
            f"needs a head dimension (model.hidden_size / model.num_heads) that is a multiple of 8 and at most "
            f"{MAX_HEAD_DIM}, not {request.head_dim}: change it, or set model.attention=xla"
        )
    return None


def _cudnn_limit(request: AttentionRequest) -> str | None:
    if request.mask_documents:
        return "cannot keep documents apart: set model.attention=tokamax, or data.mask_documents=False"
    if request.sequence_shards > 1:
        return (
            f"cannot spread a sequence over mesh.sequence={request.sequence_shards} devices: "
            "set model.attention=tokamax, or mesh.sequence=1"
        )
    return _common_limit(request)


def _tokamax_missing() -> str | None:
    if importlib.util.find_spec("tokamax") is not None:
        return None
    return "needs the library tokamax: pip install 'latentjax[gpu-masks]', or set model.attention=xla, which is slower"


CUDNN = AttentionBackend("cudnn", cudnn_attention, frozenset({"gpu"}), needs_all_queries=True, limit=_cudnn_limit)
TOKAMAX = AttentionBackend(
    "tokamax", tokamax_attention, frozenset({"gpu"}), limit=_common_limit, missing=_tokamax_missing
)
