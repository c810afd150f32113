"""Choosing the next token: the largest logit, or a draw, from all tokens or from the likeliest."""

import flax.struct
import jax
import jax.numpy as jnp

GREEDY, DRAWN, DRAWN_FROM_TOP = "greedy", "drawn", "drawn_from_top"
_LANES = 128


@flax.struct.dataclass
class Choice:
    """How next tokens are chosen. Numbers are traced: one program serves them all.

    Attributes:
      temperature: float32, divides the logits; not looked at when `kind` is GREEDY.
      top_k: int32, draw from the k likeliest tokens; top_p: float32, of these from the fewest that have together at
        least this probability. Both are looked at when `kind` is DRAWN_FROM_TOP.
      num_ids: int32, ids from this on are never chosen: a vocabulary may be larger than its tokenizer's.
      kind: static.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    num_ids: jax.Array
    kind: str = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, temperature: float, num_ids: int, top_k: int = 0, top_p: float = 1.0) -> "Choice":
        """From plain numbers, where temperature 0 is greedy, and top_k 0 and top_p 1 leave nothing out."""
        kind = GREEDY if temperature == 0 else DRAWN if top_k == 0 and top_p == 1 else DRAWN_FROM_TOP
        return cls(
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(top_k or num_ids),
            top_p=jnp.float32(top_p),
            num_ids=jnp.int32(num_ids),
            kind=kind,
        )


def choose(logits_BV: jax.Array, key_B: jax.Array, choice: Choice) -> jax.Array:
    """Chooses a token for each row, int32 (B,).

    Args:
      logits_BV: float32; key_B: a key for each row, so that what is drawn does not depend on the rows beside it.
    """
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < choice.num_ids, logits_BV, -jnp.inf)
    if choice.kind == GREEDY:
        return _first_largest(logits_BV)
    logits_BV = logits_BV / choice.temperature
    if choice.kind == DRAWN_FROM_TOP:
        logits_BV = keep_top(logits_BV, choice.top_k, choice.top_p)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def _first_largest(logits_BV: jax.Array) -> jax.Array:
    """What argmax gives, as two reductions of one operand: a CPU does many lanes of those at a time."""
    ids_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    is_largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    # Where a logit is not a number none is the largest: the last id stands in for it.
    return jnp.min(jnp.where(is_largest_BV, ids_V, ids_V[-1]), axis=-1)


def keep_top(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf all logits but those of the `top_k` likeliest tokens, and of these the fewest with mass `top_p`.

    Tokens as likely as the last one that is kept are kept too. Nothing is sorted: the least logit to be kept is found
    bit by bit, in 32 passes over the vocabulary, to the last bit.
    """
    kept_BV = logits_BV >= _least_kept(logits_BV, jnp.ones_like(logits_BV), top_k.astype(jnp.float32))[:, None]
    mass_BV = jax.nn.softmax(jnp.where(kept_BV, logits_BV, -jnp.inf), axis=-1)
    # All of the mass is no threshold: the least likely are so small that sums do not notice them.
    is_likely_BV = logits_BV >= _least_kept(logits_BV, mass_BV, jnp.minimum(top_p, _sum(mass_BV)))[:, None]
    kept_BV = kept_BV & (is_likely_BV | (top_p >= 1))
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _least_kept(logits_BV: jax.Array, mass_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """The largest number (B,) such that the logits from it on have together at least the wanted mass."""
    order_BV = _ordered(logits_BV)

    def try_bit(index: jax.Array, least_B: jax.Array) -> jax.Array:
        raised_B = least_B | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        mass_B = _sum(jnp.where(order_BV >= raised_B[:, None], mass_BV, 0))
        return jnp.where(mass_B >= wanted_B, raised_B, least_B)

    return _unordered(jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(logits_BV.shape[:1], jnp.uint32)))


def _ordered(x: jax.Array) -> jax.Array:
    """Float32 to uint32, such that both are in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _unordered(order: jax.Array) -> jax.Array:
    """The inverse of `_ordered`."""
    bits = jnp.where(order >> 31, order & jnp.uint32((1 << 31) - 1), ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _sum(x_BV: jax.Array) -> jax.Array:
    """The sum of each row; by lanes first, which a CPU does many at once."""
    rows, width = x_BV.shape
    padded = jnp.pad(x_BV, ((0, 0), (0, -width % _LANES)))
    return padded.reshape(rows, -1, _LANES).sum(axis=1).sum(axis=1)
