"""The compile verb: one small program for four TPU chips, looked at from all sides, and everything that goes wrong."""

import dataclasses
import importlib.util
import json
import math
from typing import Any

import jax
import pytest

from latentjax.compile import main
from latentjax.config import load
from latentjax.errors import UserError
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training import programs
from latentjax.training.flops import causal_attention_flops
from latentjax.training.hlo import parse
from latentjax.training.hlo_costs import ProgramCosts, count_costs
from latentjax.training.program_report import GIB, Memory
from latentjax.training.search import least_memory

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

# Sizes of which no activation has as many elements as a parameter.
RECIPE = """
from latentjax.config import default

def get_config(method="latent"):
    config = default()
    config.model.update(num_layers=2, hidden_size=256, num_heads=2, intermediate_size=640, vocab_size=512)
    config.recurrence.method = method
    config.recurrence.train_jacobi_iterations = (1, 3)
    config.data.update(sequence_length=128, batch_size=20)
    config.mesh.update(data=1, fsdp=-1)
    return config
"""


@dataclasses.dataclass
class Compiled:
    """A program, what the verb printed of it, and its exit status."""

    status: int
    report: dict[str, Any]
    costs: ProgramCosts
    config: Any


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "small.py"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def compiled(recipe: str) -> Compiled:
    """The vanilla model's step on v5e:2x2; a latent one's takes several times as long to compile."""
    programs_made, printed = [], []
    compile_lowered = programs.compile_lowered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            programs, "compile_lowered", lambda *args: programs_made.append(compile_lowered(*args)) or programs_made[0]
        )
        patch.setattr("builtins.print", lambda *lines, file=None, **_: None if file else printed.extend(lines))
        status = main(["--config", f"{recipe}:vanilla", "--topology", "v5e:2x2", "--json"])
    costs = count_costs(parse(programs_made[0].as_text()))
    return Compiled(status, json.loads("\n".join(printed)), costs, load(f"{recipe}:vanilla"))


