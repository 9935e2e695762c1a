"""The table of docs/parity.md: every name of `gptj.taps`, its axes and its meaning.

python tests/documents/taps_table.py          print the table
python tests/documents/taps_table.py --write  put it into docs/parity.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from feature_table import ROOT

from gptj.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, Tap

PAGE = ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- taps: made by tests/documents/taps_table.py -->", "<!-- taps end -->"


def table() -> str:
    """The table in Markdown."""
    lines = ["| name | axes | value |", "|---|---|---|"]
    lines += [*_rows("", BEFORE_BLOCKS), *_rows("h.0.", IN_BLOCK), *_rows("", AFTER_BLOCKS)]
    return "\n".join(lines)


def _rows(prefix: str, taps: tuple[Tap, ...]) -> Iterator[str]:
    for tap in taps:
        yield f"| `{prefix}{tap.name}` | {' '.join(tap.axes) or '-'} | {tap.meaning} |"


def placed(page: str, text: str) -> str:
    """The page with the table between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{text}\n\n{page[end:]}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(placed(PAGE.read_text(), table()))
    else:
        print(table())
