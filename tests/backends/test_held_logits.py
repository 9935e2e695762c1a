"""What a wing's device selects of its logits, and that every token is the one chosen on the host.

No device is needed: a wing is told that its logits are not in the host's memory, and then runs what it would run on
one.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from wings import Wing

from gptj.generation import PARTS

PROMPTS = np.random.default_rng(3).integers(0, 200, (5, 7))


def named(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value) or "greedy"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    {"do_sample": True, "top_k": 0, "min_p": 0.02, "sequence_bias": [[[7], 2.0], [[3, 4], -2.0]]},
    {"do_sample": True, "suppress_tokens": list(range(190)), "forced_eos_token_id": 195},
    {"do_sample": True, "typical_p": 0.8, "eta_cutoff": 0.01},
    {"do_sample": True, "remove_invalid_values": True},
    {"do_sample": True, "min_new_tokens": 4, "eos_token_id": 5, "exponential_decay_length_penalty": [2, 1.5]},
    {"num_beams": 3},
    {"num_beams": 2, "do_sample": True, "top_k": 9},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"prompt_lookup_num_tokens": 3, "do_sample": True, "temperature": 0.3},
    {"use_cache": False, "do_sample": True},
]


@pytest.fixture
def on_a_device(wing: Wing, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tells the wing that its logits are on a device; what it then selects and fetches is counted."""
    module = sys.modules[f"gptj.{wing.name}.generate"]
    seen = {"best": 0, "fetched": 0}
    best, fetch = module.Logits.best, module.Logits._fetched

    def counted_best(self: Any, *arguments: Any) -> Any:
        seen["best"] += 1
        return best(self, *arguments)

    def counted_fetch(self: Any, array: Any) -> Any:
        seen["fetched"] += 1
        return fetch(self, array)

    def turn_on() -> dict[str, int]:
        monkeypatch.setattr(module, "on_host", lambda logits: False)
        monkeypatch.setattr(module.Logits, "best", counted_best)
        monkeypatch.setattr(module.Logits, "_fetched", counted_fetch)
        return seen

    return turn_on


def settled(options: dict[str, Any]) -> dict[str, Any]:
    return {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "seed": 5} | options


@pytest.mark.parametrize(("options", "dtype"), [(o, "float32") for o in OPTIONS] + [(OPTIONS[4], "float64")], ids=named)
def test_a_device_changes_no_token(wing, revealing, on_a_device, options, dtype) -> None:
    model = revealing(dtype=dtype)
    here = wing.numpy(model.generate(PROMPTS, **settled(options)))
    seen = on_a_device()
    assert np.array_equal(wing.numpy(model.generate(PROMPTS, **settled(options))), here)
    assert seen["best"] or seen["fetched"]


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.05, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}],
    ids=named,
)
def test_the_vocabulary_stays_on_the_device(wing, revealing, on_a_device, options) -> None:
    seen = on_a_device()
    revealing().generate(PROMPTS, **settled(options))
    assert seen == {"best": 8, "fetched": 0}


def test_a_padded_prompt_and_embeddings_are_continued_the_same(wing, revealing, on_a_device) -> None:
    model = revealing()
    mask = np.ones(PROMPTS.shape, int)
    mask[0, :3] = 0
    embeds = np.random.default_rng(1).standard_normal((2, 4, model.config.n_embd)).astype(np.float32)
    calls = (
        {"input_ids": PROMPTS, "attention_mask": mask, "do_sample": True},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "penalty_alpha": 0.6, "top_k": 3},
    )
    here = [wing.numpy(model.generate(**settled(call))) for call in calls]
    seen = on_a_device()
    for call, expected in zip(calls, here, strict=True):
        assert np.array_equal(wing.numpy(model.generate(**settled(call))), expected)
    assert seen["best"] == 16  # contrastive search computes with all probabilities


def test_an_assistant_is_asked_on_the_device(wing, revealing, on_a_device) -> None:
    model = revealing()
    options = settled({"do_sample": True, "num_assistant_tokens": 3})
    here = wing.numpy(model.generate(PROMPTS, assistant_model=model, **options))
    on_a_device()
    assert np.array_equal(wing.numpy(model.generate(PROMPTS, assistant_model=model, **options)), here)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_what_a_device_selects(wing: Wing, dtype, temperature) -> None:
    """The values in order, whichever of equals, with the sums of what is not above the last."""
    module = sys.modules[f"gptj.{wing.name}.generate"]
    wing.allow_float64()
    logits = (np.random.default_rng(2).standard_normal((3, 700)) * 4).astype(dtype)
    logits[1] = np.round(logits[1])
    logits[2, 5] = np.nan
    named = np.array([[0, 5, 699]] * 3)
    selected = module.Logits(wing.module.from_numpy(logits)).best(40, named, temperature)
    assert selected.finite.tolist() == [True, True, False]
    for row in (0, 1):
        values = -np.sort(-logits[row])[:40]
        assert selected.values[row].tolist() == values.tolist() and selected.values.dtype == dtype
        assert logits[row][selected.ids[row]].tolist() == values.tolist() and len({*selected.ids[row].tolist()}) == 40
        assert selected.named[row].tolist() == logits[row][[0, 5, 699]].tolist()
        if temperature is not None:
            below = logits[row][logits[row] <= values[-1]].astype(np.float64)
            exact = np.exp((below - float(values[0])) / temperature).sum()
            assert selected.rest.shape == (3, PARTS)
            assert abs(selected.rest[row].sum(dtype=np.float64) - exact) <= 2e-6 * exact
    assert (selected.rest is None) == (temperature is None)
