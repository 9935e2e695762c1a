"""What Flax alone needs for fine-tuning: optax."""

from __future__ import annotations

import importlib.util

import pytest
from finetune_samples import tuned_model
from wings import named_backends

from gptj.errors import BackendError
from gptj.finetune import Settings

__test__ = "flax" in named_backends()  # where it is not under test, Flax may not be there
if __test__:
    from gptj.flax.finetune import TrainingStep, open_model


def test_where_optax_is_missing_it_is_asked_for(tmp_path, monkeypatch):
    model = open_model(tuned_model(tmp_path / "model", n_layer=1), Settings())
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optax" else found(name))
    with pytest.raises(BackendError, match=r"optax is not installed.*gptj-multibackend\[finetune\]"):
        TrainingStep(model, Settings())
