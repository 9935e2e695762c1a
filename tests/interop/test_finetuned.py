"""A fine-tuned folder opens unchanged in transformers, its checkpoints too, and learns there what it learns here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from finetune_samples import TEXT, text_file, tuned_model
from wings import FLOAT32_ABSOLUTE

import gptj.pt
from gptj.finetune import Settings, finetune
from gptj.finetune.curve import read_curve
from gptj.finetune.data import Batches, make_windows, read_documents
from gptj.finetune.schedule import learning_rate
from gptj.text.tokenizer import GPTJTokenizer

SETTINGS = Settings(steps=6, batch=2, length=16, lr=3e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The model before, its data, and the folder after."""
    folder = tmp_path_factory.mktemp("tuned")
    model, data = tuned_model(folder / "model", resid_pdrop=0.0), text_file(folder)
    finetune(model, data, folder / "out", SETTINGS, backend="pt", device="cpu")
    return model, data, folder / "out"


@pytest.mark.parametrize("part", ["", "checkpoints/step-00000006"])
def test_a_fine_tuned_folder_opens_in_transformers(tuned, part):
    path = tuned[2] / part
    model, info = transformers.GPTJForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = torch.tensor([tokenizer(TEXT[:40]).input_ids])
    assert ids[0].tolist() == GPTJTokenizer.from_pretrained(path).encode(TEXT[:40])
    with torch.no_grad():
        theirs = model.eval()(ids).logits.numpy()
        ours = gptj.pt.GPTJForCausalLM.from_pretrained(path)(ids).logits.numpy()
    assert np.abs(ours - theirs).max() <= FLOAT32_ABSOLUTE


def test_transformers_model_in_a_loop_of_torchs_has_the_same_curve(tuned):
    """The same windows, torch's own AdamW, clipping and backward, over transformers' model."""
    model_folder, data, out = tuned
    model = transformers.GPTJForCausalLM.from_pretrained(model_folder)
    tokenizer = GPTJTokenizer.from_pretrained(model_folder)
    windows = make_windows(data, read_documents(data), tokenizer, length=16, pack=True)
    batches = Batches(windows, 2, seed=0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for row in read_curve(out / "loss.csv"):
        [batch] = batches.of_update(row.step - 1)
        loss = model(torch.tensor(batch.ids).long(), labels=torch.tensor(batch.labels).long()).loss
        assert loss.item() == pytest.approx(row.loss, rel=1e-5)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.item() == pytest.approx(row.gradient_norm, rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(SETTINGS, row.step - 1, 6)
        optimizer.step()
        optimizer.zero_grad()
