"""Beam search against the list of all continuations, and what the groups and the draws of beams owe."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from toy_decoder import ToyDecoder, toy_config

from gptj.errors import GPTJError
from gptj.generation import GenerateOutput, GenerationConfig, generate
from gptj.generation.sampling import log_softmax

VOCAB, EOS, NEW = 5, 2, 3
CONFIG = toy_config(vocab_size=VOCAB)
PROMPT = [1, 3, 0]
WIDE = 64
"""More beams than there are running continuations (4 ** 2) and candidates (4 ** 2 * 5 = 80 are looked at twice 64)."""

SAME = 1e-12


def toy(batch: int, capacity: int) -> ToyDecoder:
    return ToyDecoder(CONFIG, batch, capacity, dtype=np.float64, sharp=1.0)


def search(prompts: list[list[int]] | None = None, seed: Any = None, **options: Any) -> GenerateOutput:
    options = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0} | options
    return generate(
        toy,
        [PROMPT] if prompts is None else prompts,
        model_config=CONFIG,
        generation_config=GenerationConfig(**options),
        seed=seed,
    )


def log_probability(tokens: tuple[int, ...]) -> float:
    decoder = toy(1, len(PROMPT) + NEW)
    logits, total = decoder.prefill(np.array([PROMPT])).logits, 0.0
    for token in tokens:
        total += float(log_softmax(logits)[0, token])
        logits = decoder.step(np.array([token])).logits
    return total


def everything() -> dict[tuple[int, ...], float]:
    """Every continuation that ends with its first eos or at the full length, and its log probability."""
    complete = {}
    for length in range(1, NEW + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == NEW):
                complete[tokens] = log_probability(tokens)
    return complete


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_wide_enough_beams_find_the_best_of_all_continuations_in_order(length_penalty: float) -> None:
    scores = {tokens: total / len(tokens) ** length_penalty for tokens, total in everything().items()}
    best = sorted(scores, key=lambda tokens: -scores[tokens])[:10]
    output = search(num_beams=WIDE, num_return_sequences=10, length_penalty=length_penalty, early_stopping="never")
    found = [tuple(row[3:end].tolist()) for row, end in zip(output.sequences, output.lengths, strict=True)]
    assert found == best
    assert output.sequences_scores == pytest.approx([scores[tokens] for tokens in best], rel=SAME)


def test_probabilities_of_all_continuations_sum_to_one() -> None:
    """The brute force itself is complete."""
    assert sum(np.exp(list(everything().values()))) == pytest.approx(1, rel=SAME)


def test_early_stopping_takes_the_first_that_end() -> None:
    """With it, a search ends as soon as there are num_beams hypotheses, though a longer one would have won."""
    options: dict[str, Any] = {
        "num_beams": 2,
        "length_penalty": 4.0,
        "max_new_tokens": 12,
        "sequence_bias": [[[EOS], 2.5]],
    }
    early = search(early_stopping=True, **options)
    late = search(early_stopping="never", **options)
    assert early.lengths[0] < late.lengths[0]
    assert early.sequences_scores is not None
    assert late.sequences_scores is not None
    assert early.sequences_scores[0] < late.sequences_scores[0]


def test_more_continuations_than_there_are_is_an_error() -> None:
    with pytest.raises(GPTJError, match=r"prompt 0: fewer continuations .*num_return_sequences = 4, found 3"):
        search(num_beams=4, num_return_sequences=4, max_new_tokens=1, suppress_tokens=[0, 1])


def test_no_continuation_comes_back_twice() -> None:
    output = search(num_beams=8, num_return_sequences=8, max_new_tokens=2)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 8


def test_groups_that_pay_nothing_for_likeness_find_the_same() -> None:
    """A penalty near 0 leaves every group with the plain search's answer; a large one makes them differ at once."""
    plain = search(num_beams=2, eos_token_id=None).sequences[0].tolist()
    alike = search(
        num_beams=6, num_beam_groups=3, diversity_penalty=1e-12, eos_token_id=None, num_return_sequences=6
    ).sequences.tolist()
    assert alike[0] == alike[1] == alike[2] == plain
    apart = search(
        num_beams=3, num_beam_groups=3, diversity_penalty=50.0, eos_token_id=None, num_return_sequences=3
    ).sequences
    assert all(len(set(column)) == 3 for column in apart[:, 3:].T.tolist())


def test_beam_draws_are_without_replacement_and_belong_to_the_prompt_s_seed() -> None:
    options: dict[str, Any] = {"num_beams": 3, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    prompts = [PROMPT, [4, 4, 1]]
    both = search(prompts, seed=[5, 6], **options)
    assert len({tuple(row) for row in both.sequences[:3].tolist()}) == 3
    alone = search(prompts[1:], seed=[6], **options)
    trimmed = [row[:end].tolist() for row, end in zip(both.sequences[3:], both.lengths[3:], strict=True)]
    assert trimmed == [row[:end].tolist() for row, end in zip(alone.sequences, alone.lengths, strict=True)]
    assert search(prompts[1:], seed=[7], **options).sequences.tolist() != alone.sequences.tolist()


def test_equal_prompts_of_one_seed_draw_different_numbers() -> None:
    options: dict[str, Any] = {"num_beams": 3, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    output = search([PROMPT, PROMPT], seed=5, max_new_tokens=6, **options).sequences.tolist()
    assert output[:3] != output[3:]


def test_beams_go_on_although_every_one_of_them_likes_each_eos_best() -> None:
    """Looking at 2 * num_beams candidates would find nothing but the two eos of both beams."""
    output = search(
        num_beams=2,
        eos_token_id=[2, 3],
        sequence_bias=[[[0], -9.0], [[1], -9.0], [[4], -9.0]],
        early_stopping="never",
        length_penalty=40.0,
        max_new_tokens=4,
    )
    assert output.lengths.tolist() == [3 + 4]


def test_equal_scores_prefer_the_earlier_beam_and_the_lower_id() -> None:
    class Level(ToyDecoder):
        def _run(self, *args: Any, **options: Any) -> Any:
            step = super()._run(*args, **options)
            return type(step)(np.zeros_like(step.logits))

    output = generate(
        lambda batch, capacity: Level(CONFIG, batch, capacity),
        [PROMPT],
        model_config=CONFIG,
        generation_config=GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=2),
    )
    assert output.sequences[:, 3:].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
