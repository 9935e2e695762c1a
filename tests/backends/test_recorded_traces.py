"""A backend's trace is its taps, and stays within the bounds of the float64 trace, each operation within its own."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutants import revealing_batch

from gptj.calls.taps import IN_BLOCK, list_taps
from gptj.checkpoint import write_checkpoint
from gptj.config.rotary import rotary_table
from gptj.config.schema import schema
from gptj.errors import InputError
from gptj.parity.differences import compare_traces
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.parity.run import open_reference
from gptj.parity.trace import TraceFacts, open_trace, rotary_sha256, table_sha256, write_trace
from gptj.parity.trace_record import PATHS, probe_batch, record_trace, weights_sha256

CONFIG = revealing_config(n_layer=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("traced") / "model", CONFIG, revealing_fill())


@pytest.fixture(scope="module")
def exact(folder) -> Path:
    """The oracle's own trace of what `record_trace` asks."""
    batch = probe_batch(CONFIG)
    taps = Oracle(CONFIG, revealing_weights(CONFIG)).taps(**batch)
    path = folder.parent / "oracle"
    write_trace(path, taps, TraceFacts("oracle", "float64", CONFIG), inputs=batch)
    return path


def test_the_tables_hash_is_of_the_one_that_turned(wing, folder, tmp_path, monkeypatch):
    """A wing whose table is another says so by its hash, and the comparison names it."""
    layers = importlib.import_module(f"gptj.{wing.name}.layers")

    def coarse(n_positions, width, dtype="float32"):
        return tuple(part.astype("float16").astype(dtype) for part in rotary_table(n_positions, width, "float64"))

    record_trace(folder, wing.name, tmp_path / "right")
    monkeypatch.setattr(layers, "rotary_table", coarse)
    facts = record_trace(folder, wing.name, tmp_path / "wrong")
    assert facts.rotary_sha256 == table_sha256(*coarse(CONFIG.n_positions, CONFIG.rotary_width))
    found = compare_traces([open_trace(tmp_path / name) for name in ("right", "wrong")])
    assert [fact for fact in found.facts if "rotary table" in fact] == [
        "wrong: its rotary table is neither the float32 nor the float64 one of its config"
    ]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_backends_trace_is_within_what_rounding_explains(wing, folder, exact, tmp_path, dtype):
    path = tmp_path / wing.name
    if dtype == "float64" and wing.name == "flax":
        import jax

        with jax.enable_x64(True):
            facts = record_trace(folder, wing.name, path, dtype=dtype)
    else:
        facts = record_trace(folder, wing.name, path, dtype=dtype)
    trace = open_trace(path)
    assert [*trace.places] == [*list_taps(CONFIG.n_layer)]
    assert (facts.source, facts.dtype, facts.weights_sha256) == (wing.name, dtype, weights_sha256(folder))
    assert facts.rotary_sha256 == rotary_sha256(CONFIG, "float64" if dtype == "float64" else "float32")
    for name, values in probe_batch(CONFIG).items():
        assert (trace.read_input(name) == values).all()
    _, read = open_reference(folder)
    found = compare_traces([open_trace(exact), trace], read)
    assert found.passed, [*found.lines()]


@pytest.fixture(scope="module")
def plain(wing, folder) -> Path:
    """A trace with gradients and texts."""
    path = folder.parent / f"{wing.name}-plain"
    record_trace(folder, wing.name, path, gradients=True, generate=8)
    return path


ABSENT = {
    "sdpa": {"scores", "visible", "weights"},
    "compiled": set(),
    "prepared": {tap.name for tap in IN_BLOCK} - {"weights", "sum"},
}
ABSENT["int8"] = ABSENT["prepared"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own call
@pytest.mark.parametrize("way", ["prepared", "int8", "compiled", "sdpa"])
def test_every_way_of_computing_is_within_what_rounding_explains(wing, folder, plain, tmp_path, way):
    if way not in PATHS[wing.name]:
        with pytest.raises(InputError, match=f"{' or '.join(PATHS[wing.name])}, found '{way}'"):
            record_trace(folder, wing.name, tmp_path / "none", way=way)
        return
    facts = record_trace(folder, wing.name, tmp_path / way, way=way, generate=8)
    trace = open_trace(tmp_path / way)
    missing = {*list_taps(CONFIG.n_layer)} - {*trace.places}
    expected = {f"h.{block}.{tap}" for block in range(CONFIG.n_layer) for tap in ABSENT[way]}
    if way in ("prepared", "int8"):  # the last state that a call gives is normed
        expected.add(f"h.{CONFIG.n_layer - 1}.sum")
    assert missing == expected and facts.path == way
    _, read = open_reference(folder)
    found = compare_traces([open_trace(plain), trace], read)
    assert found.passed, [*found.lines()]
    assert len(found.texts) == 2 and all(len(text.errors) >= 1 for text in found.texts)
    if way != "int8":
        assert all(text.first is None for text in found.texts)
        return
    assert max(tap.difference for tap in found.pairs[0].taps) > 1e-4  # by far not what float32 explains
    with pytest.raises(InputError, match="no gradients"):
        record_trace(folder, wing.name, tmp_path / "none", way=way, gradients=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_within_what_rounding_explains_of_the_oracles(wing, folder, tmp_path, plain, dtype):
    path = plain
    if dtype != "float32":
        path = tmp_path / dtype
        record_trace(folder, wing.name, path, dtype=dtype, gradients=True)
    _, read = open_reference(folder)
    found = compare_traces([open_trace(plain if path != plain else _copied(plain, tmp_path)), open_trace(path)], read)
    names = {row.name for row in schema(CONFIG)}
    against = {(one.base, one.parameter) for one in found.gradients}
    assert {("oracle", name) for name in names} <= against
    assert all(one.holds for one in found.gradients), [*found.lines()]


def _copied(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / "copy"))


def test_a_weight_that_is_off_is_born_in_its_product(wing, folder, tmp_path):
    """The smallest relative change of one weight's row that a float32 trace shows, with room: 1e-3 of one row."""
    weights = revealing_weights(CONFIG)
    name = "transformer.h.1.mlp.fc_in.weight"
    changed = weights[name].copy()
    changed[7] *= np.float32(1.001)
    fill = {**weights, name: changed}
    write_checkpoint(tmp_path / "off", CONFIG, lambda spec: fill[spec.name])
    for path, source in ((tmp_path / "right", folder), (tmp_path / "wrong", tmp_path / "off")):
        record_trace(source, wing.name, path, batch=batch())
    _, read = open_reference(folder)
    found = compare_traces([open_trace(tmp_path / "right"), open_trace(tmp_path / "wrong")], read)
    assert [tap.tap for tap in found.born["wrong"]] == ["h.1.fc_in"]
    assert found.born["wrong"][0].where.endswith("channel 7")
    assert found.born["right"] == ()
    assert any("weights_sha256 differs" in fact for fact in found.facts)


def batch():
    made = revealing_batch(CONFIG)
    return {
        "input_ids": made.input_ids,
        "attention_mask": made.attention_mask,
        "position_ids": made.position_ids,
        "labels": np.where(made.attention_mask == 1, made.input_ids, -100),
    }
