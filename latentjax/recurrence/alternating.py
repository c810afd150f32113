"""Latent thoughts solved for place by place: a form of training in which no pass computes what is thrown away.

A full pass goes over all C + 1 slots of every token. Here a pass goes over one of them: first the tokens, then the
first thoughts of all tokens, and so on, in turns. In every layer it attends to the keys and values that the latest pass
over each of the other places has left, and its hidden states are the inputs of the next place, at once: Gauss-Seidel
where full passes are Jacobi. The fixed point is the same, that of sequential decoding.

The thoughts of R refinements are there without growing passes over more than one slot, and the prediction takes a pass
over the last slots alone: (R + 1) (C + 1) forwards a token, where full passes take C (C + 1) / 2 more. Keys and values
of tokens are then one refinement older in the predicting pass, which costs a little of the accuracy.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latentjax.models.beside import Beside, PlaceKeys
from latentjax.recurrence.latent import Ids, Latent, thought_residual

# The thoughts, (B, T, D) each: inputs of places 1 .. C; and what passes over places 0 .. C - 1 left.
State = tuple[tuple[jax.Array, ...], tuple[PlaceKeys, ...]]


@dataclasses.dataclass(frozen=True)
class Alternating(Latent):
    """`Latent` with C >= 1, as training refines it; `backprop_passes`, not 1, counts rounds over all places."""

    def passes(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """Over one slot each: (R + 1) rounds over C + 1 places."""
        return (1,) * ((num_jacobi_iterations + 1) * self.slots_per_token)

    def kept_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """Of the last thoughts, only keys and values are read until the prediction."""
        thoughts = (1,) * self.num_latent_thoughts
        return (*thoughts, *(0, *thoughts) * num_jacobi_iterations, 1)

    def seen_slots(self, num_jacobi_iterations: int) -> tuple[int, ...]:
        """As many as there are: one more with each of the first passes."""
        rest = (self.slots_per_token,) * (num_jacobi_iterations * self.slots_per_token + 1)
        return (*range(1, self.slots_per_token), *rest)

    def num_trained_passes(self, num_jacobi_iterations: int) -> int:
        """The predicting pass, those of `backprop_passes` - 1 refinements, and the first ones where that is more."""
        if not self.backprop_passes or self.backprop_passes > num_jacobi_iterations + 1:
            return len(self.passes(num_jacobi_iterations))
        return 1 + (self.backprop_passes - 1) * self.slots_per_token

    def _begin(self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, first_kept: int) -> State:
        """The first pass over each place but the last, which sees the places before it."""
        keep = first_kept < self.num_latent_thoughts
        inputs, keys = [x_BTD if keep else jax.lax.stop_gradient(x_BTD)], []
        for place in range(self.num_latent_thoughts):
            hidden_BTD, own = backbone(inputs[-1], *ids, Beside((*keys, None), place))
            inputs.append(hidden_BTD)
            keys.append(own)
        state = tuple(inputs[1:]), tuple(keys)
        return state if keep else jax.lax.stop_gradient(state)

    def _refined(self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, state: State) -> tuple[State, jax.Array]:
        """The last thoughts get keys and values; then the tokens and the other thoughts, with those of all others."""
        old, keys = state
        _, last = self._feed(backbone, old[-1], ids, (*keys, None))
        places: list[Any] = [*keys, last]
        inputs = [x_BTD]
        for place in range(self.num_latent_thoughts):
            places[place] = None
            hidden_BTD, places[place] = self._feed(backbone, inputs[-1], ids, tuple(places))
            inputs.append(hidden_BTD)
        new = tuple(inputs[1:])
        residual = thought_residual(jnp.concatenate(new, axis=1), jnp.concatenate(old, axis=1))
        return (new, tuple(places[:-1])), residual

    def _predicted(self, backbone: nn.Module, x_BTD: jax.Array, ids: Ids, state: State) -> jax.Array:
        """The pass over the last thoughts."""
        thoughts, keys = state
        return self._feed(backbone, thoughts[-1], ids, (*keys, None))[0]

    @staticmethod
    def _feed(
        backbone: nn.Module, x_BTD: jax.Array, ids: Ids, places: tuple[PlaceKeys | None, ...]
    ) -> tuple[jax.Array, PlaceKeys]:
        """A pass over the place that has no keys and values."""
        return backbone(x_BTD, *ids, Beside(places, places.index(None)))
