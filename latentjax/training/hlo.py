"""Reads XLA's optimised programs as text (`Compiled.as_text()`): instructions, shapes, groups of devices, trip counts.

What is read is what the text says of one device's program. What it costs is counted in `training.hlo_costs`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5}
HBM_SPACE, HOST_SPACE = 0, 5

_LEAF = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|(?:called|branch)_computations|(?:true|false)_computation)=")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: dtype as XLA writes it, sizes, and memory space (0: HBM; 5: the host's; others are inside the chip)."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = HBM_SPACE

    @property
    def num_bytes(self) -> float:
        """Size in bytes, in whatever memory it lies."""
        digits = re.search(r"\d+", self.dtype)
        width = _BYTES.get(self.dtype)
        if width is None:
            width = int(digits.group()) / 8 if digits else 4
        return float(np.prod(self.sizes, dtype=np.float64)) * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `shapes` are the arrays of its result (of a tuple, all of them); `attributes` what is behind."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression's first match in the attributes."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else None

    def required(self, pattern: str) -> str:
        """As `attribute`, of what XLA writes for every instruction of the kind.

        Raises:
          ValueError: it is not there.
        """
        found = self.attribute(pattern)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name!r} has no {pattern}: {self.attributes[:200]}")
        return found

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it applies; of a `while`, none: see `body` and `condition`."""
        names: list[str] = []
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            names += _NAME.findall(rest[: rest.find("}")] if rest.startswith("{") else rest.split(",", 1)[0])
        return tuple(names)

    @property
    def body(self) -> str:
        """The body of a `while`."""
        return self.required(r"\bbody=%?([\w.\-]+)")

    @property
    def condition(self) -> str:
        """The condition of a `while`."""
        return self.required(r"\bcondition=%?([\w.\-]+)")


