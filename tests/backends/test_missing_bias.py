"""A language model without lm_head.bias computes in each wing what it computes with a bias of zeros, and says so."""

from __future__ import annotations

import numpy as np
import pytest
from gptj_conversion.convert import convert
from missing_bias import with_zeros, without_bias
from wings import close

from gptj.errors import CheckpointWarning
from gptj.parity.run import open_oracle

IDS = np.array([[1, 2, 3, 7, 5], [9, 8, 2, 4, 6]])
SAID = r"lm_head\.bias: is missing; zeros are taken for it"


def logits(wing, folder, **options):
    return wing.numpy(wing.call(wing.model("causal_lm").from_pretrained(folder, **options), IDS).logits)


@pytest.mark.parametrize(
    ("tied", "form", "options"),
    [
        (False, "safetensors", {}),
        (False, "safetensors in shards", {}),
        (True, "safetensors", {}),
        (False, "safetensors", {"mmap": False}),
        (False, "safetensors", {"param_dtype": "float16"}),
        (False, "safetensors", {"inference": True}),
    ],
)
def test_a_folder_without_it_opens_and_computes_as_with_zeros(wing, tmp_path, tied, form, options):
    whole = with_zeros(tmp_path / "whole", tie_word_embeddings=tied)
    without_bias(tmp_path / "model", form, tie_word_embeddings=tied)
    with pytest.warns(CheckpointWarning, match=SAID) as heard:
        found = logits(wing, tmp_path / "model", **options)
    assert len(heard) == 1
    expected = logits(wing, whole, **options)
    assert np.array_equal(found, expected)
    if not options:
        assert close(found, open_oracle(whole).forward(IDS).logits, "float32")


def test_it_is_a_parameter_of_zeros_that_is_trained_and_saved(wing, tmp_path):
    folder = without_bias(tmp_path / "model", "safetensors")
    with pytest.warns(CheckpointWarning, match=SAID):
        model, info = wing.model("causal_lm").from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == ["lm_head.bias"]
    assert not wing.parameters(model)["lm_head.bias"].any()
    model.save_pretrained(tmp_path / "saved")
    assert np.array_equal(logits(wing, tmp_path / "saved"), wing.numpy(wing.call(model, IDS).logits))


@pytest.mark.filterwarnings("ignore::gptj.errors.CheckpointWarning")
@pytest.mark.parametrize("form", ["safetensors of Flax", "bin", "flax", "tf"])  # the rest in tests/conversion
def test_what_was_converted_without_it_computes_as_with_zeros(wing, tmp_path, form):
    whole = with_zeros(tmp_path / "whole")
    converted = convert(without_bias(tmp_path / "model", form), tmp_path / "out")
    assert np.array_equal(logits(wing, converted), logits(wing, whole))
