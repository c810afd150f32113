"""Model FLOPs and what devices could do: the one place that MFU comes from.

Counted are the matrix products that the method needs: the passes of the recurrence, without what the last layer of a
pass would compute for slots that nobody reads, attention at half (causal), the head once per token and what a method
asks of the vocabulary on the way, and twice a forward for the backward of every pass that gradients flow through. Not
counted are recomputation, norms, softmax and the optimizer (the convention of PaLM, arXiv 2204.02311, appendix B).
"""

import time

import jax
import jax.numpy as jnp

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Recurrence, RecurrenceSpec
from latentjax.recurrence.draw import Work
from latentjax.recurrence.methods import train_recurrence
from latentjax.training.hardware import chip_of


def forward_flops_per_slot(spec: ModelSpec, num_slots: int) -> float:
    """FLOPs of the backbone for one slot of a sequence of `num_slots`: 2 per weight, and attention to half of them."""
    qkv = spec.hidden_size * (spec.num_heads + 2 * spec.kv_heads) * spec.head_dim
    out = spec.num_heads * spec.head_dim * spec.hidden_size
    mlp = (3 if spec.architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    attention = causal_attention_flops(spec.num_heads * num_slots, spec.head_dim)
    return spec.num_layers * (2.0 * (qkv + out + mlp) + attention)


def pass_flops_per_token(
    spec: ModelSpec, slots: int, kept: int, sequence_length: int, seen: int | None = None
) -> float:
    """FLOPs of one pass over `slots` slots per token of a sequence, of which `kept` are read afterwards.

    Of the others the last layer makes keys and values alone.

    Args:
      seen: slots per token that it attends among; None: those that it goes over.
    """
    num_slots = (slots if seen is None else seen) * sequence_length
    without_keys = spec.hidden_size * spec.num_heads * spec.head_dim * 2  # query and output
    without_keys += (3 if spec.architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    spared = 2.0 * without_keys + causal_attention_flops(spec.num_heads * num_slots, spec.head_dim)
    return slots * forward_flops_per_slot(spec, num_slots) - (slots - kept) * spared


def causal_attention_flops(num_scores: float, head_dim: int, num_products: int = 2) -> float:
    """FLOPs of causal attention, which needs half of its scores.

    Args:
      num_scores: pairs of a query and a key, over all heads, visible or not.
      num_products: matrix products with a score matrix on one side; forward: scores, and weighted values.
    """
    return 2.0 * num_products * num_scores * head_dim / 2


def train_flops_per_token(
    spec: ModelSpec, recurrence: Recurrence, sequence_length: int, num_jacobi_iterations: int
) -> float:
    """Model FLOPs of a training step, per token: forward and backward."""

    passes, kept = recurrence.passes(num_jacobi_iterations), recurrence.kept_slots(num_jacobi_iterations)
    each_pass = zip(passes, kept, recurrence.seen_slots(num_jacobi_iterations), strict=True)
    flops = [pass_flops_per_token(spec, fed, read, sequence_length, seen) for fed, read, seen in each_pass]
    forward = sum(flops)
    backward = 2 * sum(flops[-recurrence.num_trained_passes(num_jacobi_iterations) :])
    return forward + backward + 3 * vocabulary_flops(spec, recurrence)


def work_flops_per_token(spec: ModelSpec, recurrence_spec: RecurrenceSpec, sequence_length: int, work: Work) -> float:
    """As `train_flops_per_token`, of a step with its C and R; where R is a mean of microbatches, the mean."""
    recurrence = train_recurrence(recurrence_spec, work.num_latent_thoughts)
    whole = int(work.num_jacobi_iterations)
    flops = train_flops_per_token(spec, recurrence, sequence_length, whole)
    if not (rest := work.num_jacobi_iterations - whole):
        return flops
    return flops + rest * (train_flops_per_token(spec, recurrence, sequence_length, whole + 1) - flops)


def vocabulary_flops(spec: ModelSpec, recurrence: Recurrence) -> float:
    """FLOPs per token of all products with a (D, V) matrix in one forward: the head's, and what the method adds."""
    return (1 + recurrence.vocabulary_products) * 2.0 * spec.hidden_size * spec.vocab_size


def decode_flops_per_token(spec: ModelSpec, recurrence: Recurrence, sequence_length: int) -> float:
    """Model FLOPs of decoding with a cache, per token, on average over a sequence that grows to `sequence_length`.

    Decoding leaves nothing out: whatever slots and passes a token has, all layers are computed for them.
    """
    slot = forward_flops_per_slot(spec, recurrence.slots_per_token * sequence_length)
    return recurrence.forwards_per_token * slot + vocabulary_flops(spec, recurrence)


def cache_bytes_per_token(spec: ModelSpec, recurrence: Recurrence) -> int:
    """Bytes of a token's keys and values in decoding: of all its slots, passes and layers, in the compute dtype."""
    numbers = 2 * spec.num_layers * spec.kv_heads * spec.head_dim
    return recurrence.forwards_per_token * numbers * spec.compute_dtype.itemsize


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that one device could do: from the table; for a CPU, measured on a float32 matrix product; else None.

    A CPU's number is shared by all of its virtual devices.
    """
    if device.platform == "cpu":
        return _measured_matmul_flops(device)
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.peak_flops


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
