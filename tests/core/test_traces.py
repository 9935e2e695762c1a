"""A trace gives back what was written, in the taps' own order of axes, a part at a time, and refuses what is none."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from recorded import facts_of, inputs_of, recorded_taps, small_batch, write_sample

from gptj.errors import FormatError, InputError, SchemaError
from gptj.parity.layout import Layout
from gptj.parity.revealing import revealing_config
from gptj.parity.tap_names import TapNames
from gptj.parity.trace import open_trace, write_trace
from gptj.reading.safetensors_file import read_safetensors


@pytest.fixture(scope="module")
def config():
    return revealing_config(n_positions=512)


def test_a_trace_gives_back_every_tap_input_and_fact(tmp_path, config):
    batch, taps = small_batch(config), recorded_taps(config, small_batch(config))
    facts = dataclasses.replace(facts_of(config), seed=3, threads=2, path="plain", weights_sha256="a" * 64)
    write_trace(tmp_path / "t", taps, facts, inputs=inputs_of(batch))
    trace = open_trace(tmp_path / "t")
    assert trace.facts == facts
    assert trace.places.keys() == taps.keys()
    for name, values in taps.items():
        assert trace.read(name).tobytes() == np.ascontiguousarray(values).tobytes(), name
        assert trace.shape(name) == values.shape
    for name, values in inputs_of(batch).items():
        assert (trace.read_input(name) == values).all()


def test_a_slice_of_tokens_is_that_of_the_whole(tmp_path, config):
    trace = write_sample(tmp_path / "t", config, "bfloat16")
    for tap in ("embedding", "h.1.q", "h.1.scores", "h.2.visible", "logits"):
        axis = trace.places[tap].axes.index("t")
        assert (trace.read(tap, slice(2, 5)) == np.take(trace.read(tap), range(2, 5), axis)).all(), tap


def test_big_endian_and_sliced_arrays_are_written_as_they_are_meant(tmp_path, config):
    taps = {
        "embedding": np.arange(96, dtype=">f4").reshape(2, 1, 48),
        "ln_f": np.ones((1, 2, 96), "f4")[..., ::2].swapaxes(0, 1),
    }
    write_trace(tmp_path / "t", taps, facts_of(config, "float32"))
    assert (open_trace(tmp_path / "t").read("embedding") == taps["embedding"]).all()


def test_writing_holds_no_copy_of_an_array(tmp_path, config):
    import tracemalloc

    big = revealing_config(n_embd=1024, n_head=4, rotary_dim=8)
    values = np.zeros((1, 10_000, 1024), np.float32)
    tracemalloc.start()
    write_trace(tmp_path / "t", {"ln_f": values}, facts_of(revealing_config(**{**_sizes(big), "n_positions": 10_000})))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes


def _sizes(config):
    return {"n_embd": config.n_embd, "n_head": config.n_head, "rotary_dim": config.rotary_dim}


MAPPING = """
ignore = ["dropout.{block}"]

[[tap]]
from = "model.{block}.query"
to = "h.{block}.q"
axes = "b t (h d)"

