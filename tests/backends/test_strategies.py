"""Strategies x frameworks: every strategy in every wing, judged by transformers' tokens or by the oracle's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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
from generation_fields import CALLS, FULL, OUTPUTS
from strategy_table import ROWS
from wings import Wing, close

from gptj.checkpoint import write_checkpoint
from gptj.errors import GPTJError
from gptj.generation.config import ASSISTANT_FIELDS

PROMPTS = np.random.default_rng(3).integers(0, 160, (200, 5))
SEEDS = list(range(200))
CUTS = {"do_sample": True, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.2}
MANY: list[tuple[dict[str, Any], int]] = [
    ({}, 200),
    ({"do_sample": True}, 200),
    (CUTS, 200),
    ({"num_beams": 3}, 200),
    ({"num_beams": 2, "do_sample": True}, 100),
    ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, 100),
    ({"penalty_alpha": 0.6, "top_k": 2}, 100),
]
"""Every strategy, and on how many prompts: those that take several rows a prompt on fewer."""


@pytest.fixture(scope="module")
def model(wing: Wing, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The cases' model by dtype, loaded once."""
    weights = mesh_model_weights()
    folder = tmp_path_factory.mktemp("mesh") / "model"
    write_checkpoint(folder, mesh_model_config(), lambda spec: weights[spec.name])
    loaded: dict[str, Any] = {}

    def find(dtype: str) -> Any:
        if dtype not in loaded:
            loaded[dtype] = wing.model("causal_lm").from_pretrained(folder, param_dtype=dtype)
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


@pytest.mark.parametrize(("options", "prompts"), MANY, ids=str)
def test_hundreds_of_prompts_give_the_oracles_tokens_in_float32(
    wing: Wing, model: Any, options: dict[str, Any], prompts: int
) -> None:
    """float32 logits differ from float64 ones by some 1e-6: in 2,400 choices none is that close."""
    seed = {"seed": SEEDS[:prompts]} if "do_sample" in options else {}
    expected = by_the_oracle(PROMPTS[:prompts], options, **seed).sequences
    found = wing.numpy(model("float32").generate(PROMPTS[:prompts], **seed, **settings(options)))
    differing = np.flatnonzero((found != expected).any(axis=1)).tolist()
    assert not differing, f"prompts {differing} continue otherwise"


FEW = PROMPTS[:8]
ONES = np.array([[1, 8, 9, 2, 1, 5, 2], [1, 7, 6, 4, 1, 3, 4]])
"""Where the next token is a 1, the last two were there before and so was the 1 alone, each followed by others."""
PADDED = np.ones_like(FEW)
PADDED[::2, :2] = 0


@pytest.mark.strategies
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table_gives_the_oracles_tokens(wing: Wing, model: Any, name: str) -> None:
    row, spoken = ROWS[name], model("float64")
    prompts = FEW[:, :1] if name == "forced_bos_token_id" else FEW
    seed = 7 if row.options.get("do_sample") else None
    options = {key: value for key, value in row.options.items() if key not in ASSISTANT_FIELDS}
    mask = {"attention_mask": PADDED} if row.way == "padded" else {}

    def expected(ids: Any, **arguments: Any) -> Any:
        return by_the_oracle(ids, options, decode=decode, **arguments).sequences.tolist()

    arguments: dict[str, Any] = {"tokenizer": SimpleNamespace(decode=decode), **settings(row.options)}
    if row.way == "stream":
        steps = [step.tokens for step in spoken.stream(prompts, seed=seed, **arguments)]
        assert [*map(list, np.stack(steps, 1))] == [line[5:] for line in expected(prompts, seed=seed)]
    elif row.way == "conversation":
        conversation = spoken.conversation(capacity=40)
        for turn in prompts[:2].tolist():
            whole = [*conversation.ids, *turn]
            said = [int(step.tokens[0]) for step in conversation.stream(turn, seed=seed, **arguments)]
            assert [whole + said] == expected([whole], seed=seed)
    else:
        helped = {"assistant_model": model("float32")} if row.way == "assisted" else {}
        found = wing.numpy(spoken.generate(prompts, seed=seed, **mask, **helped, **arguments))
        assert found.tolist() == expected(prompts, seed=seed, **mask)


@pytest.mark.parametrize("field", OUTPUTS)
def test_a_field_of_the_output_gives_the_oracles(wing: Wing, model: Any, field: str) -> None:
    without, changes, part = OUTPUTS[field]
    options = without | changes
    found = getattr(model("float64").generate(FEW, **settings(options)), part)
    expected = getattr(by_the_oracle(FEW, options), part)
    assert getattr(model("float64").generate(FEW, **settings(FULL)), part) is None
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        layers = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
        assert all(close(np.asarray(a), np.asarray(b), "float64") for a, b in layers)


@pytest.mark.parametrize("field", CALLS)
def test_a_field_of_the_way_changes_the_calls_and_not_the_tokens(
    wing: Wing, model: Any, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    run = wing.module.Decoder._run

    def counted(self: Any, ids: Any, *rest: Any, **options: Any) -> Any:
        calls.append(ids.shape)
        return run(self, ids, *rest, **options)

    monkeypatch.setattr(wing.module.Decoder, "_run", counted)

    def both(options: dict[str, Any]) -> tuple[Any, list[tuple[int, ...]]]:
        calls.clear()
        helped = {"assistant_model": model("float32")} if options.get("assistant") else {}
        said = {"sequence_bias": [[[1], 15.0]], "eos_token_id": None, **options}
        said.pop("assistant", None)
        return wing.numpy(model("float64").generate(ONES, **helped, **settings(said))).tolist(), [*calls]

    without, changes = CALLS[field]
    (plain, plain_calls), (other, other_calls) = both(without), both(without | changes)
    assert plain == other and plain_calls != other_calls


def test_G5_logits_that_are_not_finite_are_named_or_repaired(wing: Wing, tmp_path: Path) -> None:
    weights = mesh_model_weights()
    weights["lm_head.bias"][7] = np.nan
    folder = tmp_path / "model"
    write_checkpoint(folder, mesh_model_config(), lambda spec: weights[spec.name], allow_nonfinite=True)
    model = wing.model("causal_lm").from_pretrained(folder)
    with pytest.raises(GPTJError, match=r"row 0, token 7: non-finite logits at step 0 \(found nan\)"):
        model.generate(FEW, **settings({}))
    assert wing.numpy(model.generate(FEW, remove_invalid_values=True, **settings({}))).shape[0] == 8


def decode(ids: Any) -> str:
    """Ids as text, for stop strings."""
    return " ".join(map(str, ids))
