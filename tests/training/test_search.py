"""What a search tries, skips and ranks; nothing is compiled."""

import dataclasses
from types import SimpleNamespace

import pytest
import recipes
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.models.remat import POLICIES
from latentjax.models.spec import ModelSpec
from latentjax.training.hardware import CHIPS
from latentjax.training.program_report import Memory, ProgramReport
from latentjax.training.roofline import Roofline
from latentjax.training.search import least_memory, num_parameters, search, settings
from latentjax.training.topology import Topology

GIB = 2**30


def topology(num_devices: int, hbm_bytes: float = 16 * GIB) -> Topology:
    chip = dataclasses.replace(CHIPS["TPU v5e"], hbm_bytes=hbm_bytes)
    return Topology("v5e:?", 1, (SimpleNamespace(device_kind="TPU v5e"),) * num_devices, chip)


def test_settings_are_all_that_divide():
    found = list(settings(recipes.get_config(), topology(4)))
    assert {each.remat for each in found} == set(POLICIES)
    meshes = {each.mesh for each in found}
    # Two heads and a vocabulary of 257: no tensor axis divides them.
    assert meshes == {(1, 4, 1, 1, 1), (1, 2, 2, 1, 1), (1, 1, 4, 1, 1)}
    assert {each.microbatches for each in found} == {1, 2}  # 8 rows over 4 devices
    assert len(found) == len(set(found)) == 3 * 2 * len(POLICIES)


def test_tensor_axes_that_divide():
    config = recipes.get_config()
    config.model.vocab_size = 256
    assert (1, 1, 2, 1, 2) in {each.mesh for each in settings(config, topology(4))}


def test_least_memory_falls_with_every_way_to_save():
    config = recipes.get_config()
    config.mesh.update(data=1, fsdp=1)
    config.train.gradient_accumulation_steps = 1

    def bytes_with(**knobs: object) -> float:
        changed = config.copy_and_resolve_references()
        for key, value in knobs.items():
            group, name = key.split("__")
            changed[group][name] = value
        return least_memory(changed)

    base = bytes_with(model__remat="none")
    assert bytes_with(model__remat="keep_matmul_outputs") < base
    assert bytes_with(model__remat="keep_layer_inputs") < bytes_with(model__remat="keep_matmul_outputs")
    assert bytes_with(mesh__fsdp=8) < base and bytes_with(mesh__data=8) < base
    assert bytes_with(train__gradient_accumulation_steps=8) < base
    assert bytes_with(data__batch_size=16) > base
    parameters = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 257 * 16
    assert num_parameters(ModelSpec(**config.model)) == parameters
    assert base > 16 * parameters


def fake_report(config: ConfigDict, memory: float, seconds: float) -> ProgramReport:
    """A report of a program that takes so many GiB and seconds."""
    fits = memory <= 16
    return ProgramReport(
        topology="v5e:?", num_slices=1, device_kind="TPU v5e", num_devices=4, mesh=dict(config.mesh), attention="xla",
        remat=config.model.remat, gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        num_jacobi_iterations=2, tokens=1, fits=fits, advice=None if fits else "change it",
        memory=Memory(0, 0, 0, 0, 0, memory * GIB, 16 * GIB), compile_seconds=1.0, model_flops=1.0,
        mean_model_flops=1.0, roofline=Roofline(seconds, 0, 0, 0, 0) if fits else None, mfu=0.5 if fits else None,
    )  # fmt: skip


def test_what_fits_comes_first_by_its_bound_and_what_cannot_be_better_is_not_tried():
    policies, tried, notes = list(POLICIES), [], []

    def examine(config: ConfigDict, topology: Topology, iterations: int | None) -> ProgramReport:
        level = policies.index(config.model.remat)
        tried.append((config.mesh.fsdp, config.model.remat, config.train.gradient_accumulation_steps))
        # Nothing fits but where at least layers are recomputed; fsdp is faster.
        memory = 20 - 3 * level - config.train.gradient_accumulation_steps
        return fake_report(config, memory, (2 + level) / config.mesh.fsdp)

    result = search(recipes.get_config(), topology(4), None, 100, notes.append, examine)
    fits = [report.fits for report in result.ranked]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    bounds = [report.bound for report in result.ranked if report.fits]
    assert bounds == sorted(bounds) and result.ranked[0].mesh["fsdp"] == 4
    assert len(tried) == len(set(tried)) and result.dominated > 0 and result.beyond_limit == 0
    assert len(tried) + result.dominated + result.hopeless == 3 * 2 * len(POLICIES)
    for fsdp in (1, 2, 4):
        # keep_matmul_outputs fits with one microbatch: nothing leaner is worth a try.
        assert (fsdp, "keep_pass_inputs", 2) not in tried
    assert len(notes) == 1 + 2 * len(tried)


def test_the_limit_and_the_hopeless_are_counted():
    def examine(config: ConfigDict, topology: Topology, iterations: int | None) -> ProgramReport:
        return fake_report(config, 1.0, 1.0 / config.mesh.fsdp)

    result = search(recipes.get_config(), topology(4), None, 2, lambda line: None, examine)
    assert len(result.ranked) == 2 and result.beyond_limit > 0
    everything = search(recipes.get_config(), topology(4, hbm_bytes=1000.0), None, 2, lambda line: None, examine)
    assert (len(everything.ranked), everything.hopeless) == (0, 3 * 2 * len(POLICIES))


def test_nothing_divides():
    with pytest.raises(UserError, match="no mesh over 3 devices"):
        search(recipes.get_config(), topology(3), None, 2, lambda line: None)
