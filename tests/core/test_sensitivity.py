"""Sensitivity says what would have been caught, and a comparison catches what it says."""

from __future__ import annotations

import numpy as np
import pytest
from recorded import facts_of, inputs_of, recorded_taps, small_batch

from gptj.config.dtypes import numpy_dtype
from gptj.parity.differences import compare_traces
from gptj.parity.mistaken import MistakenOperation
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.sensitivity import LARGEST_CHANGE, measure_sensitivity
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=2)
WEIGHTS = revealing_weights(CONFIG)
BATCH = small_batch(CONFIG)


def read(name, dtype):
    return WEIGHTS[name].astype(numpy_dtype(dtype))


def slices(trace, tap):
    return iter([slice(0, 5), slice(5, 9)]) if "t" in trace.places[tap].axes else iter([slice(0, 1)])


def write(path, dtype, taps=None):
    taps = recorded_taps(CONFIG, BATCH, dtype) if taps is None else taps
    write_trace(path, taps, facts_of(CONFIG, dtype), inputs=inputs_of(BATCH))
    return open_trace(path)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    return {
        dtype: measure_sensitivity(write(folder / dtype, dtype), read, slices)
        for dtype in ("float64", "float32", "bfloat16", "float16")
    }


def test_float32_shows_every_planted_mistake(found):
    assert [one.mutant for one in found["float32"].missed] == []
    names = {one.mutant for one in found["float32"].planted}
    assert len(names) >= 60 and {"rotary sign", "transposed", "no scale", "lm_head tied", "epsilon 1e-06"} <= names
    assert "activation gelu_new" not in names and "epsilon 1e-05" not in names  # the model's own are no mistakes


def test_16_bits_say_what_they_would_miss(found):
    missed = {one.mutant for one in found["bfloat16"].missed}
    assert {"rotary table bfloat16", "exact GELU"} <= missed  # which 16 bits of rounding hide
    assert not {"rotary sign", "transposed", "no scale", "k and v swapped", "mask shows padding"} & missed
    assert any("not caught" in one.headline for one in found["bfloat16"].missed)


def test_the_smallest_changes_grow_with_the_rounding(found):
    for what in ("one weight", "one rotary angle", "epsilon"):
        least = [
            min(one.change for one in found[dtype].smallest if one.what == what)
            for dtype in ("float64", "float32", "float16", "bfloat16")
        ]
        assert least == sorted(least) and 0 < least[0] < 1e-8, (what, least)
        assert least[1] < 5e-3, (what, least)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_comparison_catches_just_what_is_above_the_smallest_change(found, tmp_path, share):
    """Twice the smallest change of one weight is born in its product; half of it is rounding's."""
    change = next(one for one in found["float32"].smallest if one.tap == "h.0.fc_in")
    assert change.change < LARGEST_CHANGE
    taps = {name: value.copy() for name, value in recorded_taps(CONFIG, BATCH, "float32").items()}
    row = WEIGHTS["transformer.h.0.mlp.fc_in.weight"][0].astype(float)
    column = int(np.argsort(np.abs(row))[len(row) // 2])
    taps["h.0.fc_in"][..., 0] += (taps["h.0.ln_1"][..., column] * row[column] * change.change * share).astype("float32")
    result = compare_traces([write(tmp_path / "base", "float64"), write(tmp_path / "wrong", "float32", taps)], read)
    assert ("h.0.fc_in" in [own.tap for own in result.born["wrong"]]) == (share > 1)


def test_without_weights_what_needs_none_is_planted(tmp_path):
    found = measure_sensitivity(write(tmp_path / "trace", "float32"), None, slices)
    names = {one.mutant for one in found.planted}
    assert "rotary sign" in names and "transposed" not in names
    assert {one.what for one in found.smallest} == {"one rotary angle"}


def test_the_words_name_what_was_missed_and_the_smallest_changes(found):
    lines = [*found["bfloat16"].lines()]
    assert lines[0].startswith("bfloat16 in bfloat16 would have shown ")
    assert any(line.startswith("rotary table bfloat16: block 0, rotated q: not caught") for line in lines)
    assert any(line.startswith("smallest change shown of epsilon: ") for line in lines)
    assert len([*found["bfloat16"].lines(every=True)]) > len(lines)
    rows = found["float32"].as_dict()
    assert set(rows[0]) == {"backend", "mutant", "caught", "headline", "expected"}


def test_the_operation_without_a_change_is_the_operation(tmp_path):
    trace = write(tmp_path / "trace", "float32")
    for tap, same in (
        ("h.0.q_rotated", "rotated"), ("h.0.ln_1", "normed"), ("h.0.fc_in", "multiplied"), ("h.0.weights", "softened"),
    ):  # fmt: skip
        operation = MistakenOperation(trace, tap, read)
        right, made = operation.expect(slice(0, 9)), getattr(operation, same)(slice(0, 9))
        assert np.allclose(right.value, made.value, rtol=1e-14, atol=0) and (right.bound == made.bound).all()
