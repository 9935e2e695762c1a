"""A pair's differences as a heat map, layer by operation, in SVG: each cell says in signs what its colour says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptj.calls.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK
from gptj.parity.findings import PairFound, TapFound
from gptj.parity.reports.markup import Markup, join, tag
from gptj.parity.reports.spelling import place_of, share_of, spell_number, spell_sign

__all__ = ["heat_map", "operations_of"]

_WIDTH, _HEIGHT, _LEFT, _TOP = 66, 24, 78, 26
_SIDE_BY_SIDE = 7
_LONGEST = 10
"""Characters of a label, which fit."""


def operations_of(pair: PairFound) -> tuple[list[str], dict[int | None, dict[str, TapFound]]]:
    """The operations that a pair has, in the order of the computation, and each block's values by them.

    Those outside of the blocks are under None.
    """
    blocks: dict[int | None, dict[str, TapFound]] = {}
    for tap in pair.taps:
        block, name = place_of(tap.tap)
        blocks.setdefault(block, {})[name] = tap
    found = {name for block, taps in blocks.items() if block is not None for name in taps}
    known = [tap.name for tap in IN_BLOCK if tap.name in found]
    return known + sorted(found - {*known}), blocks


def heat_map(pair: PairFound) -> Markup:
    """The map; a sentence where there is nothing to draw."""
    if not pair.taps:
        return tag("p", "No values were compared.")
    columns, blocks = operations_of(pair)
    outside = blocks.pop(None, {})
    before = [tap.name for tap in BEFORE_BLOCKS if tap.name in outside]
    after = [tap.name for tap in AFTER_BLOCKS if tap.name in outside]
    after += sorted(outside.keys() - {*before, *after})
    rows: list[Markup] = []
    parts: list[Markup] = []
    y = _TOP if columns else 2
    for column, name in enumerate(columns):
        parts.append(_label(name, (column + 0.5) * _WIDTH, 16, "middle"))
    for names in _side_by_side(before):
        rows.append(_label(names[0], _LEFT - 6, y + 16, "end"))
        parts += _outside(outside, names, y)
        y += _HEIGHT
    for block in sorted(blocks, key=lambda number: -1 if number is None else number):
        rows.append(_label(f"block {block}", _LEFT - 6, y + 16, "end"))
        parts += [_cell(tap, columns.index(name), y) for name, tap in blocks[block].items()]
        y += _HEIGHT
    for names in _side_by_side(after):
        rows.append(_label(names[0], _LEFT - 6, y + 16, "end"))
        parts += _outside(outside, names, y)
        y += _HEIGHT
    most = min(_SIDE_BY_SIDE, max(len(before), len(after)))
    width = _WIDTH * max(len(columns), 2 * most - 1) + 2
    wrong = sum(not tap.right for tap in pair.taps)
    said = f"{pair.b} against {pair.a}, {len(pair.taps)} values, {wrong} beyond their bounds"
    drawn = tag("svg", tag("title", f"Heat map: {said}"), join(parts, "\n"), width=width, height=y + 2,
                viewbox=f"0 0 {width} {y + 2}", role="img", class_="heat")  # fmt: skip
    scrolled = tag("div", drawn, class_="scroll", role="region", tabindex=0,
                   aria_label=f"Heat map of {said}; the same numbers are in the table of values below")  # fmt: skip
    # The rows' names stay where the cells scroll; in words each cell has its whole name.
    names_of_rows = tag("svg", join(rows, "\n"), width=_LEFT, height=y + 2, aria_hidden="true")
    return tag("div", names_of_rows, scrolled, class_="map")


def _label(text: str, x: float, y: float, anchor: str) -> Markup:
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_="label")


def _side_by_side(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Names in rows, as many in each as fit."""
    return (names[start : start + _SIDE_BY_SIDE] for start in range(0, len(names), _SIDE_BY_SIDE))


def _outside(taps: dict[str, TapFound], names: Sequence[str], y: float) -> list[Markup]:
    """Values outside of the blocks, side by side: a cell each, and a name each but the first's, which is the row's."""
    parts = []
    for number, name in enumerate(names):
        if number:
            parts.append(_label(name, 2 * number * _WIDTH - 6, y + 16, "end"))
        parts.append(_cell(taps[name], 2 * number, y))
    return parts


def _cell(tap: TapFound, column: int, y: float) -> Markup:
    x, share = column * _WIDTH, share_of(tap)
    told = f"{tap.tap} {spell_sign(tap.right)} {spell_number(tap.difference)} of {spell_number(tap.bound)}"
    if tap.born:
        told += f", born there ({spell_number(tap.local)} of {spell_number(tap.local_bound)})"
    if tap.where:
        told += f"; {tap.where}"
    box = tag("rect", x=x + 1, y=y + 1, width=_WIDTH - 2, height=_HEIGHT - 2, rx=2)
    text = tag("text", share.text, x=x + _WIDTH / 2, y=y + 16, text_anchor="middle")
    return tag("g", tag("title", told), box, text, class_=f"l{share.level}")
