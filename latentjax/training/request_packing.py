"""Laying out requests for scoring: what they have in common is computed once, and rows are filled.

The choices of a question share the question, few-shot examples included. So requests whose inputs begin alike become
one tree: the common beginning, its prefix, and behind it the rest of each, its branches. A branch sees its prefix and
itself (`models.attention.SHARED_PREFIX`), at the positions that it would have alone, so every number is the one that
the request would have alone. Trees are packed into rows of few lengths, each of which is one compiled program.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from latentjax.models.attention import BRANCHES

# A beginning shorter than this is not worth a tree: it would tie requests together that have nothing in common.
_SHORTEST_PREFIX = 4


@dataclasses.dataclass(frozen=True)
class Target:
    """A token to be scored, for request `request`: `token` is what follows the input token at `place` of the input."""

    place: int
    token: int
    request: int


@dataclasses.dataclass
class Tree:
    """Inputs that begin alike.

    Attributes:
      prefix: ids that all have in common.
      branches: the ids of each behind the prefix, some of them maybe none.
      targets: of each branch, by place in the whole input.
    """

    prefix: tuple[int, ...]
    branches: list[tuple[int, ...]]
    targets: list[list[Target]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix and of all branches."""
        return len(self.prefix) + sum(map(len, self.branches))

    @property
    def num_targets(self) -> int:
        """Tokens to be scored."""
        return sum(map(len, self.targets))

    @property
    def size(self) -> int:
        """What it takes of a row, which has as many places for targets as for tokens."""
        return max(self.num_tokens, self.num_targets)


@dataclasses.dataclass
class Row:
    """Trees that lie behind each other in `length` tokens."""

    length: int
    trees: list[Tree] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    num_targets: int = 0

    @property
    def room(self) -> int:
        """What is left for trees, in the measure of `Tree.size`."""
        return self.length - max(self.num_tokens, self.num_targets)

    def add(self, tree: Tree) -> None:
        """Puts a tree behind the others."""
        self.trees.append(tree)
        self.num_tokens += tree.num_tokens
        self.num_targets += tree.num_targets


def grow_trees(requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int, *, share: bool) -> list[Tree]:
    """Makes trees of requests.

    Args:
      requests: (inputs, targets): the last len(targets) inputs are followed by the targets, in order.
      max_length: of an input, in tokens; no tree becomes larger than this rounded up to a power of two.
      share: whether requests may share what they have in common; if not, each is a tree of its own.
    """
    targets_of: dict[tuple[int, ...], list[Target]] = {}
    for number, (inputs, targets) in enumerate(requests):
        first = len(inputs) - len(targets)
        found = [Target(first + place, token, number) for place, token in enumerate(targets)]
        # The same input with other last targets, as single-token choices have, is computed once in any case.
        targets_of.setdefault(tuple(inputs), []).extend(found)
    largest = row_length(max_length, 1)
    trees: list[Tree] = []
    for inputs in sorted(targets_of):
        targets = targets_of[inputs]
        if share and trees and _join(trees[-1], inputs, targets, largest):
            continue
        for start in range(0, max(len(targets), 1), largest):
            trees.append(Tree(inputs, [()], [targets[start : start + largest]]))
    return trees


def _join(tree: Tree, inputs: tuple[int, ...], targets: list[Target], largest: int) -> bool:
    """Makes `inputs` a branch of the tree if that saves tokens; returns whether it did."""
    common = _common(tree.prefix, inputs)
    count = len(tree.branches)
    # All branches take over what the prefix loses. That pays while count * common > (count - 1) * len(prefix).
    if common < _SHORTEST_PREFIX or count * common <= (count - 1) * len(tree.prefix) or count + 1 >= BRANCHES:
        return False
    grown = common + sum(len(tree.prefix) - common + len(branch) for branch in tree.branches) + len(inputs) - common
    if grown > largest or tree.num_targets + len(targets) > largest:
        return False
    rest, tree.prefix = tree.prefix[common:], tree.prefix[:common]
    tree.branches = [rest + branch for branch in tree.branches] + [inputs[common:]]
    tree.targets.append(targets)
    return True


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many ids two sequences have in common at the beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


def row_length(num_tokens: int, shortest: int) -> int:
    """The length of the row for so many tokens: a power of two, or `shortest` where that is more."""
    return max(shortest, 1 << max(num_tokens - 1, 0).bit_length())


