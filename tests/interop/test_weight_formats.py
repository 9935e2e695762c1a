"""torch and transformers open the .bin files that we write: nothing missing, every bit as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gptj_conversion.convert import convert

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
CLASSES = {
    "pt": "GPTJForCausalLM",
    "tf_base": "GPTJModel",
    "tf_classifier": "GPTJForSequenceClassification",
}


@pytest.mark.parametrize("to", ["bin", "safetensors"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 5000])
@pytest.mark.parametrize("folder", CLASSES)
def test_transformers_opens_what_we_write(tmp_path, folder, to, max_shard_bytes):
    convert(FOREIGN / folder, tmp_path / "out", to=to, max_shard_bytes=max_shard_bytes)
    model, info = getattr(transformers, CLASSES[folder]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    own = FOREIGN / folder / "expected.npz"
    with np.load(own if own.exists() else FOREIGN / "expected.npz") as expected:
        state = model.state_dict()
        assert state.keys() == set(expected.files)
        assert all(np.array_equal(state[name].numpy(), expected[name]) for name in expected.files)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_torch_loads_our_archive_with_weights_only(tmp_path, dtype, mmap):
    convert(FOREIGN / "pt", tmp_path / "out", to="bin", dtype=dtype)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True, mmap=mmap)
    with np.load(FOREIGN / "expected.npz") as expected:
        for name in expected.files:
            assert torch.equal(state[name], torch.from_numpy(expected[name]).to(getattr(torch, dtype))), name
