"""Strategies x frameworks: every strategy in every wing, judged by transformers' tokens or by the oracle's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from generation_cases import (
    CASES,
    EXPECTED,
    PADDED_CASES,
    SAMPLED,
    by_the_oracle,
    mesh_model_config,
    mesh_model_weights,
    settings,
)
from wings import Wing

from gptj.checkpoint import write_checkpoint

PROMPTS = np.random.default_rng(3).integers(0, 160, (200, 5))
SEEDS = list(range(200))


@pytest.fixture(scope="module")
def model(wing: Wing, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The cases' model by dtype, loaded once."""
    weights = mesh_model_weights()
    folder = tmp_path_factory.mktemp("mesh") / "model"
    write_checkpoint(folder, mesh_model_config(), lambda spec: weights[spec.name])
    loaded: dict[str, Any] = {}

    def find(dtype: str) -> Any:
        if dtype not in loaded:
            loaded[dtype] = wing.model("causal_lm").from_pretrained(folder, dtype=dtype)
        return loaded[dtype]

    return find


@pytest.mark.parametrize(("version", "name"), CASES)
def test_the_tokens_are_those_of_transformers(wing: Wing, model: Any, version: str, name: str) -> None:
    facts = EXPECTED[version]
    case = facts["cases"][name]
    options = settings(case["options"])
    found = [wing.numpy(model("float64").generate([prompt], **options)).tolist() for prompt in facts["prompts"][3:]]
    assert found == case["singles"][3:]


@pytest.mark.parametrize(("version", "name"), PADDED_CASES)
def test_the_tokens_of_a_padded_batch_are_those_of_transformers(
    wing: Wing, model: Any, version: str, name: str
) -> None:
    facts = EXPECTED[version]
    case = facts["cases"][name]
    options = settings(case["options"])
    found = model("float64").generate(facts["padded"], attention_mask=facts["padded_mask"], **options)
    assert wing.numpy(found).tolist() == case["padded"]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_tokens_that_a_seed_draws_are_those_of_the_oracle(wing: Wing, model: Any, name: str) -> None:
    options = {"do_sample": True, **SAMPLED[name]}
    expected = by_the_oracle(PROMPTS[:20], options, seed=7).sequences
    assert (
        wing.numpy(model("float64").generate(PROMPTS[:20], seed=7, **settings(options))).tolist() == expected.tolist()
    )


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_two_hundred_prompts_give_the_oracles_tokens_in_float32(
    wing: Wing, model: Any, options: dict[str, Any]
) -> None:
    """float32 logits differ from float64 ones by some 1e-6: in 2,400 choices none is that close."""
    seed = {"seed": SEEDS} if "do_sample" in options else {}
    expected = by_the_oracle(PROMPTS, options, **seed).sequences
    found = wing.numpy(model("float32").generate(PROMPTS, **seed, **settings(options)))
    differing = np.flatnonzero((found != expected).any(axis=1)).tolist()
    assert not differing, f"prompts {differing} continue otherwise"


def test_an_assistant_changes_no_token(wing: Wing, model: Any) -> None:
    for options in ({}, {"do_sample": True, "seed": 5}):
        plain = wing.numpy(model("float64").generate(PROMPTS[:8], **settings(options)))
        helped = model("float64").generate(PROMPTS[:8], assistant_model=model("float32"), **settings(options))
        assert wing.numpy(helped).tolist() == plain.tolist()
