"""The settings of generation that are tested in every wing, and the model that they are tested on.

The model is the mesh fixture's, trained by the original code, made less sure of itself and fonder of its eos, so
that options tell. `EXPECTED` holds what transformers generates with it (tests/data/generation/make_expected.py).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from oracle_decoder import OracleDecoder
from reference import MESH_CONFIG, mesh_weights

from gptj import GPTJConfig
from gptj.generation import GenerateOutput, GenerationConfig, generate
from gptj.parity.oracle import Oracle

FOLDER = Path(__file__).parents[1] / "data" / "generation"
EXPECTED: dict[str, dict[str, Any]] = {
    version: json.loads((FOLDER / f"transformers_{version}.json").read_text()) for version in ("4.57.6", "4.46.3")
}
CASES = [(version, name) for version, file in EXPECTED.items() for name in file["cases"]]
PADDED_CASES = [(version, name) for version, name in CASES if "padded" in EXPECTED[version]["cases"][name]]

SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "warm": {"top_k": 0, "temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_k": 0, "top_p": 0.8},
    "min_p": {"top_k": 0, "min_p": 0.1},
    "typical": {"top_k": 0, "typical_p": 0.7},
    "epsilon": {"top_k": 0, "epsilon_cutoff": 0.02},
    "eta": {"top_k": 0, "eta_cutoff": 0.05},
    "three of each": {"num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
"""Settings that draw; transformers draws other numbers, so here the oracle is the judge."""


def mesh_model_weights() -> dict[str, NDArray[np.float32]]:
    """The model's tensors in float32."""
    facts, weights = EXPECTED["4.57.6"], mesh_weights()
    bias = weights["lm_head.bias"].copy()
    bias[facts["eos"]] += np.float32(1)
    return weights | {"lm_head.weight": weights["lm_head.weight"] * np.float32(facts["flatter"]), "lm_head.bias": bias}


def mesh_model_config() -> GPTJConfig:
    return GPTJConfig(**MESH_CONFIG, bos_token_id=None, eos_token_id=None)


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """`options` beside what all cases share."""
    facts = EXPECTED["4.57.6"]
    return {"max_new_tokens": 12, "eos_token_id": facts["eos"], "pad_token_id": facts["pad"]} | options


@cache
def mesh_oracle() -> Oracle:
    return Oracle(mesh_model_config(), mesh_model_weights())


def by_the_oracle(prompts: Any, options: dict[str, Any], **arguments: Any) -> GenerateOutput:
    """What the oracle, in float64, generates."""
    return generate(
        lambda batch, capacity: OracleDecoder(mesh_oracle(), batch, capacity),
        prompts,
        model_config=mesh_oracle().config,
        generation_config=GenerationConfig(**settings(options)),
        **arguments,
    )
