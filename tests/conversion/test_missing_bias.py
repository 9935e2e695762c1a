"""A language model without lm_head.bias is converted from every format to every other, with a bias of zeros, said."""

from __future__ import annotations

import numpy as np
import pytest
from gptj_conversion.convert import convert, describe, open_source
from gptj_conversion.verify import verify
from missing_bias import BIAS, FORMATS, with_zeros, without_bias
from weight_changes import arrays, store

from gptj.checkpoint import open_checkpoint
from gptj.config.schema import schema
from gptj.errors import CheckpointWarning, SchemaError
from gptj.parity.fingerprint import read_by_row, take_fingerprint
from gptj.parity.oracle import Oracle
from gptj.parity.run import open_oracle
from gptj.reading.manifest import Manifest

SAID = r"lm_head\.bias: is missing; zeros are taken for it"
IGNORED = pytest.mark.filterwarnings("ignore:.*saved by PyTorch before 1.6", "ignore:.*noted no checksums")


@IGNORED
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_with_zeros(tmp_path, form, tied):
    expected = with_zeros(tmp_path / "whole", tie_word_embeddings=tied)
    without_bias(tmp_path / "model", form, tie_word_embeddings=tied)
    with pytest.warns(CheckpointWarning, match=SAID):
        converted = convert(tmp_path / "model", tmp_path / "out", verify=True)
    one, other = open_checkpoint(converted), open_checkpoint(expected)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(np.array_equal(one.read(name), other.read(name)) for name in other.tensors)
    with pytest.warns(CheckpointWarning, match=SAID):
        assert sum(BIAS in problem for problem in describe(tmp_path / "model").problems) == 1
    ids = np.array([[1, 2, 3, 7]])
    logits = [open_oracle(folder).forward(ids).logits for folder in (converted, expected)]
    assert np.array_equal(*logits)
    found = Manifest.from_file(converted / "manifest.json").fingerprint
    assert found == take_fingerprint(other.config, "causal_lm", read_by_row(other))


@pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
@pytest.mark.parametrize("to", ["safetensors", "bin", "flax", "tf", "mesh"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "flax", "tf"])
def test_every_format_is_written_with_zeros(tmp_path, form, to):
    source = without_bias(tmp_path / "model", form, n_inner=None)
    dtype, more = ("float32", {"shards": 2}) if to == "mesh" else ("float16", {})
    out = convert(source, tmp_path / "out", to=to, dtype=dtype, **more)
    verify(out, fingerprint=True)
    written = open_source(out)
    whole = with_zeros(tmp_path / "whole", n_inner=None)
    other = open_checkpoint(convert(whole, tmp_path / "cast", dtype=dtype, fingerprint=False))
    for row in schema(other.config, "causal_lm"):
        assert written.dtype_of(row.name) == dtype
        assert written.read(row).tobytes() == other.read(row.name).tobytes()


def test_a_folder_without_it_has_a_fingerprint_and_an_oracle(tmp_path):
    whole, cut = with_zeros(tmp_path / "whole"), without_bias(tmp_path / "cut", "safetensors")
    with pytest.warns(CheckpointWarning, match=SAID):
        read = read_by_row(open_checkpoint(cut))
    config = open_checkpoint(whole).config
    assert take_fingerprint(config, "causal_lm", read) == take_fingerprint(
        config, "causal_lm", read_by_row(open_checkpoint(whole))
    )
    assert isinstance(Oracle(config, read).forward(np.array([[1]])).logits, np.ndarray)


@IGNORED
@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "transformer.h.0.mlp.fc_in.bias"])
def test_another_row_that_is_missing_is_no_zeros(tmp_path, name):
    folder = with_zeros(tmp_path / "model")
    tensors = arrays(folder)
    store(folder, {key: array for key, array in tensors.items() if key not in (name, BIAS)})
    with pytest.raises(SchemaError, match="missing"):
        convert(folder, tmp_path / "out")
