"""The same tokens as transformers, replayed over the NumPy oracle in float64, and the same processed logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_decoder import OracleDecoder
from reference import MESH_CONFIG, mesh_weights

from gptj import GPTJConfig
from gptj.generation import GenerationConfig, generate
from gptj.generation import processors as p
from gptj.generation.sampling import log_softmax
from gptj.parity.oracle import Oracle

FOLDER = Path(__file__).parent.parent / "data" / "generation"
EXPECTED = [json.loads((FOLDER / f"transformers_{v}.json").read_text()) for v in ("4.57.6", "4.46.3")]
CASES = [pytest.param(n, name, id=name) for n, file in enumerate(EXPECTED) for name in file["cases"]]
PADDED = [
    pytest.param(n, name, id=name)
    for n, f in enumerate(EXPECTED)
    for name in f["cases"]
    if "padded" in f["cases"][name]
]

EXACT = 1e-12
"""Relative. Both sides are float64; only the order of sums of 40 numbers differs."""


@cache
def oracle() -> Oracle:
    weights = {name: array.astype(np.float64) for name, array in mesh_weights().items()}
    weights["lm_head.weight"] = weights["lm_head.weight"] * EXPECTED[0]["flatter"]
    weights["lm_head.bias"] = weights["lm_head.bias"].copy()
    weights["lm_head.bias"][EXPECTED[0]["eos"]] += 1.0
    return Oracle(GPTJConfig(**MESH_CONFIG, eos_token_id=None), weights)


def ours(facts: dict[str, Any], options: dict[str, Any], prompts: list[list[int]], mask: Any = None) -> list[list[int]]:
    config = GenerationConfig(
        **{"max_new_tokens": 12, "eos_token_id": facts["eos"], "pad_token_id": facts["pad"]} | options
    )
    output = generate(
        lambda batch, capacity: OracleDecoder(oracle(), batch, capacity),
        prompts,
        model_config=oracle().config,
        generation_config=config,
        attention_mask=mask,
    )
    return output.sequences.tolist()


@pytest.mark.parametrize(("file", "name"), CASES)
def test_each_prompt_continues_as_in_transformers(file: int, name: str) -> None:
    facts = EXPECTED[file]
    case = facts["cases"][name]
    found = [ours(facts, case["options"], [prompt]) for prompt in facts["prompts"]]
    assert found == case["singles"]


@pytest.mark.parametrize(("file", "name"), PADDED)
def test_a_padded_batch_continues_as_in_transformers(file: int, name: str) -> None:
    facts = EXPECTED[file]
    case = facts["cases"][name]
    assert ours(facts, case["options"], facts["padded"], facts["padded_mask"]) == case["padded"]


def test_the_cases_can_tell_options_apart() -> None:
    """An option that were ignored would show: its case differs from greedy's, or from another beam search's."""
    new = {name: case["singles"] for name, case in EXPECTED[0]["cases"].items() if name != "lookup"}
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
