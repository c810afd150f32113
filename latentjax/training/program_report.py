"""Compiles a recipe's train step for a topology and says what it needs and how fast it could be."""

import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.models.remat import POLICIES
from latentjax.recurrence.draw import Work
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training import programs
from latentjax.training.flops import work_flops_per_token
from latentjax.training.hlo import parse
from latentjax.training.hlo_costs import COLLECTIVES, ProgramCosts, count_costs
from latentjax.training.mesh import BATCH_AXES, make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.roofline import Roofline, roofline
from latentjax.training.state import abstract_state
from latentjax.training.topology import Topology

GIB = 2**30
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip; `outputs` are those that do not take over the memory of an argument."""

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    program: float
    total: float
    capacity: float


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
    """All collectives of one kind in a step: how many, and the bytes that a chip sends for them."""

    kind: str
    between_slices: bool
    count: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """What the compiler makes of a train step. FLOPs, bytes and seconds are of one step.

    Attributes:
      mesh: devices along each axis.
      num_jacobi_iterations: R of the program.
      fits: whether it fits the chips' memory; if not, `advice` says what to change, and what needs the compiled
        program is None: XLA may have given none.
      memory: per chip; where XLA gave no program, its `total` is what XLA says was wanted (0: it does not say).
      model_flops: of all chips, for this program; `mean_model_flops`: over all that training draws.
      chip_flops, hbm_bytes, host_bytes: of one chip, recomputation included.
      mfu: at the roofline's bound, for this R.
      unknown_loops: loops that count as one trip, because the program's text does not say how often they run.
    """

    topology: str
    num_slices: int
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    attention: str
    remat: str
    gradient_accumulation_steps: int
    num_jacobi_iterations: int
    tokens: int
    fits: bool
    advice: str | None
    memory: Memory
    compile_seconds: float
    model_flops: float
    mean_model_flops: float
    chip_flops: float | None = None
    hbm_bytes: float | None = None
    host_bytes: float | None = None
    collectives: tuple[CollectiveSum, ...] = ()
    roofline: Roofline | None = None
    mfu: float | None = None
    unknown_loops: int = 0

    @property
    def bound(self) -> float:
        """Seconds below which no step can be; infinite where there is no program."""
        return self.roofline.bound if self.roofline else float("inf")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        values = dataclasses.asdict(self)
        if self.roofline:
            values["roofline"] |= {"bound": self.roofline.bound, "bound_by": self.roofline.bound_by}
        return values


def examine(config: ConfigDict, topology: Topology, num_jacobi_iterations: int | None = None) -> ProgramReport:
    """Compiles the train step that the trainer would run on such chips.

    Args:
      config: validated.
      num_jacobi_iterations: R; None: that of the largest step that training draws, which takes the most memory. C is
        that step's.

    Raises:
      UserError: the mesh does not fit the chips, or the attention backend does not serve them.
    """
    mesh = make_mesh(config, topology.devices)
    model = programs.make_model(config, mesh)
    work, shares = programs.largest_work(config), programs.schedule_of(config).shares
    if num_jacobi_iterations is not None:
        work = work._replace(num_jacobi_iterations=num_jacobi_iterations)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = {each: tokens * _flops_per_token(config, model, each) for each in {*shares, work}}
    common = {
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "device_kind": topology.devices[0].device_kind,
        "num_devices": mesh.size,
        "mesh": dict(mesh.shape),
        "attention": model.spec.attention,
        "remat": model.spec.remat,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "num_jacobi_iterations": work.num_jacobi_iterations,
        "tokens": tokens,
        "model_flops": flops[work],
        "mean_model_flops": sum(share * flops[each] for each, share in shares.items()),
    }
    start = time.monotonic()
    state = abstract_state(model, make_optimizer(config.optimizer, config.train.num_steps), mesh)
    lowered = programs.lower_train_step(config, model, mesh, state, work)
    try:
        compiled = programs.compile_lowered(lowered, mesh)
    except UserError as error:
        wanted, available = _wanted(error, topology.chip.hbm_bytes)
        return ProgramReport(
            **common,
            fits=False,
            advice=advice(config, mesh, wanted, available),
            memory=Memory(0, 0, 0, 0, 0, wanted, available),
            compile_seconds=time.monotonic() - start,
        )
    seconds = time.monotonic() - start
    memory = _memory(compiled, topology.chip.hbm_bytes)
    text = compiled.as_text()
    assert text is not None  # every platform that chips are described of gives it
    module = parse(text)
    costs = count_costs(module)
    bound = roofline(costs, topology.chip, list(mesh.devices.flat))
    fits = memory.total <= memory.capacity
    return ProgramReport(
        **common,
        fits=fits,
        advice=None if fits else advice(config, mesh, memory.total, memory.capacity),
        memory=memory,
        compile_seconds=seconds,
        chip_flops=costs.flops,
        hbm_bytes=costs.hbm_bytes,
        host_bytes=costs.host_bytes,
        collectives=_sums(costs),
        roofline=bound,
        mfu=bound.mfu(flops[work] / mesh.size, topology.chip),
        unknown_loops=costs.unknown_loops,
    )


def _flops_per_token(config: ConfigDict, model: LanguageModel, work: Work) -> float:
    return work_flops_per_token(model.spec, model.recurrence_spec, config.data.sequence_length, work)


def _memory(compiled: jax.stages.Compiled, capacity: float) -> Memory:
    stats = compiled.memory_analysis()
    assert stats is not None  # likewise
    arguments, aliased = stats.argument_size_in_bytes, stats.alias_size_in_bytes
    outputs = stats.output_size_in_bytes - aliased
    temporaries, program = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    return Memory(
        arguments, outputs, aliased, temporaries, program, arguments + outputs + temporaries + program, capacity
    )


def _sums(costs: ProgramCosts) -> tuple[CollectiveSum, ...]:
    sums = []
    for between in (False, True):
        for kind in COLLECTIVES:
            alike = [each for each in costs.collectives if each.kind == kind and (each.num_slices > 1) == between]
            if alike:
                count, sent = sum(each.count for each in alike), sum(each.sent for each in alike)
                sums.append(CollectiveSum(kind, between, count, sent))
    return tuple(sums)


def _wanted(error: UserError, capacity: float) -> tuple[float, float]:
    """What XLA says it wanted and had of HBM, in bytes (0: it does not say); other errors go on."""
    message = str(error.__cause__)
    if "RESOURCE_EXHAUSTED" not in message or "vmem" in message:
        raise error
    sizes = re.search(r"(?:Used|\()\s*([\d.]+)([KMGT])\)?(?: of | exceeds available \w+ \()([\d.]+)([KMGT])", message)
    if sizes is None:
        return 0.0, capacity
    wanted, unit, available, other_unit = sizes.groups()
    return float(wanted) * _UNITS[unit], float(available) * _UNITS[other_unit]


def advice(config: ConfigDict, mesh: Mesh, wanted: float, available: float) -> str:
    """One line that says how much memory is missing and which settings need less."""
    policies, size = list(POLICIES), mesh.shape
    microbatches, rows = config.train.gradient_accumulation_steps, config.data.batch_size
    changes = []
    if config.model.remat != policies[-1]:
        changes.append(f"model.remat={policies[policies.index(config.model.remat) + 1]} (now {config.model.remat})")
    if rows % (2 * microbatches) == 0 and rows // (2 * microbatches) % _batch_shards(mesh) == 0:
        changes.append(f"train.gradient_accumulation_steps={2 * microbatches} (now {microbatches})")
    if size["data"] > 1:
        changes.append(f"mesh.fsdp={size['fsdp'] * size['data']} and mesh.data=1 (now {size['fsdp']}, {size['data']})")
    else:
        changes.append(f"more chips, with a larger mesh.fsdp (now {size['fsdp']})")
    changes.append(f"a smaller data.batch_size (now {rows})")
    needs = f"a chip would need {wanted / GIB:.2f} GiB" if wanted else "a chip would need more than"
    return f"does not fit: {needs} of its {available / GIB:.2f} GiB; try {', '.join(changes[:-1])} or {changes[-1]}"


def _batch_shards(mesh: Mesh) -> int:
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh.shape[axis]
    return shards
