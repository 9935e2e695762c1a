"""The draws: the right distribution, the right order, and numbers that belong to (seed, step, row)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from gptj.errors import InputError
from gptj.generation.processors import keep_top_p
from gptj.generation.sampling import (
    best,
    draw,
    draw_without_replacement,
    exponential,
    log_softmax,
    seeds_and_rows,
    softmax,
    uniforms,
)

DRAWS = 20_000
CHI_SQUARED_999 = {4: 18.47, 11: 31.26}
"""The 99.9 % point by degrees of freedom. The seeds are fixed: the test is passed for good, or failed for good."""


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


def test_tokens_come_as_often_as_the_logits_say() -> None:
    logits = np.array([0.3, -1.0, 1.2, -math.inf, 0.3, -0.2])
    counts = np.bincount([draw(logits, uniforms(1, step, 0)[0]) for step in range(DRAWS)], minlength=6)
    assert counts[3] == 0
    there = logits > -math.inf
    assert chi_squared(counts[there], DRAWS * softmax(logits)[there]) < CHI_SQUARED_999[4]


def test_pairs_drawn_without_replacement_come_as_often_as_two_draws_would_give_them() -> None:
    logits = np.array([0.5, -0.5, 1.0, 0.0])
    share = softmax(logits)
    pairs = list(itertools.permutations(range(4), 2))
    expected = np.array([share[a] * share[b] / (1 - share[a]) for a, b in pairs]) * DRAWS
    drawn = [tuple(draw_without_replacement(logits, 2, uniforms(2, step, 0, 4)).tolist()) for step in range(DRAWS)]
    counts = np.array([drawn.count(pair) for pair in pairs])
    assert chi_squared(counts, expected) < CHI_SQUARED_999[11]


def test_a_draw_is_the_inverse_of_the_cumulative_distribution_best_first_lower_id_first() -> None:
    logits = np.log([0.125, 0.25, 0.5, 0.125])
    edges = {0.0: 2, 0.499: 2, 0.501: 1, 0.749: 1, 0.751: 0, 0.874: 0, 0.876: 3, 1 - 2**-53: 3}
    assert {u: draw(logits, u) for u in edges} == edges
    assert draw(np.zeros(4), 0.5) == 2  # a border belongs to the token after it


@pytest.mark.parametrize("left", [20_000, 9_000, 700, 40])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_a_large_vocabulary_is_cut_and_drawn_from_as_a_small_one(spread: float, left: int) -> None:
    """Sorting only the best few, where they decide, gives what sorting all 20,000 gives; every third logit is a tie.

    So it is where all but `left` logits are -inf, from a cut before.
    """
    logits = np.random.default_rng(9).normal(size=20_000) * spread
    logits[::3] = logits[0]
    logits[np.random.default_rng(3).permutation(20_000)[left:]] = -np.inf
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits - logits.max())
    cumulative = np.cumsum((weights / weights.sum())[order])
    for count in (1, 30, 512, 8192, 19_999):
        assert best(logits, count).tolist() == order[:count].tolist()
    for uniform in uniforms(1, 0, 0, 40):
        assert draw(logits, uniform) == order[np.searchsorted(cumulative, uniform, side="right")]
    for mass in (0.05, 0.5, 0.9, 0.999):
        kept = np.flatnonzero(keep_top_p(logits, mass) > -math.inf)
        assert set(kept) == set(order[: np.searchsorted(cumulative, mass) + 1])


def test_an_exponential_of_a_cut_is_numpys_own_bit_for_bit() -> None:
    """One number more or less on either side of a border would be another text."""
    for seed in range(50):
        random = np.random.default_rng(seed)
        exponent = np.where(random.random(999) < random.random(), -random.random(999) * 99, -np.inf)
        assert (exponential(exponent) == np.exp(exponent)).all()


def test_a_token_without_probability_is_never_drawn() -> None:
    assert draw(np.array([0.0, -2000.0, -math.inf]), 1 - 2**-53) == 0
    assert draw(np.array([-math.inf, -math.inf, 3e38, -3e38]), 1 - 2**-53) == 2


def test_float32_and_float64_logits_of_equal_value_draw_the_same() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    uniform = uniforms(3, 0, 0, 200)
    assert [draw(logits, u) for u in uniform] == [draw(logits.astype(np.float64), u) for u in uniform]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 as its paper has it (Salmon et al. 2011, section 3.3): four words of 64 bits."""
    words, (low, high) = list(counter), key
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (two >> 64) ^ words[1] ^ low,
            two % 2**64,
            (one >> 64) ^ words[3] ^ high,
            one % 2**64,
        ]
        low, high = (low + 0x9E3779B97F4A7C15) % 2**64, (high + 0xBB67AE8584CAA73B) % 2**64
    return words


@pytest.mark.parametrize(("seed", "step", "row"), [(0, 0, 0), (7, 3, 1), (2**64 - 1, 2000, 63)])
def test_the_numbers_are_philox_keyed_by_the_seed_and_counted_by_step_and_row(seed: int, step: int, row: int) -> None:
    """So they can never change with a version of NumPy, and the same seed never gives another text."""
    words = philox([1, row, step, 0], [seed, 0]) + philox([2, row, step, 0], [seed, 0])
    assert uniforms(seed, step, row, 8).tolist() == [(word >> 11) / 2**53 for word in words]


def test_no_two_seeds_steps_or_rows_share_a_number() -> None:
    numbers = {uniforms(seed, step, row)[0] for seed in range(10) for step in range(10) for row in range(10)}
    assert len(numbers) == 1000


def test_one_seed_counts_rows_through_the_batch_and_a_seed_a_prompt_counts_each_from_zero() -> None:
    assert seeds_and_rows(4, 2, 2) == ((4, 4, 4, 4), (0, 1, 2, 3))
    assert seeds_and_rows([4, 9], 2, 2) == ((4, 4, 9, 9), (0, 1, 0, 1))
    assert seeds_and_rows(np.int64(4), 1, 1) == ((4,), (0,))
    first, second = seeds_and_rows(None, 1, 1), seeds_and_rows(None, 1, 1)
    assert first != second


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "7", [1, -1]])
def test_a_seed_that_is_none_is_refused_by_its_value(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed: no such seed .*0 to 2\*\*64 - 1"):
        seeds_and_rows(seed, 2, 1)  # type: ignore[arg-type]


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(InputError, match=r"not one seed a prompt .*expected 3, found 2"):
        seeds_and_rows([1, 2], 3, 1)


def test_best_settles_ties_by_the_lower_index() -> None:
    values = np.array([1.0, 2.0, 2.0, 0.0, 2.0, 1.0])
    for count in range(1, 8):
        assert best(values, count).tolist() == [1, 2, 4, 0, 5, 3][:count]


def test_log_softmax_keeps_what_is_forbidden() -> None:
    result = log_softmax(np.array([0.0, 0.0, -math.inf]))
    assert result.tolist() == [-math.log(2), -math.log(2), -math.inf]
