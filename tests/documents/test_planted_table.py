"""The page tells of every planted mistake, and each wing's test holds it to its own column."""

from __future__ import annotations

from planted import PLANTED
from planted_table import TABLE, WINGS, read_cells, table, without_numbers


def test_the_page_has_a_row_a_mistake_and_a_headline_a_wing() -> None:
    cells = read_cells()
    assert [*cells] == [planted.name for planted in PLANTED], "run: python tests/documents/planted_table.py --write"
    assert TABLE.place(table(cells)) == TABLE.read_page()
    for planted in PLANTED:
        for wing in WINGS:
            assert planted.where in cells[planted.name][wing]
            assert planted.looks_like is None or cells[planted.name][wing].endswith(f": {planted.looks_like}")


def test_numbers_alone_are_left_out_of_the_comparison() -> None:
    assert (
        without_numbers("block 0, q: 3.2e+00 where rounding explains 5e-07")
        == "block 0, q: # where rounding explains #"
    )
