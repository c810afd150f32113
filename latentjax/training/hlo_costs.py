"""What a compiled program does in one run on one device: FLOPs, bytes of memory, and what goes over the networks.

XLA's own cost analysis counts the body of a loop once. Here everything is counted as often as it runs.

- FLOPs: 2 m n k of every dot and convolution (so XLA writes products on TPUs), recomputation included. Attention
  kernels are opaque to XLA: they are charged what causality leaves of their products (`training.flops`).
- Memory: what each instruction outside a fusion reads and writes of HBM. What lies in memory inside the chip is free;
  of a stack of layers, a slice that is taken or replaced counts as that slice.
- Collectives: N is the size of the whole array that a group of g devices gathers, reduces or exchanges. In a ring, a
  device sends (g - 1) / g N for all-gather, reduce-scatter and all-to-all, twice that for all-reduce, N for
  collective-permute. On several slices XLA reduces within each slice first and then sends what is left to its like in
  the other slices, as a `send` that names the collective; there g is the number of slices.
"""

import dataclasses
import math
import re

import numpy as np

from latentjax.training.flops import causal_attention_flops
from latentjax.training.hlo import HBM_SPACE, HOST_SPACE, Computation, Instruction, Module, Shape, device_groups

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Nothing is computed or moved by these.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "add-dependency", "domain", "recv", "recv-done", "send", "send-done", "while",
}  # fmt: skip
_FREE_CALLS = {"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "SliceId", "AssumeGatherIndicesInBound"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_CHAINS = {"bitcast", "reshape", "copy", "transpose", "convert"}
# Products with a score matrix in a pass of an attention kernel, by what its name has.
_KERNEL_PRODUCTS = {"dkv": 4, "dq": 3, "fwd": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same groups.

    Attributes:
      kind: one of COLLECTIVES.
      groups: (groups, devices of each) places in the mesh, filled up with -1; across slices, within one of them.
      num_slices: 1 within a slice; else over how many slices they go.
      count: how many run in a step.
      sent: bytes that a device sends in a step.
      shapes: of the operands of one of them.
    """

    kind: str
    groups: np.ndarray
    num_slices: int
    count: int
    sent: float
    shapes: tuple[Shape, ...] = ()


@dataclasses.dataclass
class ProgramCosts:
    """Counts for one device and one run of a program.

    Attributes:
      flops: of matrix products.
      kernel_flops: of attention kernels, a part of `flops`.
      hbm_bytes: read from and written to HBM.
      host_bytes: copied between HBM and the host's memory.
      collectives: see `Collective`.
      unknown_loops: loops whose trips could not be read; they are counted as one trip.
    """

    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0


def count_costs(module: Module) -> ProgramCosts:
    """Counts everything that the program does from its entry on. Of a conditional, every branch is counted."""
    counter = _Counter(module)
    counter.walk(module.entry, 1)
    return counter.costs


class _Counter:
    def __init__(self, module: Module):
        self._module = module
        self.costs = ProgramCosts()

    def walk(self, computation: Computation, times: int) -> None:
        for instruction in computation:
            if instruction.opcode == "while":
                trips = self._module.trip_count(computation, instruction)
                self.costs.unknown_loops += trips is None
                self.walk(self._module.computations[instruction.body], times * (1 if trips is None else trips))
                continue
            if instruction.opcode in ("call", "conditional", "async-start"):
                for name in instruction.called:
                    self.walk(self._module.computations[name], times)
                continue
            self._work(computation, instruction, times)
            self._traffic(computation, instruction, times)

    def _work(self, computation: Computation, instruction: Instruction, times: int, is_fused: bool = False) -> None:
        """FLOPs and collectives of an instruction and of what is fused into it."""
        opcode = instruction.opcode
        if opcode == "fusion":
            fused = self._module.computations[instruction.called[0]]
            for each in fused:
                self._work(fused, each, times, is_fused=True)
        elif opcode == "dot":
            self.costs.flops += times * _dot_flops(computation, instruction)
        elif opcode == "convolution":
            self.costs.flops += times * _convolution_flops(computation, instruction)
        elif opcode == "custom-call":
            flops = times * _kernel_flops(computation, instruction)
            self.costs.flops += flops
            self.costs.kernel_flops += flops
        elif opcode == "send" or opcode.removesuffix("-start") in COLLECTIVES:
            collective = _collective(computation, instruction, self._module.num_partitions, times, is_fused)
            if collective is not None:
                self.costs.collectives.append(collective)

    def _traffic(self, computation: Computation, instruction: Instruction, times: int) -> None:
        opcode, costs = instruction.opcode, self.costs
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or _is_free_call(instruction):
            return
        if opcode == "fusion":
            costs.hbm_bytes += times * self._fusion_bytes(instruction)
        elif opcode in ("copy-start", "slice-start"):
            ends = instruction.shapes[:2]  # from and to, of which one may be larger than what is moved
            moved = min(shape.num_bytes for shape in ends)
            costs.hbm_bytes += times * moved * sum(shape.space == HBM_SPACE for shape in ends)
            costs.host_bytes += times * moved * any(shape.space == HOST_SPACE for shape in ends)
        elif opcode in _SLICES:
            costs.hbm_bytes += times * 2 * _hbm(instruction.shapes)
        elif opcode == "dynamic-update-slice":
            costs.hbm_bytes += times * 2 * _hbm(computation[instruction.operands[1]].shapes)
        elif opcode == "scatter":
            costs.hbm_bytes += times * 3 * _hbm(computation[instruction.operands[-1]].shapes)
        else:
            moved = [*computation.operand_shapes(instruction), *instruction.shapes]
            costs.hbm_bytes += times * _hbm(moved)
            if opcode == "copy" and any(shape.space == HOST_SPACE for shape in moved):
                costs.host_bytes += times * instruction.shapes[0].num_bytes

    def _fusion_bytes(self, fusion: Instruction) -> float:
        """What a fusion reads of its operands and writes of its results."""
        fused = self._module.computations[fusion.called[0]]
        read = sum(self._read_bytes(fused, parameter) for parameter in fused.parameters.values())
        return read + self._written_bytes(fused, fused.root)

    def _read_bytes(self, fused: Computation, value: Instruction) -> float:
        """How much of a value in a fusion is needed by what uses it there."""
        if not _hbm(value.shapes):
            return 0.0
        needed = 0.0
        for user in fused.users.get(value.name, ()):
            if user.opcode == "bitcast":
                needed += self._read_bytes(fused, user) or _hbm(value.shapes)
            elif user.opcode == "fusion":
                inner = self._module.computations[user.called[0]]
                places = [place for place, name in enumerate(user.operands) if name == value.name]
                needed += sum(self._read_bytes(inner, inner.parameters[place]) for place in places)
            elif user.opcode in _SLICES and user.operands[0] == value.name:
                needed += sum(shape.num_bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                pass  # replaced in place
            elif user.opcode != "tuple" and not _is_async_step(user) and not _is_free_call(user):
                needed = math.inf
        return min(needed, _hbm(value.shapes))

    def _written_bytes(self, fused: Computation, value: Instruction) -> float:
        """How much is written for a result of a fusion."""
        if value.opcode == "tuple":
            return sum(self._written_bytes(fused, fused[name]) for name in value.operands)
        if value.opcode == "parameter" or _is_async_step(value):
            return 0.0
        if value.opcode == "custom-call" and "AsyncCollectiveStart" in value.attributes:
            return _hbm(value.shapes[1:2])  # (operand, result, flags)
        if _is_free_call(value) or not _hbm(value.shapes):
            return 0.0
        if value.opcode == "bitcast":
            return self._written_bytes(fused, fused[value.operands[0]])
        if value.opcode == "dynamic-update-slice":
            return sum(shape.num_bytes for shape in fused[value.operands[1]].shapes)
        if value.opcode == "fusion":
            inner = self._module.computations[value.called[0]]
            return min(self._written_bytes(inner, inner.root), _hbm(value.shapes))
        return _hbm(value.shapes)


def _hbm(shapes: list[Shape] | tuple[Shape, ...]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.space == HBM_SPACE)


def _is_free_call(instruction: Instruction) -> bool:
    if instruction.opcode != "custom-call":
        return False
    return instruction.attribute(r'custom_call_target="([^"]*)"') in _FREE_CALLS


def _is_async_step(instruction: Instruction) -> bool:
    """Whether this is a later part of a collective that runs beside other work: it is counted where it starts."""
    step = instruction.attribute(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
    return step is not None and step != "-1"


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    contracted = dot.required(r"lhs_contracting_dims=\{([\d,]*)\}")
    left = computation[dot.operands[0]].shapes[0].sizes
    return 2.0 * math.prod(dot.shapes[0].sizes) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Multiplications and additions that meet no padding: on TPUs, batched products are written as convolutions."""
    left, right = (computation[name].shapes[0].sizes for name in convolution.operands[:2])
    labels = re.split("_|->", convolution.required(r"dim_labels=(\w+_\w+->\w+)"))
    out = convolution.shapes[0].sizes
    window = convolution.attribute(r"window=\{([^}]*)\}") or ""
    spatial = sorted(label for label in labels[2] if label.isdigit())

    def field(name: str, axis: int, default: str) -> str:
        match = re.search(rf"\b{name}=(\S+)", window)
        return match.group(1).split("x")[axis] if match else default

    positions = 1
    for axis, label in enumerate(spatial):
        stride, dilation = int(field("stride", axis, "1")), int(field("lhs_dilate", axis, "1"))
        low, spread = int(field("pad", axis, "0_0").split("_")[0]), int(field("rhs_dilate", axis, "1"))
        inputs, taps = left[labels[0].index(label)], right[labels[1].index(label)]
        outputs = out[labels[2].index(label)]
        place = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * spread - low
        positions *= int(np.sum((place >= 0) & (place <= (inputs - 1) * dilation) & (place % dilation == 0)))
    rows, columns = out[labels[2].index("b")], out[labels[2].index("f")]
    return 2.0 * rows * columns * right[labels[1].index("i")] * positions


def _kernel_flops(computation: Computation, call: Instruction) -> float:
    """Products of an attention kernel, which is known by its name; 0 for any other call."""
    is_attention = 'custom_call_target="tpu_custom_call"' in call.attributes and call.name.startswith("splash")
    passes = next((each for each in _KERNEL_PRODUCTS if is_attention and each in call.name), None)
    floats = [shape for shape in computation.operand_shapes(call) if shape.dtype in ("bf16", "f32", "f16")]
    if passes is None or len(floats) < 2:
        return 0.0
    # The first are queries (.., Q, K) and keys (.., S, K).
    queries, keys = floats[0].sizes, floats[1].sizes
    num_scores = math.prod(queries[:-1]) * keys[-2]
    return causal_attention_flops(num_scores, queries[-1], _KERNEL_PRODUCTS[passes])


def _collective(
    computation: Computation, instruction: Instruction, num_partitions: int, times: int, is_fused: bool
) -> Collective | None:
    if _is_async_step(instruction):
        return None
    operands = tuple(computation.operand_shapes(instruction))
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send":
        return _slice_collective(instruction, times)
    if kind == "all-reduce" and is_fused and _is_scattered(computation, instruction):
        kind = "reduce-scatter"
    groups = device_groups(instruction, num_partitions)
    whole = sum(shape.num_bytes for shape in operands) * (groups.shape[1] if kind == "all-gather" else 1)
    return Collective(kind, groups, 1, times, times * sent_bytes(kind, whole, groups.shape[1]), operands)


def _is_scattered(computation: Computation, reduction: Instruction) -> bool:
    """Whether each device keeps its own slice only: fused, so XLA writes a reduce-scatter on TPUs."""
    users = list(computation.users.get(reduction.name, []))
    for user in [each for each in users if each.opcode == "get-tuple-element"]:
        users.remove(user)
        users += computation.users.get(user.name, [user])
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _slice_collective(send: Instruction, times: int) -> Collective | None:
    kind = (send.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "").lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    if kind not in COLLECTIVES:
        return None
    slices = send.attribute(r'_xla_megascale_target="\{([^}]*)\}') or "1,2"
    num_slices = 0
    for part in slices.split(","):
        first, _, last = part.partition(":")
        num_slices += int(last or first) - int(first) + 1
    payload = send.shapes[:1]
    whole = payload[0].num_bytes * (num_slices if kind == "all-gather" else 1)
    return Collective(
        kind, np.zeros((1, 1), int), num_slices, times, times * sent_bytes(kind, whole, num_slices), payload
    )


def sent_bytes(kind: str, whole: float, group_size: int) -> float:
    """Bytes that a device sends for a collective over an array of `whole` bytes (formulas: see the module)."""
    if kind == "collective-permute":
        return whole
    return (2 if kind == "all-reduce" else 1) * (group_size - 1) / group_size * whole
