"""A token chosen from what a device selects, with what processors change of few tokens, is the definition's token.

The device is NumPy's here, and as unhelpful as a device may be: it leaves out any of the logits that equal the last
one, sums in float32 one number after another, and takes the smallest numbers for 0. What the wings' devices select is
held against the same definition in tests/backends/test_held_logits.py.
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
from gptj.generation import Decoder, GenerationConfig, Step, generate, known_tokens_only
from gptj.generation.candidates import SUM_ERROR, HostRow
from gptj.generation.changes import Changed, repetition
from gptj.generation.choice import Choice
from gptj.generation.held import HeldRow
from gptj.generation.processors import FewTokens, Row, filters, processors
from gptj.generation.sampling import draw, uniforms

PROCESSED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "encoder_repetition_penalty": 7.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[0], [1, 2]]},
    {"sequence_bias": [[[0], 30.0], [[1], -1e30], [[2], 1e-9]]},
    {"sequence_bias": [[[0], -1000.0], [[3, 4], 1000.0]], "repetition_penalty": 1e4},
    {"suppress_tokens": list(range(9)), "begin_suppress_tokens": [9]},
    {"min_new_tokens": 50, "eos_token_id": [1, 2], "exponential_decay_length_penalty": [1, 1.5]},
    {"min_length": 90, "eos_token_id": 3},
    {"eos_token_id": 3, "exponential_decay_length_penalty": [1, 1e6]},
]


def definition(logits: np.ndarray, config: GenerationConfig, row: Row, uniform: float) -> int | None:
    """All processors and cuts over the whole row; None where no token is left."""
    scores = logits.astype(np.float64)
    for process in processors(config, 99):
        scores = process(row, scores)
    if not scores.max() > -np.inf:
        return None
    for cut in filters(config):
        scores = cut(row, scores)
    return draw(scores, uniform) if config.do_sample else int(np.argmax(scores))


@settings(max_examples=800, deadline=None)
@given(
    kind=st.sampled_from(sorted({*KINDS} - {"masked"})),
    size=st.sampled_from([11, 12, 60, 500, 513, 1100, 4097, 20_000]),
    scale=st.sampled_from([0.0, 1e-8, 0.1, 1.0, 4.0, 50.0]),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.float32, np.float64]),
    cuts=st.sampled_from(
        [
            None,
            {"top_k": 0},
            {"top_k": 1},
            {"top_k": 7, "temperature": 0.7},
            {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
            {"top_k": 0, "top_p": 0.9},
            {"top_k": 0, "top_p": 0.5, "temperature": 30.0},
            {"top_k": 0, "min_p": 0.05, "temperature": 0.01},
            {"top_k": 0, "top_p": 0.99, "min_p": 1e-4, "temperature": 1e-6},
        ]
    ),
    processed=st.sampled_from(PROCESSED),
    uniform=st.sampled_from([None, 0.0, 1 - 2**-53]),
)
def test_what_is_chosen_is_the_definitions(kind, size, scale, seed, dtype, cuts, processed, uniform) -> None:
    random = np.random.default_rng(seed)
    logits = make_logits(kind, size, scale, seed, dtype)
    config = GenerationConfig(**processed, **({} if cuts is None else {"do_sample": True, **cuts}))
    # The best tokens are among those that processors change: a model repeats itself.
    ids = np.concatenate([random.integers(0, size, 8), np.argsort(-logits)[: random.integers(1, 40)]])
    row = Row(ids, int(random.integers(1, len(ids))), len(ids))
    uniform = float(uniforms(seed, 3, 0)[0]) if uniform is None else uniform
    expected = definition(logits, config, row, uniform)
    choice = Choice(config, size, processors(config, 99))
    held = OnNumPy(np.stack([logits, logits[::-1]]))
    assert choice.on_device(held, {0: row}, {0: uniform}).get(0, expected) == expected
    assert choice.on_host(logits, row, uniform, 0) in (None, expected)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["normal", "ties", "tail", "twins", "one hot"]),
    size=st.sampled_from([60, 513, 20_000, 50_400]),
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([1.0, 0.8, 0.3, 5.0]),
    factor=st.sampled_from([None, 0.25, 1.1, 3.0, 1e4]),
)
def test_what_the_rest_weighs_is_known_within_its_error(kind, size, seed, temperature, factor) -> None:
    random = np.random.default_rng(seed)
    logits = make_logits(kind, size, 3.0, seed, np.float32)
    after, changed = logits.astype(np.float64), None
    if factor is not None:
        changes = [repetition(np.concatenate([random.integers(0, size, 99), np.argsort(-logits)[:9]]), factor)]
        after = changes[0].of(after)
        tokens = Changed.named(changes)
        changed = Changed.by(changes, tokens, logits[tokens])
    asked = np.zeros((1, 0), np.int64) if changed is None else changed.tokens[None]
    device = HeldRow(OnNumPy(logits[None]).best(50, asked, temperature), 0, size, changed)
    for row in (device, HostRow(logits, changed)):
        found = row.candidates(50)
        best = float(after.max())
        outside = np.ones(size, bool)
        outside[found.ids] = False
        assert (after[outside] <= found.bound).all() and (after[~outside] > found.bound).all()
        exact = np.exp((after[outside] - best) / temperature).sum()
        weight, error = row.rest(found, best, temperature)
        assert abs(weight - exact) <= error + SUM_ERROR * (1 + exact)
        with np.errstate(over="ignore"):
            assert error <= 1e-4 * np.exp(max(float(logits.max()) - best, 0.0) / temperature) * size


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=20),
    st.integers(0, 20),
    st.integers(0, 10),
    st.sampled_from(PROCESSED),
)
def test_a_change_is_the_same_of_few_tokens_as_of_the_row(ids, prompt, seed, processed) -> None:
    logits = np.random.default_rng(seed).standard_normal(13)
    row = Row(np.array(ids), min(prompt, len(ids)), len(ids))
    config = GenerationConfig(**processed)
    whole, changes = logits, []
    for process in processors(config, 99):
        assert isinstance(process, FewTokens)
        whole = process(row, whole)
        changes.append(process.change(row))
    tokens = Changed.named(changes)
    changed = Changed.by(changes, tokens, logits[tokens])
    assert np.array_equal(changed.after, whole[tokens])
    others = ~changed.holds(np.arange(13))
    assert np.array_equal(whole[others], logits[others]) and others.sum() == 13 - len(tokens)


class Listed(Decoder):
    """Logits of a list, whatever the tokens, on a device or not."""

    on_device = False
    spoilt = False

    def __init__(self, config: GPTJConfig, batch: int, capacity: int) -> None:
        super().__init__(config, batch, capacity)
        self.calls = 0

    def _run(self, token_ids: Any, *others: Any, last_only: bool, want: Any) -> Step:
        self.calls += 1
        shape = (self.batch, token_ids.shape[1], 3000)
        logits = np.random.default_rng(self.calls).standard_normal(shape).astype(np.float32) * 3
        logits[0] = np.round(logits[0])  # ties
        if self.spoilt and self.calls == 3:
            logits[1, -1, 7] = np.nan
        logits = logits[:, -1] if last_only else logits
        return Step(OnNumPy(logits) if self.on_device else logits)

    def _gather(self, rows: Any) -> None: ...


def run(settings_of_call: dict[str, Any], *, on_device: bool, spoilt: bool = False, **arguments: Any) -> Any:
    config = GPTJConfig(vocab_size=3000, n_embd=8, n_layer=1, n_head=1, rotary_dim=2, n_positions=64)
    prompt = np.random.default_rng(0).integers(0, 3000, (4, 6))

    def make(batch: int, capacity: int) -> Decoder:
        decoder = Listed(config, batch, capacity)
        decoder.on_device, decoder.spoilt = on_device, spoilt
        return decoder

    chosen = GenerationConfig(
        **{"max_new_tokens": 10, "pad_token_id": 0, "return_dict_in_generate": True, **settings_of_call}
    )
    return generate(make, prompt, model_config=config, generation_config=chosen, seed=4, **arguments)


def named(options: dict[str, Any]) -> str:
    return ", ".join(options) or "greedy"


ALL: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"renormalize_logits": True},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "num_return_sequences": 2},
    {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    {"do_sample": True, "suppress_tokens": list(range(2900))},
    {"do_sample": True, "typical_p": 0.8},
    {"do_sample": True, "eta_cutoff": 0.01, "epsilon_cutoff": 0.001},
    {"do_sample": True, "min_new_tokens": 4, "eos_token_id": 5, "bad_words_ids": [[7], [8, 9]]},
    {"forced_bos_token_id": 3, "forced_eos_token_id": 4, "do_sample": True},
    {"do_sample": True, "remove_invalid_values": True},
    {"output_logits": True, "output_scores": True, "do_sample": True},
    {"num_beams": 3},
    {"num_beams": 2, "do_sample": True, "top_k": 5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"prompt_lookup_num_tokens": 3, "do_sample": True, "temperature": 0.1},
    {"use_cache": False, "do_sample": True},
    {"prefill_chunk_size": 2},
]


@pytest.mark.parametrize("options", ALL, ids=named)
def test_a_device_changes_no_token(options: dict[str, Any]) -> None:
    there, here = (run(options, on_device=on_device) for on_device in (True, False))
    assert np.array_equal(there.sequences, here.sequences)
    for field in ("logits", "scores"):
        assert np.array_equal(getattr(there, field) or (), getattr(here, field) or ())


@pytest.mark.parametrize("options", ALL, ids=named)
def test_keeping_to_known_tokens_reads_no_scores_and_is_the_same(options: dict[str, Any]) -> None:
    def plain(ids: Any, logits: Any) -> Any:
        return known_tokens_only(200, but=[2000, 2950])(ids, logits)

    options = {"max_new_tokens": 4, "eos_token_id": 2000} | options
    for on_device in (True, False):
        known, custom = (
            run(options, on_device=on_device, logits_processor=[processor])
            for processor in (known_tokens_only(200, but=[2000, 2950]), plain)
        )
        assert np.array_equal(known.sequences, custom.sequences)
        assert np.array_equal(known.scores or (), custom.scores or ())
    new = known.sequences[:, 6:]
    assert ((new < 200) | np.isin(new, [2000, 2950])).all()


def test_keeping_to_known_tokens_takes_its_place_among_the_callers_functions() -> None:
    """After a processor that undoes it, it is done; before it, undone."""
    undo = lambda ids, logits: np.where(np.isneginf(logits), 99.0, logits)  # noqa: E731
    done, undone = (
        run({}, on_device=True, logits_processor=those).sequences[:, 6:]
        for those in ([undo, known_tokens_only(200)], [known_tokens_only(200), undo])
    )
    assert (done < 200).all() and (undone >= 200).all()


@pytest.mark.parametrize("sampled", [False, True])
def test_the_callers_functions_see_all_scores_of_a_device(sampled: bool) -> None:
    def run_with(on_device: bool) -> Any:
        return run(
            {"do_sample": sampled},
            on_device=on_device,
            logits_processor=[lambda ids, scores: scores * 0.5],
            stopping_criteria=[lambda ids, scores: scores.max(axis=1) > 8],
            allowed=lambda prompt, ids: range(prompt, 3000),
        )

    assert np.array_equal(run_with(True).sequences, run_with(False).sequences)


def test_a_logit_of_a_device_that_is_not_finite_is_refused_by_its_place() -> None:
    with pytest.raises(GPTJError, match="row 1, token 7: non-finite logits at step 2"):
        run({}, on_device=True, spoilt=True)


def test_only_rows_that_candidates_do_not_decide_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, ...]] = []
    kept = OnNumPy._fetched

    def fetch(self: OnNumPy, array: Any) -> np.ndarray:
        fetched.append(array.shape)
        return kept(self, array)

    monkeypatch.setattr(OnNumPy, "_fetched", fetch)
    run({"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}, on_device=True)
    run({"repetition_penalty": 1.1}, on_device=True)
    assert all(shape[0] == 1 for shape in fetched) and len(fetched) <= 10  # the row of ties alone, now and then
    run({"do_sample": True, "typical_p": 0.5}, on_device=True)
    assert fetched[-1] == (4, 3000)


def test_an_assistant_on_a_device_guesses_the_same() -> None:
    """Real history: what is guessed wrong is forgotten on the device too."""

    class There(ToyDecoder):
        def _run(self, *args: Any, **options: Any) -> Step:
            step = super()._run(*args, **options)
            return Step(OnNumPy(step.logits), step.hidden_states, step.attentions)

    def run_on(kind: type[ToyDecoder]) -> Any:
        config = toy_config()
        return generate(
            lambda batch, capacity: kind(config, batch, capacity, seed=1),
            [[1, 2, 3, 4]] * 2,
            model_config=config,
            generation_config=GenerationConfig(do_sample=True, max_new_tokens=20, pad_token_id=0, top_k=5),
            assistant=lambda batch, capacity: kind(config, batch, capacity, seed=2),
            seed=3,
        )

    assert np.array_equal(run_on(There).sequences, run_on(ToyDecoder).sequences)
