"""Recorded traces of other programs, under their own names: each difference from ours is named where it is born.

tests/data/traces/make.py recorded them with transformers 4.57.6, of a revealing model of two blocks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import small_batch, write_sample

from gptj.errors import InputError
from gptj.parity.differences import compare_traces
from gptj.parity.revealing import revealing_config
from gptj.parity.tap_names import TapNames, shipped_names
from gptj.parity.trace import open_trace

TRACES = Path(__file__).parents[1] / "data" / "traces"
CONFIG = revealing_config(n_layer=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("base") / "base", CONFIG, batch=small_batch(CONFIG))


EXPECTED = {
    # bfloat16: frequencies made in bfloat16 are off by 1e-3 of themselves, an angle by that times the position
    ("transformers-pt", "bfloat16"): (
        "rotary table made in bfloat16, as by transformers 4.28 to 4.57", "masked row attends evenly", 5e-2,
    ),
    ("transformers-tf", "float32"): (
        "rotary angles and frequencies in float32, as by transformers", "additive -1e4 padding", 3e-6,
    ),
    ("transformers-flax", "float32"): (
        "rotary angles in float32, as by transformers in Flax", "masked row attends evenly", 3e-6,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("names", "dtype"), EXPECTED)
def test_each_difference_of_transformers_is_explained_from_the_trace_alone(base, names, dtype):
    """The rotation's is the first; queries that see nothing attend otherwise, at padding alone; no more differs."""
    rotary, padding, largest = EXPECTED[names, dtype]
    theirs = open_trace(TRACES / f"{names.replace('-', '_')}_{dtype}.safetensors", TapNames.find(names))
    found = compare_traces([base, theirs])
    [pair] = found.pairs
    start = f"{theirs.name} first differs from base in block 0, rotated q: born there"
    assert pair.headline.startswith(start) and pair.headline.endswith(f"looks like: {rotary}")
    assert pair.first.tap == "h.0.q_rotated" and pair.first.difference < 3 * largest
    assert {tap.tap for tap in found.born[theirs.name] if not tap.padding} == {
        f"h.{block}.{kind}_rotated" for block in (0, 1) for kind in "qk"
    }
    assert {tap.tap for tap in found.born[theirs.name] if tap.padding} == {"h.0.weights", "h.1.weights"}
    assert found.looks_like[theirs.name]["h.0.weights"] == padding
    assert found.born["base"] == ()


def test_two_programs_traces_are_compared_with_both_maps():
    paths = [TRACES / f"transformers_{name}_float32.safetensors" for name in ("tf", "flax")]
    names = TapNames.find("transformers-tf", "transformers-flax")
    found = compare_traces([open_trace(path, names) for path in paths])
    assert all(tap.holds or tap.padding for tap in found.pairs[0].taps)


def test_every_shipped_map_is_one_and_a_name_that_is_none_is_refused(tmp_path):
    assert {"transformers-pt", "transformers-tf", "transformers-flax"} <= {*shipped_names()}
    for name in shipped_names():
        assert TapNames.find(name).rules
    with pytest.raises(InputError, match="Did you mean transformers-pt"):
        TapNames.find("transformers-ptt")
    (tmp_path / "mine.toml").write_text('ignore = ["lm_head"]\n')
    with pytest.raises(InputError, match="mapped differently by two files"):
        TapNames.find("transformers-pt", tmp_path / "mine.toml")
