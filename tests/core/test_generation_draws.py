"""A token that is drawn from a part of the vocabulary is the token that the definition draws from all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from logit_samples import KINDS, make_logits

from gptj import GPTJConfig
from gptj.generation import Decoder, GenerationConfig, Step, generate
from gptj.generation.candidates import Draws, HostRow, find_candidates, is_cut_simply
from gptj.generation.processors import Row, filters
from gptj.generation.sampling import draw, softmax, uniforms


def defined(logits: np.ndarray, config: GenerationConfig, uniform: float) -> int:
    """The cuts one after another over all logits, and the inverse of the cumulative distribution."""
    scores, row = logits.astype(np.float64), Row(np.zeros(1, np.int64), 1, 1)
    for process in filters(config):
        scores = process(row, scores)
    return draw(scores, uniform)


def borders(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The sums of the probabilities, best first: where top_p and the uniform number are hardest to place."""
    return np.minimum(np.cumsum(-np.sort(-softmax(logits.astype(np.float64) / temperature))), 1 - 2**-53)


@settings(max_examples=600, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([1, 2, 3, 11, 60, 500, 513, 4097, 20_000]),
    scale=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 4.0, 50.0]),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.float32, np.float64]),
    temperature=st.sampled_from([1.0, 0.8, 0.01, 1e-6, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 500, 10**6]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-9, "border", "above"]),
    min_p=st.sampled_from([None, 0.05, 0.5, 1.0]),
    where=st.sampled_from(["anywhere", "border", "0", "1"]),
)
@example("flat", 20_000, 0.0, 0, np.float32, 1.0, 0, "border", None, "border")
@example("staircase", 60, 1.0, 0, np.float64, 1.0, 0, 0.5, None, "border")
@example("whiskers", 4097, 4.0, 0, np.float32, 1.0, 0, 1.0, None, "anywhere")
@example("twins", 4097, 1.0, 1, np.float32, 1.0, 50, 1.0, None, "anywhere")
def test_the_token_is_the_definitions_or_none(
    kind, size, scale, seed, dtype, temperature, top_k, top_p, min_p, where
) -> None:
    logits = make_logits(kind, size, scale, seed, dtype)
    sums = borders(logits, temperature)
    some = int(np.random.default_rng(seed + 1).integers(size))
    if top_p in ("border", "above"):
        top_p = float(np.clip(np.nextafter(sums[some], 2) if top_p == "above" else sums[some], 1e-12, 1.0))
    uniform = {"anywhere": float(uniforms(seed, 3, 0)[0]), "0": 0.0, "1": 1 - 2**-53, "border": float(sums[some])}[
        where
    ]
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws, expected = Draws(config, size), defined(logits, config, uniform)
    assert draws._from_best(HostRow(logits), uniform) in (None, expected)
    for depth in (-np.inf, 0.0, -1e-3, -1.0, -20.0, None):  # None: what the step before has left
        if depth is not None:
            draws._many[0] = depth
        assert draws._from_all(logits, uniform, 0) in (None, expected)
    assert draws.token(HostRow(logits), uniform, row=0) in (None, expected)


@pytest.mark.parametrize("as_top_p", [False, True])
def test_what_the_rest_weighs_is_never_taken_for_exact(as_top_p: bool) -> None:
    """The rest is summed in float32, so a number that falls next to a border is left to the definition."""
    logits = make_logits("normal", 20_000, 1.0, 7, np.float32)
    sums, near = borders(logits, 1.0), 0
    for place in range(0, 400, 5):
        for shift in (-1e-9, 0.0, 1e-9):
            share = float(sums[place]) + shift
            config = GenerationConfig(do_sample=True, top_k=0, top_p=share if as_top_p else 1.0)
            uniform = 1 - 1e-9 if as_top_p else share
            token = Draws(config, len(logits))._from_best(HostRow(logits), uniform)
            assert token in (None, defined(logits, config, uniform))
            near += token is None
    assert near == 240


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}]
)
def test_a_models_logits_hardly_ever_need_the_definition(scale: float, options: dict[str, Any]) -> None:
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    draws, random = Draws(config, 50_400), np.random.default_rng(1)
    tokens = []
    for step in range(60):
        logits = (random.standard_normal(50_400) * scale).astype(np.float32)
        uniform = float(uniforms(1, step, 0)[0])
        tokens.append(draws.token(HostRow(logits), uniform, row=0))
        assert tokens[-1] in (None, defined(logits, config, uniform))
    assert tokens.count(None) <= 1


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, -np.inf]), min_size=1, max_size=300), st.integers(1, 300))
def test_candidates_are_the_best(values: list[float], count: int) -> None:
    logits = np.array(values)
    found = find_candidates(logits, min(count, len(values)))
    assert sorted(found.ids.tolist()) == np.flatnonzero(logits > found.bound).tolist()
    assert found.values.tolist() == logits[found.ids].tolist()
    assert len(found.ids) >= min(count, int(np.isfinite(logits).sum()))
    assert found.best() == (int(np.argmax(logits)) if np.isfinite(logits).any() else None)


def test_what_is_cut_otherwise_is_left_to_the_definition() -> None:
    simple = GenerationConfig(do_sample=True, top_p=0.9, min_p=0.1, temperature=0.5)
    assert is_cut_simply(simple)
    for field, value in {
        "typical_p": 0.9,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
        "renormalize_logits": True,
    }.items():
        assert not is_cut_simply(simple.replace(**{field: value}))
    assert not is_cut_simply(GenerationConfig())


class Listed(Decoder):
    """Logits of a list, whatever the tokens."""

    def __init__(self, config: GPTJConfig, batch: int, capacity: int) -> None:
        super().__init__(config, batch, capacity)
        self.step_number = 0

    def _run(self, token_ids: Any, *others: Any, last_only: bool, want: Any) -> Step:
        self.step_number += 1
        logits = np.random.default_rng(self.step_number).standard_normal((self.batch, 3000)).astype(np.float32) * 3
        return Step(logits)

    def _gather(self, rows: Any) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 0, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
        {"do_sample": True, "top_k": 7, "min_p": 0.1, "suppress_tokens": list(range(2900))},
        {"do_sample": True, "typical_p": 0.8},
        {"do_sample": True, "min_new_tokens": 4, "eos_token_id": 5, "bad_words_ids": [[7], [8, 9]]},
    ],
    ids=str,
)
def test_tokens_are_the_same_whether_or_not_the_scores_are_read(options: dict[str, Any]) -> None:
    """With output_scores every row is computed by the definition."""
    config = GPTJConfig(vocab_size=3000, n_embd=8, n_layer=1, n_head=1, rotary_dim=2, n_positions=64)
    settings = GenerationConfig(**{"max_new_tokens": 12, "pad_token_id": 0, **options})
    prompt = np.random.default_rng(0).integers(0, 3000, (5, 6))

    def run(config_of_call: GenerationConfig) -> Any:
        make = lambda batch, capacity: Listed(config, batch, capacity)  # noqa: E731
        return generate(make, prompt, model_config=config, generation_config=config_of_call, seed=4)

    whole = run(settings.replace(return_dict_in_generate=True, output_scores=True))
    assert np.array_equal(run(settings).sequences, whole.sequences) and len(whole.scores) == 12
