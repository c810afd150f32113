"""Writing HTML: everything that is not markup already is escaped."""

import html
from collections.abc import Iterable
from typing import TypeAlias

# Texts, which are escaped, `Markup`, which is not, or iterables of them; None is left out.
Content: TypeAlias = "str | Iterable[Content] | None"

_EMPTY = frozenset(("br", "col", "hr", "meta"))


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: Content, **attributes: str | None) -> Markup:
    """Returns an element.

    Args:
      children: what it holds, see `Content`.
      attributes: a trailing underscore is dropped (`class_`) and others become hyphens; None is left out.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{joined(children)}</{name}>")


def joined(children: Content) -> Markup:
    """Returns texts, markup and iterables of them as one piece of markup."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(html.escape(children, quote=False))
    return Markup("".join(map(joined, children)))