[[tap]]
from = "model.out"
to = "ln_f"
axes = "(b t) m"
"""


def test_a_mapping_reshapes_and_transposes(tmp_path, config):
    (tmp_path / "names.toml").write_text(MAPPING)
    names = TapNames.from_file(tmp_path / "names.toml")
    q = np.arange(2 * 5 * 48, dtype=np.float32).reshape(2, 5, 48)
    out = np.arange(480, dtype=np.float32).reshape(10, 48)
    from safetensors.numpy import save_file

    tensors = {"model.1.query": q, "model.out": out, "dropout.7": q, "input_ids": np.zeros((2, 5), np.int64)}
    save_file(tensors, tmp_path / "t", metadata=facts_of(config, "float32").as_metadata())
    trace = open_trace(tmp_path / "t", names)
    assert [*trace.places] == ["h.1.q", "ln_f"]
    assert (trace.read("h.1.q") == q.reshape(2, 5, 4, 12).swapaxes(1, 2)).all()
    assert (trace.read("h.1.q", slice(1, 3)) == q.reshape(2, 5, 4, 12).swapaxes(1, 2)[:, :, 1:3]).all()
    assert (trace.read("ln_f", slice(4, 5)) == out.reshape(2, 5, 48)[:, 4:]).all()
    assert trace.shape("ln_f") == (2, 5, 48)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tap = 3", "tap"),
        ("[[tap]]\nfrom = 'a'\nto = 'h.0.qq'", "tap 1: to"),
        ("[[tap]]\nfrom = 'a'\nto = 'h.{block}.q'", "tap 1: from"),
        ("[[tap]]\nfrom = 'a.{block}'\nto = 'h.0.q'", "tap 1: to"),
        ("[[tap]]\nfrom = 'a.{block}.{block}'\nto = 'h.{block}.q'", "tap 1: from"),
        ("[[tap]]\nto = 'ln_f'", "tap 1: from"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxis = 'b t m'", "axis"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = 'b t v'", "axes"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = 'b t m m'", "axes"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = 'b (t m'", "axes"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\naxes = ['b', 't', 'm']", "axes"),
        ("[[tap]]\nfrom = 'a'\nto = 'ln_f'\n[[tap]]\nfrom = 'a'\nto = 'logits'", "mapped twice"),
        ("ignore = 'a'", "ignore"),
        ("rename = {}", "rename"),
        ("[[tap]", "TOML"),
        ("tap = [1]", "tap"),
        ("x = " + "[" * 5000, "TOML"),
        ("[[tap]]\nfrom = ''\nto = 'ln_f'", "tap 1: from"),
    ],
)
def test_a_mapping_that_is_none_is_refused_by_name(tmp_path, text, named):
    (tmp_path / "names.toml").write_text(text)
    with pytest.raises(FormatError, match=named) as caught:
        TapNames.from_file(tmp_path / "names.toml")
    assert "names.toml" in str(caught.value)


def test_two_lines_that_mean_one_name_are_refused(tmp_path, config):
    (tmp_path / "n.toml").write_text("ignore = ['h.{block}.q', 'h.0.q']")
    write_sample(tmp_path / "t", config)
    with pytest.raises(SchemaError, match=r"two lines.*h\.0\.q"):
        open_trace(tmp_path / "t", TapNames.from_file(tmp_path / "n.toml"))


def test_two_tensors_cannot_be_one_tap(tmp_path, config):
    (tmp_path / "n.toml").write_text("[[tap]]\nfrom = 'h.{block}.k'\nto = 'h.{block}.q'")
    write_sample(tmp_path / "t", config)
    with pytest.raises(SchemaError, match="two tensors of one tap"):
        open_trace(tmp_path / "t", TapNames.from_file(tmp_path / "n.toml"))


@pytest.mark.parametrize(
    "name", ["h.00.q", "h.3.embedding", "q", "h.\u0663.q", "h." + "9" * 400 + ".q", "h.0.visible.x"]
)
def test_what_is_nearly_a_tap_is_none(tmp_path, config, name):
    with pytest.raises(SchemaError, match=r"no tap's name|a block that the config"):
        write_trace(tmp_path / "t", {name: np.zeros((2, 4, 5, 12))}, facts_of(config))
    assert not (tmp_path / "t").exists()


def test_a_tap_of_another_shape_or_dtype_is_not_written(tmp_path, config):
    for values in (np.zeros((2, 5, 47)), np.zeros((2, 5)), np.zeros((2, 0, 48)), np.zeros((2, 5, 48), np.int32)):
        with pytest.raises(SchemaError):
            write_trace(tmp_path / "t", {"ln_f": values}, facts_of(config))
    with pytest.raises(InputError, match="mask"):
        write_trace(tmp_path / "t", {"ln_f": np.zeros((2, 5, 48))}, facts_of(config), inputs={"mask": np.zeros(1)})
    assert [*tmp_path.iterdir()] == []


def test_an_unknown_key_changes_nothing_and_is_said(tmp_path, config):
    taps = recorded_taps(config, small_batch(config))
    write_trace(tmp_path / "t", taps, facts_of(config))
    file = read_safetensors(tmp_path / "t")
    from safetensors.numpy import load_file, save_file

    save_file(load_file(tmp_path / "t"), tmp_path / "u", metadata={**file.metadata, "mood": "good", "format": "np"})
    with pytest.warns(UserWarning, match="mood"):
        open_trace(tmp_path / "u")


def test_bfloat16_is_held_as_it_is(tmp_path, config):
    trace = write_sample(tmp_path / "t", config, "bfloat16")
    assert trace.read("ln_f").dtype == ml_dtypes.bfloat16


def test_a_layout_is_solved_from_what_is_known():
    layout = Layout.parse("(b t) h d", of="bhtd")
    assert layout.solve((10, 4, 12), {"t": 5, "h": 4, "d": 12}) == {"b": 2}
    with pytest.raises(InputError, match=r"found \[10, 4, 13\]"):
        layout.solve((10, 4, 13), {"t": 5, "h": 4, "d": 12})
