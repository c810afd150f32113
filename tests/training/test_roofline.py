"""Seconds from counts: which links a group has, which network it crosses."""

import dataclasses

import numpy as np
import pytest

from latentjax.training.hardware import CHIPS
from latentjax.training.hlo_costs import Collective, ProgramCosts, sent_bytes
from latentjax.training.roofline import group_bandwidth, roofline

V5P, V5E = CHIPS["TPU v5p"], CHIPS["TPU v5e"]


@dataclasses.dataclass
class _Device:
    coords: list[int]


def slice_of(*sizes: int) -> list[_Device]:
    """Devices of a slice, x fastest, as jax has them."""
    return [_Device([int(place) for place in reversed(index)]) for index in np.ndindex(*reversed(sizes))]


@pytest.mark.parametrize(
    ("chip", "sizes", "group", "links"),
    [
        (V5P, (4, 4, 4), range(64), 6),  # three rings
        (V5P, (4, 4, 4), range(16), 4),  # a plane of two
        (V5P, (4, 4, 4), range(4), 2),  # one
        (V5P, (4, 4, 4), range(2), 1),  # two neighbours on a ring
        (V5P, (2, 2, 1), range(4), 2),  # too small to close: two lines
        (V5E, (4, 4, 1), range(16), 2),
        (V5E, (16, 16, 1), range(16), 2),
        (V5E, (16, 16, 1), range(256), 4),
    ],
)
def test_links_of_a_group(chip, sizes: tuple[int, ...], group: range, links: int):
    assert group_bandwidth(chip, slice_of(*sizes), np.array(group)) == links * 100e9 * (0.5 if chip is V5E else 1)


def test_a_switch_connects_any_group_alike():
    gpus = [object()] * 8
    assert group_bandwidth(CHIPS["NVIDIA H100"], gpus, np.arange(2)) == 450e9


def test_the_formulas_of_rings():
    assert sent_bytes("all-gather", 800.0, 8) == sent_bytes("reduce-scatter", 800.0, 8) == 700.0
    assert sent_bytes("all-to-all", 800.0, 8) == 700.0
    assert sent_bytes("all-reduce", 800.0, 8) == 1400.0
    assert sent_bytes("collective-permute", 800.0, 8) == 800.0
    assert sent_bytes("all-reduce", 800.0, 1) == 0.0


def test_the_bound_is_the_slowest_resource():
    ring, across = np.arange(64)[None], np.zeros((1, 1), int)
    costs = ProgramCosts(
        flops=459e12 * 0.5,
        hbm_bytes=2765e9 * 0.25,
        host_bytes=16e9 * 0.125,
        collectives=[
            Collective("all-gather", ring, 1, 10, 600e9 * 0.3),
            Collective("reduce-scatter", ring, 1, 1, 600e9 * 0.1),
            Collective("all-reduce", across, 2, 1, 6.25e9 * 0.75),
        ],
    )
    line = roofline(costs, V5P, slice_of(4, 4, 4))
    assert dataclasses.astuple(line) == pytest.approx((0.5, 0.25, 0.4, 0.75, 0.125))
    assert (line.bound, line.bound_by) == (0.75, "network")
    assert line.mfu(459e12 * 0.3, V5P) == pytest.approx(0.4)
