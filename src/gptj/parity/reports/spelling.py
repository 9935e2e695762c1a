"""Numbers and shares in words, and texts that nothing can hide in: the same in every report."""

from __future__ import annotations

import dataclasses
import math

from gptj.calls.taps import split_tap
from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.errors import harmless
from gptj.parity.findings import Findings, MeasureFound, TapFound

__all__ = [
    "NOTHING",
    "Share",
    "grid_of_matrix",
    "legible",
    "place_of",
    "share_of",
    "spell_born",
    "spell_number",
    "spell_percent",
    "spell_sign",
    "spell_times",
    "title_of_ladder",
]

NOTHING = "-"
LONGEST_NAME = 200
LONGEST_TEXT = 2_000
"""Of one name or sentence in a report; what is longer is no name."""


def legible(text: str, *, longest: int = LONGEST_TEXT) -> str:
    """A text as XML and HTML may hold it: controls, lone surrogates and non-characters escaped, cut at `longest`."""
    text = harmless(text).encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(rf"\U{ord(c):08x}" if ord(c) & 0xFFFE == 0xFFFE else c for c in text)
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def place_of(tap: str) -> tuple[int | None, str]:
    """A tap's block, None outside of the blocks, and its name there; of any text, however long its number."""
    return split_tap(tap) if len(tap) <= LONGEST_NAME else (None, tap)


def spell_number(number: float | None) -> str:
    """A number in two digits.

    >>> [spell_number(n) for n in (None, 0.0, 0.41, 2e-6, float("inf"), float("nan"))]
    ['-', '0', '4.1e-01', '2.0e-06', 'inf', 'NaN']
    """
    if number is None:
        return NOTHING
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "inf" if number > 0 else "-inf"
    return "0" if number == 0 else f"{number:.1e}"


def spell_percent(share: float | None) -> str:
    """A share of one in percent; 100% is said of nothing less.

    >>> spell_percent(0.99999), spell_percent(1.0), spell_percent(0.5), spell_percent(None)
    ('99.99%', '100%', '50%', '-')
    """
    if share is None or not math.isfinite(share):
        return spell_number(share)
    percent = math.floor(share * 1e4 + 1e-9) / 100
    percent = min(percent, 99.99) if share < 1 else percent
    return f"{percent:g}%"


def spell_born(tap: TapFound) -> str:
    """Whether the error was born in a value: yes, no, or what is lacking to tell."""
    if tap.born is not None:
        return "yes" if tap.born else "no"
    return "-" if tap.needs is None else f"not told: needs {tap.needs}"


def title_of_ladder(found: Findings) -> str:
    """The ladder's heading; two folders' next tokens stand in its place, one against the other."""
    precise = any(rung.rung in (*PARAMETER_DTYPES, "int8") for rung in found.ladder)
    return "Precisions against float64" if precise else "Next tokens"


GridRow = tuple[str, str, dict[str, list[MeasureFound]]]


def grid_of_matrix(found: Findings) -> tuple[list[str], list[GridRow]]:
    """The backends of the matrix, and its rows: each one's name, what it is of, and each backend's.

    A row is of one thing where a backend has several of its name; else its backends may each have another of their
    own, which was the worst, and it is called by its name alone.
    """
    several = {(row.against, row.backend): 0 for row in found.matrix}
    for row in found.matrix:
        several[row.against, row.backend] += 1
    split = {name for (name, _), count in several.items() if count > 1}
    rows: dict[tuple[str, str], dict[str, list[MeasureFound]]] = {}
    for row in found.matrix:
        place = rows.setdefault((row.against, row.what if row.against in split else ""), {})
        place.setdefault(row.backend, []).append(row)
    grid = []
    for (name, _), by_backend in rows.items():
        kinds = {row.what for some in by_backend.values() for row in some}
        grid.append((name, kinds.pop() if len(kinds) == 1 else "", by_backend))
    return list(dict.fromkeys(row.backend for row in found.matrix)), grid


def spell_sign(right: bool | None) -> str:
    """A check mark, a cross, or a question mark where nobody can tell."""
    return "?" if right is None else "✓" if right else "✗"


@dataclasses.dataclass(frozen=True)
class Share:
    """A difference as a share of its bound.

    Attributes:
        level: 0 none, 1 under a hundredth, 2 under a tenth, 3 within, 4 beyond, 5 beyond and born there, 6 unknown.
        text: a few characters for a cell, which say the same without colour.
    """

    level: int
    text: str


def share_of(tap: TapFound) -> Share:
    """The share, and whether the error was born there.

    >>> share_of(TapFound("h.0.q", 0.5, 2.0, True)).text, share_of(TapFound("h.0.q", 4.0, 2e-4, False, born=True)).text
    ('25%', '✗● 2e4×')
    """
    difference, bound = tap.difference, tap.bound
    if not tap.right:
        sign = "✗●" if tap.born else "✗"
        local = tap.holds and tap.local is not None  # within the bound of the pair, beyond that of the operation alone
        if local:
            difference, bound = tap.local, tap.local_bound
        return Share(5 if tap.born else 4, f"{sign} {spell_times(difference, bound)}".rstrip())
    if difference is None:
        return Share(6, "?")
    if difference == 0:
        return Share(0, "0")
    if bound is None or not bound > 0 or not math.isfinite(bound):
        return Share(3, spell_number(difference))
    share = difference / bound
    if share < 0.01:
        return Share(1, "<1%")
    return Share(2 if share < 0.1 else 3, f"{math.ceil(100 * share):d}%")


def spell_times(difference: float | None, bound: float | None) -> str:
    """How many times its bound a difference is.

    >>> spell_times(3.0, 1.0), spell_times(5e-1, 1e-6), spell_times(float("nan"), 1.0), spell_times(1.0, 0.0)
    ('3×', '5e5×', 'NaN', '1e0')
    """
    if difference is None:
        return ""
    if bound is not None and bound > 0 and math.isfinite(difference) and math.isfinite(difference / bound):
        times = difference / bound
        return f"{times:.2g}×" if times < 100 else f"{_short(times)}×"
    return _short(difference) if math.isfinite(difference) else spell_number(difference)


def _short(number: float) -> str:
    mantissa, _, exponent = f"{number:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
