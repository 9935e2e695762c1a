"""Elements of HTML and SVG, whose texts and attributes are escaped because nothing else can be made here."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Final

from gptj.parity.reports.spelling import legible

__all__ = ["Markup", "join", "table", "tag"]

_EMPTY: Final = frozenset({"meta", "br", "hr"})

Attribute = str | int | float | bool | None


class Markup(str):
    """Text that is markup already, and is not escaped again. Only `tag` and `join` make it."""

    __slots__ = ()


def tag(name: str, /, *children: str | Markup, **attributes: Attribute) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: texts, which are escaped, and markup, which is kept.
        attributes: None and False leave one out, True sets it bare; `class_` and `aria_label` are class, aria-label.

    >>> tag("p", "1 < 2 & ", tag("b", "3"), class_="a", title='"')
    '<p class="a" title="&quot;">1 &lt; 2 &amp; <b>3</b></p>'
    """
    spelt = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    inner = join(children)
    return Markup(f"<{name}{spelt}>" if name in _EMPTY else f"<{name}{spelt}>{inner}</{name}>")


def join(parts: Iterable[str | Markup], between: str = "") -> Markup:
    """Parts one after the other; texts are escaped."""
    return Markup(between.join(part if isinstance(part, Markup) else html.escape(legible(part)) for part in parts))


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-").replace("viewbox", "viewBox")
    if isinstance(value, bool):
        return f" {name}" if value else ""
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{html.escape(legible(str(value)))}"'


def table(
    caption: str, heading: Iterable[str], rows: Iterable[tuple[Iterable[str | Markup], str | None]], *,
    numbers: Iterable[str] = (),
) -> Markup:  # fmt: skip
    """A table that scrolls in a region of its own, which the keyboard reaches.

    Args:
        caption: of the table, and the region's name.
        heading: of the columns.
        rows: cells, the first of which is the row's heading, and the row's class.
        numbers: the headings of columns of numbers, which stand at the right.
    """
    right = frozenset(numbers)
    kinds = [(text, "number" if text in right else None) for text in heading]
    head = tag("tr", *(tag("th", text, scope="col", class_=kind) for text, kind in kinds))
    body = []
    for cells, kind in rows:
        first, *others = cells
        told = (tag("td", cell, class_=of) for cell, (_, of) in zip(others, kinds[1:], strict=True))
        body.append(tag("tr", tag("th", first, scope="row"), *told, class_=kind))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", join(body, "\n")))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)
