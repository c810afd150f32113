"""Several processes run one program: the same losses as one, and nobody waits for one that has left."""

import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
from together import losses, run_together, start_together, wait_for_step

from latentjax.errors import OthersMissing, UserError, report
from latentjax.training import processes
from latentjax.training.mesh import make_mesh, put_batch, rows_of_process
from latentjax.training.metrics import read_metrics


def test_two_processes_have_the_losses_of_one(whole_run: Path, tmp_path: Path):
    """Their evaluations and gradient norms too; test_mesh_equality.py compares the losses on more meshes."""
    mesh = ("mesh.replica=2", "mesh.fsdp=4", "mesh.data=1", "data.num_workers=1")
    for result in (results := run_together(tmp_path / "two", *mesh)):
        assert result.returncode == 0, result.stdout + result.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(whole_run), atol=1e-5)
    # The first says it all, the second nothing.
    assert "of 2 processes" in results[0].stdout and "done: 12 steps" in results[0].stdout
    assert [line for line in results[1].stdout.splitlines() if not line.startswith("[Gloo]")] == []
    assert (tmp_path / "two" / "samples.txt").read_text().count("=== step ") == 2
    # Their checkpoint is one that a single process can go on from.
    recipes.trained(tmp_path / "two", "train.num_steps=13")


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path: Path):
    """To the second, which writes nothing itself."""
    workdir = tmp_path / "run"
    started = start_together(workdir, "mesh.data=8", "train.num_steps=100000")
    wait_for_step(workdir, started, 4)
    started[1].send_signal(signal.SIGTERM)
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, out + err
        assert "Traceback" not in err
    steps = [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == list(range(1, saved + 1))


def test_a_mistake_that_the_first_finds_ends_all(whole_run: Path, tmp_path: Path):
    """A directory of another model: the others, which did not look, say the same and leave."""
    shutil.copy(whole_run / "config.json", tmp_path)
    for result in run_together(tmp_path, "model.num_layers=1"):
        assert result.returncode == 2
        assert "holds a run of another model: model.num_layers" in result.stderr
        assert "Traceback" not in result.stderr


def test_rows_of_any_place_go_where_they_belong():
    config = recipes.get_config()
    config.data.batch_size = 16
    mesh = make_mesh(config, jax.devices())
    rows = rows_of_process(mesh, 16)
    np.testing.assert_array_equal(rows, np.arange(16))
    whole = np.random.default_rng(0).integers(0, 100, (16, 5))
    array = put_batch({"tokens": whole}, mesh, rows, 16)["tokens"]
    assert array.sharding == put_batch({"tokens": whole}, mesh)["tokens"].sharding
    np.testing.assert_array_equal(np.asarray(array), whole)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "--coordinator, --num_processes and --process_id go together"),
        ((None, 2, 0), "--coordinator, --num_processes and --process_id go together"),
        (("localhost", 2, 0), "--coordinator='localhost' must be HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id=2 must be at least 0 and below --num_processes=2"),
    ],
)
def test_flags_that_make_no_sense(arguments: tuple, message: str):
    with pytest.raises(UserError, match=message):
        processes.start(*arguments)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # in an allocation, but not started by srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "the TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_the_launcher_is_told_by_its_environment(
    monkeypatch, tmp_path: Path, environment: dict[str, str], launcher: str | None
):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_DEVICES", tmp_path)  # of a machine with neither GPUs nor TPUs
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    called = []

    def initialize(**arguments):
        called.append(arguments)
        raise RuntimeError("nobody there")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    if launcher is None:
        processes.start(None, None, None)
        processes.refuse_several("export")
        assert not called
    else:
        monkeypatch.delenv("JAX_PLATFORMS")
        with pytest.raises(UserError, match="export is done by one process, and "):
            processes.refuse_several("export")
        message = f"cannot connect with the other processes, started by {launcher}: nobody"
        with pytest.raises(OthersMissing, match=message) as caught:
            processes.start(None, None, None)
        assert report("train", caught.value) == 75  # they may be there at the next start
        (arguments,) = called
        assert arguments.keys() == {"heartbeat_timeout_seconds"}  # the rest jax finds out


SLURM_NODES = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),4,1"}  # four nodes


@pytest.mark.parametrize(
    ("environment", "devices", "gpus"),
    [
        # One process on a node gets all of it, which jax alone would not give it.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3", "SLURM_LOCALID": "0"}, 8, range(8)),
        (SLURM_NODES | {"SLURM_NODEID": "1", "SLURM_LOCALID": "1"}, 8, range(4, 8)),
        (SLURM_NODES | {"SLURM_NODEID": "2", "SLURM_LOCALID": "3"}, 4, [3]),
        (SLURM_NODES | {"SLURM_NODEID": "3", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "5,6"}, 8, [0, 1]),
        # Bound by the launcher: what is seen is this process's own.
        (SLURM_NODES | {"SLURM_NODEID": "2", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "GPU-1"}, 8, [0]),
        (
            SLURM_NODES
            | {"SLURM_NODEID": "0", "SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "4,5"},
            8,
            range(2),
        ),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 4, [2, 3]),
        # Nothing to share, or the user has shared it.
        (SLURM_NODES | {"SLURM_NODEID": "0", "SLURM_LOCALID": "1"}, 0, None),
        (SLURM_NODES | {"SLURM_NODEID": "0", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": ""}, 8, None),
        (SLURM_NODES | {"SLURM_NODEID": "0", "SLURM_LOCALID": "1", "JAX_LOCAL_DEVICE_IDS": "7"}, 8, None),
    ],
)
def test_processes_of_a_node_share_its_gpus(monkeypatch, tmp_path: Path, environment: dict, devices: int, gpus):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS", "SLURM_GPUS_PER_TASK", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("ctl", "-uvm", *range(devices)):
        (tmp_path / f"nvidia{name}").touch()
    monkeypatch.setattr(processes, "_DEVICES", tmp_path)
    assert processes.gpus_of_process() == ({} if gpus is None else {"local_device_ids": list(gpus)})


def test_gpus_that_cannot_be_shared_evenly(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("JAX_LOCAL_DEVICE_IDS", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "3")
    with pytest.raises(UserError, match="3 processes on this node cannot share its 4 GPUs evenly"):
        processes.gpus_of_process()


@pytest.mark.parametrize(
    ("metadata", "several"),
    [
        ({}, False),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.2"}, False),
        ({"worker-network-endpoints": "u:u:10.0.0.2,u:u:10.0.0.3"}, True),
        # Several slices of one host each: the endpoints are those of the slice.
        ({"worker-network-endpoints": "u:u:10.0.0.2", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"worker-network-endpoints": "u:u:10.0.0.2", "tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, False),
    ],
)
def test_a_tpu_machine_learns_of_others_from_its_metadata(monkeypatch, tmp_path: Path, metadata: dict, several: bool):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(processes, "_DEVICES", tmp_path)
    monkeypatch.setattr(processes, "_metadata", lambda attribute: metadata.get(attribute, ""))
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert processes._is_on_tpu_pod() is several
