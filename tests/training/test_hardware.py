"""The table of chips."""

import pytest

from latentjax.training.hardware import CHIPS, chip_of


def test_the_longest_name_wins():
    assert chip_of("TPU v5 lite") is CHIPS["TPU v5 lite"] is CHIPS["TPU v5e"]
    assert chip_of("TPU v5") is CHIPS["TPU v5p"]
    assert chip_of("TPU v5 lite").peak_flops == 197e12
    assert chip_of("TPU v5").peak_flops == 459e12
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["NVIDIA H100"]
    assert chip_of("TPU v99") is None


def test_a_tpu7x_device_is_half_a_chip():
    assert chip_of("TPU7x").peak_flops == 2307e12 / 2
    assert chip_of("TPU7x").hbm_bytes == 96 * 2**30


@pytest.mark.parametrize("kind", CHIPS)
def test_networks_are_slower_the_farther_they_reach(kind: str):
    chip = CHIPS[kind]
    assert chip.hbm_bandwidth > chip.ici_bandwidth > chip.host_bandwidth > 0
    assert chip.ici_bandwidth > 5 * chip.network_bandwidth > 0
    # A product of matrices with some thousand rows is what keeps a chip computing rather than reading.
    assert 100 < chip.peak_flops / chip.hbm_bandwidth < 1000
    assert 16e9 <= chip.hbm_bytes < 256e9
