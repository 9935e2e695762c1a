"""What torch itself saves of a training run, in both of its formats, gives the model, and says what was left."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from gptj_conversion.convert import convert

from gptj.errors import CheckpointWarning

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
}
TREES = {
    "beside the model": lambda model, state: {"epoch": 3, "model": model, "optimizer": state, "lr": 1e-4},
    "in a list": lambda model, state: {"optimizer_states": [state], "state_dict": model},
    "among the tensors": lambda model, state: {**model, "optimizer": state},
    "with a random state": lambda model, state: {"rng": torch.get_rng_state(), "model": model, "optimizer": state},
}


@pytest.mark.filterwarnings("ignore:.*saved by PyTorch before 1.6")
@pytest.mark.parametrize("zipped", [False, True], ids=["before 1.6", "today"])
@pytest.mark.parametrize(
    ("optimizer", "tree"),
    [*((name, "beside the model") for name in OPTIMIZERS), *(("AdamW", tree) for tree in [*TREES][1:])],
)
def test_a_training_checkpoint_gives_the_trained_model(wing, folder, tmp_path, optimizer, tree, zipped):
    source = tmp_path / "model"
    shutil.copytree(folder(n_layer=1), source)
    model = wing.model("causal_lm").from_pretrained(source)
    before = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    steps = OPTIMIZERS[optimizer](model.parameters())
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, labels=ids).loss.backward()
    steps.step()
    expected = model(ids).logits.detach()
    assert any(not np.array_equal(value.detach().numpy(), before[name]) for name, value in model.state_dict().items())
    (source / "model.safetensors").unlink()
    (source / "manifest.json").unlink()
    saved = TREES[tree](model.state_dict(), steps.state_dict())
    torch.save(saved, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.warns(CheckpointWarning, match="left out: .*optimizer"):
        converted = convert(source, tmp_path / "out", fingerprint=False)
    again = wing.model("causal_lm").from_pretrained(converted)
    assert torch.equal(again(ids).logits, expected)
