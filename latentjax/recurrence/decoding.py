"""Generating text with the key/value cache: prompts at once, then token by token, each preceded by its thoughts.

Prompts of a batch end at the same place and begin where their length says: padding on their left has a segment of its
own, so nothing attends to it, and one number says for all rows how far the cache is filled. What a row becomes does not
depend on the rows beside it, but for the rounding of sums.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from latentjax.models.cache import KeyValueCache
from latentjax.models.loops import SEPARATE
from latentjax.models.separation import separate_params
from latentjax.recurrence.choosing import Choice, choose
from latentjax.recurrence.language_model import LanguageModel

_SMALLEST_ROOM = 16  # tokens


@flax.struct.dataclass
class Prompts:
    """A batch of prompts.

    Attributes:
      tokens_BT: int32; row b's prompt is its last lengths_B[b] tokens, 1 or more.
      lengths_B: int32.
      keys_B: a key for each row, see `row_key`.
    """

    tokens_BT: jax.Array | np.ndarray
    lengths_B: jax.Array | np.ndarray
    keys_B: jax.Array


class DecodingState(flax.struct.PyTreeNode):
    """Where a batch has got to.

    Attributes:
      cache: of all tokens but the last.
      token_B: int32, the last token chosen, not fed yet.
      position_B: int32, where it stands in its own text: the prompt's length and so on.
      finished_B: bool, whether it, or one before it, is one that ends a text.
      keys_B: as in `Prompts`.
    """

    cache: KeyValueCache
    token_B: jax.Array
    position_B: jax.Array
    finished_B: jax.Array
    keys_B: jax.Array


def decoding_model(model: LanguageModel, *, separates: bool) -> LanguageModel:
    """The model as it is decoded with: plain attention, whatever serves training, and nothing kept for gradients.

    Args:
      separates: layers and matrices lie as a CPU wants them; parameters are then those of `separated`.
    """
    loops = SEPARATE if separates else model.spec.loops
    return model.clone(spec=dataclasses.replace(model.spec, attention="xla", loops=loops, remat="none"))


@partial(jax.jit, static_argnames="model")
def separated(model: LanguageModel, params: Any) -> Any:
    """Lays the parameters of a stacked model out for `decoding_model(separates=True)`."""
    separate = decoding_model(model, separates=True)
    shapes = jax.eval_shape(separate.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return separate_params(params, shapes)


def room(num_tokens: int) -> int:
    """The power of two that arrays for so many tokens are made for: few sizes, few programs."""
    return max(_SMALLEST_ROOM, 1 << (num_tokens - 1).bit_length())


def cache_room(num_tokens: int) -> int:
    """As `room`, for a cache, all of which is read for every token: also three quarters of a power of two."""
    size = room(num_tokens)
    return 3 * size // 4 if num_tokens <= 3 * size // 4 else size


def row_key(seed: int, prompt: Sequence[int], sample: int) -> jax.Array:
    """The key of a row's draws: of the seed, the prompt's ids and the number of the sample, and of nothing else."""
    digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), np.uint32(digest)), sample)


def pad_prompts(prompts: Sequence[Sequence[int]], keys: Sequence[jax.Array], num_tokens: int) -> Prompts:
    """A batch of token ids, none of them empty, padded on the left to `num_tokens`."""
    tokens_BT = np.zeros((len(prompts), num_tokens), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[num_tokens - len(prompt) :] = prompt
    return Prompts(tokens_BT, np.array([len(prompt) for prompt in prompts], np.int32), jnp.stack(list(keys)))


def _start(
    model: LanguageModel,
    params: Any,
    prompts: Prompts,
    choice: Choice,
    end_ids_E: jax.Array,
    tolerance: jax.Array | float,
    capacity: int,
    token_by_token: bool = False,
) -> tuple[DecodingState, jax.Array, jax.Array]:
    """Feeds prompts and chooses the token behind each.

    Args:
      end_ids_E: int32, tokens that end a text.
      tolerance: of the thoughts, which are solved for together, see `Recurrence.prefill`; 0: until nothing changes.
      capacity: how many tokens the cache has room for, at least those of the prompts; static.
      token_by_token: feed prompts as what follows is fed; static.

    Returns:
      The state; each row's thought residual (B,) and the number of refinement passes.
    """
    batch_size, num_tokens = prompts.tokens_BT.shape
    positions_BT = jnp.arange(num_tokens, dtype=jnp.int32) - (num_tokens - prompts.lengths_B[:, None])
    logits_BV, prefilled = model.apply(
        {"params": params},
        prompts.tokens_BT,
        jnp.maximum(positions_BT, 0),
        (positions_BT >= 0).astype(jnp.int32),
        model.apply({}, batch_size, capacity, method="empty_cache"),
        tolerance=tolerance,
        token_by_token=token_by_token,
        method="prefill",
    )
    position_B = jnp.asarray(prompts.lengths_B)
    token_B = choose(logits_BV, jax.vmap(jax.random.fold_in)(prompts.keys_B, position_B), choice)
    state = DecodingState(prefilled.cache, token_B, position_B, jnp.isin(token_B, end_ids_E), prompts.keys_B)
    return state, prefilled.residual_B, prefilled.num_passes


def _extend(
    model: LanguageModel,
    params: Any,
    state: DecodingState,
    choice: Choice,
    end_ids_E: jax.Array,
    limit: jax.Array | int,
    num_tokens: int,
) -> tuple[DecodingState, jax.Array, jax.Array]:
    """Feeds the last token and chooses the next, again and again until every row has finished.

    Args:
      limit: int32, how often at most; `num_tokens` or less, and what the cache has room for.
      num_tokens: static.

    Returns:
      The state, tokens (B, num_tokens) int32 and how many of them there are; what stands behind a row's end is not
      meant for anyone.
    """
    batch_size = state.token_B.shape[0]

    def goes_on(carry: tuple) -> jax.Array:
        state, _, count = carry
        return (count < limit) & ~jnp.all(state.finished_B)

    def step(carry: tuple) -> tuple:
        state, tokens_nB, count = carry
        ones_B = jnp.ones((batch_size,), jnp.int32)
        logits_BV, cache = model.apply(
            {"params": params}, state.token_B, state.position_B, state.cache, ones_B, method="decode"
        )
        position_B = state.position_B + 1
        token_B = choose(logits_BV, jax.vmap(jax.random.fold_in)(state.keys_B, position_B), choice)
        finished_B = state.finished_B | jnp.isin(token_B, end_ids_E)
        state = DecodingState(cache, token_B, position_B, finished_B, state.keys_B)
        return state, tokens_nB.at[count].set(token_B), count + 1

    tokens_nB = jnp.zeros((num_tokens, batch_size), jnp.int32)
    state, tokens_nB, count = jax.lax.while_loop(goes_on, step, (state, tokens_nB, jnp.zeros((), jnp.int32)))
    return state, tokens_nB.T, count


start = jax.jit(_start, static_argnames=("model", "capacity", "token_by_token"))
# The state is taken over: the cache grows in place.
extend = jax.jit(_extend, static_argnames=("model", "num_tokens"), donate_argnames="state")


@partial(jax.jit, static_argnames=("model", "capacity"))
def grow(model: LanguageModel, state: DecodingState, capacity: int) -> DecodingState:
    """The same state, in whose cache there is room for `capacity` tokens."""
    slots = model.apply({}, method="cache_slots", num_tokens=capacity)
    return state.replace(cache=state.cache.grown(slots))


@partial(jax.jit, static_argnames=("model", "num_tokens"))
def continue_prompts(
    model: LanguageModel,
    params: Any,
    prompts: Prompts,
    choice: Choice,
    end_ids_E: jax.Array,
    *,
    num_tokens: int,
    tolerance: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts by `num_tokens` tokens, or until every row has finished, as one program.

    Returns:
      Tokens (B, num_tokens) int32, and how many of them there are.
    """
    capacity = prompts.tokens_BT.shape[1] + num_tokens
    state, _, _ = _start(model, params, prompts, choice, end_ids_E, tolerance, capacity)
    first_B = state.token_B
    if num_tokens == 1:
        return first_B[:, None], jnp.ones((), jnp.int32)
    _, tokens_Bn, count = _extend(model, params, state, choice, end_ids_E, num_tokens - 1, num_tokens - 1)
    return jnp.concatenate([first_B[:, None], tokens_Bn], axis=1), count + 1
