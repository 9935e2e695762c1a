"""Recorded traces of other programs, under their own names: each difference from ours is named where it is born.

tests/data/traces/make.py recorded them with transformers 4.57.6, of a revealing model of two blocks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import small_batch, write_sample

from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import open_trace

TRACES = Path(__file__).parents[1] / "data" / "traces"
CONFIG = revealing_config(n_layer=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("base") / "base", CONFIG, batch=small_batch(CONFIG))


def born(found, name):
    return {tap.tap: tap for tap in found.born[name]}


def test_16_bit_rotary_frequencies_are_born_in_the_rotation(base):
    """transformers 4.57.6 in bfloat16 makes the frequencies in bfloat16: angles are off by 1e-3 of them."""
    theirs = open_trace(TRACES / "transformers_pt_bfloat16.safetensors", TapNames.find("transformers-pt"))
    found = compare_traces([base, theirs])
    [pair] = found.pairs
    assert pair.first.tap == "h.0.q_rotated" and not pair.first.padding
    assert pair.headline.startswith(
        "transformers_pt_bfloat16.safetensors first differs from base in block 0, rotated q: born there"
    )
    assert pair.looks_like == "rotary table made in bfloat16, as by transformers 4.28 to 4.57"
    at_tokens = [tap.tap for tap in found.born[theirs.name] if not tap.padding]
    assert at_tokens == ["h.0.q_rotated", "h.0.k_rotated", "h.1.q_rotated", "h.1.k_rotated"]
    assert all(tap.difference > 5 * tap.bound for tap in born(found, theirs.name).values())
