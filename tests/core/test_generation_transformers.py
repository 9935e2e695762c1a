"""The same tokens as transformers, replayed over the NumPy oracle in float64, and the same processed logits."""

from __future__ import annotations

import numpy as np
import pytest
from generation_cases import CASES, EXPECTED, FOLDER, PADDED_CASES, by_the_oracle

from gptj.generation import processors as p
from gptj.generation.sampling import log_softmax

EXACT = 1e-12
"""Relative. Both sides are float64; only the order of sums of 40 numbers differs."""


@pytest.mark.parametrize(("version", "name"), CASES)
def test_each_prompt_continues_as_in_transformers(version: str, name: str) -> None:
    facts = EXPECTED[version]
    case = facts["cases"][name]
    found = [by_the_oracle([prompt], case["options"]).sequences.tolist() for prompt in facts["prompts"]]
    assert found == case["singles"]


@pytest.mark.parametrize(("version", "name"), PADDED_CASES)
def test_a_padded_batch_continues_as_in_transformers(version: str, name: str) -> None:
    facts = EXPECTED[version]
    case = facts["cases"][name]
    found = by_the_oracle(facts["padded"], case["options"], attention_mask=facts["padded_mask"])
    assert found.sequences.tolist() == case["padded"]


def test_the_cases_can_tell_options_apart() -> None:
    """An option that were ignored would show: its case differs from greedy's, or from another beam search's."""
    new = {name: case["singles"] for name, case in EXPECTED["4.57.6"]["cases"].items() if name != "lookup"}
    assert all(result != new["greedy"] for name, result in new.items() if name != "greedy")
    assert new["beams, long"] != new["beams, short"] != new["beams"] != new["beams, two eos"]


PROCESSED = {
    "penalize_repetition": lambda row, x: p.penalize_repetition(row, x, 1.4),
    "forbid_ngrams": lambda row, x: p.forbid_ngrams(row, x, 2),
    "decay_length": lambda row, x: p.decay_length(x, [2, 5], 1.3, 3),
    "keep_top_k": lambda row, x: p.keep_top_k(x, 5),
    "keep_top_p": lambda row, x: p.keep_top_p(x, 0.8),
    "keep_top_p_3": lambda row, x: p.keep_top_p(x, 0.1, 3),
    "keep_min_p": lambda row, x: p.keep_min_p(x, 0.1),
    "keep_min_p_3": lambda row, x: p.keep_min_p(x, 0.99, 3),
    "keep_typical": lambda row, x: p.keep_typical(x, 0.6),
    "keep_typical_3": lambda row, x: p.keep_typical(x, 0.01, 3),
    "keep_above_epsilon": lambda row, x: p.keep_above_epsilon(x, 0.05),
    "keep_above_epsilon_3": lambda row, x: p.keep_above_epsilon(x, 0.9, 3),
    "keep_above_eta": lambda row, x: p.keep_above_eta(x, 0.05),
    "log_softmax": lambda row, x: log_softmax(x),
}


@pytest.mark.parametrize("name", [*PROCESSED, "bias_sequences"])
def test_each_processor_does_what_transformers_does(name: str) -> None:
    with np.load(FOLDER / "processors_4.57.6.npz") as file:
        ids, logits, expected = file["ids"], file["logits"], file[name]
    biases = [((3,), 1.5), ((int(ids[0, -1]), 8), -2.0)]
    process = PROCESSED.get(name, lambda row, x: p.bias_sequences(row, x, biases))
    found = np.stack([process(row, x) for row, x in zip(ids, logits, strict=True)])
    assert not np.array_equal(expected, logits), "the fixture would not show a processor that does nothing"
    np.testing.assert_allclose(found, expected, rtol=EXACT)
