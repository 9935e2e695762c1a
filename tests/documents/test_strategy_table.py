"""The tables of docs/generation.md say what the tests say; every field of GenerationConfig is walked in every wing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_cases import by_the_oracle
from generation_fields import CALLS, ELSEWHERE, OUTPUTS
from strategy_table import PROCESSORS, ROWS, TABLES, backed, table

from gptj.generation import GenerationConfig

BACKENDS = Path(__file__).parents[1] / "backends"
PROMPTS = np.random.default_rng(3).integers(0, 160, (8, 5))
IN_ITS_OWN_TEST = {"remove_invalid_values": "test_G5_logits_that_are_not_finite_are_named_or_repaired"}


def test_the_pages_tables_are_the_tests_tables() -> None:
    assert TABLES.place(table(BACKENDS)) == TABLES.read_page(), "run: python tests/documents/strategy_table.py --write"


def test_a_wing_without_the_test_would_be_noticed(tmp_path: Path) -> None:
    assert backed(BACKENDS) == ("pt", "tf", "flax")
    (tmp_path / "test_tf_x.py").write_text("import pytest\n@pytest.mark.strategies\ndef test_x(wing): pass")
    assert backed(tmp_path) == ("tf",)
    assert "| greedy | the best token, the lower id among equals | - | yes | - |" in table(tmp_path)


def test_every_field_has_its_effect_shown_in_every_wing() -> None:
    """By a row of the table, whose tokens it changes, or by a walk over outputs and calls."""
    fields = {field.name for field in dataclasses.fields(GenerationConfig)}
    in_rows = {name for row in ROWS.values() for name in row.options}
    elsewhere = {"pad_token_id", "return_dict_in_generate", "bos_token_id", "extra"}
    alone = {"length_penalty", "early_stopping"}  # of beam searches; transformers' cases have them
    assert in_rows | OUTPUTS.keys() | CALLS.keys() | elsewhere | alone == fields
    assert elsewhere <= ELSEWHERE.keys() | {"pad_token_id"}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in IN_ITS_OWN_TEST])
def test_a_row_that_were_ignored_would_show(name: str) -> None:
    """The tokens by the row's settings are not those without them."""
    row = ROWS[name]
    prompts = PROMPTS[:, :1] if name == "forced_bos_token_id" else PROMPTS
    seed: dict[str, Any] = {"seed": 7} if row.options.get("do_sample") else {}

    def tokens(options: dict[str, Any]) -> list[list[int]]:
        return by_the_oracle(
            prompts, options, decode=lambda ids: " ".join(map(str, ids)), **(seed if options.get("do_sample") else {})
        ).sequences.tolist()

    said = {key: value for key, value in row.options.items() if key != "num_assistant_tokens"}
    left = {key: value for key, value in said.items() if key != name} if name in PROCESSORS else {}
    same = said.keys() <= {"prompt_lookup_num_tokens", "prefill_chunk_size", "use_cache"}  # the way, not the answer
    assert (tokens(said) == tokens(left)) == same


def test_a_row_that_is_tested_elsewhere_is() -> None:
    source = (BACKENDS / "test_strategies.py").read_text()
    assert all(f"def {test}(" in source for test in IN_ITS_OWN_TEST.values())