@needs_libtpu
def test_a_small_program_fits(compiled: Compiled):
    report = compiled.report
    assert (compiled.status, report["fits"], report["advice"]) == (0, True, None)
    assert report["mesh"] == {"replica": 1, "data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert (report["num_devices"], report["tokens"], report["unknown_loops"]) == (4, 20 * 128, 0)
    memory = Memory(**report["memory"])
    # Parameters and two moments, a quarter on each chip (of tables and matrices: what else there is, is small).
    parameters = 2 * (256 * 768 + 256 * 256 + 2 * 256 * 640) + 2 * 512 * 256
    assert 12 * parameters / 4 < memory.arguments < 1.05 * 12 * parameters / 4
    assert memory.aliased > 0.99 * (memory.arguments - 20 * 128 * 8)  # the state is donated, the batch is not
    assert memory.total == memory.arguments + memory.outputs + memory.temporaries + memory.program
    config = compiled.config
    config.mesh.fsdp = 4
    assert least_memory(config) <= memory.total <= memory.capacity == 16 * GIB


@needs_libtpu
def test_it_computes_its_model_flops_and_the_scores_again(compiled: Compiled):
    report, spec = compiled.report, ModelSpec(**compiled.config.model)
    if report["attention"] != "splash":
        pytest.skip(f"{report['attention']} attention is not charged by the formula")
    # The kernels compute scores and their gradients anew: 2 + 3 + 4 products with scores instead of 2 + 4.
    again = causal_attention_flops(20 * 2 * 128 * 128, spec.head_dim, 3) * spec.num_layers
    assert report["chip_flops"] == (report["model_flops"] + again) / 4
    assert report["roofline"]["compute"] == report["chip_flops"] / 197e12
    bound = report["roofline"]["bound"]
    assert report["mfu"] == pytest.approx(report["model_flops"] / 4 / 197e12 / bound)
    assert bound == max(report["roofline"][each] for each in ("compute", "memory", "interconnect", "network", "host"))


@needs_libtpu
def test_only_parameters_are_gathered(compiled: Compiled):
    """Golden: fsdp gathers weights, reduces gradients and leaves activations where they are."""
    kinds = {each["kind"]: each for each in compiled.report["collectives"]}
    assert {"all-gather", "reduce-scatter", "all-reduce"} <= kinds.keys()
    gathers = [each for each in compiled.costs.collectives if each.kind == "all-gather"]
    assert sum(each.count for each in gathers) == kinds["all-gather"]["count"]
    spec = dataclasses.replace(ModelSpec(**compiled.config.model), attention="xla")
    model = LanguageModel(spec, RecurrenceSpec(**compiled.config.recurrence))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))["params"]
    # A layer's parameters, or those of all layers.
    sizes = {math.prod(leaf.shape) // layers for leaf in jax.tree.leaves(boxed) for layers in (1, 2)}
    for gather in gathers:
        assert gather.groups.tolist() == [[0, 1, 2, 3]]
        for shape in gather.shapes:
            if shape.dtype != "s32":  # tokens, for the lookup in a sharded table
                assert 4 * math.prod(shape.sizes) in sizes, gather
    matrices = 2 * (256 * 768 + 256 * 256 + 2 * 256 * 640)
    # Each matrix is gathered at least once, in bfloat16, and its gradient reduced.
    assert kinds["all-gather"]["sent_bytes"] > 3 / 4 * 2 * matrices
    assert kinds["reduce-scatter"]["sent_bytes"] + kinds["all-reduce"]["sent_bytes"] > 3 / 4 * 2 * matrices


def error_of(recipe: str, *flags: str, topology: str = "v5e:2x2") -> str:
    with pytest.raises(UserError) as error:
        main(["--config", recipe, "--topology", topology, *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.mesh.fsdp=3"], ["fsdp=3", "4"]),
        (["--config.data.batch_size=6"], ["data.batch_size", "mesh.fsdp = 4"]),
        (["--config.model.attention=flash"], ["model.attention='flash'"]),
        (["--num_slices", "2"], ["2 slices", "mesh.replica"]),
        (["--num_jacobi_iterations", "-1"], ["--num_jacobi_iterations", "from 0 to"]),
        (["--search", "--search_limit", "0"], ["--search_limit"]),
        (["--topologie", "v5e:2x2"], ["--topologie"]),
    ],
)
def test_mistakes(recipe: str, flags: list[str], parts: list[str]):
    message = error_of(recipe, "--config.data.batch_size=24", *flags)
    assert all(part in message for part in parts), message


def test_an_unknown_topology_names_the_known_ones(recipe: str):
    assert "v5p:4x4x4" in error_of(recipe, topology="v8:2x2")


@needs_libtpu
@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (38.12G) exceeds available HBM "
            "(15.75G).",
            38.12,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.84G of 15.75G hbm. "
            "Exceeded hbm capacity by 18.09G.\n\nTotal hbm usage >= 34.09G:",
            33.84,
        ),
    ],
)
def test_what_xla_wanted_is_said(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, message: str, wanted: float
):
    def refuse(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> None:
        with programs.memory_errors("compiling"):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(programs, "compile_lowered", refuse)
    monkeypatch.setattr(programs, "lower_train_step", lambda *arguments: None)
    flags = ["--config.mesh.data=-1", "--config.mesh.fsdp=2", "--config.data.batch_size=64"]
    assert main(["--config", recipe, "--topology", "v5e:2x2", *flags]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    for part in (
        f"does not fit: a chip would need {wanted:.2f} GiB of its 15.75 GiB",
        "model.remat=keep_matmul_outputs (now none)",
        "train.gradient_accumulation_steps=2 (now 1)",
        "mesh.fsdp=4 and mesh.data=1 (now 2, 2)",
        "a smaller data.batch_size (now 64)",
    ):
        assert part in last
    assert main(["--config", recipe, "--topology", "v5e:2x2", "--json", *flags]) == 1
    report = json.loads(capsys.readouterr().out)
    # The largest R that is drawn takes the most memory; the mean is over all that are.
    assert (report["num_jacobi_iterations"], report["fits"], report["roofline"]) == (3, False, None)
    assert report["model_flops"] > report["mean_model_flops"]
    assert main(["--config", recipe, "--topology", "v5e:2x2", "--json", "--num_jacobi_iterations", "2", *flags]) == 1
    middle = json.loads(capsys.readouterr().out)
    assert middle["model_flops"] == pytest.approx(middle["mean_model_flops"]) == report["mean_model_flops"]
