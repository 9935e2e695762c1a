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

from page_parts import Part, markdown_table
from planted import PLANTED, Planted, headline, shorten

TABLE = Part("docs/parity.md", "planted", "tests/documents/planted_table.py")
WINGS = ("pt", "tf", "flax")


def cell(sentence: str) -> str:
    """The cell of a headline."""
    return shorten(sentence).replace("|", "\\|")


def without_numbers(text: str) -> str:
    """A cell as it is on every machine: the sizes of differences are of the framework and the processor."""
    return re.sub(r"\d(\.\d)?e[+-]\d+", "#", text)


def table(cells: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, from cells by mistake and wing."""
    return markdown_table(["mistake", *WINGS], [[name, *map(of.__getitem__, WINGS)] for name, of in cells.items()])


def read_cells() -> dict[str, dict[str, str]]:
    """The page's cells by mistake and wing."""
    return {name: dict(zip(WINGS, rest, strict=True)) for name, *rest in TABLE.read_rows()}


def _cell_of(planted: Planted, wing: str) -> str:
    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return cell(headline(planted, wing, Path(folder), patch)[2].replace(folder, "."))


if __name__ == "__main__":
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(name, value)
    TABLE.print_or_write(lambda: table({p.name: {wing: _cell_of(p, wing) for wing in WINGS} for p in PLANTED}))
