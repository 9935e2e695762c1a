"""GenerationConfig: every field has a rule and an effect; generation_config.json in and out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fields import CALLS, ELSEWHERE, OUTPUTS, TOKENS
from toy_decoder import ToyDecoder, toy_config

from gptj import GPTJConfig
from gptj.errors import CheckpointWarning, ConfigError, MissingFileError
from gptj.generation import GenerateOutput, GenerationConfig, generate
from gptj.generation.config import UNSUPPORTED

CONFIG = toy_config()
PROMPTS = [[4, 5, 6, 7], [1, 2, 3, 9], [8, 8, 1, 0]]
FIELDS = {field.name for field in dataclasses.fields(GenerationConfig)}


# ---- no field is ignored


def run(options: dict[str, Any]) -> tuple[GenerateOutput, list[tuple[int, int]]]:
    """The output, and the shapes of the calls of every decoder."""
    options = {"max_new_tokens": 8, "eos_token_id": 3, "pad_token_id": 0} | options
    prompts = [[1], [2], [5]] if options.pop("one_token_prompt", False) else PROMPTS
    made: list[ToyDecoder] = []

    def factory(batch: int, capacity: int) -> ToyDecoder:
        made.append(ToyDecoder(CONFIG, batch, capacity))
        return made[-1]

    assistant = factory if options.pop("assistant", False) else None
    config = GenerationConfig(**options)
    output = generate(factory, prompts, model_config=CONFIG, generation_config=config, seed=3, assistant=assistant)
    return output, [call for decoder in made for call in decoder.calls]


def test_every_field_is_in_the_walk() -> None:
    assert TOKENS.keys() | {*OUTPUTS} | {*CALLS} | {*ELSEWHERE} == FIELDS


@pytest.mark.parametrize("field", TOKENS)
def test_the_field_changes_the_tokens(field: str) -> None:
    without, changes = TOKENS[field]
    assert run(without)[0].sequences.tolist() != run(without | changes)[0].sequences.tolist()


@pytest.mark.parametrize("field", OUTPUTS)
def test_the_field_changes_the_output(field: str) -> None:
    without, changes, part = OUTPUTS[field]
    before, after = (getattr(run(options)[0], part) for options in (without, without | changes))
    assert after is not None
    assert before is None or not np.array_equal(np.stack(before), np.stack(after))


@pytest.mark.parametrize("field", CALLS)
def test_the_field_changes_the_way_and_not_the_tokens(field: str) -> None:
    without, changes = CALLS[field]
    (plain, plain_calls), (other, other_calls) = run(without), run(without | changes)
    assert plain.sequences.tolist() == other.sequences.tolist()
    assert plain_calls != other_calls


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_is_not_honoured_is_refused_with_its_reason(field: str) -> None:
    default, reason = UNSUPPORTED[field]
    other = {"a": 1} if default is None else not default if isinstance(default, bool) else 3
    with pytest.raises(ConfigError, match=f"{field}: not supported: {reason}"):
        GenerationConfig().replace(**{field: other})
    with pytest.warns(CheckpointWarning, match=f"{field}: not supported: {reason}"):
        read = GenerationConfig.from_dict({field: other})
    assert read.extra == {field: other}
    for make in (GenerationConfig.from_dict, lambda members: GenerationConfig().replace(**members)):
        assert make({field: default}) == GenerationConfig()
        assert make({field: None}) == GenerationConfig()


def test_what_recipes_pass_to_generate_is_accepted_where_it_asks_for_nothing() -> None:
    """Also an array, whose comparison is no truth value, is refused by name."""
    idle = {"synced_gpus": False, "negative_prompt_ids": None, "custom_generate": None}
    assert GenerationConfig().replace(**idle) == GenerationConfig()
    with pytest.raises(ConfigError, match="negative_prompt_ids: not supported: classifier-free"):
        GenerationConfig().replace(negative_prompt_ids=np.ones((1, 2), int))


# ---- rules

NOT_NUMBERS: list[Any] = [math.nan, math.inf, "1", True, [1]]
BAD: dict[str, list[Any]] = {
    "max_length": [0, -1, 2.0, 10**12],
    "max_new_tokens": [0, -1, True, "9"],
    "min_length": [-1, 1.5],
    "min_new_tokens": [-1],
    "max_time": [0, -1.0, *NOT_NUMBERS],
    "stop_strings": ["", ["a", ""], [], [1], 5],
    "eos_token_id": [-1, 2.0, [1, -1], [], "x", True],
    "pad_token_id": [-1, 1.5, [1]],
    "bos_token_id": [-1],
    "do_sample": [1, "yes"],
    "num_beams": [0, -2, 1.0],
    "num_beam_groups": [0],
    "diversity_penalty": [-1.0, *NOT_NUMBERS],
    "length_penalty": NOT_NUMBERS,
    "early_stopping": ["always", 2],
    "penalty_alpha": [-0.1, 1.1, *NOT_NUMBERS],
    "prompt_lookup_num_tokens": [0],
    "max_matching_ngram_size": [0],
    "num_assistant_tokens": [0],
    "num_assistant_tokens_schedule": ["sometimes"],
    "assistant_confidence_threshold": [-0.1, 1.1],
    "num_return_sequences": [0],
    "use_cache": [0],
    "prefill_chunk_size": [0],
    "sequence_bias": [[], [[[], 1.0]], [[[1], math.nan]], [[[1], 1.0], [[1], 2.0]], {(1,): "x"}, 7],
    "encoder_repetition_penalty": [0, -1.0],
    "repetition_penalty": [0, -1.0, *NOT_NUMBERS],
    "no_repeat_ngram_size": [-1, 1.5],
    "encoder_no_repeat_ngram_size": [-1],
    "bad_words_ids": [[], [[]], [[-1]], [1], [["a"]]],
    "forced_bos_token_id": [-1],
    "forced_eos_token_id": [-1, []],
    "remove_invalid_values": ["no"],
    "exponential_decay_length_penalty": [[1], [-1, 2.0], [1, 0.0], [1, math.inf], 5],
    "suppress_tokens": [[], [-1], 5],
    "begin_suppress_tokens": [[], [1.5]],
    "temperature": [-1.0, 1e-300, 1e300, *NOT_NUMBERS],
    "top_k": [-1, 1.5],
    "top_p": [0, 1.5, -0.1, *NOT_NUMBERS],
    "min_p": [-0.1, 1.5],
    "typical_p": [0, 1.5],
    "epsilon_cutoff": [-0.1, 1],
    "eta_cutoff": [-0.1, 1],
    "renormalize_logits": [1],
    "return_dict_in_generate": [1],
    "output_scores": [1],
    "output_logits": [1],
    "output_hidden_states": [1],
    "output_attentions": [1],
}


def test_every_field_has_values_that_are_refused() -> None:
    assert BAD.keys() == FIELDS - {"extra"}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_G4_a_value_that_breaks_its_rule_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: breaks its rule \(expected .*, found .*\)"):
        GenerationConfig(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 9, "max_new_tokens": 9}, "max_length: .*unset, since max_new_tokens is set"),
        ({"temperature": 0.7}, r"temperature: has no effect without do_sample \(expected 1.0, found 0.7\)"),
        ({"top_k": 5}, "top_k: has no effect without do_sample"),
        ({"top_p": 0.9}, "top_p: has no effect without do_sample"),
        ({"min_p": 0.1}, "min_p: has no effect without do_sample"),
        ({"length_penalty": 2.0}, "length_penalty: has no effect without num_beams above 1"),
        ({"early_stopping": True}, "early_stopping: has no effect without num_beams above 1"),
        (
            {"num_beams": 2, "diversity_penalty": 1.0},
            "diversity_penalty: has no effect without num_beam_groups above 1",
        ),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "a divisor of num_beams = 4"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty: .*above 0, or all groups are the same"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "num_beam_groups: .*1 beside",
        ),
        ({"num_beams": 2, "do_sample": True, "temperature": 0}, "temperature: .*above 0 beside num_beams above 1"),
        ({"penalty_alpha": 0.5, "do_sample": True}, "penalty_alpha: .*do_sample false"),
        ({"penalty_alpha": 0.5, "top_k": 1}, "penalty_alpha: .*top_k above 1"),
        ({"num_return_sequences": 2}, "num_return_sequences: .*1 for greedy, which has one answer"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: .*at most num_beams = 2"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size: has no effect without prompt_lookup_num_tokens"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: .*null beside beam"),
        ({"output_scores": True}, "output_scores: has no effect without return_dict_in_generate"),
        (
            {"exponential_decay_length_penalty": (1, 1.1)},
            "exponential_decay_length_penalty: .*an eos_token_id beside it",
        ),
        ({"penalty_alpha": 0.5, "prefill_chunk_size": 3}, "prefill_chunk_size: .*null beside hidden states"),
    ],
)
def test_fields_that_contradict_each_other_or_wait_for_another_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)


# ---- copies


def test_a_changed_strategy_drops_the_fields_that_only_the_former_one_read() -> None:
    sampled = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, top_k=5, eos_token_id=3)
    assert sampled.replace(do_sample=False) == GenerationConfig(eos_token_id=3)
    beams = GenerationConfig(num_beams=4, length_penalty=2.0, early_stopping=True)
    assert beams.replace(num_beams=1) == GenerationConfig()
    with pytest.raises(ConfigError, match="top_p: has no effect without do_sample"):
        sampled.replace(do_sample=False, top_p=0.9)


def test_the_two_lengths_replace_each_other() -> None:
    assert GenerationConfig(max_length=9).replace(max_new_tokens=3) == GenerationConfig(max_new_tokens=3)
    assert GenerationConfig(max_new_tokens=3).replace(max_length=9) == GenerationConfig(max_length=9)


def test_an_unknown_field_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"'temperatur': no such field\. Did you mean temperature\?"):
        GenerationConfig().replace(temperatur=1.0)


def test_null_is_off_as_in_transformers() -> None:
    assert GenerationConfig(temperature=None, top_p=None, repetition_penalty=None) == GenerationConfig()  # type: ignore[arg-type]
    assert GenerationConfig(do_sample=True, top_k=None).top_k == 0  # type: ignore[arg-type]


def test_it_is_hashable_and_holds_tuples() -> None:
    config = GenerationConfig(eos_token_id=np.array([1, 2]), bad_words_ids=[[1], [2, 3]], sequence_bias={(1,): 2})  # type: ignore[arg-type]
    assert (config.eos_token_id, config.bad_words_ids) == ((1, 2), ((1,), (2, 3)))
    assert config.sequence_bias == (((1,), 2),)
    assert hash(config) == hash(config.replace())
    with pytest.raises(ConfigError, match="top_k: has no effect without do_sample"):
        config.top_k = 3
    assert config.top_k == 50


# ---- files


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        eos_token_id=[3, 4],
        sequence_bias=[[[1, 2], 0.5]],
        stop_strings="end",
        exponential_decay_length_penalty=[3, 1.2],
        extra={"transformers_version": "4.57.6", "ours": {"a": 1}},
    )
    path = tmp_path / "generation_config.json"
    path.write_text(config.to_json())
    assert GenerationConfig.from_file(path) == GenerationConfig.from_file(tmp_path) == config
    assert json.loads(path.read_text())["sequence_bias"] == [[[1, 2], 0.5]]


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert json.loads(GenerationConfig(top_k=5, do_sample=True).to_json()) == {"do_sample": True, "top_k": 5}


def test_the_file_of_the_published_gpt_j_is_read() -> None:
    members = {
        "_from_model_config": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "transformers_version": "4.27.0",
    }
    config = GenerationConfig.from_dict(members)
    assert (config.eos_token_ids, config.padding_id, config.strategy) == ((50256,), 50256, "greedy")
    assert json.loads(config.to_json()) == members


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"top_k": 1, "top_k": 2}', "the key 'top_k' stands twice"),
        ('{"temperature": NaN}', "NaN is not JSON"),
        ("[]", "not a JSON object"),
        ('{"top_k": 1' + "0" * 5000 + "}", "a number too large: an integer of 5,001 digits"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        GenerationConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"generation_config\.json: no such file"):
        GenerationConfig.from_file(tmp_path)


def test_the_model_gives_its_ids_but_none_that_it_cannot_make() -> None:
    small = GenerationConfig.from_model_config(GPTJConfig(vocab_size=9, n_embd=16, n_head=2, eos_token_id=[3, 50256]))
    assert (small.eos_token_id, small.bos_token_id) == (3, None)
    assert GenerationConfig.from_model_config(GPTJConfig()).eos_token_id == 50256


@pytest.mark.parametrize("kind", [GenerationConfig, GPTJConfig])
def test_a_field_called_self_is_no_field(kind) -> None:
    with pytest.raises(ConfigError, match="'self': no such field"):
        kind().replace(**{"self": 1})


def test_extra_that_is_no_mapping_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="extra: breaks its rule"):
        GenerationConfig().replace(extra=1)


@pytest.mark.parametrize("strings", ["\ud800", ["a", "\udfff"], "a\udcff"])
def test_a_stop_string_with_a_lone_surrogate_is_refused_by_name(strings) -> None:
    with pytest.raises(ConfigError, match="stop_strings: breaks its rule"):
        GenerationConfig(stop_strings=strings)
