"""Looks for the mesh, remat policy and number of microbatches whose step is fastest by its bound.

Many settings are not worth compiling. Those whose least memory (a formula, below what XLA takes) is more than a chip
has are left out. The others are tried in the order of an estimate of their time; a setting is skipped if one tried
already shows that it cannot fit, or recomputes and gathers more for nothing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.models.remat import POLICIES
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Recurrence, RecurrenceSpec
from latentjax.recurrence.methods import train_recurrence
from latentjax.training.flops import train_flops_per_token
from latentjax.training.mesh import AXES, check_divisible
from latentjax.training.program_report import GIB, ProgramReport, examine
from latentjax.training.programs import largest_work
from latentjax.training.topology import Topology

MAX_TENSOR = 8  # beyond, a product's share on a chip is too narrow for its matrix unit

# Forwards that the backward pass of a policy recomputes; in the order of POLICIES, from the fastest to the leanest.
_RECOMPUTED = {
    "none": 0.0,
    "keep_matmul_outputs": 0.1,
    "keep_layer_inputs": 1.0,
    "offload_layer_inputs": 1.0,
    "keep_pass_inputs": 2.0,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One candidate: sizes of the mesh in the order of AXES, remat policy, and microbatches."""

    mesh: tuple[int, ...]
    remat: str
    microbatches: int

    def applied(self, config: ConfigDict) -> ConfigDict:
        """A copy of the config with this setting."""
        copy = config.copy_and_resolve_references()
        for axis, size in zip(AXES, self.mesh, strict=True):
            copy.mesh[axis] = size
        copy.model.remat = self.remat
        copy.train.gradient_accumulation_steps = self.microbatches
        return copy

    def saves_as_much_as(self, other: "Setting") -> bool:
        """Whether this is on the same mesh, with as much recomputation and as many microbatches or more."""
        policies = list(POLICIES)
        return (
            self.mesh == other.mesh
            and policies.index(self.remat) >= policies.index(other.remat)
            and self.microbatches >= other.microbatches
        )

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, self.mesh, strict=True) if size > 1)
        return f"{sizes or 'one device'}, remat {self.remat}, {self.microbatches} microbatches"


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Reports, best first (those that fit, by bound), and how many settings were left out, by reason."""

    ranked: tuple[ProgramReport, ...]
    hopeless: int
    dominated: int
    beyond_limit: int

    def as_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        left_out = {"hopeless": self.hopeless, "dominated": self.dominated, "beyond_limit": self.beyond_limit}
        return {"ranked": [report.as_json() for report in self.ranked], "left_out": left_out}


def search(
    config: ConfigDict,
    topology: Topology,
    num_jacobi_iterations: int | None,
    limit: int,
    note: Callable[[str], None],
    examine: Callable[[ConfigDict, Topology, int | None], ProgramReport] = examine,
) -> SearchResult:
    """Compiles up to `limit` settings of a recipe for a topology and ranks them.

    Args:
      num_jacobi_iterations: R; None: the largest that training draws.
      note: is given a line of progress now and then.

    Raises:
      UserError: no mesh divides the recipe's sizes.
    """
    everything = list(settings(config, topology))
    if not everything:
        raise UserError(
            f"no mesh over {len(topology.devices)} devices divides data.batch_size={config.data.batch_size} and the "
            "model's sizes: change one of them"
        )
    hopeful = [each for each in everything if least_memory(each.applied(config)) <= topology.chip.hbm_bytes]
    hopeful.sort(key=lambda each: _estimated_seconds(each.applied(config), topology))
    note(f"{len(everything)} settings, of which {len(everything) - len(hopeful)} cannot fit")
    fitting: list[Setting] = []
    failing: list[Setting] = []
    reports: list[ProgramReport] = []
    dominated = beyond = 0
    for each in hopeful:
        for_nothing = any(each.saves_as_much_as(other) for other in fitting)
        if for_nothing or any(_shows_too_large(other, each) for other in failing):
            dominated += 1
        elif len(reports) == limit:
            beyond += 1
        else:
            note(f"[{len(reports) + 1} of at most {limit}] {each} ...")
            report = examine(each.applied(config), topology, num_jacobi_iterations)
            reports.append(report)
            (fitting if report.fits else failing).append(each)
            outcome = f"bound {report.bound * 1e3:,.1f} ms" if report.fits else "does not fit"
            note(f"    {report.memory.total / GIB:.2f} GiB, {outcome} ({report.compile_seconds:,.0f} s)")
    reports.sort(key=lambda report: (not report.fits, report.bound, report.memory.total))
    return SearchResult(tuple(reports), len(everything) - len(hopeful), dominated, beyond)


def _shows_too_large(failing: Setting, setting: Setting) -> bool:
    """Whether a setting cannot fit because another one did not, which saves as much or more."""
    # What is offloaded is not on the chip: that other policies do not fit says nothing about it.
    comparable = failing.remat == setting.remat or setting.remat != "offload_layer_inputs"
    return comparable and failing.saves_as_much_as(setting)


def settings(config: ConfigDict, topology: Topology) -> Iterator[Setting]:
    """All settings whose sizes divide: replica over the slices, the recipe's sequence, every split of the rest."""
    sequence = max(config.mesh.sequence, 1)
    rest, remainder = divmod(len(topology.devices), topology.num_slices * sequence)
    if remainder:
        return
    for tensor in _divisors(rest):
        for fsdp in _divisors(rest // tensor):
            mesh = (topology.num_slices, rest // tensor // fsdp, fsdp, sequence, tensor)
            microbatches = 1
            while tensor <= MAX_TENSOR and microbatches <= config.data.batch_size:
                setting = Setting(mesh, "none", microbatches)
                if config.data.batch_size % microbatches == 0 and _divides(setting.applied(config), mesh):
                    yield from (dataclasses.replace(setting, remat=policy) for policy in POLICIES)
                microbatches *= 2


def _divides(config: ConfigDict, mesh: tuple[int, ...]) -> bool:
    try:
        check_divisible(config, mesh)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def num_parameters(spec: ModelSpec) -> int:
    """Elements of the matrices: embedding, head, and those of the layers."""
    per_layer = spec.hidden_size * spec.head_dim * (2 * spec.num_heads + 2 * spec.kv_heads)
    per_layer += (3 if spec.architecture == "llama" else 2) * spec.hidden_size * spec.intermediate_size
    tables = (1 if spec.tie_embeddings else 2) * spec.vocab_size * spec.hidden_size
    if spec.architecture == "gpt2":
        tables += spec.max_position_embeddings * spec.hidden_size
    return spec.num_layers * per_layer + tables


def _largest(config: ConfigDict) -> tuple[Recurrence, int]:
    """The method, with the C of the largest step, and its R."""
    work = largest_work(config)
    return train_recurrence(RecurrenceSpec(**config.recurrence), work.num_latent_thoughts), work.num_jacobi_iterations


def least_memory(config: ConfigDict) -> float:
    """Bytes of a chip's memory below which the step cannot be, for a config whose mesh has no -1.

    Counted are parameters, two moments and a gradient in float32, what the remat policy keeps of the passes that
    gradients flow through, and the logits of one chunk.
    """
    spec, mesh = ModelSpec(**config.model), config.mesh
    recurrence, iterations = _largest(config)
    passes = recurrence.passes(iterations)[-recurrence.num_trained_passes(iterations) :]
    rows = config.data.batch_size / config.train.gradient_accumulation_steps / mesh.replica / mesh.data / mesh.fsdp
    tokens = rows * config.data.sequence_length / mesh.sequence
    width, size = spec.hidden_size, 2 if spec.dtype == "bfloat16" else 4
    heads = spec.head_dim * (2 * spec.num_heads + 2 * spec.kv_heads)  # queries, keys, values, and what comes out
    inner = (2 if spec.architecture == "llama" else 1) * spec.intermediate_size
    kept = {  # values per slot and layer
        "none": 2 * width + (heads + 2 * inner) / mesh.tensor,
        "keep_matmul_outputs": 2 * width + (heads * 3 / 4 + inner) / mesh.tensor,
        "keep_layer_inputs": width,
    }.get(spec.remat, 0.0)
    slots = tokens * sum(passes)
    activations = size * slots * (spec.num_layers * kept + width)
    if spec.remat == "keep_pass_inputs":
        activations += size * tokens * max(passes) * spec.num_layers * width
    chunk = min(config.train.loss_chunk_tokens or config.data.sequence_length, config.data.sequence_length)
    logits = 4 * rows * chunk / mesh.sequence * spec.vocab_size / mesh.tensor
    return 16 * num_parameters(spec) / mesh.fsdp / mesh.tensor + activations + logits


def _estimated_seconds(config: ConfigDict, topology: Topology) -> tuple[float, ...]:
    """The order to try settings in: a rough time of a step, then the fewest microbatches."""
    spec, mesh, chip = ModelSpec(**config.model), config.mesh, topology.chip
    recurrence, iterations = _largest(config)
    passes, length, devices = recurrence.passes(iterations), config.data.sequence_length, len(topology.devices)
    recomputed = _RECOMPUTED.get(spec.remat, 1.0)
    flops = config.data.batch_size * length * train_flops_per_token(spec, recurrence, length, iterations) / devices
    compute = flops * (3 + recomputed) / 3 / chip.peak_flops
    microbatches = config.train.gradient_accumulation_steps
    # Every pass gathers the weights forward and backward, and scatters gradients; tensor shards exchange activations.
    weights = 2 * num_parameters(spec) / mesh.tensor * (mesh.fsdp - 1) / mesh.fsdp
    gathered = microbatches * len(passes) * (3 + recomputed) * weights
    slots = config.data.batch_size * length * sum(passes) * mesh.tensor / devices
    exchanged = (
        (4 + 2 * recomputed) * 2 * (mesh.tensor - 1) / mesh.tensor * slots * spec.num_layers * 2 * spec.hidden_size
    )
    reduced = 8 * num_parameters(spec) / mesh.fsdp / mesh.tensor * (mesh.data > 1) * microbatches
    communication = (gathered + exchanged + reduced) / chip.ici_bandwidth
    return (max(compute, communication) + 0.1 * (compute + communication), microbatches)
