"""The loop: what must not change its answer, what it hands out, and what it refuses before it computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from toy_decoder import ToyDecoder, toy_config

from gptj.errors import ConfigError, GPTJError, InputError
from gptj.generation import Decoder, GenerateOutput, GenerationConfig, Step, generate, stream
from gptj.generation.decoder import round_up, round_up_columns

CONFIG = toy_config()
PROMPTS = [[4, 5, 6, 7], [1, 2, 3, 9], [8, 8, 1, 0]]
SHORT = [[6, 7], [1, 2, 3, 9], [0]]
PADDED = [[22, 22, 6, 7], [1, 2, 3, 9], [22, 22, 22, 0]]
MASK = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
SEEDS = [3, 4, 5]

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "sample, cut": {"do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "sample, twice": {"do_sample": True, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "suppress_tokens": [5]},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam, never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
    "beam_sample": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "group_beam": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lookup, sampled": {"prompt_lookup_num_tokens": 3, "do_sample": True},
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def config(name: str = "greedy", **options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 9, "eos_token_id": 3, "pad_token_id": 0} | STRATEGIES[name] | options)


def toy(batch: int, capacity: int) -> ToyDecoder:
    return ToyDecoder(CONFIG, batch, capacity)


def run(prompts: Any, how: GenerationConfig, *, factory: Any = toy, seed: Any = None, **rest: Any) -> GenerateOutput:
    seed = SEEDS[: len(prompts)] if seed is None and how.do_sample else seed
    return generate(factory, prompts, model_config=CONFIG, generation_config=how, seed=seed, **rest)


def texts(output: GenerateOutput, prompt_columns: int) -> list[list[int]]:
    return [row[prompt_columns:end].tolist() for row, end in zip(output.sequences, output.lengths, strict=True)]


# ---- what must not change the answer


@every_strategy
def test_a_prompt_gives_the_same_alone_and_in_a_batch(name: str) -> None:
    together = texts(run(PROMPTS, config(name)), 4)
    alone = [text for n in range(3) for text in texts(run(PROMPTS[n : n + 1], config(name), seed=SEEDS[n : n + 1]), 4)]
    assert together == alone


@every_strategy
def test_a_prompt_gives_the_same_with_and_without_padding(name: str) -> None:
    together = texts(run(PADDED, config(name), attention_mask=MASK), 4)
    alone = [t for n in range(3) for t in texts(run([SHORT[n]], config(name), seed=SEEDS[n : n + 1]), len(SHORT[n]))]
    assert together == alone


def test_the_padding_is_not_a_token_that_was_said() -> None:
    """Each row is padded with the very token that it would say next, and repetition is forbidden."""
    how = config(repetition_penalty=50.0, no_repeat_ngram_size=1)
    alone = [texts(run([prompt], how), len(prompt))[0] for prompt in SHORT]
    padded = [[text[0]] * (4 - len(prompt)) + prompt for text, prompt in zip(alone, SHORT, strict=True)]
    assert texts(run(padded, how, attention_mask=MASK), 4) == alone


@every_strategy
def test_the_cache_changes_nothing(name: str) -> None:
    cached, uncached = (run(PADDED, config(name, use_cache=on), attention_mask=MASK) for on in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "contrastive"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
def test_a_prompt_in_chunks_is_the_prompt(name: str, chunk: int) -> None:
    chunked = run(PADDED, config(name, prefill_chunk_size=chunk), attention_mask=MASK)
    assert chunked.sequences.tolist() == run(PADDED, config(name), attention_mask=MASK).sequences.tolist()


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "beam" not in name])
def test_the_stream_is_the_whole(name: str) -> None:
    whole = run(PADDED, config(name), attention_mask=MASK)
    seed = SEEDS if config(name).do_sample else None
    steps = list(
        stream(toy, PADDED, model_config=CONFIG, generation_config=config(name), attention_mask=MASK, seed=seed)
    )
    assert [step.index for step in steps] == list(range(len(steps)))
    assert np.stack([step.tokens for step in steps], axis=1).tolist() == whole.sequences[:, 4:].tolist()
    assert sum(step.running for step in steps).tolist() == (whole.lengths - 4).tolist()
    assert steps[-1].ended.all()


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("assistant_seed", [0, 1])
def test_an_assistant_changes_nothing(options: dict[str, Any], schedule: str, assistant_seed: int) -> None:
    """Neither one that is nearly right (the same toy, less sharp) nor one that is always wrong (another toy)."""
    how = config(max_new_tokens=20, **options)
    helped = how.replace(num_assistant_tokens=4, num_assistant_tokens_schedule=schedule)

    def assistant(batch: int, capacity: int) -> ToyDecoder:
        return ToyDecoder(CONFIG, batch, capacity, seed=assistant_seed, sharp=0.4)

    plain = run(PADDED, how, attention_mask=MASK)
    assert run(PADDED, helped, attention_mask=MASK, assistant=assistant).sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_good_assistant_saves_calls_of_the_model(name: str) -> None:
    """One that is the model itself draws with the model's numbers, so even its draws are all right."""
    made: list[ToyDecoder] = []

    def counted(batch: int, capacity: int) -> ToyDecoder:
        made.append(ToyDecoder(CONFIG, batch, capacity))
        return made[-1]

    how = config(name, max_new_tokens=20, eos_token_id=None)
    run(PROMPTS[:1], how, factory=counted)
    run(
        PROMPTS[:1],
        how.replace(assistant_confidence_threshold=0.0, num_assistant_tokens=4),
        factory=counted,
        assistant=toy,
    )
    plain, helped = (len(decoder.calls) for decoder in made)
    assert (plain, helped) == (20, 5)  # the prompt's, which gives 1 token, then 5 + 5 + 5 + 4


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    how = config("sample", max_new_tokens=20)
    one, same, other = (run(PROMPTS, how, seed=seed).sequences.tolist() for seed in (7, 7, 8))
    assert one == same != other


