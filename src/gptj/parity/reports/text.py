"""Findings as text for a terminal, of 80 columns too: what does not hold, a map of each pair that parts, tables."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from gptj.parity.findings import Findings, MeasureFound, PairFound, TapFound
from gptj.parity.reports.heat_map import operations_of
from gptj.parity.reports.spelling import (
    grid_of_matrix,
    legible,
    share_of,
    spell_number,
    spell_percent,
    spell_sign,
    title_of_ladder,
)

__all__ = ["render_text"]

_SHORT = {"q_rotated": "qrot", "k_rotated": "krot", "scores": "scor", "visible": "vis", "weights": "soft",
          "mixed": "mix", "out_proj": "out", "fc_in": "fcin", "activation": "act", "fc_out": "fout"}  # fmt: skip
_CELL, _NUMBER = 5, 5
_LONGEST_LIST = 12
_LONGEST_KIND = 10


def render_text(found: Findings, *, width: int = 80) -> str:
    """The text, no line of it longer than `width` where its words allow."""
    return "\n".join(_lines(found, max(40, width))).rstrip("\n") + "\n"


def _lines(found: Findings, width: int) -> Iterator[str]:
    name = f" {found.folder}:" if found.folder else ""
    yield from _wrapped(f"{spell_sign(found.passed)} {found.verdict}:{name} {found.headline}", width)
    for note in found.notes:
        yield from _wrapped(note, width, "  ")
    others = [one for one in found.wrong() if one != found.headline]
    if others:
        yield ""
        for one in others[:_LONGEST_LIST]:
            yield from _wrapped(f"✗ {one}", width, "  ")
        if len(others) > _LONGEST_LIST:
            yield f"  and {len(others) - _LONGEST_LIST} more"
    for pair in found.pairs:
        yield from ("", *_pair(pair, width))
    yield from _matrix(found, width)
    yield from _table("Texts: first difference, margins, what rounding may turn", [
        (spell_sign(t.right), f"{t.a}, {t.b}", f"prompt {t.prompt}",
         "-" if t.first_difference is None else f"{t.first_difference} of {t.tokens}", spell_number(t.margin_a),
         spell_number(t.margin_b), spell_number(t.bound)) for t in found.texts], width)  # fmt: skip
    ladder = title_of_ladder(found).removeprefix("Precisions ").capitalize()
    yield from _table(f"{ladder}: error, KL in nats, top-1 and greedy tokens the same", [
        (r.backend, r.rung, spell_number(r.error), spell_number(r.kl), spell_percent(r.top1), spell_percent(r.greedy))
        for r in found.ladder], width)  # fmt: skip
    missed = [planted for planted in found.sensitivity if not planted.caught]
    if found.sensitivity:
        caught = len(found.sensitivity) - len(missed)
        yield from ("", f"Planted mistakes: {caught} of {len(found.sensitivity)} noticed")
        for planted in missed:
            yield from _wrapped(f"✗ {planted.backend}: {planted.mutant}", width, "  ")
    yield from _table("Smallest relative changes that would have been noticed", [
        (s.backend, s.dtype, s.what, spell_number(s.change), s.tap or "-") for s in found.smallest], width)  # fmt: skip


def _wrapped(text: str, width: int, indent: str = "") -> Iterator[str]:
    yield from textwrap.wrap(legible(" ".join(text.split())), width, initial_indent=indent,
                             subsequent_indent=f"{indent}  ", break_on_hyphens=False)  # fmt: skip


def _pair(pair: PairFound, width: int) -> Iterator[str]:
    """A line where all holds; else the map. Its headline stands above, under what does not hold."""
    dtype = f" in {pair.dtype}" if pair.dtype and pair.dtype not in pair.b else ""
    name = f"{spell_sign(pair.right)} {pair.b}{dtype} against {pair.a}"
    if pair.right:
        yield from _wrapped(f"{name}: all {len(pair.taps)} values within what rounding explains", width)
        return
    yield from _wrapped(name, width)
    if pair.looks_like and pair.looks_like not in pair.headline:
        yield from _wrapped(f"looks like: {pair.looks_like}", width, "  ")
    columns, blocks = operations_of(pair)
    outside = blocks.pop(None, {})
    room = max(1, (width - _NUMBER) // _CELL)
    for start in range(0, len(columns), room):
        some = columns[start : start + room]
        yield " " * _NUMBER + "".join(f"{_short(name):>{_CELL}}" for name in some)
        for block in sorted(blocks, key=lambda number: -1 if number is None else number):
            cells = (_cell(blocks[block], name) for name in some)
            yield f"{str(block)[-_NUMBER:]:>{_NUMBER}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)
    if outside:
        yield from _wrapped(", ".join(f"{name} {_cell(outside, name)}" for name in outside), width, "  ")
    yield "  percent of what rounding explains; ✗ beyond it, ● born there"


def _matrix(found: Findings, width: int) -> Iterator[str]:
    """A row an invariance and a column a backend, where that fits; else a line for each of both."""
    backends, rows = grid_of_matrix(found)
    grid = [["", *backends]]
    for name, what, by_backend in rows:
        cells = [", ".join(map(_matrix_cell, by_backend.get(backend, ()))) or "-" for backend in backends]
        short = what and len(what) <= _LONGEST_KIND  # a parameter's name would leave the columns no room
        grid.append([f"{name}: {what}" if short else name, *cells])
    whole = sum(max(len(row[column]) for row in grid) + 2 for column in range(len(grid[0])))
    if rows and whole <= width:
        yield from _table("Invariances: off by, and how much of the limit that is", grid, width)
        return
    yield from _table("Invariances: off by, of the limit", [
        (spell_sign(row.holds), row.backend, f"{row.against}: {row.what}", spell_number(row.difference),
         spell_number(row.limit)) for row in found.matrix], width)  # fmt: skip


def _matrix_cell(row: MeasureFound) -> str:
    """A difference, and in percent how much of its limit that is, where there is some of both."""
    share = ""
    if row.holds and row.difference and row.limit and math.isfinite(part := 100 * row.difference / row.limit):
        share = f" {math.ceil(part)}%"
    return f"{spell_sign(row.holds)} {spell_number(row.difference)}{share}"


def _short(name: str) -> str:
    return _SHORT.get(name, legible(name))[: _CELL - 1]


def _cell(taps: Mapping[str, TapFound], name: str) -> str:
    tap = taps.get(name)
    if tap is None:
        return ""
    if not tap.right:
        return "●" if tap.born else "✗"
    return share_of(tap).text.removesuffix("%")[: _CELL - 1]


def _table(title: str, rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Rows in columns as wide as they need; a longer text is cut where a line would be longer than `width`."""
    if not rows:
        return
    cells = [[legible(cell, longest=80) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    over = sum(widths) + 2 * len(widths) - width
    if over > 0:
        longest = widths.index(max(widths))
        widths[longest] = max(8, widths[longest] - over)
    yield from ("", *_wrapped(title, width))
    for row in cells:
        fitted = (cell if len(cell) <= size else f"{cell[: size - 1]}…" for cell, size in zip(row, widths, strict=True))
        yield "  " + "  ".join(f"{cell:<{size}}" for cell, size in zip(fitted, widths, strict=True)).rstrip()
