"""The pages of the documentation, and the blocks of code in them."""

import dataclasses
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# README.md and its companions are pages of the site too.
_AT_THE_ROOT = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))
PAGES = tuple(path for path in (*_AT_THE_ROOT, *sorted(DOCS.glob("*.md"))) if path.is_file())

_FENCE = re.compile(r"^(```+)\s*(\w*)(?:\s+title=\"([^\"]*)\")?\s*$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
      page: where it is, relative to the root.
      language: of a fenced block; "" where it names none, and of an indented one.
      title: of a fenced block, the file that it is, or is a diff of; "" where there is none.
      text: without fence and indentation.
    """

    page: str
    language: str
    title: str
    text: str


@functools.cache
def blocks(path: Path) -> tuple[Block, ...]:
    """The fenced and indented blocks of a page, in order."""
    page, found, lines = str(path.relative_to(ROOT)), [], path.read_text(encoding="utf-8").splitlines()
    place, is_free = 0, True  # whether the line before lets an indented block begin: it is empty
    while place < len(lines):
        line = lines[place]
        if fence := _FENCE.match(line):
            end = lines.index(fence[1], place + 1)
            found.append(Block(page, fence[2], fence[3] or "", "\n".join(lines[place + 1 : end]) + "\n"))
            place, is_free = end + 1, True
        elif line.startswith("    ") and is_free:
            end = place
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(each[4:] for each in lines[place:end]).strip("\n") + "\n"
            found.append(Block(page, "", "", text))
            place, is_free = end, True
        else:
            place, is_free = place + 1, not line.strip()
    return tuple(found)


def all_blocks() -> list[Block]:
    """Those of all pages."""
    return [block for path in PAGES for block in blocks(path)]


def command_lines(text: str) -> list[str]:
    """The lines of a block, continued ones joined, comments and empty ones left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
