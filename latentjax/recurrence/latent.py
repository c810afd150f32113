"""Latent thoughts: PonderLM-2 (arXiv 2509.23184), section 3.

Slots are interleaved, x_1 z_1^1 .. z_1^C x_2 z_2^1 .., and the input of a thought slot is the backbone's output at the
slot before it. Decoding fills slots one by one. Training solves the same equations for all tokens at once by Jacobi
iteration: the thoughts start from C growing passes, and each of R refinement passes replaces all of them by what the
backbone makes of the previous ones. A token's thoughts depend on earlier slots only, so a pass more makes one slot
more exact, and all of them about threefold closer.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.cache import KeyValueCache, OptionalCache
from latentjax.models.embedding import Vocabulary
from latentjax.models.layers import shard_activation
from latentjax.models.slots import SlotRange, interleave, repeat_ids, split
from latentjax.recurrence.base import Prefilled, Recurrence

Ids = tuple[jax.Array, jax.Array | None]  # positions and segment ids of the tokens, int32 (B, T)


@dataclasses.dataclass(frozen=True)
class Latent(Recurrence):
    """C latent thoughts per token.

    Attributes:
      num_latent_thoughts: C; 0 for a part of training only, with R = 0: one pass, whose hidden states at the tokens the
        head reads (a model that never has thoughts is `Vanilla`).
      backprop_passes: gradients flow through this many of the last passes only; 0: through all.
      scale_embeddings: give token embeddings unit RMS at initialisation, which thoughts have after the final norm.
    """

    num_latent_thoughts: int
    backprop_passes: int
    scale_embeddings: bool

    uses_jacobi_iterations: ClassVar[bool] = True

    @property
    def slots_per_token(self) -> int:
        """C + 1."""
        return self.num_latent_thoughts + 1

    def embedding_scale(self, hidden_size: int) -> float:
        """sqrt(2.5 D): the inverse of the embedding's standard deviation at initialisation."""
        return (2.5 * hidden_size) ** 0.5 if self.scale_embeddings else 1.0

    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """Growing over 1 .. C slots, then R + 1 passes over C + 1 slots."""
        slots = self.slots_per_token
        return (*range(1, slots), *[slots] * (num_jacobi_iterations + 1))

    def kept_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """All while growing, then the thoughts, then the prediction slot."""
        growing = range(1, self.slots_per_token)
        return (*growing, *[self.num_latent_thoughts] * num_jacobi_iterations, 1)

    def num_trained_passes(self, num_jacobi_iterations: int) -> int:
        """`backprop_passes`, or all."""
        num_passes = len(self.passes(num_jacobi_iterations))
        return min(self.backprop_passes, num_passes) if self.backprop_passes else num_passes

    def forward(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Growing passes, R refinement passes as one scan, and the pass whose prediction slots the head reads."""
        num_thoughts, ids = self.num_latent_thoughts, (positions_BT, segment_ids_BT)
        # Passes before this one are computed without keeping anything for the backward pass.
        num_passes = num_thoughts + num_jacobi_iterations + 1
        first_kept = num_passes - self.backprop_passes if self.backprop_passes else 0
        state = self._begin(backbone, x_BTD, ids, first_kept)

        def refine(backbone: nn.Module, state: Any) -> tuple[Any, jax.Array]:
            return self._refined(backbone, x_BTD, ids, state)

        def refine_constants(backbone: nn.Module, state: Any) -> tuple[Any, jax.Array]:
            constants = jax.lax.stop_gradient((x_BTD, state))
            return jax.lax.stop_gradient(self._refined(backbone, constants[0], ids, constants[1]))

        num_free = min(max(first_kept - num_thoughts, 0), num_jacobi_iterations)
        state, free_R = _repeat(backbone, state, refine_constants, num_free)
        state, kept_R = _repeat(backbone, state, refine, num_jacobi_iterations - num_free)
        return self._predicted(backbone, x_BTD, ids, state), jnp.concatenate([free_R, kept_R])

    def forward_settled(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
        tolerance: float,
    ) -> tuple[jax.Array, jax.Array]:
        """Passes without gradients until the thoughts have settled, in a loop; then `backprop_passes` with them."""
        ids, num_trained = (positions_BT, segment_ids_BT), self.backprop_passes - 1

        def settle(backbone: nn.Module, x_BTD: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
            def is_unsettled(backbone: nn.Module, carry: tuple) -> jax.Array:
                _, residual, num_passes = carry
                return (residual > tolerance) & (num_passes < num_jacobi_iterations - num_trained)

            def refine(backbone: nn.Module, carry: tuple) -> tuple:
                state, _, num_passes = carry
                return *self._refined(backbone, x_BTD, ids, state), num_passes + 1

            state = self._begin(backbone, x_BTD, ids, first_kept=0)
            start = (state, jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))
            loop = partial(nn.while_loop, broadcast_variables="params", split_rngs={"params": False})
            return loop(is_unsettled, refine, backbone, start)  # pyright: ignore[reportArgumentType]  # as in `_settle`

        # The parameters of the loop are constants: how often it runs is not known when gradients are traced.
        settle = nn.map_variables(settle, "params", trans_in_fn=jax.lax.stop_gradient)
        state, _, num_passes = settle(backbone, jax.lax.stop_gradient(x_BTD))

        def refine(backbone: nn.Module, state: Any) -> tuple[Any, jax.Array]:
            return self._refined(backbone, x_BTD, ids, state)

        state, _ = _repeat(backbone, jax.lax.stop_gradient(state), refine, num_trained)
        return self._predicted(backbone, x_BTD, ids, state), num_passes + num_trained

    def _begin(self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, first_kept: int) -> jax.Array | None:
        """Growing passes: the thoughts before any refinement, (B, C T, D), or None where C is 0.

        Those before `first_kept` are constants.
        """
        z_BQD = None
        for k in range(self.num_latent_thoughts):
            # The pass that appends thought k + 1 also refines those before it.
            if k >= first_kept:
                z_BQD, _ = _apply_pass(backbone, x_BTD, z_BQD, *ids)
            else:
                h_BQD, _ = _apply_pass(backbone, *jax.lax.stop_gradient((x_BTD, z_BQD)), *ids)
                z_BQD = jax.lax.stop_gradient(h_BQD)
        return z_BQD

    def _refined(
        self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, z_BQD: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A refinement pass: the new thoughts and the thought residual."""
        new_BQD, _ = _apply_pass(backbone, x_BTD, z_BQD, *ids, stop=self.num_latent_thoughts)
        return new_BQD, thought_residual(new_BQD, z_BQD)

    def _predicted(self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, z_BQD: jax.Array | None) -> jax.Array:
        """The pass whose prediction slots the head reads, (B, T, D)."""
        return _apply_pass(backbone, x_BTD, z_BQD, *ids, start=self.num_latent_thoughts)[0]

    def forward_until(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        tolerance: float,
        counted_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same passes, refining in a loop that ends when all rows have settled: after C T passes at the latest."""
        z_BQD, residual_B, num_passes = self._settle(
            backbone, x_BTD, positions_BT, segment_ids_BT, tolerance, counted_BT
        )
        start = self.num_latent_thoughts
        hidden_BTD, _ = _apply_pass(backbone, x_BTD, z_BQD, positions_BT, segment_ids_BT, start)
        return hidden_BTD, residual_B, num_passes

    def forward_each(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        *,
        vocabulary: Vocabulary,
        num_jacobi_iterations: int,
        read: Callable[[jax.Array], Any],
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One scan of R + 1 passes, of which every slot is kept.

        A refinement pass is the final pass too, for the thoughts that enter it: its prediction slots are what R would
        have been enough for, had it been the last.
        """
        num_thoughts = self.num_latent_thoughts
        z_BQD = self._begin(backbone, x_BTD, (positions_BT, segment_ids_BT), first_kept=0)
        assert z_BQD is not None  # without thoughts there is nothing to refine

        def refine(backbone: nn.Module, z_BQD: jax.Array, _: None) -> tuple[jax.Array, tuple]:
            h_BSD = _apply_pass(backbone, x_BTD, z_BQD, positions_BT, segment_ids_BT)[0]
            *thoughts, hidden_BTD = split(h_BSD, num_thoughts + 1)
            new_BQD = interleave(thoughts)
            return new_BQD, (read(hidden_BTD), *_row_squares(new_BQD, z_BQD, None))

        scanned = nn.scan(
            refine,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=num_jacobi_iterations + 1,
        )
        _, (readings, change_RB, size_RB) = scanned(backbone, z_BQD, None)
        return readings, change_RB[:-1], size_RB[:-1]  # the last pass's new thoughts have not been read with

    def decode(
        self,
        backbone: nn.Module,
        x_BD: jax.Array,
        position_B: jax.Array,
        segment_id_B: jax.Array | None,
        cache: KeyValueCache,
        *,
        vocabulary: Vocabulary,
    ) -> tuple[jax.Array, KeyValueCache]:
        """C + 1 slots, each fed the hidden state of the slot before."""
        segment_ids_B1 = None if segment_id_B is None else segment_id_B[:, None]

        def feed(backbone: nn.Module, carry: tuple, _: None) -> tuple[tuple, None]:
            slot_B1D, cache = carry
            return backbone(slot_B1D, position_B[:, None], segment_ids_B1, cache), None

        scanned = nn.scan(
            feed,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=self.slots_per_token,
            unroll=self.slots_per_token if backbone.spec.unrolls else 1,
        )
        (h_B1D, cache), _ = scanned(backbone, (x_BD[:, None], cache), None)
        return h_B1D[:, 0], cache

    def prefill(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        cache: KeyValueCache,
        *,
        vocabulary: Vocabulary,
        tolerance: jax.Array | float,
    ) -> Prefilled:
        """Solves for all thoughts at once, then fills the cache in one pass over all slots.

        As many refinement passes as the thoughts need to settle, but at most C T, which give sequential decoding.
        """
        z_BQD, residual_B, num_passes = self._settle(
            backbone, x_BTD, positions_BT, segment_ids_BT, tolerance, segment_ids_BT > 0
        )
        start, cache = self.num_latent_thoughts, cache.replace(is_prefill=True)
        h_BTD, cache = _apply_pass(backbone, x_BTD, z_BQD, positions_BT, segment_ids_BT, start, cache=cache)
        return Prefilled(h_BTD[:, -1], cache.replace(is_prefill=False), residual_B, num_passes)

    def _settle(
        self,
        backbone: nn.Module,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        tolerance: jax.Array | float,
        counted_BT: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Growing passes, then refinement in a loop until all rows have settled.

        Returns:
          The thoughts, (B, C T, D); each row's last relative change, (B,); the number of refinement passes.
        """
        num_thoughts, (batch_size, num_tokens) = self.num_latent_thoughts, x_BTD.shape[:2]
        ids = positions_BT, segment_ids_BT
        z_BQD = self._begin(backbone, x_BTD, ids, first_kept=0)
        assert z_BQD is not None  # without thoughts there is nothing to refine
        counted_BQ1 = None if counted_BT is None else jnp.repeat(counted_BT, num_thoughts, axis=1)[..., None]

        def is_unsettled(backbone: nn.Module, carry: tuple) -> jax.Array:
            _, residual_B, num_passes = carry
            return jnp.any(residual_B > tolerance) & (num_passes < num_thoughts * num_tokens)

        def refine(backbone: nn.Module, carry: tuple) -> tuple:
            z_BQD, _, num_passes = carry
            new_BQD, _ = _apply_pass(backbone, x_BTD, z_BQD, *ids, stop=num_thoughts)
            return new_BQD, _row_residuals(new_BQD, z_BQD, counted_BQ1), num_passes + 1

        start = (z_BQD, jnp.full((batch_size,), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))
        return nn.while_loop(
            is_unsettled,  # pyright: ignore[reportArgumentType]  # it returns an array, where flax says bool
            refine,
            backbone,
            start,
            broadcast_variables="params",
            split_rngs={"params": False},
        )


def _apply_pass(
    backbone: nn.Module,
    x_BTD: jax.Array,
    z_BQD: jax.Array | None,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    start: int = 0,
    stop: int | None = None,
    cache: OptionalCache = None,
) -> tuple[jax.Array, OptionalCache]:
    """One pass over x and the thoughts there are; its outputs at slots start .. stop - 1 of every token, and the cache.

    Args:
      stop: None: to the last slot.
      cache: is filled with all slots; None: there is none.
    """
    thoughts = [] if z_BQD is None else split(z_BQD, z_BQD.shape[1] // x_BTD.shape[1])
    slots = 1 + len(thoughts)
    x_BSD = shard_activation(interleave([x_BTD, *thoughts]), "batch", "slots", None)
    ids = repeat_ids(positions_BT, slots), repeat_ids(segment_ids_BT, slots)
    return backbone(x_BSD, *ids, cache, kept=SlotRange(slots, start, slots if stop is None else stop))


def _repeat(
    backbone: nn.Module, state: Any, refine: Callable[[nn.Module, Any], tuple[Any, jax.Array]], length: int
) -> tuple[Any, jax.Array]:
    """So many refinements as one scan: the state after them, and the thought residual of each, float32 (length,)."""
    if length == 0:
        return state, jnp.zeros((0,), jnp.float32)
    scanned = nn.scan(
        lambda backbone, state, _: refine(backbone, state),
        variable_broadcast="params",
        split_rngs={"params": False},
        length=length,
        unroll=length if backbone.spec.unrolls else 1,
    )
    return scanned(backbone, state, None)


def thought_residual(new_BQD: jax.Array, old_BQD: jax.Array) -> jax.Array:
    """The RMS of the change over the RMS of the new thoughts: a float32 scalar, 0 at the fixed point."""
    new_BQD, old_BQD = (jax.lax.stop_gradient(z).astype(jnp.float32) for z in (new_BQD, old_BQD))
    return jnp.sqrt(jnp.mean(jnp.square(new_BQD - old_BQD)) / jnp.mean(jnp.square(new_BQD)))


def _row_residuals(new_BQD: jax.Array, old_BQD: jax.Array, counted_BQ1: jax.Array | None) -> jax.Array:
    """As `thought_residual`, for each row, over the slots that count: float32 (B,)."""
    change_B, size_B = _row_squares(new_BQD, old_BQD, counted_BQ1)
    return jnp.sqrt(change_B / jnp.maximum(size_B, jnp.finfo(jnp.float32).tiny))


def _row_squares(new_BQD: jax.Array, old_BQD: jax.Array, counted_BQ1: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Each row's sums of squares of the change and of the new thoughts, over the slots that count: float32 (B,)."""
    weight = 1.0 if counted_BQ1 is None else counted_BQ1.astype(jnp.float32)
    new_BQD, old_BQD = (z.astype(jnp.float32) for z in (new_BQD, old_BQD))
    change_B, size_B = (jnp.sum(jnp.square(z) * weight, axis=(1, 2)) for z in (new_BQD - old_BQD, new_BQD))
    return change_B, size_B