def test_a_seed_that_was_drawn_can_be_used_again() -> None:
    how = config("sample", max_new_tokens=20)
    first = generate(toy, PROMPTS, model_config=CONFIG, generation_config=how)
    again = run(PROMPTS, how, seed=first.seeds[0])
    assert first.sequences.tolist() == again.sequences.tolist()


def test_sampling_at_temperature_zero_is_greedy() -> None:
    how = config("sample", temperature=0.0)
    assert run(PROMPTS, how).sequences.tolist() == run(PROMPTS, config()).sequences.tolist()


def test_a_cold_temperature_comes_near_greedy_without_overflow() -> None:
    how = config("sample", temperature=1e-6)
    assert run(PROMPTS, how).sequences.tolist() == run(PROMPTS, config()).sequences.tolist()


def test_equal_logits_choose_the_lower_id() -> None:
    class Level(ToyDecoder):
        def _run(self, *args: Any, **options: Any) -> Step:
            return Step(np.zeros_like(super()._run(*args, **options).logits))

    output = run(
        PROMPTS[:1], config(eos_token_id=None, suppress_tokens=[0, 1]), factory=lambda b, c: Level(CONFIG, b, c)
    )
    assert texts(output, 4) == [[2] * 9]


# ---- when rows end


def test_a_row_ends_at_its_eos_and_is_padded_and_the_batch_ends_with_its_last_row() -> None:
    plain = run(PROMPTS, config(eos_token_id=None, max_new_tokens=12)).sequences[:, 4:]
    eos = int(plain[0, 2])
    output = run(PROMPTS, config(eos_token_id=[eos, 21], pad_token_id=17, max_new_tokens=12))
    for row, full in zip(texts(output, 4), plain.tolist(), strict=True):
        ends = [n for n, token in enumerate(full) if token in (eos, 21)]
        assert row == full[: ends[0] + 1 if ends else 12]
    for row, end in zip(output.sequences, output.lengths, strict=True):
        assert (row[end:] == 17).all()


