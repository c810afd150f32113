"""The table of methods."""

from collections.abc import Callable

from latentjax.recurrence.alternating import Alternating
from latentjax.recurrence.base import Recurrence, RecurrenceSpec
from latentjax.recurrence.latent import Latent
from latentjax.recurrence.loop import Loop
from latentjax.recurrence.pause import Pause
from latentjax.recurrence.ponder import Ponder
from latentjax.recurrence.vanilla import Vanilla

# From the settings, of which num_latent_thoughts is at least 1.
METHODS: dict[str, Callable[[RecurrenceSpec], Recurrence]] = {
    "vanilla": lambda spec: Vanilla(),
    "latent": lambda spec: Latent(spec.num_latent_thoughts, spec.backprop_passes, spec.scale_embeddings),
    "ponder": lambda spec: Ponder(spec.num_latent_thoughts, spec.scale_embeddings, spec.ponder_chunk_tokens),
    "loop": lambda spec: Loop(spec.num_latent_thoughts),
    "pause": lambda spec: Pause(spec.num_latent_thoughts, spec.pause_token_id, spec.scale_embeddings),
}

# Forms of refinement in training; in evaluation it is always full.
REFINEMENTS: dict[str, type[Latent]] = {"full": Latent, "alternating": Alternating}


def make_recurrence(spec: RecurrenceSpec) -> Recurrence:
    """Builds the method that the settings name; without any thoughts, pauses or more passes, that is vanilla.

    Raises:
      KeyError: an unknown method (the config is validated before a model is built).
    """
    return METHODS[spec.method](spec) if spec.num_latent_thoughts else Vanilla()


def train_recurrence(spec: RecurrenceSpec, num_latent_thoughts: int) -> Recurrence:
    """As `make_recurrence`, in the form that a training step has, with the C of its stage.

    Without thoughts a stage of `latent` is still its own: embeddings have the scale that they will have with thoughts.

    Raises:
      KeyError: as there, or an unknown form of refinement.
    """
    recurrence = make_recurrence(spec)
    if not isinstance(recurrence, Latent):
        return recurrence
    form = REFINEMENTS[spec.refinement] if num_latent_thoughts else Latent
    return form(num_latent_thoughts, spec.backprop_passes, spec.scale_embeddings)
