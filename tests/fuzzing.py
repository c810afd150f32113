"""Damage for parsers of outside files, and what must hold of any: a right result or one line, in bounded time."""

import copy
import json
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentjax.errors import UserError

MOST_SECONDS = 5  # of CPU time, of one file
LONGEST = 600

# How many files a test tries: few, and always the same, or many and others every time.
AMOUNTS = pytest.mark.parametrize("amount", [60, pytest.param(1000, marks=pytest.mark.long)])

_NUMBERS = [0, 1, -1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63)]
_ODD_VALUES = st.sampled_from(
    [
        *_NUMBERS, 2**64, 10**400, 0.5, float("nan"), float("inf"), 1e308, None, True, False, "", "x", "\0", "\ud800",
        "../../etc/passwd", "/etc/passwd", [], {}, [[]], {"": {}}, [1, 2], ["a"], "a" * 5000,
    ]
)  # fmt: skip


def try_many(amount: int, strategy: st.SearchStrategy, check: Callable[[Any], Any]) -> None:
    """Calls `check` with so many draws; it may raise a UserError of one line, and nothing else."""

    @settings(
        max_examples=amount,
        derandomize=amount < 1000,
        database=None,
        deadline=None,  # of the clock: a loaded machine is no failure
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        began = time.process_time()
        try:
            check(drawn)
        except UserError as error:
            message = str(error)
            assert 10 < len(message) <= LONGEST and len(message.splitlines()) == 1, message
        assert time.process_time() - began < MOST_SECONDS

    run()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of a valid file, cut short, changed in a few places or with parts moved; or any bytes."""
    kind = draw(st.sampled_from(["bytes", "cut", "changed", "numbers", "moved", "grown"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    data = bytearray(valid)
    place = st.integers(0, max(len(data) - 1, 0))
    if kind == "cut":
        return bytes(data[: draw(place)])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(place | st.integers(0, min(80, max(len(data) - 1, 0))))  # heads of files hold the most
        if kind == "changed":
            data[at] = draw(st.integers(0, 255))
        elif kind == "numbers":
            layout = draw(st.sampled_from(["<Q", ">Q", "<I", "<H"]))
            number = draw(st.sampled_from(_NUMBERS)) % 2 ** (8 * struct.calcsize(layout))
            data[at : at + struct.calcsize(layout)] = struct.pack(layout, number)
        elif kind == "moved":
            other = draw(place)
            data[at:at] = data[other : other + 40]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, valid: Any) -> bytes:
    """JSON with fields of another value, left out, nested deeply or standing twice; or damaged text."""
    if draw(st.integers(0, 5)) == 0:
        return draw(damaged(json.dumps(valid).encode()))
    whole = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = whole, 0
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 7)):
            parent = parent[key]
            key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
        if parent is not whole and draw(st.integers(0, 5)) == 0:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(draw(_ODD_VALUES))  # the next change may be within it
    text = json.dumps(whole[0])
    how = draw(st.integers(0, 9))
    if how == 0:
        text = text.replace("}", ', "format": 1, "model": 2}', 1)  # keys that stand twice
    elif how == 1:
        depth = draw(st.sampled_from([900, 100_000]))
        text = text.replace("1", "[" * depth + "]" * depth, 1)
    return text.encode("utf-8", "surrogatepass")
