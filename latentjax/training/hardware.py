"""What the chips can do: the one table of their speeds and sizes, from the makers' data sheets.

TPUs: the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of Google Cloud's documentation; the
data-centre network and PCIe, which those pages give only in part, as in "How to Scale Your Model" (Google DeepMind,
chapter 2). NVIDIA: the data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200, and of the DGX systems around them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device: a chip, but for TPU7x, of whose chips each half is a device. Bandwidths are in bytes/s.

    Attributes:
      peak_flops: dense bfloat16 FLOP/s.
      hbm_bytes: high-bandwidth memory.
      hbm_bandwidth: of reads and writes together.
      ici_bandwidth: what it can send to its neighbours on all links together (NVLink on GPUs), one way.
      ici_links: how many links that is: two for each dimension of a torus; 1 where a switch connects all with all.
      ring_size: a dimension of the torus closes to a ring if it is a multiple of this; else it is a line. 0: no torus.
      network_bandwidth: its share of its host's data-centre network, one way: what lies between slices or nodes.
      host_bandwidth: to its host's memory, one way.
    """

    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    ring_size: int
    network_bandwidth: float
    host_bandwidth: float


_V5E = Chip(197e12, 16 * 2**30, 819e9, 200e9, 4, 16, 3.125e9, 16e9)
_V5P = Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6, 4, 6.25e9, 16e9)
_V6E = Chip(918e12, 32 * 2**30, 1638e9, 400e9, 4, 16, 12.5e9, 32e9)

# By the start of jax's device_kind.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9, 6, 4, 6.25e9, 16e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # Half a chip: 2307e12 FLOP/s, 192 GiB, 7380e9, 600e9 and 12.5e9 bytes/s are a whole one's.
    "TPU7x": Chip(2307e12 / 2, 96 * 2**30, 3690e9, 300e9, 6, 4, 6.25e9, 16e9),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 300e9, 1, 0, 25e9, 32e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 450e9, 1, 0, 50e9, 64e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9, 1, 0, 50e9, 64e9),
    "NVIDIA B200": Chip(2250e12, 180e9, 8000e9, 900e9, 1, 0, 50e9, 64e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device, by jax's `device_kind`; None: not in the table."""
    # The longest match, so that "TPU v5 lite" is not taken for "TPU v5".
    matches = [kind for kind in CHIPS if device_kind.startswith(kind)]
    return CHIPS[max(matches, key=len)] if matches else None
