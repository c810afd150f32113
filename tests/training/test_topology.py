"""Topologies by name: what is there, and one clear line for what is not."""

import importlib.util

import pytest

from latentjax.errors import UserError
from latentjax.training.topology import make_topology, parse_topology

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_names():
    assert parse_topology("v5p:4x4x8") == ("v5p", (4, 4, 8))
    assert parse_topology("V6E:1x1") == ("v6e", (1, 1))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5p", ["v5p:4x4x4", "v4, v5e, v5p, v6e, tpu7x"]),
        ("v9:2x2", ["v9:2x2", "v5p:4x4x4", "v5e"]),
        ("v5p:4x4", ["3 dimensions"]),
        ("v5e:2x2x1", ["2 dimensions"]),
        ("v5e:0x2", ["2 dimensions"]),
        ("v5e:twoxtwo", ["2 dimensions"]),
        ("v5e:3x2", ["even"]),
        ("v5p:1x1x4", ["even"]),
        ("v5e:32x32", ["1024 chips", "at most 256"]),
    ],
)
def test_what_is_not_a_topology(name: str, parts: list[str]):
    with pytest.raises(UserError) as error:
        make_topology(name)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_libtpu_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*\.\[tpu\]"):
        make_topology("v5e:2x2")


def test_no_slices():
    with pytest.raises(UserError, match="--num_slices"):
        make_topology("v5e:2x2", 0)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "peak"),
    [("v4:2x2x1", 4, 275e12), ("v5e:4x4", 16, 197e12), ("v5p:1x1x1", 1, 459e12), ("v6e:2x2", 4, 918e12)],
)
def test_devices(name: str, devices: int, peak: float):
    topology = make_topology(name)
    assert len(topology.devices) == devices
    assert topology.chip.peak_flops == peak


@needs_libtpu
def test_each_half_of_a_tpu7x_is_a_device():
    assert len(make_topology("tpu7x:2x2x1").devices) == 8


@needs_libtpu
def test_slices():
    topology = make_topology("v5e:2x4", 3)
    assert [device.slice_index for device in topology.devices] == [0] * 8 + [1] * 8 + [2] * 8
