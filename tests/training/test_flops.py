"""Model FLOPs against the matrix products that a traced forward really has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of

from latentjax.recurrence.methods import make_recurrence
from latentjax.training.flops import (
    cache_bytes_per_token,
    causal_attention_flops,
    decode_flops_per_token,
    forward_flops_per_slot,
    pass_flops_per_token,
    peak_flops,
    train_flops_per_token,
)
from latentjax.training.hardware import CHIPS


def matmul_flops(jaxpr) -> float:
    """2 m n k of every dot_general in a jaxpr, those inside scans as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracted])
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * matmul_flops(inner)
    return total


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "num_thoughts", "num_iterations"),
    [("latent", 0, 0), ("latent", 1, 0), ("latent", 1, 3), ("latent", 2, 2), ("ponder", 2, 0), ("loop", 2, 0),
     ("pause", 2, 0)],
)  # fmt: skip
def test_forward_flops_are_those_of_the_program(method: str, architecture: str, num_thoughts: int, num_iterations: int):
    model = language_model(num_thoughts, architecture, method=method)
    spec, recurrence = model.spec, make_recurrence(model.recurrence_spec)
    batch_size, length = 2, 6
    tokens_BT = jnp.zeros((batch_size, length), jnp.int32)
    traced = jax.make_jaxpr(
        lambda params: model.apply({"params": params}, tokens_BT, num_jacobi_iterations=num_iterations)
    )(params_of(model))

    products = 5 if method == "ponder" else 1  # the head; twice the head and the mean of embeddings
    counted = products * 2.0 * spec.hidden_size * spec.vocab_size
    passes, all_kept = recurrence.passes(num_iterations), recurrence.kept_slots(num_iterations)
    for n, (slots, kept) in enumerate(zip(passes, all_kept, strict=True)):
        counted += pass_flops_per_token(spec, slots, kept, length)
        # So short a sequence is one chunk of queries, which meets all keys up to its last slot, not half.
        is_refining = kept < slots and n < len(passes) - 1
        seen = slots * length - (1 if is_refining else 0)
        scores = (spec.num_layers - 1) * slots * slots * length + kept * seen
        half = ((spec.num_layers - 1) * slots + kept) * slots * length / 2
        counted += 4.0 * spec.num_heads * spec.head_dim * (scores - half)
    assert counted * batch_size * length == matmul_flops(traced.jaxpr)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["vanilla", "latent", "ponder", "loop", "pause"])
def test_decoding_flops_are_those_of_the_program(method: str, architecture: str):
    """Of one token; a program attends to all that a cache has room for, of which half is counted."""
    model = language_model(2, architecture, method=method)
    spec, recurrence, length = model.spec, make_recurrence(model.recurrence_spec), 6
    cache, ids_B = model.empty_cache(2, length), jnp.zeros(2, jnp.int32)
    traced = jax.make_jaxpr(lambda params: model.apply({"params": params}, ids_B, ids_B, cache, method="decode"))(
        params_of(model)
    )
    slots = {"latent": 3, "pause": 3}.get(method, 1)
    forwards = 1 if method == "vanilla" else 3
    hidden = forwards * spec.num_layers * causal_attention_flops(spec.num_heads * slots * length, spec.head_dim)
    counted = decode_flops_per_token(spec, recurrence, length) + hidden
    assert 2 * counted == matmul_flops(traced.jaxpr)
    size = cache.keys_NBGLK.nbytes + cache.values_NBGLK.nbytes
    assert size == 2 * length * cache_bytes_per_token(spec, recurrence)


def test_backward_counts_twice_a_forward():
    vanilla = language_model(0, method="vanilla")
    forward = forward_flops_per_slot(vanilla.spec, 64) + 2 * vanilla.spec.hidden_size * vanilla.spec.vocab_size
    assert train_flops_per_token(vanilla.spec, make_recurrence(vanilla.recurrence_spec), 64, 0) == 3 * forward


def test_passes_without_gradients_have_no_backward():
    full = language_model(1)
    last = language_model(1, backprop_passes=1)
    flops = [train_flops_per_token(model.spec, make_recurrence(model.recurrence_spec), 64, 3) for model in (full, last)]
    # Passes over 1, 2, 2, 2, 2 slots; the last alone is differentiated.
    saved = 2 * (forward_flops_per_slot(full.spec, 64) + 3 * pass_flops_per_token(full.spec, 2, 1, 64))
    assert flops[0] - flops[1] == pytest.approx(saved)


class _Device:
    platform = "tpu"

    def __init__(self, kind: str):
        self.device_kind = kind


def test_peak_by_the_longest_matching_name():
    assert peak_flops(_Device("TPU v5 lite")) == CHIPS["TPU v5 lite"].peak_flops
    assert peak_flops(_Device("TPU v5p")) == CHIPS["TPU v5p"].peak_flops
    assert peak_flops(_Device("NVIDIA H100 80GB HBM3")) == CHIPS["NVIDIA H100"].peak_flops
    assert peak_flops(_Device("TPU v99")) is None


def test_peak_of_a_cpu_is_measured_and_shared_by_its_virtual_devices():
    assert 1e9 < peak_flops(jax.devices()[0]) * len(jax.devices()) < 1e14
