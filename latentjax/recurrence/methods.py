"""The table of methods."""

from collections.abc import Callable

from latentjax.recurrence.base import Recurrence, RecurrenceSpec
from latentjax.recurrence.latent import Latent
from latentjax.recurrence.vanilla import Vanilla


def _latent(spec: RecurrenceSpec) -> Recurrence:
    if spec.num_latent_thoughts == 0:
        return Vanilla()
    return Latent(spec.num_latent_thoughts, spec.backprop_passes, spec.scale_embeddings)


METHODS: dict[str, Callable[[RecurrenceSpec], Recurrence]] = {
    "vanilla": lambda spec: Vanilla(),
    "latent": _latent,
}


def make_recurrence(spec: RecurrenceSpec) -> Recurrence:
    """Builds the method that the settings name.

    Raises:
      KeyError: an unknown method (the config is validated before a model is built).
    """
    return METHODS[spec.method](spec)
