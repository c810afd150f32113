"""Set before jax is imported anywhere: tests run on the CPU, as eight devices, so that meshes can be tried."""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable
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


@pytest.fixture
def tpu_topology(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Describes TPUs that are not there, to compile for: (name, **options) -> topology; skips without libtpu."""
    libtpu = pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to be asked about itself
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may be compiling: no chip is shared
    monkeypatch.setenv("TPU_LIBRARY_PATH", libtpu.get_library_path())
    from jax.experimental import topologies

    return lambda name, **options: topologies.get_topology_desc(name, platform="tpu", **options)
