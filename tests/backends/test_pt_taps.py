"""PyTorch's own ways to compute attention, looked into: fused attention, and training with recomputation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wings import FLOAT64_RELATIVE

from gptj.parity.revealing import revealing_config
from gptj.pt import GPTJForCausalLM

IDS = np.random.default_rng(0).integers(0, 214, (2, 7))


@pytest.fixture
def calls(monkeypatch) -> list[Any]:
    """A list that grows with each call of PyTorch's fused attention."""
    seen: list[Any] = []
    fused = F.scaled_dot_product_attention

    def count(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments)
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    return seen


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (None, 0),
        ("h.*.mixed", 3),
        (["h.1.scores", "ln_f"], 2),
        ("h.1.visible", 2),
        ("h.2.weights", 2),
    ],
)
@torch.no_grad()
def test_fused_attention_is_looked_into_as_it_is_unless_what_it_fuses_is_asked_for(folder, calls, names, fused):
    model = GPTJForCausalLM.from_pretrained(folder(), param_dtype="float64", attn_implementation="sdpa")
    plain = GPTJForCausalLM.from_pretrained(folder(), param_dtype="float64")
    taps, expected = model.taps(IDS, names=names), plain.taps(IDS, names=names)
    assert len(calls) == fused
    assert list(taps) == list(expected)
    for name, value in taps.items():
        wanted = expected[name].double()
        assert (value.double() - wanted).abs().max() <= FLOAT64_RELATIVE * wanted.abs().max(), name


def test_taps_carry_gradients_and_recomputation_does_not_hide_them():
    model = GPTJForCausalLM(revealing_config())
    model.gradient_checkpointing_enable()
    model.train()
    taps = model.taps(IDS, labels=IDS, names=["h.1.scores", "loss"])
    (slope,) = torch.autograd.grad(taps["loss"], taps["h.1.scores"])
    assert slope.shape == (2, model.config.n_head, 7, 7)
    assert slope.abs().max() > 0
