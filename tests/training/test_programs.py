"""What is compiled before step 1, kept for the next start, and said where memory runs out."""

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from latentjax.errors import UserError
from latentjax.training import programs
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.state import abstract_state

TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 45.65G of 15.75G hbm. Exceeded by 29.90G.\n"
    "Largest program allocations in hbm:\n  1. Size: 8.00G"
)


def compiled(evaluates: bool = True):
    config = recipes.get_config()
    config.mesh.update(data=2, fsdp=4)
    mesh = make_mesh(config, jax.devices())
    model = programs.make_model(config, mesh)
    state = abstract_state(model, make_optimizer(config.optimizer, config.train.num_steps), mesh)
    return programs.compile_programs(config, model, mesh, state, evaluates)


@pytest.fixture
def cache(tmp_path: Path):
    """A compilation cache of its own."""
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    programs.use_compilation_cache(str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_a_second_start_compiles_nothing(cache: Path):
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))

    def counted() -> tuple[int, int]:
        events.clear()
        steps, evaluate = compiled()
        assert sorted(steps) == [(1, 1), (1, 2)] and evaluate is not None
        return events.count("cache_misses"), events.count("cache_hits")

    assert counted() == (3, 0)
    kept = sorted(path.name for path in cache.iterdir() if path.name.endswith("-cache"))
    assert len(kept) == 3
    assert counted() == (0, 3)
    assert sorted(path.name for path in cache.iterdir() if path.name.endswith("-cache")) == kept


def test_the_evaluation_step_is_made_beside_the_train_steps(monkeypatch: pytest.MonkeyPatch):
    """All programs are under way before one is done."""
    together = threading.Barrier(3, timeout=60)

    def compile_lowered(lowered, mesh):
        together.wait()
        return lowered

    monkeypatch.setattr(programs, "compile_lowered", compile_lowered)
    steps, evaluate = compiled()
    assert sorted(steps) == [(1, 1), (1, 2)]
    # The state is taken over by a train step, not by an evaluation.
    for lowered, donates in ((steps[1, 1], True), (steps[1, 2], True), (evaluate, False)):
        assert any(info.donated for info in jax.tree.leaves(lowered.args_info)) == donates


def test_without_evaluation_there_is_no_program_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(programs, "compile_lowered", lambda lowered, mesh: lowered)
    steps, evaluate = compiled(evaluates=False)
    assert sorted(steps) == [(1, 1), (1, 2)] and evaluate is None


class StandIn:
    """A program that is compiled by raising."""

    def __init__(self, message: str):
        self.message = message

    def compile(self, compiler_options: dict) -> None:
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_too_large_for_the_devices():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(UserError) as caught:
        programs.compile_lowered(StandIn(TOO_LARGE), mesh)
    message = str(caught.value)
    assert message.startswith(
        "out of device memory while compiling the program (Ran out of memory in memory space hbm."
    )
    for part in ("Used 45.65G of 15.75G", "gradient_accumulation_steps", "model.remat", "mesh.fsdp", "batch_size"):
        assert part in message
    assert "Largest" not in message
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        programs.compile_lowered(StandIn("INTERNAL: a bug"), mesh)


def test_options_of_the_platform_go_to_the_compiler(monkeypatch: pytest.MonkeyPatch):
    """That of the mesh's devices, not of this process's."""
    asked = []
    monkeypatch.setattr(programs, "options_for", lambda platform: asked.append(platform) or {"xla_no_such": True})
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        programs.compile_lowered(jax.jit(jnp.sin).lower(1.0), mesh)
    assert asked == ["cpu"]
