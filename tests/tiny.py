"""Models small enough to compile in a second, with parameters in which nothing is zero, one or symmetric."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.choosing import Choice
from latentjax.recurrence.decoding import continue_prompts, pad_prompts, row_key
from latentjax.recurrence.language_model import LanguageModel

_NEOX = ModelSpec(
    architecture="gpt_neox",
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=0,
    intermediate_size=24,
    vocab_size=29,
    max_position_embeddings=64,
    rotary_fraction=0.5,
    rope_theta=100.0,
    parallel_residual=True,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    dtype="float32",
    attention="xla",
    loops="rolled",
    remat="none",
)
_LLAMA = dataclasses.replace(
    _NEOX, architecture="llama", num_heads=4, num_kv_heads=2, rotary_fraction=1.0, parallel_residual=False
)
_GPT2 = dataclasses.replace(
    _NEOX, architecture="gpt2", rotary_fraction=0.0, parallel_residual=False, tie_embeddings=True
)
_SPECS = {spec.architecture: spec for spec in (_NEOX, _LLAMA, _GPT2)}


def model_spec(architecture: str = "gpt_neox", **changes: Any) -> ModelSpec:
    """A GPT-NeoX with partial rotary, a LLaMA with grouped queries, or a GPT-2 with its tied head."""
    return dataclasses.replace(_SPECS[architecture], **changes)


def language_model(
    num_latent_thoughts: int = 1,
    architecture: str = "gpt_neox",
    *,
    method: str = "latent",
    backprop_passes: int = 0,
    refinement: str = "full",
    ponder_chunk_tokens: int = 0,
    **changes: Any,
) -> LanguageModel:
    """A model with C thoughts a token; `changes` are fields of its ModelSpec."""
    recurrence_spec = RecurrenceSpec(
        method=method,
        num_latent_thoughts=num_latent_thoughts,
        num_jacobi_iterations=2,
        train_jacobi_iterations=(2,),
        backprop_passes=backprop_passes,
        scale_embeddings=True,
        pause_token_id=-1,
        ponder_chunk_tokens=ponder_chunk_tokens,
        train_schedule=(),
        handover_ratio=0.0,
        train_tolerance=0.0,
        refinement=refinement,
    )
    return LanguageModel(model_spec(architecture, **changes), recurrence_spec)


@functools.cache
def params_of(model: LanguageModel, seed: int = 0) -> Any:
    """Float32 parameters: matrices of the size that they are initialised with, biases and norm scales off 0 and 1."""
    rng = np.random.default_rng(seed)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    std = (2 / (5 * model.spec.hidden_size)) ** 0.5

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray({"scale": 1 + 0.1 * noise, "bias": 0.1 * noise}.get(path[-1].key, std * noise))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens(batch_size: int, num_tokens: int, *, vocab_size: int = 29, seed: int = 0) -> np.ndarray:
    """Random token ids (B, T) int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch_size, num_tokens)).astype(np.int32)


def greedy(model: LanguageModel, prompts: Sequence[Sequence[int]], num_tokens: int) -> np.ndarray:
    """What follows prompts of any lengths by greedy decoding with `params_of(model)`, (B, num_tokens) int32."""
    keys = [row_key(0, prompt, 0) for prompt in prompts]
    batch = pad_prompts(prompts, keys, max(map(len, prompts)))
    nothing_ends = np.array([-1], np.int32)
    choice = Choice.of(0.0, model.spec.vocab_size)
    found, count = continue_prompts(model, params_of(model), batch, choice, nothing_ends, num_tokens=num_tokens)
    assert int(count) == num_tokens
    return np.asarray(found)


def cross_entropy(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean next-token loss in nats, written out."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1))
