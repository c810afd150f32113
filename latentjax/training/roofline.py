"""The least time that a step can take on its chips: the longest of what it computes and of what it moves.

Each resource is taken to work at its data sheet's speed and all of them at once, so no step is faster than its bound;
how much slower it is, only a run tells. Collectives are charged their ring's bytes (`training.hlo_costs`) over

- within a slice: the links that their groups can use. A chip has one or two links along each dimension of the torus:
  two where the dimension closes to a ring that the group fills, one on a line. A group that spans k dimensions sends
  along all of them at once, one way per link.
- between slices: a chip's share of its host's data-centre network.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from latentjax.training.hardware import Chip
from latentjax.training.hlo_costs import Collective, ProgramCosts


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step needs each resource for.

    Attributes:
      compute: matrix products, at the peak of bfloat16.
      memory: reads and writes of HBM.
      interconnect: collectives within a slice.
      network: collectives between slices.
      host: copies to and from the host's memory.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    host: float

    @property
    def bound(self) -> float:
        """Seconds below which no step can be."""
        return max(dataclasses.astuple(self))

    @property
    def bound_by(self) -> str:
        """The resource that takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    def mfu(self, model_flops: float, chip: Chip) -> float:
        """Model FLOPs utilisation at the bound, for the model FLOPs of one device and step."""
        return model_flops / self.bound / chip.peak_flops


def roofline(costs: ProgramCosts, chip: Chip, devices: Sequence[jax.Device]) -> Roofline:
    """Charges a program's costs to a chip.

    Args:
      devices: of the mesh, in its order: what groups of collectives refer to.
    """
    return Roofline(
        compute=costs.flops / chip.peak_flops,
        memory=costs.hbm_bytes / chip.hbm_bandwidth,
        interconnect=sum(seconds(each, chip, devices) for each in costs.collectives if each.num_slices == 1),
        network=sum(seconds(each, chip, devices) for each in costs.collectives if each.num_slices > 1),
        host=costs.host_bytes / chip.host_bandwidth,
    )


def seconds(collective: Collective, chip: Chip, devices: Sequence[jax.Device]) -> float:
    """How long the collectives take in a step, one after another."""
    if collective.num_slices > 1:
        return collective.sent / chip.network_bandwidth
    group = collective.groups[0]  # the others lie alike
    return collective.sent / group_bandwidth(chip, devices, group[group >= 0])


def group_bandwidth(chip: Chip, devices: Sequence[jax.Device], group: np.ndarray) -> float:
    """Bytes/s that each member of a group can send to the others within a slice (see the module)."""
    link = chip.ici_bandwidth / chip.ici_links
    coords = [getattr(device, "coords", None) for device in devices]
    if not chip.ring_size or None in coords:
        return chip.ici_bandwidth
    members = np.array([coords[place] for place in group])
    sizes = np.max(np.array(coords), axis=0) + 1
    links = 0
    for size, places in zip(sizes, members.T):
        spanned = len(np.unique(places))
        closes = size % chip.ring_size == 0 and spanned == size
        links += 0 if spanned == 1 else 2 if closes else 1
    # The two halves of one chip talk to each other without any link, at least as fast as all links together.
    return links * link if links else chip.ici_bandwidth