@every_strategy
def test_what_comes_after_a_rows_end_is_the_padding_id_even_one_that_the_model_does_not_have(name: str) -> None:
    output = run(PROMPTS, config(name, pad_token_id=99, eos_token_id=list(range(8)), min_new_tokens=1))
    assert len(set(output.lengths.tolist())) > 1
    for row, end in zip(output.sequences, output.lengths, strict=True):
        assert (row[:end] < 23).all()
        assert (row[end:] == 99).all()


def test_contrastive_search_never_takes_what_is_forbidden() -> None:
    """Of four candidates two are forbidden, and nothing is less like the context than a token that cannot be."""
    how = config("contrastive", penalty_alpha=1.0, suppress_tokens=list(range(21)), eos_token_id=None)
    assert (run(PROMPTS, how).sequences[:, 4:] >= 21).all()


def test_length_is_counted_in_columns_or_in_new_tokens_or_is_twenty() -> None:
    for options, columns in (({"max_length": 7}, 7), ({"max_new_tokens": 7}, 11), ({}, 24)):
        how = GenerationConfig(eos_token_id=None, **options)
        assert run(PROMPTS, how).sequences.shape == (3, columns)


def test_without_a_length_the_positions_are_the_end() -> None:
    output = run([[1] * 60], GenerationConfig())
    assert output.sequences.shape == (1, 64)


def decode(ids: Any) -> str:
    return "".join(chr(97 + i) for i in ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it() -> None:
    plain = texts(run(PROMPTS, config(eos_token_id=None)), 4)
    string = decode(plain[1][3:5])
    how = config(eos_token_id=None, stop_strings=[string, "never here"])
    for name in ("greedy", "beam"):
        stopped = texts(run(PROMPTS, how.replace(**STRATEGIES[name]), decode=decode), 4)
        assert any(len(row) < 9 for row in stopped)
        for row in stopped:
            assert string not in decode(row[:-1])
            assert len(row) == 9 or decode(row).endswith(string)


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    how = config(eos_token_id=None, stop_strings=decode(PROMPTS[0]))
    assert run(PROMPTS[:1], how, decode=decode).sequences.shape == (1, 13)


def test_time_ends_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("gptj.generation.stopping.time.monotonic", lambda: next(clock))
    output = run(PROMPTS, config(eos_token_id=None, max_time=3.0))
    assert output.sequences.shape == (3, 4 + 3)  # made at second 0, asked at 1, 2 and 3


def test_a_criterion_of_the_callers_may_end_all_rows_or_some() -> None:
    output = run(PROMPTS, config(eos_token_id=None), stopping_criteria=[lambda ids, scores: ids.shape[1] >= 6])
    assert output.sequences.shape == (3, 6)
    only_second = run(
        PROMPTS, config(eos_token_id=None), stopping_criteria=[lambda ids, scores: ids[:, 0] == PROMPTS[1][0]]
    )
    assert only_second.lengths.tolist() == [13, 5, 13]


def test_a_processor_of_the_callers_runs_before_temperature_and_the_cuts() -> None:
    seen: list[tuple[int, ...]] = []

    def only_odd(ids: Any, logits: Any) -> Any:
        seen.append(ids.shape)
        logits[:, ::2] = -math.inf
        return logits

    output = run(PROMPTS, config("sample, cut", eos_token_id=None), logits_processor=[only_odd])
    assert (output.sequences[:, 4:] % 2 == 1).all()
    assert seen[:2] == [(3, 4), (3, 5)]


# ---- what is handed back


@every_strategy
def test_outputs_come_where_asked_one_a_step(name: str) -> None:
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    output = run(PROMPTS, config(name, return_dict_in_generate=True, **wanted))
    how = config(name)
    rows = 3 * (how.num_beams if how.num_beams > 1 else how.num_return_sequences)
    assert output.logits is not None
    assert output.scores is not None
    assert output.hidden_states is not None
    assert output.attentions is not None
    steps = len(output.logits)
    assert steps >= output.lengths.max() - 4
    assert all(x.shape == (rows, 23) and x.dtype == np.float32 for x in (*output.logits, *output.scores))
    assert [h[-1].shape[1] for h in output.hidden_states] == [4] + [1] * (steps - 1)
    assert [a[0].shape for a in output.attentions[:2]] == [(rows, 1, 4, 4), (rows, 1, 1, 5)]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "contrastive"])