class Computation:
    """Instructions by name, in order; the root is the result."""

    def __init__(self, name: str):
        """Makes an empty one."""
        self.name = name
        self.instructions: dict[str, Instruction] = {}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(each for each in self if each.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        return {int(each.argument): each for each in self if each.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each instruction's result."""
        users: dict[str, list[Instruction]] = {}
        for each in self:
            for operand in dict.fromkeys(each.operands):
                users.setdefault(operand, []).append(each)
        return users

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The arrays of all operands."""
        return [shape for name in instruction.operands for shape in self[name].shapes]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, the first to run, and over how many devices it is spread."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a `while` of this computation runs its body; None: the text does not say."""
        known = loop.attribute(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*[:=]\s*"?(\d+)')
        return int(known) if known else _counted_trips(self, computation, loop)


def parse(text: str) -> Module:
    """Reads the text of one program."""
    computations: dict[str, Computation] = {}
    current = entry = None
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header.group(2), Computation(header.group(2)))
                entry = current if header.group(1) else entry
        elif line == "}":  # a longer line may begin so too: the end of an attribute written over several lines
            current = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    assert entry is not None, text[:200]  # every program has one
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _parse_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    shapes = tuple(_shape(*leaf) for leaf in _LEAF.findall(line[start:end]))
    opening = line.index("(", end)
    closing = _closing(line, opening)
    argument = line[opening + 1 : closing]
    return Instruction(
        name=head.group(2),
        opcode=line[end:opening].strip(),
        shapes=shapes,
        operands=tuple(_NAME.findall(argument)),
        argument=argument,
        attributes=line[closing + 1 :],
        is_root=head.group(1) is not None,
    )


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, sizes: str, layout: str) -> Shape:
    space = _SPACE.search(layout)
    dims = tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
    return Shape(dtype, dims, int(space.group(1)) if space else HBM_SPACE)


def _closing(line: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth, place = 1, opening
    while depth:
        following = line.index(")", place + 1)
        depth += line.count("(", place + 1, following) - 1
        place = following
    return place


def device_groups(instruction: Instruction, num_partitions: int) -> np.ndarray:
    """Which devices a collective ties together: int64 (groups, devices of each), as places in the mesh.

    Reads explicit lists {{0,1},{2,3}}, iota [2,4]<=[4,2]T(1,0), meshes mesh['a'=2,'b'=4] {'a'}, and the pairs of a
    collective-permute. Groups of different sizes are filled up with -1.
    """
    start = instruction.attributes.find("replica_groups=")
    if start < 0:
        pairs = instruction.attribute(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
        return _explicit(pairs) if pairs else np.arange(num_partitions)[None]
    return _groups(instruction.attributes[start + len("replica_groups=") :].split(", metadata=")[0], num_partitions)


@functools.lru_cache(maxsize=4096)
def _groups(text: str, num_partitions: int) -> np.ndarray:
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        return _iota(text)
    explicit = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    return _explicit(explicit.group(1)) if explicit and explicit.group(1) else np.arange(num_partitions)[None]


def _explicit(text: str) -> np.ndarray:
    lists = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    longest = max(map(len, lists))
    return np.array([group + [-1] * (longest - len(group)) for group in lists])


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): 0 .. 7 as (4, 2), transposed, as (2, 4); [4,2]T(1,0) is left as transposed."""
    match = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    assert match is not None, text  # a form that XLA does not write today
    shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
    assert shape is not None  # in every form
    ids = np.arange(np.prod(source or shape)).reshape(source or shape)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if source else ids


def _mesh_groups(text: str) -> np.ndarray:
    """mesh['a'=2,'b'=4], device_ids=(..) {'b'}; an axis may be given in part: 'b':(2)2 is the inner half of b."""
    match = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text)
    assert match is not None, text
    sizes = {name: int(size) for name, size in re.findall(r"[\"']?([^\"'=,]+)[\"']?=(\d+)", match.group(1))}
    ids = np.arange(np.prod(list(sizes.values())))
    if match.group(2):
        listed = match.group(2)
        ids = _iota(listed).ravel() if "]" in listed else np.array([int(n) for n in re.findall(r"\d+", listed)])
    # Every axis is taken apart into (before, in the group, after), of which most have size 1.
    parts = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, before, size in re.findall(r"[\"']?([^\"':,{}]+)[\"']?(?::\((\d+)\)(\d+))?", match.group(3)):
        whole = sizes[name]
        parts[name] = (int(before), int(size), whole // int(before) // int(size)) if before else (1, whole, 1)
    ids = ids.reshape([part for triple in parts.values() for part in triple])
    grouped = list(range(1, ids.ndim, 3))
    others = [axis for axis in range(ids.ndim) if axis not in grouped]
    return ids.transpose(others + grouped).reshape(-1, int(np.prod([ids.shape[axis] for axis in grouped])))


def _counted_trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a loop that counts up to a bound: while (i < bound) i += step."""
    condition, body = module.computations[loop.condition], module.computations[loop.body]
    test, scope = condition.root, condition
    while test.opcode in ("fusion", "call") or (test.opcode in ("copy", "bitcast") and test.operands):
        if test.opcode in ("copy", "bitcast"):
            test = scope[test.operands[0]]
            continue
        inner = module.computations[test.called[0]]
        bound = {inner.parameters[i].name: scope[name] for i, name in enumerate(test.operands)}
        test, scope, outer = inner.root, inner, bound
        if test.opcode == "compare":
            sides = [outer.get(name, inner[name]) for name in test.operands]
            break
    else:
        sides = [scope[name] for name in test.operands] if test.opcode == "compare" else []
    direction = test.attribute(r"direction=(\w+)")
    if test.opcode != "compare" or direction not in ("LT", "LE"):
        return None
    counter, limit = (_through_copies(condition, side) for side in sides)
    index = counter.attribute(r"index=(\d+)")
    if counter.opcode != "get-tuple-element" or index is None:
        return None
    outside = _Scalars(module, computation)
    first = outside.element(loop.operands[0], int(index))
    last = _constant(limit)
    if last is None and limit.opcode == "get-tuple-element":
        last = outside.element(loop.operands[0], int(limit.required(r"index=(\d+)")))
    step = _step(module, body, int(index))
    if last is None or not step:
        return None
    span = last - (first or 0) + (direction == "LE")  # a start that cannot be read is 0, as in every scan
    return max(-(-span // step), 0)


def _through_copies(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.argument)
    return int(instruction.argument) if is_number else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """By how much a body raises element `index` of what it carries."""
    if body.root.opcode != "tuple":
        return 1
    scope, update = body, _through_copies(body, body[body.root.operands[index]])
    if update.opcode == "fusion":
        scope = module.computations[update.called[0]]
        update = _through_copies(scope, scope.root)
    if update.opcode != "add":
        return 1
    steps = [_constant(_through_copies(scope, scope[name])) for name in update.operands]
    return next((step for step in steps if step is not None), 1)


class _Scalars:
    """Finds whole numbers that a computation holds in tuples."""

    def __init__(self, module: Module, computation: Computation):
        self._module, self._computation = module, computation

    def element(self, name: str, index: int) -> int | None:
        """Element `index` of the tuple called `name`, where it is a constant."""
        source = self._computation[name]
        while source.opcode in ("copy", "opt-barrier"):
            source = self._computation[source.operands[0]]
        if source.opcode == "while":
            # What a loop before this one left behind: the same number, if its body hands it on.
            body = self._module.computations[source.body]
            kept = body[body.root.operands[index]] if body.root.opcode == "tuple" else body.root
            unchanged = kept.opcode == "get-tuple-element" and kept.attribute(r"index=(\d+)") == str(index)
            return self.element(source.operands[0], index) if unchanged else None
        if source.opcode != "tuple":
            return None
        value = _through_copies(self._computation, self._computation[source.operands[index]])
        if value.opcode == "get-tuple-element":
            return self.element(value.operands[0], int(value.required(r"index=(\d+)")))
        return _constant(value)
