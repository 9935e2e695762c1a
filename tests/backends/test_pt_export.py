"""torch.export's program of a model is reloaded, and steps over a cache as the model does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from gptj.command.export import FORMATS, write
from gptj.errors import InputError
from gptj.parity.revealing import revealing_config
from gptj.pt import GPTJForCausalLM
from gptj.pt.export import PROGRAM_FILE, write_onnx

CONFIG = revealing_config()
SIZES = ((1, 5), (2, 1), (3, 7), (1, 1))
"""Rows, and tokens of the prompt; 1 among them, which a trace may take for a constant."""


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    write(folder(), out, FORMATS["torch-export"], dtype=None, weights=None)
    return out


@pytest.mark.feature("a step over a cache exported: ONNX, torch.export", "causal_lm")
@torch.no_grad()
def test_a_reloaded_program_steps_over_a_cache_of_any_length(written, oracle):
    program = torch.export.load(written / PROGRAM_FILE).module()
    for b, t in SIZES:
        ids = np.random.default_rng(t).integers(0, CONFIG.vocab_size, (b, t + 2))
        expected = oracle().forward(ids).logits
        past = [torch.zeros(b, CONFIG.n_head, 0, CONFIG.head_dim)] * (2 * CONFIG.n_layer)
        for start, end in ((0, t), (t, t + 2)):
            mask, places = torch.ones(b, end, dtype=torch.int64), torch.arange(start, end).expand(b, -1).contiguous()
            logits, *past = program(torch.from_numpy(ids[:, start:end]), mask, places, past)
            assert np.abs(logits.numpy() - expected[:, start:end]).max() <= 2e-5
            assert past[0].shape == (b, CONFIG.n_head, end, CONFIG.head_dim)


@torch.no_grad()
def test_padding_is_masked(written, oracle):
    program = torch.export.load(written / PROGRAM_FILE).module()
    ids, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    past = [torch.zeros(2, CONFIG.n_head, 0, CONFIG.head_dim)] * (2 * CONFIG.n_layer)
    logits = program(ids, mask, places, past)[0].numpy()
    assert np.abs(logits[0, 2:] - oracle().forward([[5, 6]]).logits[0]).max() <= 2e-5


def test_the_program_needs_neither_this_library_nor_its_folder(written):
    code = f"import torch, sys; torch.export.load({str(written / PROGRAM_FILE)!r}); print('gptj' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_bfloat16_is_no_onnx(folder, tmp_path):
    model = GPTJForCausalLM.from_pretrained(folder(), param_dtype="bfloat16")
    with pytest.raises(InputError, match="dtype: bfloat16"):
        write_onnx(model, tmp_path)