def test_the_tokens_follow_from_the_scores_that_are_handed_back(name: str) -> None:
    how = config(name, return_dict_in_generate=True, output_scores=True, eos_token_id=None)
    output = run(PROMPTS, how)
    assert output.scores is not None
    if output.beam_indices is None and not how.do_sample:
        assert np.stack([s.argmax(1) for s in output.scores], 1).tolist() == output.sequences[:, 4:].tolist()
    if output.beam_indices is not None and not how.num_beam_groups > 1:
        for n, sequence in enumerate(output.sequences[:, 4:]):
            total = sum(output.scores[k][output.beam_indices[n, k], token] for k, token in enumerate(sequence))
            assert output.sequences_scores is not None
            assert total / len(sequence) ** how.length_penalty == pytest.approx(output.sequences_scores[n], rel=1e-5)


def test_a_streamer_gets_the_prompts_then_the_tokens_then_the_end() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, tokens: Any) -> None:
            self.got.append(tokens.tolist())

        def end(self) -> None:
            self.got.append("end")

    recorder = Recorder()
    output = run(PROMPTS, config(), streamer=recorder)
    assert recorder.got == [PROMPTS, *output.sequences[:, 4:].T.tolist(), "end"]


def test_nothing_that_was_passed_in_is_changed() -> None:
    prompts, mask = np.array(PADDED), np.array(MASK)
    before = prompts.copy(), mask.copy()
    run(prompts, config("processors"), attention_mask=mask)
    assert (prompts == before[0]).all()
    assert (mask == before[1]).all()


# ---- what is refused