def pack_rows(trees: Sequence[Tree], shortest: int, *, together: bool) -> list[Row]:
    """Fills rows with trees, the largest first, so that small ones fill what the large ones leave; longest rows first.

    Args:
      shortest: length of the shortest rows; those for larger trees are powers of two.
      together: whether several trees may share a row; if not, each has its own.
    """
    if not together:
        rows = [Row(row_length(tree.size, shortest)) for tree in trees]
        for row, tree in zip(rows, trees, strict=True):
            row.add(tree)
        return sorted(rows, key=lambda row: -row.length)
    rows: list[Row] = []
    gaps: list[tuple[int, int]] = []  # (room, number) of each row, sorted: a tree takes the least that suffices
    for tree in sorted(trees, key=lambda tree: -tree.size):
        place = bisect.bisect_left(gaps, (tree.size, 0))
        number = gaps.pop(place)[1] if place < len(gaps) else len(rows)
        if number == len(rows):
            rows.append(Row(row_length(tree.size, shortest)))
        rows[number].add(tree)
        bisect.insort(gaps, (rows[number].room, number))
    return sorted(rows, key=lambda row: -row.length)


@dataclasses.dataclass
class PackedBatch:
    """Rows as arrays.

    Attributes:
      tokens_BT, positions_BT, segment_ids_BT: int32; the segment ids are of trees and branches, or None where no two
        trees share a row and none has branches.
      places_GK, targets_GK: int32; of each group of B / G rows, where its targets lie among its tokens, and which they
        are. Behind the last there is anything.
      counts_G: int32, how many targets each group has.
      requests: for each group, the request of each of its targets, (counts[g],) int.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    segment_ids_BT: np.ndarray | None
    places_GK: np.ndarray
    targets_GK: np.ndarray
    counts_G: np.ndarray
    requests: list[np.ndarray]


def filling_id(length: int) -> int:
    """The segment id of what fills a row of `length` tokens up, above those of all trees."""
    return BRANCHES * length


def make_batches(rows: Sequence[Row], batch_tokens: int, groups: int, *, segmented: bool) -> Iterator[PackedBatch]:
    """Puts rows of one length together, in their order, as many as make up `batch_tokens`; all of a length alike.

    Args:
      batch_tokens: tokens of a batch, padding included; a batch has at least one row for each group.
      groups: G, the parts that a batch is split into over the mesh.
      segmented: whether to give segment ids.
    """
    lengths = dict.fromkeys(row.length for row in rows)
    for length in lengths:
        those = [row for row in rows if row.length == length]
        fitting = max(batch_tokens // length // groups, 1)
        # Fewer where there are not so many: a power of two, so that sizes do not multiply.
        per_group = min(fitting, row_length(-(-len(those) // groups), 1))
        size = per_group * groups
        for start in range(0, len(those), size):
            yield _arrays(those[start : start + size], length, size, groups, segmented)


def _arrays(rows: Sequence[Row], length: int, size: int, groups: int, segmented: bool) -> PackedBatch:
    tokens_BT, positions_BT = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    # What no tree fills is a segment by itself, behind all others.
    segment_ids_BT = np.full((size, length), filling_id(length), np.int32)
    per_group = size // groups
    capacity = per_group * length
    places_GK, targets_GK = np.zeros((groups, capacity), np.int32), np.zeros((groups, capacity), np.int32)
    counts_G, requests = np.zeros(groups, np.int32), []
    for group in range(groups):
        found: list[tuple[int, int, int]] = []
        # Dealt out in turn, so that groups have about equally many targets.
        for number, row in enumerate(rows[group::groups]):
            at = group * per_group + number
            begin = 0
            for tree_number, tree in enumerate(row.trees):
                parts = _lay_out(tree, begin)
                for branch, (start, first, ids) in enumerate(parts):
                    stop = start + len(ids)
                    tokens_BT[at, start:stop] = ids
                    positions_BT[at, start:stop] = np.arange(first, first + len(ids))
                    segment_ids_BT[at, start:stop] = BRANCHES * tree_number + branch
                split = len(tree.prefix)
                for (start, _, _), targets in zip(parts[1:], tree.targets, strict=True):
                    for each in targets:
                        place = begin + each.place if each.place < split else start + each.place - split
                        found.append((number * length + place, each.token, each.request))
                begin += tree.num_tokens
        count = counts_G[group] = len(found)
        table = np.array(found, np.int64).reshape(-1, 3)
        places_GK[group, :count], targets_GK[group, :count] = table[:, 0], table[:, 1]
        requests.append(table[:, 2])
    return PackedBatch(
        tokens_BT,
        positions_BT,
        segment_ids_BT if segmented else None,
        places_GK,
        targets_GK,
        counts_G,
        requests,
    )


def _lay_out(tree: Tree, begin: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """Where the prefix and the branches of a tree lie: (place in the row, position of the first id, ids) of each."""
    parts, place = [(begin, 0, tree.prefix)], begin + len(tree.prefix)
    for branch in tree.branches:
        parts.append((place, len(tree.prefix), branch))
        place += len(branch)
    return parts
