"""The strategies' shorter ways on the host give what the plain ways gave, to the bit.

A beam search whose scores nobody reads looks at some of each beam's best; with output_scores it computes them all. The
plain forms of what contrastive search and drawing without replacement compute are kept here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_samples import KINDS, OnNumPy, make_logits
from toy_decoder import ToyDecoder, toy_config

from gptj import GPTJConfig
from gptj.errors import GPTJError
from gptj.generation import Decoder, GenerationConfig, Step, generate
from gptj.generation.choice import Choice
from gptj.generation.contrastive import _Context, degeneration
from gptj.generation.processors import Row, processors
from gptj.generation.sampling import draw_without_replacement, softmax, softmax_of
from gptj.generation.session import Session


class Scripted(Decoder):
    """Logits of a kind that is hard to tell apart, which hang on the last token and the column."""

    kind, scale, seed, computed = "normal", 1.0, 0, 0

    def _run(self, token_ids: Any, position_ids: Any, mask: Any, offset: int, *, last_only: bool, want: Any) -> Step:
        size = self.config.vocab_size
        last = [
            make_logits(self.kind, size, self.scale, self.seed + int(token) + 99 * offset, np.float32)
            for token in token_ids[:, -1]
        ]
        return Step(np.stack(last))

    def _gather(self, rows: Any) -> None: ...


BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 5, "num_return_sequences": 3, "eos_token_id": [3, 4, 5]},
    {"num_beams": 3, "repetition_penalty": 1.4, "no_repeat_ngram_size": 1, "eos_token_id": 3},
    {"num_beams": 3, "repetition_penalty": 0.2, "early_stopping": True, "eos_token_id": 1},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 3.0, "length_penalty": 0.5, "eos_token_id": 2},
    {"num_beams": 2, "suppress_tokens": list(range(40)), "min_new_tokens": 3, "eos_token_id": 45},
    {"num_beams": 2, "sequence_bias": [[[0], 20.0], [[1, 2], -5.0]], "forced_eos_token_id": 7, "eos_token_id": 7},
    {"num_beams": 3, "renormalize_logits": True, "remove_invalid_values": True},
]


@settings(max_examples=250, deadline=None)
@given(
    options=st.sampled_from(BEAMS),
    kind=st.sampled_from(sorted({*KINDS} - {"masked", "huge"})),
    size=st.sampled_from([60, 61, 700, 4000]),
    scale=st.sampled_from([1e-8, 0.5, 3.0]),
    seed=st.integers(0, 2**32),
)
def test_a_beam_search_is_the_same_from_the_best_of_each_beam(options, kind, size, scale, seed) -> None:
    config = GPTJConfig(vocab_size=size, n_embd=8, n_layer=1, n_head=1, rotary_dim=2, n_positions=64)

    def make(batch: int, capacity: int) -> Decoder:
        decoder = Scripted(config, batch, capacity)
        decoder.kind, decoder.scale, decoder.seed = kind, scale, seed
        return decoder

    def run(**more: Any) -> Any:
        how = {"max_new_tokens": 6, "pad_token_id": 0, "return_dict_in_generate": True, "eos_token_id": None}
        how_of_call = GenerationConfig(**how | options | more)
        prompt = np.random.default_rng(seed).integers(0, size, (2, 3))
        try:
            return generate(make, prompt, model_config=config, generation_config=how_of_call)
        except GPTJError as error:
            return str(error)

    short, whole = run(), run(output_scores=True)
    if isinstance(whole, str):
        assert short == whole
        return
    assert len(whole.scores) and short.scores is None
    assert np.array_equal(short.sequences, whole.sequences)
    assert short.sequences_scores.tolist() == whole.sequences_scores.tolist()
    assert np.array_equal(short.beam_indices, whole.beam_indices)


@pytest.mark.parametrize("options", BEAMS[:5], ids=lambda options: ", ".join(options))
def test_a_beam_search_hardly_ever_computes_all_scores(options, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kept = Session.adjust
    monkeypatch.setattr(Session, "adjust", lambda self, *a, **o: calls.append(1) or kept(self, *a, **o))
    config = GPTJConfig(vocab_size=4000, n_embd=8, n_layer=1, n_head=1, rotary_dim=2, n_positions=64)
    how = GenerationConfig(**{"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None} | options)
    make = lambda batch, capacity: Scripted(config, batch, capacity)  # noqa: E731
    generate(make, [[1, 2, 3]] * 2, model_config=config, generation_config=how)
    assert not calls


def drawn_plainly(scores: np.ndarray, count: int, uniform: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        noise = -np.log(-np.log(uniform))
    return np.argsort(-(scores + noise), kind="stable")[:count]


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 900),
    count=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_drawing_without_replacement_sorts_only_what_can_be_drawn(kind, size, count, seed) -> None:
    scores = make_logits(kind, size, 3.0, seed, np.float64)
    uniform = np.random.default_rng(seed).random(size)
    uniform[seed % size] = 0.0
    assert draw_without_replacement(scores, count, uniform).tolist() == drawn_plainly(scores, count, uniform).tolist()


@given(kind=st.sampled_from(KINDS), size=st.integers(1, 900), seed=st.integers(0, 2**32))
def test_the_softmax_of_some_tokens_is_the_softmaxs(kind, size, seed) -> None:
    logits = make_logits(kind, size, 3.0, seed, np.float64)
    tokens = np.random.default_rng(seed).integers(0, size, 5)
    assert softmax_of(logits, tokens).tolist() == softmax(logits)[tokens].tolist()


@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 9),
    new=st.integers(0, 5),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_unit_vectors_that_are_kept_are_those_made_anew(rows, columns, new, width, seed) -> None:
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((rows, columns + new, width)).astype(np.float32)
    mask = np.arange(columns) >= random.integers(0, columns, rows)[:, None]
    tried = random.standard_normal((4, width)).astype(np.float32)
    context = _Context(hidden[:, :columns], mask, columns + new)
    for column in range(columns, columns + new):
        context.append(hidden[:, column])
    for row in range(rows):
        seen = np.concatenate([mask[row], np.ones(new, bool)])
        assert context.degeneration(row, tried).tolist() == degeneration(hidden[row, seen], tried).tolist()


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["normal", "ties", "one hot", "flat", "tail", "twins"]),
    size=st.sampled_from([12, 60, 4000]),
    scale=st.sampled_from([0.1, 3.0, 9.0]),
    seed=st.integers(0, 2**32),
    options=st.sampled_from(
        [
            {},
            {"repetition_penalty": 3.0},
            {"do_sample": True, "temperature": 0.3, "top_k": 0},
            {"do_sample": True, "temperature": 4.0, "typical_p": 0.9, "suppress_tokens": [1, 2]},
        ]
    ),
)
def test_a_chance_is_never_more_than_the_probability(kind, size, scale, seed, options) -> None:
    logits = make_logits(kind, size, scale, seed, np.float32)
    config, random = GenerationConfig(**options), np.random.default_rng(seed)
    row = Row(random.integers(0, size, 9), 3, 9)
    choice, scores = Choice(config, size, processors(config, 99)), logits.astype(np.float64)
    for process in processors(config, 99):
        scores = process(row, scores)
    exact = softmax(scores / (config.temperature if config.do_sample else 1.0))
    best = int(np.argmax(scores))
    for held in (logits[None], OnNumPy(logits[None])):
        for token in (best, int(random.integers(size))):
            chance = choice.chances(held, {0: row}, {0: token})[0]
            assert chance <= exact[token]
            if token == best and exact[best] > 0.3 and kind == "normal" and "repetition_penalty" not in options:
                assert chance >= 0.998 * exact[best]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 0.2}], ids=["greedy", "drawn"])
def test_an_assistant_guesses_as_many_tokens_as_by_all_scores(options, threshold, monkeypatch) -> None:
    config = toy_config()

    def calls() -> list[tuple[int, int]]:
        made: list[ToyDecoder] = []

        def assistant(batch: int, capacity: int) -> ToyDecoder:
            made.append(ToyDecoder(config, batch, capacity, seed=1, sharp=6.0))
            return made[0]

        how = GenerationConfig(
            max_new_tokens=25,
            pad_token_id=0,
            assistant_confidence_threshold=threshold,
            num_assistant_tokens=4,
            **options,
        )
        model = lambda batch, capacity: ToyDecoder(config, batch, capacity, seed=1, sharp=5.0)  # noqa: E731
        generate(model, [[1, 2, 3]] * 2, model_config=config, generation_config=how, assistant=assistant, seed=1)
        return made[0].calls

    short = calls()
    monkeypatch.setattr(Session, "surely_above", lambda *a, **o: False)
    assert calls() == short and len(short) > 5
