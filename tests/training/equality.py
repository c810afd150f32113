"""The same training on any mesh: losses of compiled steps called directly, for tests that compare meshes.

As a program (`python equality.py COORDINATOR NUM_PROCESSES PROCESS_ID CASES`) it is one of several processes that go
through cases together; the first prints {case: losses} as JSON.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a program: where the recipe is

import jax
import numpy as np
import recipes
from ml_collections import ConfigDict

from latentjax.data.batches import train_batches
from latentjax.data.sources import open_sources
from latentjax.training import processes, programs
from latentjax.training.agreement import Wish
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import make_mesh, rows_of_process
from latentjax.training.optimizer import make_optimizer
from latentjax.training.state import abstract_state, create_state

NUM_STEPS = 20
NUM_ITERATIONS = 2  # R


def config_of(architecture: str, masked: bool, mesh: str) -> ConfigDict:
    """The recipe of the tests with C = 1 on a mesh, written "fsdp=4,tensor=2"; "" is one device."""
    config = recipes.get_config()
    # Every line of a real text a document of its own, so that most windows hold several.
    config.data.update(path=str(lines_as_documents()), mask_documents=masked)
    config.model.update(architecture=architecture, num_heads=4, vocab_size=258)
    if architecture == "llama":
        config.model.update(num_kv_heads=2, rotary_fraction=1.0)
    config.recurrence.train_jacobi_iterations = (NUM_ITERATIONS,)
    config.train.num_steps = NUM_STEPS
    config.mesh.data = 1
    config.mesh.update({axis: int(size) for axis, size in (part.split("=") for part in mesh.split(",") if part)})
    return config


def lines_as_documents() -> Path:
    """Path of a JSON-lines corpus, written once."""
    path = Path(os.environ["LATENTJAX_TEST_CACHE"]) / "lines.jsonl"
    if not path.exists():
        lines = [line for file in sorted(recipes.CORPUS.glob("*.py")) for line in file.read_text().splitlines()]
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text("".join(json.dumps({"text": line.strip()}) + "\n" for line in lines if line.strip()))
        partial.rename(path)
    return path


def losses(config: ConfigDict, devices: list[jax.Device]) -> list[float]:
    """The loss of each step."""
    mesh = make_mesh(config, devices)
    programs.use_compilation_cache(config.train.compilation_cache)
    sources = open_sources(config.data, progress=False, needs_evaluation=False)
    model = programs.make_model(config, mesh)
    optimizer = make_optimizer(config.optimizer, NUM_STEPS)
    abstract = abstract_state(model, optimizer, mesh)
    steps, _ = programs.compile_programs(config, model, mesh, abstract, evaluates=False)
    state = create_state(model, optimizer, mesh, config.train.seed)
    processes.wait_for_all(f"compiled {config.mesh} {config.model.architecture}")
    rows = rows_of_process(mesh, config.data.batch_size)
    batches = train_batches(sources.train, config.data, eod_id=sources.eod_id, start_step=0, rows=rows)
    batches = put_ahead(batches, mesh, 2, NUM_STEPS, rows, config.data.batch_size)
    found, stopping = [], Wish(mesh, every_steps=1)
    # As the train loop has it; nothing is moved but what is asked for by name.
    with contextlib.closing(batches), jax.transfer_guard("disallow"):
        while len(found) < NUM_STEPS and not stopping.granted(len(found), False):
            state, metrics = steps[1, NUM_ITERATIONS](state, next(batches))
            found.append(metrics["loss"])
    return np.asarray(jax.device_get(found), np.float64).tolist()


def main() -> None:
    """One of the processes."""
    coordinator, num_processes, process_id, cases = sys.argv[1:]
    processes.start(coordinator, int(num_processes), int(process_id))
    found = []
    for case in json.loads(cases):
        found.append(losses(config_of(*case), jax.devices()))
        print(f"{case}: {found[-1][-1]:.6f} after {time.process_time():.0f} s of work", file=sys.stderr, flush=True)
    if processes.is_first():
        print(json.dumps(found))


if __name__ == "__main__":
    main()
