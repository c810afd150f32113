"""Every message that docs/troubleshooting.md quotes still stands in the source, word by word but for what differs."""

import ast
import functools
import re

import pytest
from pages import DOCS, ROOT

PAGE = DOCS / "troubleshooting.md"
GAP = "\0"  # where a value is put in


def quoted() -> list[str]:
    """The messages: what is in backticks in the first column of tables that are headed `message`."""
    found, is_message = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            is_message = False
        elif line.startswith("| message |"):
            is_message = True
        elif is_message and (match := re.match(r"\| `([^`]+)` \|", line)):
            found.append(match[1])
        elif is_message:
            assert line.startswith("| ---"), f"no message in backticks: {line}"
    return found


@functools.cache
def source_texts() -> tuple[str, ...]:
    """All texts in the source, neighbours joined as Python joins them, values as GAP."""
    texts = []
    for path in (ROOT / "latentjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def stands(message: str) -> bool:
    """Whether the fixed parts of a message stand in one text of the source, in their order."""
    parts = [re.escape(part.strip()) for part in message.split("..") if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in source_texts())


def test_messages_are_found():
    assert len(quoted()) > 30
    assert len(set(quoted())) == len(quoted())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_stands_in_the_source(message: str):
    assert stands(message), f"no text of latentjax reads {message!r} any more: docs/troubleshooting.md quotes it"


def test_another_text_would_be_noticed():
    assert not stands("there is no checkpoint in .. yesterday")
    assert not stands("yet .. there is no checkpoint in")
