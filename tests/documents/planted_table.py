"""The table of docs/parity.md: every mistake of `planted.PLANTED` in every wing, and what a comparison says of it.

python tests/documents/planted_table.py          print the table; it takes two minutes, and all three frameworks
python tests/documents/planted_table.py --write  put it into docs/parity.md
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))  # pytest has it there already

from feature_table import ROOT
from planted import PLANTED, Planted, headline, shorten

PAGE = ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- planted: made by tests/documents/planted_table.py -->", "<!-- planted end -->"
WINGS = ("pt", "tf", "flax")


def cell(sentence: str) -> str:
    """The cell of a headline."""
    return shorten(sentence).replace("|", "\\|")


def without_numbers(text: str) -> str:
    """A cell as it is on every machine: the sizes of differences are of the framework and the processor."""
    return re.sub(r"\d(\.\d)?e[+-]\d+", "#", text)


def table(cells: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, from cells by mistake and wing."""
    lines = [f"| mistake | {' | '.join(WINGS)} |", "|---" * (1 + len(WINGS)) + "|"]
    lines += [f"| {name} | {' | '.join(of_wing[wing] for wing in WINGS)} |" for name, of_wing in cells.items()]
    return "\n".join(lines)


def read_cells(page: str) -> dict[str, dict[str, str]]:
    """The page's cells by mistake and wing."""
    text = page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip().splitlines()[2:]
    rows = ([part.strip() for part in line.strip("|").split(" | ")] for line in text)
    return {name: dict(zip(WINGS, rest, strict=True)) for name, *rest in rows}


def placed(page: str, text: str) -> str:
    """The page with the table between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{text}\n\n{page[end:]}"


def _cell_of(planted: Planted, wing: str) -> str:
    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return cell(headline(planted, wing, Path(folder), patch)[2].replace(folder, "."))


if __name__ == "__main__":
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(name, value)
    cells = {planted.name: {wing: _cell_of(planted, wing) for wing in WINGS} for planted in PLANTED}
    if "--write" in sys.argv[1:]:
        PAGE.write_text(placed(PAGE.read_text(), table(cells)))
    else:
        print(table(cells))
