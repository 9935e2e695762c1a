"""Each mistake that is planted in a wing is named at its block and operation, and called by its name."""

from __future__ import annotations

import pytest
from mutants import MUTANTS
from planted import PLANTED, headline
from planted_table import cell, read_cells, without_numbers


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_a_planted_mistake_is_named_where_it_is(wing, tmp_path, monkeypatch, planted):
    place, looks_like, sentence = headline(planted, wing.name, tmp_path, monkeypatch)
    assert (place, looks_like) == (planted.where, planted.looks_like), sentence
    said = read_cells()[planted.name][wing.name]
    found = cell(sentence.replace(str(tmp_path), "."))
    assert without_numbers(found) == without_numbers(said), "run: python tests/documents/planted_table.py --write"


def test_every_mutant_is_planted_and_twenty_more():
    names = [planted.name for planted in PLANTED]
    assert len({*names}) == len(names) and {mutant.name for mutant in MUTANTS} <= {*names}
    assert len(names) >= len(MUTANTS) + 20
    assert sum(planted.cached for planted in PLANTED) >= 8
    assert sum(planted.gradient for planted in PLANTED) >= 10
