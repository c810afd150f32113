"""Set before jax is imported anywhere: tests run on the CPU, as eight devices, so that meshes can be tried."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

import pytest

flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # Programs here run for milliseconds and compile for seconds: less optimised machine code halves the suite's time.
    "--xla_backend_optimization_level=0",
]
if importlib.metadata.version("jax").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # faster still; newer versions abort at the name
os.environ["XLA_FLAGS"] = " ".join(flags).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

# Stores and compiled programs made by one test serve the others; the user's own caches are left alone.
os.environ.setdefault("LATENTJAX_TEST_CACHE", tempfile.mkdtemp(prefix="latentjax-tests-"))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of tests/recipes.py that nothing interrupted."""
    import recipes

    return recipes.trained(tmp_path_factory.mktemp("runs") / "whole")
