"""Model FLOPs and what devices could do: the one place that MFU comes from.

Counted are the matrix products that the method needs: the passes of the recurrence, attention at half (causal), the
head once per token, and twice a forward for the backward of every pass that gradients flow through. Not counted are
recomputation, norms, softmax and the optimizer (the convention of PaLM, arXiv 2204.02311, appendix B).
"""

import time

import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Recurrence

# Dense bfloat16 FLOP/s of one device, by the start of jax's device_kind; from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def forward_flops_per_slot(spec: ModelSpec, num_slots: int) -> float:
    """FLOPs of the backbone for one slot of a sequence of `num_slots`: 2 per weight, and attention to half of them."""
    qkv = spec.hidden_size * (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
    out = spec.num_heads * spec.head_dim * spec.hidden_size
    mlp = (3 if spec.architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    attention = 2 * spec.num_heads * spec.head_dim * num_slots / 2  # scores and weighted values
    return 2.0 * spec.num_layers * (qkv + out + mlp + attention)


def train_flops_per_token(
    spec: ModelSpec, recurrence: Recurrence, sequence_length: int, num_jacobi_iterations: int
) -> float:
    """Model FLOPs of a training step, per token: forward and backward."""

    def passes_flops(passes: tuple[int, ...]) -> float:
        return sum(slots * forward_flops_per_slot(spec, slots * sequence_length) for slots in passes)

    forward = passes_flops(recurrence.passes(num_jacobi_iterations))
    backward = 2 * passes_flops(recurrence.trained_passes(num_jacobi_iterations))
    head = 3 * 2.0 * spec.hidden_size * spec.vocab_size
    return forward + backward + head


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that one device could do: from the table; for a CPU, measured on a float32 matrix product; else None.

    A CPU's number is shared by all of its virtual devices.
    """
    if device.platform == "cpu":
        return _measured_matmul_flops(device)
    # The longest match, so that "TPU v5 lite" is not taken for "TPU v5".
    matches = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def _measured_matmul_flops(device: jax.Device) -> float:
    size = 1024
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / sum(other.platform == "cpu" for other in jax.local_devices())
