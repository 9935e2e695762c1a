"""The page's ladders have a row a backend and precision, as the command prints them; their figures are a machine's."""

from __future__ import annotations

import re

from ladder_table import LADDERS, MODELS, expected_rows, merged, read_rows, read_rungs, text

from gptj.parity.findings import LadderRung

NUMBER = re.compile(r"\d(\.\d+)?(e[+-]\d+)?")


def test_the_page_has_every_row_of_both_checkpoints() -> None:
    found = read_rows(LADDERS.read())
    assert (*found,) == MODELS, "run: python tests/documents/ladder_table.py --write"
    for rows in found.values():
        assert [row[:2] for row in rows] == expected_rows()
        for _, _, error, divergence, top1, greedy in rows:
            assert NUMBER.fullmatch(error) and NUMBER.fullmatch(divergence)
            assert top1.endswith("%") and greedy.endswith("%")


def test_a_page_is_read_as_it_is_printed() -> None:
    rungs = tuple(LadderRung(*row, 0.01, 1e-5, 0.995, 0.97, 8) for row in expected_rows())
    printed = LADDERS.read(LADDERS.place(text(dict.fromkeys(MODELS, rungs))))
    assert [row[:2] for row in read_rows(printed)["revealing"]] == expected_rows()
    assert all(len(line) <= 80 for line in printed.splitlines() if line.startswith("  "))


def test_rows_that_were_not_measured_again_stay() -> None:
    old = read_rungs(LADDERS.read())
    new = {name: (LadderRung("pt", "float64", 1.0, 1.0, 1.0, 1.0),) for name in MODELS}
    assert text(old) == LADDERS.read()
    kept = merged(old, new)["demo"]
    assert kept == (*new["demo"], *(rung for rung in old["demo"] if rung.backend != "pt"))
