"""The page's ladders have a row a backend and precision, as the command prints them; their figures are a machine's."""

from __future__ import annotations

import re

from ladder_table import BEGIN, MODELS, PAGE, expected_rows, merged, placed, rows_of_page, rungs_of_page, text

from gptj.parity.findings import LadderRung

NUMBER = re.compile(r"\d(\.\d+)?(e[+-]\d+)?")


def test_the_page_has_every_row_of_both_checkpoints() -> None:
    found = rows_of_page(PAGE.read_text())
    assert (*found,) == MODELS, "run: python tests/documents/ladder_table.py --write"
    for rows in found.values():
        assert [row[:2] for row in rows] == expected_rows()
        for _, _, error, divergence, top1, greedy in rows:
            assert NUMBER.fullmatch(error) and NUMBER.fullmatch(divergence)
            assert top1.endswith("%") and greedy.endswith("%")


def test_a_page_is_read_as_it_is_printed() -> None:
    rungs = tuple(LadderRung(*row, 0.01, 1e-5, 0.995, 0.97, 8) for row in expected_rows())
    page = placed(PAGE.read_text(), text(dict.fromkeys(MODELS, rungs)))
    assert [row[:2] for row in rows_of_page(page)["revealing"]] == expected_rows()
    assert all(len(line) <= 80 for line in page[page.index(BEGIN) :].splitlines() if line.startswith("  "))


def test_rows_that_were_not_measured_again_stay() -> None:
    page = PAGE.read_text()
    old = rungs_of_page(page)
    new = {name: (LadderRung("pt", "float64", 1.0, 1.0, 1.0, 1.0),) for name in MODELS}
    assert placed(page, text(old)) == page
    kept = merged(old, new)["demo"]
    assert kept == (*new["demo"], *(rung for rung in old["demo"] if rung.backend != "pt"))
