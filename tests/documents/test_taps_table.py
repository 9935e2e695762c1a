"""The table of docs/parity.md is made of the list of names, and its example says what the oracle computes."""

from __future__ import annotations

import re

import numpy as np
from taps_table import TABLE, table

from gptj.calls.taps import list_taps
from gptj.config import GPTJConfig
from gptj.config.initial import initial_tensor
from gptj.config.schema import schema
from gptj.parity.oracle import Oracle


def test_the_pages_table_is_the_list_of_names() -> None:
    assert TABLE.place(table()) == TABLE.read_page(), "run: python tests/documents/taps_table.py --write"
    assert re.findall(r"^\| `([^`]+)`", table(), re.MULTILINE) == list(list_taps(1))


def test_a_page_that_is_behind_would_be_noticed() -> None:
    page = TABLE.read_page()
    assert TABLE.place(table(), page.replace("before the mask", "after it")) == page


def test_the_pages_patterns_are_names() -> None:
    config = GPTJConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=4, n_head=2, rotary_dim=2)
    oracle = Oracle(config, {row.name: np.asarray(initial_tensor(row, config, seed=0)) for row in schema(config)})
    named = re.findall(r'names=(?:\[(.*?)\]|"(.*?)")', TABLE.read_page())
    assert len(named) >= 3
    for several, one in named:
        asked = [one] if one else re.findall(r'"(.*?)"', several)
        assert oracle.taps([[1, 2, 3]], labels=[[1, 2, 3]], names=asked)
