"""Every processor against its definition, spelt out token by token; ties included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj.generation import GenerationConfig
from gptj.generation import processors as p
from gptj.generation.sampling import log_softmax

VOCAB = 7
SURE = 1e-9
"""A sum of seven float64 within this of a border is on either side of it: such a draw is not judged."""

# Few different values, so that ties are the rule.
LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 2.0, -math.inf]), min_size=VOCAB, max_size=VOCAB).filter(
    lambda x: max(x) > -math.inf
)
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)
LEAST = st.integers(1, 3)
many = settings(max_examples=300, deadline=None)


def probabilities(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def best_first(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def kept(result: Any) -> set[int]:
    return {i for i, x in enumerate(result) if x > -math.inf}


def check_cut(logits: list[float], result: Any, stay: set[int]) -> None:
    """What stays is as it was, and it is what should stay of what was there."""
    assert kept(result) == {i for i in stay if logits[i] > -math.inf}
    assert all(result[i] == logits[i] for i in kept(result))


@many
@given(LOGITS, st.integers(1, 9))
def test_top_k_keeps_the_k_largest_and_their_equals(logits: list[float], k: int) -> None:
    border = sorted(logits, reverse=True)[min(k, VOCAB) - 1]
    check_cut(logits, p.keep_top_k(np.array(logits), k), {i for i in range(VOCAB) if logits[i] >= border})


@many
@given(LOGITS, st.floats(0.01, 1), LEAST)
def test_top_p_keeps_the_fewest_best_that_hold_the_mass(logits: list[float], mass: float, least: int) -> None:
    share, order = probabilities(logits), best_first(logits)
    stay, held = set(), 0.0
    for place, token in enumerate(order):
        if abs(held - mass) < SURE:
            return
        if held < mass or place < least:
            stay.add(token)
        held += share[token]
    check_cut(logits, p.keep_top_p(np.array(logits), mass, least), stay)


@many
@given(LOGITS, st.floats(0, 1), LEAST)
def test_min_p_keeps_what_is_probable_beside_the_best(logits: list[float], ratio: float, least: int) -> None:
    share = probabilities(logits)
    if any(abs(s - ratio * max(share)) < SURE for s in share if s not in (0, max(share))):
        return
    stay = {i for i in range(VOCAB) if share[i] >= ratio * max(share)} | set(
        best_first(logits)[:least] if least > 1 else []
    )
    check_cut(logits, p.keep_min_p(np.array(logits), ratio, least), stay)


@many
@given(LOGITS, st.floats(0.01, 0.99), LEAST)
def test_typical_keeps_what_is_nearest_to_the_expected_surprise(logits: list[float], mass: float, least: int) -> None:
    share = probabilities(logits)
    there = [i for i in range(VOCAB) if share[i] > 0]
    entropy = -sum(share[i] * math.log(share[i]) for i in there)
    distance = {i: abs(-math.log(share[i]) - entropy) for i in there}
    order = sorted(there, key=lambda i: (distance[i], i))
    near = [abs(distance[a] - distance[b]) for a in there for b in there if logits[a] != logits[b]]
    if any(n < SURE for n in near):  # two values on both sides of the entropy: either may come first
        return
    held, last = 0.0, order[-1]
    for token in order:
        held += share[token]
        if abs(held - mass) < SURE:
            return
        if held >= mass:
            last = token
            break
    stay = {i for i in there if distance[i] <= distance[last] + SURE} | set(order[:least])
    check_cut(logits, p.keep_typical(np.array(logits), mass, least), stay)


@many
@given(LOGITS, st.floats(0.001, 0.9), LEAST, st.booleans())
def test_epsilon_and_eta_keep_what_is_probable_enough(
    logits: list[float], epsilon: float, least: int, eta: bool
) -> None:
    share = probabilities(logits)
    entropy = -sum(s * math.log(s) for s in share if s > 0)
    border = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)) if eta else epsilon
    if any(abs(s - border) < SURE for s in share):
        return
    least_best = sorted(logits, reverse=True)[least - 1]
    stay = {i for i in range(VOCAB) if share[i] >= border or logits[i] >= least_best}
    cut = p.keep_above_eta if eta else p.keep_above_epsilon
    check_cut(logits, cut(np.array(logits), epsilon, least), stay)


@many
@given(IDS, LOGITS, st.floats(0.1, 9))
def test_repetition_penalty_changes_every_seen_token_once(ids: list[int], logits: list[float], penalty: float) -> None:
    result = p.penalize_repetition(np.array(ids), np.array(logits), penalty)
    for token, x in enumerate(logits):
        expected = x if token not in ids else x * penalty if x < 0 else x / penalty
        assert result[token] == expected


@many
@given(IDS, st.integers(1, 4), st.integers(1, 9))
def test_no_ngram_comes_twice(ids: list[int], size: int, prompt: int) -> None:
    seen = [tuple(ids[n : n + size]) for n in range(len(ids) - size + 1)]
    result = p.forbid_ngrams(np.array(ids), np.zeros(VOCAB), size)
    end = tuple(ids[len(ids) - size + 1 :])
    if len(ids) >= size - 1:
        assert kept(result) == {t for t in range(VOCAB) if (*end, t) not in seen}
    of_prompt = [tuple(ids[:prompt][n : n + size]) for n in range(len(ids[:prompt]) - size + 1)]
    result = p.forbid_ngrams(np.array(ids), np.zeros(VOCAB), size, made_from=np.array(ids[:prompt]))
    if len(ids) >= size - 1:
        assert kept(result) == {t for t in range(VOCAB) if (*end, t) not in of_prompt}


@many
@given(
    IDS,
    st.dictionaries(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(tuple), st.floats(-9, 9), max_size=5
    ),
)
def test_a_bias_counts_where_its_sequence_is_being_made(ids: list[int], biases: dict[tuple[int, ...], float]) -> None:
    result = p.bias_sequences(np.array(ids), np.zeros(VOCAB), list(biases.items()))
    for token in range(VOCAB):
        made = [b for s, b in biases.items() if (*ids, token)[-len(s) :] == s]
        assert result[token] == pytest.approx(sum(made), abs=SURE)


def test_a_bad_word_is_caught_where_the_whole_prompt_is_its_beginning() -> None:
    """transformers 4.57.6 lets this one through: it wants the context to be as long as the word."""
    config = GenerationConfig(bad_words_ids=[[1, 2]])
    (ban,) = p.processors(config, 9)
    assert kept(ban(p.Row(np.array([1]), 1, 1), np.zeros(4))) == {0, 1, 3}


@many
@given(LOGITS, st.lists(st.integers(0, VOCAB - 1), max_size=6), st.floats(0.1, 3))
def test_diversity_costs_once_for_each_time_taken(logits: list[float], taken: list[int], penalty: float) -> None:
    result = p.diversify(np.array(logits), taken, penalty)
    assert result == pytest.approx([x - penalty * taken.count(i) for i, x in enumerate(logits)])


def test_the_eos_grows_with_every_token_after_the_start() -> None:
    config = GenerationConfig(exponential_decay_length_penalty=(2, 1.5), eos_token_id=[0, 2])
    (grow,) = p.processors(config, 99)
    logits = np.array([-2.0, 1.0, 4.0])
    for made, expected in ((2, [-2, 1, 4]), (3, [-1, 1, 6]), (4, [0.5, 1, 9])):
        row = p.Row(np.zeros(5 + made, np.int64), 5, 5 + made)
        assert grow(row, logits).tolist() == expected


@many
@given(LOGITS, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), st.floats(0.5, 2), st.integers(1, 9))
def test_a_length_decay_raises_each_eos_by_its_size(
    logits: list[float], eos: list[int], factor: float, beyond: int
) -> None:
    result = p.decay_length(np.array(logits), eos, factor, beyond)
    for token, x in enumerate(logits):
        raised = x if token not in eos or math.isinf(x) else x + abs(x) * (factor**beyond - 1)
        assert result[token] == pytest.approx(raised)


@many
@given(LOGITS, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
def test_suppressed_tokens_are_gone_and_forced_ones_are_all_that_is_left(logits: list[float], named: list[int]) -> None:
    check_cut(logits, p.suppress(np.array(logits), named), set(range(VOCAB)) - set(named))
    assert p.force(np.array(logits), named).tolist() == [0 if i in named else -math.inf for i in range(VOCAB)]


@many
@given(LOGITS)
def test_normalised_logits_are_the_logarithms_of_the_probabilities(logits: list[float]) -> None:
    expected = [math.log(share) if share > 0 else -math.inf for share in probabilities(logits)]
    assert log_softmax(np.array(logits)).tolist() == pytest.approx(expected)


@many
@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -2.5]), min_size=1, max_size=9))
def test_repaired_logits_are_finite_and_the_finite_ones_are_as_they_were(logits: list[float]) -> None:
    largest = float(np.finfo(np.float32).max)
    wanted = [0.0 if math.isnan(x) else max(min(x, largest), -largest) for x in logits]
    assert p.repair(np.array(logits)).tolist() == wanted


def test_a_forbidden_eos_does_not_grow_into_nan() -> None:
    result = p.decay_length(np.array([-math.inf, 1.0]), [0], 2.0, 5000)
    assert result.tolist() == [-math.inf, 1.0]
    assert np.isfinite(p.decay_length(np.array([3.0, 1.0]), [0], 2.0, 5000)).all()


def row(ids: list[int], *, prompt: int, padding: int = 0) -> p.Row:
    return p.Row(np.array(ids), prompt, len(ids) + padding)


@pytest.mark.parametrize(
    ("options", "seen", "stay"),
    [
        ({"min_length": 4, "eos_token_id": 1}, row([0, 0, 0], prompt=2), {0, 2, 3}),
        ({"min_length": 4, "eos_token_id": 1}, row([0, 0, 0], prompt=2, padding=1), {0, 1, 2, 3}),
        ({"min_new_tokens": 2, "eos_token_id": [1, 2]}, row([0, 0, 0], prompt=2), {0, 3}),
        ({"min_new_tokens": 2, "eos_token_id": [1, 2]}, row([0, 0, 0], prompt=2, padding=3), {0, 3}),
        ({"min_new_tokens": 2, "eos_token_id": [1, 2]}, row([0, 0, 0, 0], prompt=2), {0, 1, 2, 3}),
        ({"forced_bos_token_id": 3}, row([0], prompt=1, padding=4), {3}),
        ({"forced_bos_token_id": 3}, row([0, 0], prompt=2), {0, 1, 2, 3}),
        ({"forced_eos_token_id": [2, 3]}, row([0] * 8, prompt=2, padding=1), {2, 3}),
        ({"forced_eos_token_id": 2}, row([0] * 8, prompt=2), {0, 1, 2, 3}),
        ({"suppress_tokens": [0, 3]}, row([0], prompt=1), {1, 2}),
        ({"begin_suppress_tokens": [0, 3]}, row([0, 1], prompt=2), {1, 2}),
        ({"begin_suppress_tokens": [0, 3]}, row([0, 1, 1], prompt=2), {0, 1, 2, 3}),
        ({"begin_suppress_tokens": [0], "forced_bos_token_id": 2}, row([0, 2], prompt=1), {1, 2, 3}),
        ({"bad_words_ids": [[1], [2]], "eos_token_id": 2}, row([0], prompt=1), {0, 2, 3}),
    ],
)
def test_a_rule_of_length_or_place_holds_there_and_only_there(
    options: dict[str, Any], seen: p.Row, stay: set[int]
) -> None:
    logits = np.zeros(4)
    for process in p.processors(GenerationConfig(**options), total_length=10):
        logits = process(seen, logits)
    assert kept(logits) == stay


def test_the_order_is_that_of_transformers() -> None:
    """The penalty, then temperature, then top_p: without the first two, top_p would keep all three."""
    config = GenerationConfig(do_sample=True, temperature=0.1, top_k=0, top_p=0.9, repetition_penalty=2.0, min_p=0.01)
    logits = np.array([1.0, 0.95, 0.2])
    for process in (*p.processors(config, 9), *p.filters(config)):
        logits = process(row([0], prompt=1), logits)
    assert logits == pytest.approx([-math.inf, 9.5, -math.inf])


def test_beam_sampling_keeps_enough_tokens_for_one_that_is_no_eos() -> None:
    config = GenerationConfig(do_sample=True, num_beams=2, top_k=1, top_p=0.01, eos_token_id=[0, 1], min_p=1.0)
    logits = np.array([3.0, 2.0, 1.0, 0.0])
    for process in p.filters(config):
        logits = process(row([0], prompt=1), logits)
    assert kept(logits) == {0, 1, 2}


@pytest.mark.parametrize(
    "name", [n for n in p.__all__ if n.startswith(("keep", "penalize", "forbid", "bias", "suppress"))]
)
def test_no_processor_changes_what_it_is_given(name: str) -> None:
    ids, logits = np.array([1, 2, 1]), np.linspace(-1, 1, VOCAB)
    ids.setflags(write=False)
    logits.setflags(write=False)
    arguments = {
        "penalize_repetition": (ids, logits, 2.0),
        "forbid_ngrams": (ids, logits, 2),
        "bias_sequences": (ids, logits, [((1, 2), 1.0)]),
        "suppress": (logits, [1]),
        "keep_allowed": (logits, [1]),
    }.get(name, (logits, 2 if name == "keep_top_k" else 0.3))
    getattr(p, name)(*arguments)
