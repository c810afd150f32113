"""Twenty steps on real text have the same losses on every mesh, in one process and in two."""

import functools
import json
import socket
import subprocess
import sys
from pathlib import Path

import equality
import jax
import numpy as np
import pytest
import recipes

# Each architecture once; plain, and with documents kept apart.
RECIPES = [("gpt_neox", False), ("llama", True)]
MESHES = ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,sequence=2", "replica=2,fsdp=4"]
TOLERANCE = 1e-5


@functools.cache
def on_one_device(architecture: str, masked: bool) -> list[float]:
    return equality.losses(equality.config_of(architecture, masked, ""), jax.devices()[:1])


def test_one_device_learns():
    """So that what is compared is not noise around the start; and the masks matter."""
    for recipe in RECIPES:
        losses = on_one_device(*recipe)
        assert len(losses) == 20 and losses[0] > 5.0 and losses[-1] < losses[0] - 1.5
    assert abs(on_one_device("llama", True)[0] - on_one_device("llama", False)[0]) > 1e-3


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("architecture", "masked"), RECIPES, ids=["plain", "masked"])
def test_every_mesh_has_the_losses_of_one_device(architecture: str, masked: bool, mesh: str):
    losses = equality.losses(equality.config_of(architecture, masked, mesh), jax.devices())
    np.testing.assert_allclose(losses, on_one_device(architecture, masked), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "case",
    [
        (*RECIPES[1], "sequence=8"),  # along the sequence, both processes hold all rows
        pytest.param((*RECIPES[0], "fsdp=8"), marks=pytest.mark.long),  # test_processes.py has another like it
    ],
    ids=str,
)
def test_two_processes_have_the_losses_of_one_device(case: tuple[str, bool, str]):
    """Of four devices each."""
    cases = [case]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(equality.__file__)), coordinator, "2", str(number), json.dumps(cases)],
            env=recipes.environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    (out, err), (_, other_err) = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], err + other_err
    found = json.loads(out.splitlines()[-1])
    for (architecture, masked, mesh), losses in zip(cases, found, strict=True):
        expected = on_one_device(architecture, masked)
        np.testing.assert_allclose(losses, expected, rtol=0, atol=TOLERANCE, err_msg=mesh)
