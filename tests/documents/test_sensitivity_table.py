"""The page's figures of sensitivity are what is measured."""

from __future__ import annotations

import pytest
from sensitivity_table import TABLE, measure, row, table


def test_the_page_says_what_is_measured() -> None:
    said = TABLE.read_rows()
    assert TABLE.place(table(said)) == TABLE.read_page()
    for cells, found in zip(said, [row(one) for one in measure()], strict=True):
        assert (*cells[:2], cells[5]) == (*found[:2], found[5]), (
            "run: python tests/documents/sensitivity_table.py --write"
        )
        # One digit is said; a sum in another order moves it by less than one more.
        assert [float(cell) for cell in cells[2:5]] == pytest.approx([float(cell) for cell in found[2:5]], rel=0.5)
