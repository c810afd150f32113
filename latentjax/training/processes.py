"""Being one of several processes that together run one program: how they find each other, and what only one does.

One process is the default. Several are started by what launches them (a TPU pod, Slurm, Open MPI), which tells each of
them in its environment who the others are, or by explicit flags.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from latentjax.errors import OthersMissing, UserError, brief, report, shown
from latentjax.training.last_words import Verb, Witness
from latentjax.training.watchdog import CoordinatorBoard, Watchdog

Result = TypeVar("Result")

# Number of processes of the step or job, as the launchers tell it. Slurm's is that of the step (`srun`): a script that
# runs in an allocation without srun is one process.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
_DEVICES = Path("/dev")
_MESSAGE_BYTES = 4096
_HEARTBEAT_SECONDS = 900  # `watchdog` is there first and names who is gone; jax ends all with a stack trace
_PATIENCE_MS = 3_600_000  # one process may find in the cache what another compiles


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others, if there are any; before anything else is asked of jax.

    Args:
      coordinator: HOST:PORT of process 0, or None.
      num_processes, process_id: how many there are, and which this is; None where the coordinator is.

    Raises:
      UserError: only some of the three are given, they make no sense, or the GPUs of this node cannot be shared out.
      OthersMissing: the others cannot be reached.
    """
    if any(value is not None for value in (coordinator, num_processes, process_id)):
        if coordinator is None or num_processes is None or process_id is None:
            raise UserError("--coordinator, --num_processes and --process_id go together: give all three or none")
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise UserError(f"--coordinator={shown(coordinator)} must be HOST:PORT of process 0, as node-1:1234")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} must be at least 0 and below --num_processes={num_processes}")
        # jax would look around for launchers all the same, to guess what was not given.
        _initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    elif launcher := _launcher():
        _initialize(launcher, **gpus_of_process())
    elif _is_on_tpu_pod():
        _initialize("the TPU pod")


def refuse_several(verb: str) -> None:
    """Checks that this process is no part of several, for a verb that each of them would do by itself.

    Raises:
      UserError: a launcher has started several, or the chips of this machine are those of a TPU pod.
    """
    if launcher := _launcher():
        raise UserError(f"{verb} is done by one process, and {launcher} has started several: start one")
    if "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and _is_on_tpu_pod():
        raise UserError(
            f"{verb} is done by one process, and the chips of this machine work only together with those of the other "
            "machines of its TPU slice: use another machine, or this one's CPU (JAX_PLATFORMS=cpu)"
        )


def _launcher() -> str | None:
    """What has started this process and others with it, if the environment says so."""
    return next((name for key, name in _LAUNCHERS.items() if int(os.environ.get(key, 1)) > 1), None)


def _initialize(launcher: str = "--coordinator", **arguments) -> None:
    # Stopping is agreed on by `agreement.Wish`; jax's own service for it would take SIGTERM away from everybody else.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OthersMissing(f"cannot connect with the other processes, started by {launcher}: {reason}") from error


def gpus_of_process() -> dict[str, list[int]]:
    """Which GPUs of its node are this process's, as an argument for jax; none where jax shall decide.

    jax takes one GPU for each process that Slurm or Open MPI has started, and would leave the others of a node idle.
    Here the processes of a node share what they see. One that its launcher has bound to its own GPUs sees no others.

    Raises:
      UserError: the GPUs of the node cannot be shared out evenly.
    """
    gpus, (index, num_processes) = _num_gpus(), _place_on_node()
    if not gpus or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return {}
    if "SLURM_GPUS_PER_TASK" in os.environ or gpus < num_processes:
        index, num_processes = 0, 1
    if gpus % num_processes:
        raise UserError(
            f"{num_processes} processes on this node cannot share its {gpus} GPUs evenly: start 1 process, or {gpus}"
        )
    share = gpus // num_processes
    return {"local_device_ids": list(range(index * share, (index + 1) * share))}


def _num_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1", "NoDevFiles")])
    return len([path for path in _DEVICES.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def _place_on_node() -> tuple[int, int]:
    """Which of the processes on its node this is, from 0, and how many they are, as Slurm or Open MPI tells it."""
    if counts := os.environ.get("SLURM_STEP_TASKS_PER_NODE"):  # 2(x3),1: of three nodes and a fourth one
        per_node = [
            int(tasks) for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(nodes or 1))
        ]
        return int(os.environ["SLURM_LOCALID"]), per_node[int(os.environ["SLURM_NODEID"])]
    size = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)), size


def _is_on_tpu_pod() -> bool:
    """Whether this machine is one of several TPU hosts; they are named in the environment or the machine's metadata."""
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return True
    has_chips = (_DEVICES / "accel0").exists() or (_DEVICES / "vfio" / "0").exists()
    if not has_chips or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
        return False
    # Several slices may have one host each: then only the second says that there are others.
    return "," in _metadata("worker-network-endpoints") or (
        int((re.findall(r"MEGASCALE_NUM_SLICES:\s*'?(\d+)", _metadata("tpu-env")) or [1])[0]) > 1
    )


def _metadata(attribute: str) -> str:
    """What Google Cloud tells this machine about itself; empty where it tells nothing."""
    import urllib.request

    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


@contextlib.contextmanager
def watched(verb: Verb, settings: ConfigDict) -> Iterator[Watchdog | None]:
    """A context in which this process and the others watch each other; yields None where there are no others.

    An exception that leaves the context is reported here, to the others too, and ends the process: on its way out jax
    would wait for the others, and they for it.

    Args:
      verb: what the processes do together.
      settings: the `train` group of the config: how long to be patient.
    """
    if not jax.distributed.is_initialized():
        yield None
        return
    board = CoordinatorBoard()
    watchdog = Watchdog(
        board,
        board.process,
        board.num_processes,
        lost_after=settings.lost_after_seconds,
        hung_after=settings.hung_after_seconds,
        witness=Witness(board.process, board.address, verb),
        verb=verb,
    )
    try:
        yield watchdog
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # most likely it is the devices of another that are gone
            watchdog.expect_verdict()
        status = report(verb.name, error)
        watchdog.end(f"{type(error).__name__}: {brief(error, _MESSAGE_BYTES)}", status)
        sys.stdout.flush()
        os._exit(status)
    watchdog.end("", 0)


def wait_for_all(moment: str) -> None:
    """Returns when every process has come here; `moment` is a name that each of them uses once.

    They wait for each other over the connection that `start` made, as long as it takes. Between devices, the first
    collective of a program waits half a minute for those that are still compiling, and then fails (gloo).
    """
    from orbax.checkpoint import multihost  # slow to import, and only here

    multihost.get_barrier_sync_fn()(key=f"latentjax {moment}", timeout_ms=_PATIENCE_MS)


def is_first() -> bool:
    """Whether this is the process that writes logs and talks to people."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def on_first(action: Callable[[], Result]) -> Result | None:
    """Does something in the first process while the others wait; its mistake is everyone's.

    Returns:
      what `action` returned, in the first process; None in the others.

    Raises:
      UserError: `action` raised it; in every process, so that none waits for one that has left.
    """
    result, message = None, ""
    if is_first():
        try:
            result = action()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            message = str(error)
    if jax.process_count() > 1:
        sent = np.frombuffer(message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES), np.uint8)
        message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode(errors="ignore").rstrip()
    if message:
        raise UserError(message)
    return result
