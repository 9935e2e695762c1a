"""The table of docs/parity.md: every name of `gptj.calls.taps`, its axes and its meaning.

python tests/documents/taps_table.py          print the table
python tests/documents/taps_table.py --write  put it into docs/parity.md
"""

from __future__ import annotations

from collections.abc import Iterator

from page_parts import Part, markdown_table

from gptj.calls.taps import AFTER_BLOCKS, BEFORE_BLOCKS, IN_BLOCK, Tap

TABLE = Part("docs/parity.md", "taps", "tests/documents/taps_table.py")


def table() -> str:
    """The table in Markdown."""
    rows = [*_rows("", BEFORE_BLOCKS), *_rows("h.0.", IN_BLOCK), *_rows("", AFTER_BLOCKS)]
    return markdown_table(["name", "axes", "value"], rows)


def _rows(prefix: str, taps: tuple[Tap, ...]) -> Iterator[list[str]]:
    for tap in taps:
        yield [f"`{prefix}{tap.name}`", " ".join(tap.axes) or "-", tap.meaning]


if __name__ == "__main__":
    TABLE.print_or_write(table)
