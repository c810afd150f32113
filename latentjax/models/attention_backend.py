"""What an attention backend is, what a run asks of one, and how one is chosen by name.

A backend's function attends from the slots of a range to all slots of their sequence, in order of slots:

    call(q_BQHK, k_BSGK, v_BSGK, *, segment_ids_BS, queried) -> (B, Q, H, K)

Row i of q stands at slot `queried.indices(S)[i]` and sees the slots up to its own; where segment_ids_BS, (B, S) int32,
is not None, only those of its own segment. Segments are runs: ids never fall along a row. G divides H (grouped
queries). Scores are scaled by 1 / sqrt(K), softmax is in float32, the result has the dtype of q.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax

from latentjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """What a run asks of attention.

    Attributes:
      platform: of the devices: cpu, gpu or tpu.
      mask_documents: whether slots attend within their document only (`data.mask_documents`).
      head_dim: K.
      dtype: name of the dtype of queries, keys and values, as "bfloat16".
      sequence_shards: over how many devices the slots of a sequence are spread (`mesh.sequence`).
      compute_capability: of GPUs, see `compute_capability`; None: not known.
    """

    platform: str
    mask_documents: bool
    head_dim: int
    dtype: str
    sequence_shards: int = 1
    compute_capability: tuple[int, int] | None = None


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Returns a GPU's compute capability, as (9, 0); (0, 0) for a GPU not of NVIDIA's make, None for other devices."""
    if device.platform != "gpu":
        return None
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _serves_all(request: AttentionRequest) -> str | None:
    return None


def _needs_nothing() -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention.

    Attributes:
      name: as in `model.attention`.
      call: see the module's docstring.
      platforms: those it serves.
      needs_all_queries: `call` takes `queried` = ALL_SLOTS only: the caller computes the queries of every slot and
        takes the range out of the result.
      limit: what it cannot serve of a request on one of its platforms, as the end of a sentence that begins with its
        name; None: it serves it.
      missing: the library that is not installed and what to do, as such an end of a sentence; None: all is there.
    """

    name: str
    call: Callable[..., jax.Array]
    platforms: frozenset[str]
    needs_all_queries: bool = False
    limit: Callable[[AttentionRequest], str | None] = _serves_all
    missing: Callable[[], str | None] = _needs_nothing


# What `auto` tries on each platform, best first.
PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "tpu": ("splash", "xla"),
    "gpu": ("cudnn", "tokamax", "xla"),
    "cpu": ("xla",),
}


def choose(backends: Mapping[str, AttentionBackend], name: str, request: AttentionRequest) -> AttentionBackend:
    """Resolves `model.attention` to a backend that serves the request.

    `auto` takes the best backend whose limits allow it. A backend that is asked for by name is never replaced, and
    neither is one that `auto` would take but whose library is absent: that would be slow in silence.

    Raises:
      UserError: there is no backend of that name, it does not serve the request, or its library is absent.
    """
    if name == "auto":
        preferred = [backends[each] for each in PREFERENCES[request.platform] if each in backends]
        backend = next(each for each in preferred if each.limit(request) is None)
    elif name in backends:
        backend = backends[name]
    else:
        raise UserError(f"model.attention={name!r} is not an attention backend: choose auto or {', '.join(backends)}")
    asked = f"model.attention={name!r}" + (f" (here {backend.name})" if name == "auto" else "")
    if request.platform not in backend.platforms:
        raise UserError(
            f"{asked} serves {' and '.join(sorted(backend.platforms))} devices, but these are {request.platform}: "
            "choose auto"
        )
    reason = backend.limit(request) or backend.missing()
    if reason is not None:
        raise UserError(f"{asked} {reason}")
    return backend