def never(batch: int, capacity: int) -> Decoder:
    raise AssertionError("a decoder was made before the arguments were checked")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 23]], r"input_ids\[0\]\[1\]: no such token \(expected 0 to 22, found 23\)"),
        ([[1, -1]], r"input_ids\[0\]\[1\]: no such token \(expected 0 to 22, found -1\)"),
        ([[1.0, 2.0]], r"input_ids: not whole numbers \(expected an integer array, found float64\)"),
        ([[True, False]], r"input_ids: not whole numbers .*found bool"),
        ([1, 2], r"input_ids: of another shape .*found \(2,\)"),
        ([[[1]]], r"input_ids: of another shape .*found \(1, 1, 1\)"),
        ([[1, 2], [3]], r"input_ids: rows of different lengths"),
        ([[]], r"input_ids: .*"),
        (np.zeros((0, 3), np.int64), r"input_ids: of another shape .*found \(0, 3\)"),
        (np.full((1, 2), -128, np.int8), r"no such token .*found -128"),
        (
            [[1] * 60],
            r"max_new_tokens: longer than the model's positions .*n_positions = 64 .*found 60 of the prompt \+ 9 new",
        ),
    ],
)
def test_G1_a_prompt_that_is_none_is_refused_before_anything_is_computed(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(never, prompts, model_config=CONFIG, generation_config=config())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[0, 0, 0, 0], [1, 1, 1, 1]], r"attention_mask\[0\]: a prompt without a token"),
        ([[1, 1, 1, 1], [1, 1, 1, 0]], r"attention_mask\[1\]\[3\]: padding to the right of a token .*padding_side"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], r"attention_mask\[0\]\[1\]: padding to the right"),
        ([[1, 1, 1, 2], [1, 1, 1, 1]], r"attention_mask\[0\]\[3\]: not a mask \(expected 0 or 1, found 2\)"),
        ([[1.0, 1, 1, 0.5], [1, 1, 1, 1]], r"attention_mask\[0\]\[3\]: not a mask .*found 0\.5"),
        ([[1, 1, 1], [1, 1, 1]], r"attention_mask: of another shape .*expected \(2, 4\), found \(2, 3\)"),
    ],
)
def test_G3_a_mask_that_is_none_is_refused_before_anything_is_computed(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(never, PROMPTS[:2], model_config=CONFIG, generation_config=config(), attention_mask=mask)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"max_new_tokens": 10**9}, {}, r"max_new_tokens: longer than the model's positions"),
        ({"max_new_tokens": None, "max_length": 4}, {}, r"max_length: leaves no room .*above the prompt's 4, found 4"),
        ({"eos_token_id": 23}, {}, r"eos_token_id: no such token \(expected 0 to 22, found 23\)"),
        ({"bad_words_ids": [[1, 50]]}, {}, r"bad_words_ids: no such token .*found 50"),
        ({"sequence_bias": [[[50], 1.0]]}, {}, r"sequence_bias: no such token"),
        ({"suppress_tokens": [99]}, {}, r"suppress_tokens: no such token"),
        ({"stop_strings": ["a"]}, {}, r"decode: stop_strings need the tokenizer"),
        ({"eos_token_id": None, "pad_token_id": None}, {"stopping_criteria": [len]}, r"pad_token_id: needed to fill"),
        ({"do_sample": True}, {"seed": -1}, r"seed: no such seed"),
        ({"num_assistant_tokens": 3}, {}, r"num_assistant_tokens: has no effect without an assistant model"),
        ({"num_beams": 2}, {"assistant": toy}, r"assistant: assists greedy decoding and sampling alone .*found beam"),
        ({"prompt_lookup_num_tokens": 2}, {"assistant": toy}, r"assistant: .*found prompt_lookup_num_tokens"),
    ],
)
def test_G4_options_that_do_not_fit_the_call_are_refused_before_anything_is_computed(
    options: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        generate(never, PROMPTS, model_config=CONFIG, generation_config=config(**options), **arguments)


def test_a_beam_search_is_not_streamed() -> None:
    with pytest.raises(InputError, match="a beam search knows its tokens only at its end"):
        stream(never, PROMPTS, model_config=CONFIG, generation_config=config("beam"))
    with pytest.raises(InputError, match="streamer: a beam search knows"):
        generate(never, PROMPTS, model_config=CONFIG, generation_config=config("beam"), streamer=object())  # type: ignore[arg-type]


def test_an_assistant_of_another_vocabulary_is_refused() -> None:
    other = toy_config(vocab_size=9)
    with pytest.raises(InputError, match=r"assistant: another vocabulary than the model's \(expected 23, found 9\)"):
        run(PROMPTS, config(), assistant=lambda batch, capacity: ToyDecoder(other, batch, capacity))


class Broken(ToyDecoder):
    """One logit is `value` from the second step on."""

    value = math.nan

    def _run(self, *args: Any, **options: Any) -> Step:
        logits = super()._run(*args, **options).logits.copy()
        if self.length >= 5:
            logits[0, 7] = self.value
        return Step(logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["greedy", "sample", "beam", "beam_sample"])
def test_G5_logits_that_are_not_finite_stop_the_run(value: float, name: str) -> None:
    class Now(Broken):
        pass

    Now.value = value
    with pytest.raises(GPTJError, match=rf"row 0, token 7: non-finite logits at step 2 \(found {value}\)"):
        run(PROMPTS, config(name, eos_token_id=None), factory=lambda b, c: Now(CONFIG, b, c))


def test_invalid_values_may_be_repaired_instead() -> None:
    how = config(eos_token_id=None, remove_invalid_values=True)
    output = run(PROMPTS, how, factory=lambda b, c: Broken(CONFIG, b, c))
    assert output.sequences.shape == (3, 13)


@pytest.mark.parametrize("name", ["greedy", "sample", "contrastive"])
def test_a_row_with_every_token_forbidden_is_an_error(name: str) -> None:
    with pytest.raises(GPTJError, match="row 0: no token is left to choose at step 0"):
        run(PROMPTS, config(name, suppress_tokens=list(range(23))))


def test_custom_functions_that_return_something_else_are_named() -> None:
    with pytest.raises(InputError, match=r"logits_processor: returned something else than logits .*floats \(3, 23\)"):
        run(PROMPTS, config(), logits_processor=[lambda ids, logits: None])
    with pytest.raises(InputError, match=r"stopping_criteria: answered neither a bool nor one a row .*bool \(3,\)"):
        run(PROMPTS, config(), stopping_criteria=[lambda ids, scores: np.zeros(5, bool)])


# ---- the decoder's bookkeeping


def test_a_decoder_refuses_what_its_cache_has_no_room_for() -> None:
    decoder = toy(1, 4)
    decoder.prefill(np.array([[1, 2, 3, 4]]))
    with pytest.raises(InputError, match=r"the cache is full .*4 of 4 slots taken"):
        decoder.step(np.array([1]))
    with pytest.raises(InputError, match="the cache is not empty"):
        decoder.prefill(np.array([[1]]))
    with pytest.raises(InputError, match=r"truncate: no such length \(expected 0 to 4, found 5\)"):
        decoder.truncate(5)
    with pytest.raises(InputError, match=r"another batch than the cache's .*expected 1, found 2"):
        decoder.step(np.array([1, 2]))
    with pytest.raises(InputError, match=r"max_length: no such cache .*1 to n_positions = 64, found 65"):
        toy(1, 65)


def test_a_refused_step_leaves_the_decoder_as_it_was() -> None:
    decoder, other = toy(1, 5), toy(1, 5)
    for d in (decoder, other):
        d.prefill(np.array([[1, 2, 3]]))
    with pytest.raises(InputError):
        decoder.step(np.array([23]))
    assert decoder.length == 3
    assert decoder.step(np.array([4])).logits.tolist() == other.step(np.array([4])).logits.tolist()


def test_positions_count_tokens_and_not_padding() -> None:
    decoder = toy(2, 6)
    decoder.prefill(np.array([[9, 9, 1, 2], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool))
    decoder.step(np.array([5, 5]))
    assert decoder.positions[:, :5].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_truncate_and_select_give_back_what_was() -> None:
    decoder = toy(2, 8)
    decoder.prefill(np.array([[1, 2, 3], [4, 5, 6]]))
    before = decoder.step(np.array([7, 8])).logits
    decoder.step(np.array([9, 9]))
    decoder.truncate(3)
    assert not decoder.mask[:, 3:].any()
    decoder.select([1, 1, 0])
    again = decoder.step(np.array([8, 8, 7])).logits
    assert again.tolist() == before[[1, 1, 0]].tolist()
    assert (decoder.batch, decoder.length) == (3, 4)
    assert decoder.mask.tolist() == [[True] * 4 + [False] * 4] * 3


@pytest.mark.parametrize("most", [1, 7, 2048, 2056])
@pytest.mark.parametrize("fewest", [1, 8, 64])
def test_a_size_rounded_up_is_enough_and_one_of_few(most, fewest):
    sizes = [round_up(count, most, fewest=fewest) for count in range(1, most + 1)]
    assert all(count <= size <= max(2 * count, fewest) and size <= most for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and len({*sizes}) <= 17
    assert all(size <= count + 255 for count, size in enumerate(sizes, 1) if count > 256)


@pytest.mark.parametrize(("columns", "width"), [(1, 1), (2, 8), (9, 16), (257, 512), (1030, 1280), (1990, 2000)])
def test_a_prompt_is_rounded_up_unless_it_is_one_token(columns, width):
    assert round_up_columns(columns, 2000) == width
