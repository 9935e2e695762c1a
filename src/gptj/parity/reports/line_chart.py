"""Sizes along depth or along a text, in SVG: a logarithmic axis, and lines that their marks and dashes tell apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from gptj.parity.reports.markup import Markup, join, tag

__all__ = ["Line", "line_chart"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 18, 28
_WIDTH, _HEIGHT = 640, 220
_SIGNS = "●■▲◆"
_SHAPES = ((), ((-4, -4), (4, -4), (4, 4), (-4, 4)), ((-4, 3), (0, -4), (4, 3)), ((-3, 0), (0, -3), (3, 0), (0, 3)))
"""The corners of a line's marks, by its number; none is a circle. A later one is smaller, and hides none before."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: in the legend.
        values: at each place along the axis; None is a gap, infinity and NaN are crosses at the top.
        dashed: drawn without marks, as a bound is.
    """

    name: str
    values: Sequence[float | None]
    dashed: bool = False


def line_chart(title: str, places: Sequence[str], lines: Sequence[Line], *, marks: Sequence[int] = ()) -> Markup:
    """The chart; a sentence where no value is there.

    Args:
        title: in words, also for who does not see it.
        places: the axis' labels, of which as many are drawn as fit.
        lines: each with a value a place.
        marks: the places of vertical lines.
    """
    finite = [v for line in lines for v in line.values if v is not None and math.isfinite(v) and v > 0]
    known = [v for line in lines for v in line.values if v is not None]
    if not known or not places:
        return tag("p", f"{title}: no numbers.")
    low = math.floor(math.log10(min(finite, default=1e-9)))
    high = max(math.ceil(math.log10(max(finite, default=1.0))), low + 1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step = width / max(1, len(places) - 1) if len(places) > 1 else 0

    def x_of(place: int) -> float:
        return _LEFT + (place * step if step else width / 2)

    def y_of(value: float) -> float:
        if not math.isfinite(value):
            return _TOP
        share = 0.0 if value <= 0 else (math.log10(value) - low) / (high - low)
        return _TOP + height * (1 - min(1.0, max(0.0, share)))

    parts = [*_axes(places, low, high, x_of, height)]
    for mark in sorted({*marks} & {*range(len(places))}):
        parts.append(tag("line", x1=x_of(mark), x2=x_of(mark), y1=_TOP, y2=_TOP + height, class_="mark"))
    for number, line in enumerate(lines):
        parts.append(_drawn(line, number, x_of, y_of))
    drawn = tag("svg", tag("title", title), join(parts, "\n"), width=_WIDTH, height=_HEIGHT,
                viewbox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", class_="chart")  # fmt: skip
    scrolled = tag("div", drawn, class_="scroll", role="region", aria_label=title, tabindex=0)
    legend = (
        tag("li", tag("span", "╌╌" if line.dashed else _SIGNS[number % 4], class_=f"n{number % 4}", aria_hidden="true"),
            f" {line.name}{', dashed' if line.dashed else ''}")
        for number, line in enumerate(lines)
    )  # fmt: skip
    return tag("figure", scrolled, tag("figcaption", f"{title}.", tag("ul", *legend, class_="key")))


def _axes(places: Sequence[str], low: int, high: int, x_of: Callable[[int], float], height: float) -> Iterator[Markup]:
    """Powers of ten at the left, with lines across; places below, as many as fit."""
    every = max(1, math.ceil((high - low) / 6))
    for exponent in range(low, high + 1, every):
        y = _TOP + height * (1 - (exponent - low) / (high - low))
        yield tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid")
        yield tag("text", f"1e{exponent}", x=_LEFT - 6, y=y + 4, text_anchor="end", class_="label")
    free = 0.0  # where the label before ends: who does not fit beside it is left out
    for place, text in enumerate(places):
        x, half = x_of(place), 3.5 * len(text)
        if x - half >= free:
            yield tag("text", text, x=x, y=_TOP + height + 18, text_anchor="middle", class_="label")
            free = x + half + 6


def _drawn(line: Line, number: int, x_of: Callable[[int], float], y_of: Callable[[float], float]) -> Markup:
    """A line, broken where a value is missing, with a mark at each value."""
    pieces: list[list[str]] = [[]]
    marks = []
    for place, value in enumerate(line.values):
        if value is None:
            pieces.append([])
            continue
        x, y = x_of(place), y_of(value)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        if not math.isfinite(value):
            marks.append(tag("text", "NaN" if math.isnan(value) else "inf", x=x, y=y - 2, text_anchor="middle",
                             class_="label"))  # fmt: skip
        elif not line.dashed:
            marks.append(_mark(number % 4, x, y))
    paths = [tag("polyline", points=" ".join(points), fill="none") for points in pieces if len(points) > 1]
    return tag("g", *paths, *marks, class_=f"line n{number % 4}{' dashed' if line.dashed else ''}")


def _mark(number: int, x: float, y: float) -> Markup:
    corners = _SHAPES[number]
    if not corners:
        return tag("circle", cx=x, cy=y, r=5, class_="dot")
    return tag("polygon", points=" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners), class_="dot")
