"""generation_config.json as other people write it: no model stays shut, and nothing is left out in silence."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_decoder import ToyDecoder, toy_config

from gptj.checkpoint import write_checkpoint
from gptj.errors import CheckpointWarning, ConfigError, FormatError, InputError
from gptj.generation import GenerateOutput, Generates, GenerationConfig, generate
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.pretrained import prepare

MODEL = toy_config()
VOCAB = MODEL.vocab_size
PROMPT = [[4, 5, 6, 7]]


def read(folder: Path, members: dict[str, Any]) -> tuple[GenerationConfig, str]:
    """The config of a file, and all that was said of it."""
    (folder / "generation_config.json").write_text(json.dumps(members))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        config = GenerationConfig.from_file(folder, vocab_size=VOCAB)
    assert all(issubclass(warning.category, CheckpointWarning) for warning in heard)
    return config, "\n".join(str(warning.message) for warning in heard)


def run(config: Any, **arguments: Any) -> GenerateOutput:
    def factory(batch: int, capacity: int) -> ToyDecoder:
        return ToyDecoder(MODEL, batch, capacity)

    return generate(factory, PROMPT, model_config=MODEL, generation_config=config, seed=3, **arguments)


PLAIN = run(GenerationConfig(max_new_tokens=6)).sequences.tolist()

NO_EFFECT: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "typical_p": 0.4,
    "min_p": 0.1,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "early_stopping": True,
    "length_penalty": 2.0,
    "diversity_penalty": 0.5,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "sequence_bias": [],
    "stop_strings": [],
    "cache_implementation": "static",
    "cache_config": {"a": 1},
    "return_legacy_cache": True,
    "compile_config": {"a": 1},
    "disable_compile": True,
    "low_memory": True,
    "decoder_start_token_id": 4,
    "assistant_early_exit": 3,
    "pad_token_id": -1,
    "eos_token_id": [-1],
    "bos_token_id": VOCAB,
    "forced_bos_token_id": 50256,
    "forced_eos_token_id": 50256,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.2,
    "max_matching_ngram_size": 3,
    "output_scores": True,
    "output_attentions": True,
    "max_length": 40,
    "exponential_decay_length_penalty": [1, 1.5],
    "temprature": 0.3,
    "max_time": 1000,
}
"""Each beside max_new_tokens 6 leaves the greedy text as it is."""


@pytest.mark.parametrize("field", [field for field in NO_EFFECT if field != "max_time"])
def test_a_field_without_effect_is_said_kept_and_changes_nothing(tmp_path, field):
    config, said = read(tmp_path, {"max_new_tokens": 6, field: NO_EFFECT[field]})
    assert f"generation_config.json: {field}: " in said.replace("'", "")
    assert run(config).sequences.tolist() == PLAIN
    assert run(config.replace(num_beams=1)).sequences.tolist() == PLAIN


NEUTRAL: list[dict[str, Any]] = [
    {field: None for field in NO_EFFECT if field != "temprature"},
    {"guidance_scale": 1.0},
    {"guidance_scale": 1},
    {"token_healing": False, "low_memory": False, "disable_compile": False, "constraints": [], "force_words_ids": []},
    {"forced_decoder_ids": None, "watermarking_config": None, "dola_layers": None, "assistant_lookbehind": 10},
    {"transformers_version": "4.28.1", "_from_model_config": True, "chat_format": "x", "is_assistant": False},
    {"top_k": None},
    {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "num_beams": 1, "early_stopping": False, "length_penalty": 1.0},
    {"max_length": None, "do_sample": None, "use_cache": None, "num_return_sequences": None},
]


@pytest.mark.parametrize("members", NEUTRAL, ids=range(len(NEUTRAL)))
def test_a_neutral_value_is_nothing_to_speak_of(tmp_path, members):
    config, said = read(tmp_path, {"max_new_tokens": 6} | members)
    assert said == ""
    assert config.replace(extra={}) == GenerationConfig(max_new_tokens=6)


def test_what_waited_in_the_file_takes_effect_in_the_call_that_asks_for_it(tmp_path):
    sampled = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=0.7, top_p=0.9)
    config, said = read(tmp_path, {"max_new_tokens": 6, "temperature": 0.7, "top_p": 0.9})
    assert "temperature" in said and "top_p" in said
    assert config.replace(do_sample=True) == sampled
    beams, _ = read(tmp_path, {"early_stopping": True, "length_penalty": 2})
    assert beams.replace(num_beams=3) == GenerationConfig(num_beams=3, early_stopping=True, length_penalty=2)
    assert beams.replace(num_beams=3, length_penalty=1.5).length_penalty == 1.5
    lengths, _ = read(tmp_path, {"max_length": 20, "max_new_tokens": 5})
    assert lengths.replace(max_new_tokens=None).max_length == 20
    assert "max_length" not in lengths.replace(max_new_tokens=3).extra


def test_an_assistants_settings_wait_for_the_assistant(tmp_path):
    config, said = read(tmp_path, {"max_new_tokens": 6, "num_assistant_tokens": 2, "assistant_confidence_threshold": 0})
    assert "num_assistant_tokens" in said and "assistant_confidence_threshold" in said
    eager = GenerationConfig(max_new_tokens=6, assistant_confidence_threshold=0)

    def calls(one: GenerationConfig) -> list[Any]:
        made: list[ToyDecoder] = []

        def factory(batch: int, capacity: int) -> ToyDecoder:
            made.append(ToyDecoder(MODEL, batch, capacity))
            return made[-1]

        generate(factory, PROMPT, model_config=MODEL, generation_config=one, assistant=factory)
        return [call for decoder in made for call in decoder.calls]

    assert calls(config) == calls(eager.replace(num_assistant_tokens=2)) != calls(eager)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": 1.5}, "guidance_scale"),
    ({"force_words_ids": [[3]]}, "force_words_ids"),
    ({"constraints": [{"a": 1}]}, "constraints"),
    ({"token_healing": True}, "token_healing"),
    ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
    ({"dola_layers": "high"}, "dola_layers"),
    ({"forced_decoder_ids": [[1, 5]]}, "forced_decoder_ids"),
    ({"do_sample": True, "top_p": 7}, "top_p"),
    ({"do_sample": True, "temperature": "hot"}, "temperature"),
    ({"do_sample": "yes"}, "do_sample"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": 10**9}, "num_beams"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
    ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups"),
    ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beam_groups"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-310}, "repetition_penalty"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ({"eos_token_id": "<|endoftext|>"}, "eos_token_id"),
    ({"eos_token_id": [[3]]}, "eos_token_id"),
    ({"suppress_tokens": 5.5}, "suppress_tokens"),
    ({"bad_words_ids": [3]}, "bad_words_ids"),
    ({"stop_strings": [1]}, "stop_strings"),
    ({"max_new_tokens": "6"}, "max_new_tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"min_length": 30, "max_length": 20, "max_new_tokens": None}, "min_length"),
    ({"max_time": -1}, "max_time"),
]


@pytest.mark.parametrize(("members", "field"), CHANGES, ids=[str(members) for members, _ in CHANGES])
def test_what_would_change_the_text_is_said_and_refused_at_the_call_by_name(tmp_path, members, field):
    config, said = read(tmp_path, {"max_new_tokens": 6} | members)
    assert f"{field}: " in said and "`generate` refuses it" in said
    with pytest.raises(ConfigError, match=rf"^{field}: is asked for by the model's generation_config\.json"):
        run(config)
    cleared = config.replace(**{**dict.fromkeys(members), "max_new_tokens": 6})
    assert run(cleared).sequences.tolist() == PLAIN
    assert json.loads(config.to_json())[field] == members[field]  # and it is written back


WHOLE: dict[str, Any] = {"max_new_tokens": 6.0, "num_beams": 1.0, "no_repeat_ngram_size": 2.0, "top_k": 50.0}


@pytest.mark.parametrize("field", WHOLE)
def test_a_whole_number_with_a_point_is_one_and_said(tmp_path, field):
    config, said = read(tmp_path, {field: WHOLE[field]})
    assert f"{field}: not written as a whole number (found {WHOLE[field]})" in said
    assert getattr(config, field) == int(WHOLE[field]) and type(getattr(config, field)) is int


def test_ids_beyond_the_vocabulary_are_left_out_and_said(tmp_path):
    members = {
        "eos_token_id": [3, 50256],
        "pad_token_id": 50257,
        "bos_token_id": 50256,
        "suppress_tokens": [50256, 2, 99999],
        "begin_suppress_tokens": [50256],
        "bad_words_ids": [[1, 2], [1, 50256]],
        "sequence_bias": [[[1, 50256], 2.0], [[1], 1.0]],
        "forced_eos_token_id": [50256, 4],
        "exponential_decay_length_penalty": [1, 1.5],
    }
    config, said = read(tmp_path, members)
    for field in members.keys() - {"exponential_decay_length_penalty"}:
        assert f"{field}: beyond the vocabulary: left out (expected 0 to {VOCAB - 1}" in said
    assert config.eos_token_id == 3 and config.pad_token_id is config.bos_token_id is None
    assert (config.suppress_tokens, config.begin_suppress_tokens) == ((2,), None)
    assert (config.bad_words_ids, config.sequence_bias) == (((1, 2),), (((1,), 1.0),))
    assert config.forced_eos_token_id == 4
    config.check_vocabulary(VOCAB)
    alone, _ = read(tmp_path, {"eos_token_id": 50256, "exponential_decay_length_penalty": [1, 1.5]})
    assert alone.eos_token_id is None and run(alone.replace(max_new_tokens=6)).sequences.tolist() == PLAIN


def test_what_a_call_says_is_as_strict_as_ever():
    for options in ({"temperature": 0.7}, {"guidance_scale": 1.5}, {"max_new_tokens": 6.0}, {"eos_token_id": -1}):
        with pytest.raises(ConfigError):
            GenerationConfig().replace(**options)
        with pytest.raises(ConfigError):
            run({"max_new_tokens": 6} | options)
    with pytest.raises(InputError, match="eos_token_id: no such token"):
        run(GenerationConfig(eos_token_id=50256))


@pytest.mark.parametrize("value", [3, "greedy", [], {1: 2}, object()])
def test_what_is_no_generation_config_is_refused_by_name(value):
    with pytest.raises(InputError, match="generation_config: cannot be used"):
        run(value)


def test_a_dict_is_a_generation_config():
    assert run({"max_new_tokens": 6}).sequences.tolist() == PLAIN
    with pytest.raises(ConfigError, match=r"'max_new_token': no such field\. Did you mean max_new_tokens\?"):
        run({"max_new_token": 6})


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("value", [3, "x", [3], {}, object(), lambda ids, scores: scores])
def test_a_list_of_functions_is_asked_for_by_name(where, value):
    with pytest.raises(InputError, match=f"{where}: not a list of functions"):
        run(GenerationConfig(max_new_tokens=2), **{where: value})


@pytest.mark.parametrize(
    ("where", "value"), [("streamer", 3), ("decode", 3), ("seed_", "x"), ("seed_", 10**5000), ("allowed", 3)],
    ids=range(5),
)  # fmt: skip
def test_an_argument_of_another_kind_is_named(where, value):
    field = {"seed_": "seed", "allowed": "prefix_allowed_tokens_fn"}.get(where, where)
    with pytest.raises(InputError, match=f"^{field}: "):
        if where == "seed_":
            generate(lambda b, c: None, PROMPT, model_config=MODEL, generation_config={"do_sample": True}, seed=value)  # type: ignore[arg-type,return-value]
        else:
            run(GenerationConfig(max_new_tokens=2), **{where: value})


@pytest.mark.parametrize("field", ["input_ids", "attention_mask"])
def test_rows_of_different_lengths_are_named(field):
    arguments: dict[str, Any] = {"input_ids": PROMPT, field: [[1, 1, 1, 1], [1]]}
    with pytest.raises(InputError, match=f"{field}: rows of different lengths"):
        generate(lambda b, c: None, model_config=MODEL, **arguments)  # type: ignore[arg-type,return-value]


BEYOND: dict[str, list[Any]] = {
    "num_beams": [10**6, 10**9, 10**5000],
    "num_beam_groups": [10**6],
    "num_return_sequences": [10**6, 10**9],
    "num_assistant_tokens": [10**9],
    "prompt_lookup_num_tokens": [10**9],
    "max_matching_ngram_size": [10**9],
    "no_repeat_ngram_size": [10**9],
    "encoder_no_repeat_ngram_size": [10**9],
    "prefill_chunk_size": [10**9],
    "pad_token_id": [10**9, 10**5000],
    "repetition_penalty": [1e-310, 1e300, 10**400],
    "encoder_repetition_penalty": [1e-310, 1e300],
    "length_penalty": [1e300, -1e300, 10**400],
    "diversity_penalty": [1e-310, 1e300],
    "exponential_decay_length_penalty": [[1, 1e-310], [1, 1e300], [10**400, 1.1]],
    "sequence_bias": [[[[1], 1e300]], [[[1], 10**400]]],
    "temperature": [1e-310, 10**400],
    "max_time": [10**400],
    "max_new_tokens": [10**5000],
}


BEYOND_ALL = [(field, value) for field, values in BEYOND.items() for value in values]


@pytest.mark.parametrize(("field", "value"), BEYOND_ALL, ids=range(len(BEYOND_ALL)))
def test_a_number_beyond_reason_is_refused_by_its_field(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: breaks its rule"):
        GenerationConfig(**{field: value})


def test_more_rows_than_fit_are_refused_before_anything_is_made():
    model = toy_config(vocab_size=2**20)
    for options, field in (
        ({"num_beams": 4096}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 4096}, "num_return_sequences"),
    ):
        with pytest.raises(InputError, match=rf"^{field}: more rows than fit .*found 1 prompts x 4096"):
            generate(lambda b, c: None, PROMPT, model_config=model, generation_config=options)  # type: ignore[arg-type,return-value]


def test_a_least_length_above_the_longest_is_named():
    with pytest.raises(ConfigError, match=r"min_length: breaks its rule .expected at most max_length = 9, found 10"):
        GenerationConfig(min_length=10, max_length=9)
    with pytest.raises(ConfigError, match="min_new_tokens: breaks its rule"):
        GenerationConfig(min_new_tokens=10, max_new_tokens=9)
    with pytest.warns(CheckpointWarning, match="min_length: above the longest result, so no eos is chosen"):
        run(GenerationConfig(min_length=99, max_new_tokens=2))


def test_numbers_of_numpy_are_taken_as_pythons_own():
    config = GenerationConfig(
        max_new_tokens=np.int64(6), do_sample=np.bool_(True), temperature=np.float32(0.5), top_k=np.array(3)  # type: ignore[arg-type]
    )  # fmt: skip
    assert (type(config.max_new_tokens), config.do_sample, config.temperature, config.top_k) == (int, True, 0.5, 3)


class Toy(Generates):
    """A model of toy decoders, with the generation_config that a folder gave it."""

    config = MODEL

    def __init__(self, settings: GenerationConfig) -> None:
        self.generation_config = settings

    def _decoder(self, batch: int, capacity: int) -> ToyDecoder:
        return ToyDecoder(MODEL, batch, capacity)

    def _host(self, array: Any) -> Any:
        return np.asarray(array)

    def _native(self, array: Any) -> Any:
        return array


def test_a_call_may_say_otherwise_than_the_folder(tmp_path):
    model = Toy(read(tmp_path, {"max_new_tokens": 6, "guidance_scale": 1.5, "temperature": 0.7})[0])
    for refused in ({}, {"generation_config": GenerationConfig(max_new_tokens=6)}, {"num_beams": 2}):
        with pytest.raises(ConfigError, match="guidance_scale: is asked for"):
            model.generate(PROMPT, **refused)
    assert model.generate(PROMPT, guidance_scale=None).tolist() == PLAIN
    assert model.generate(PROMPT, {"guidance_scale": None}).tolist() == PLAIN
    assert model.generate(PROMPT, GenerationConfig().replace(guidance_scale=None)).tolist() == PLAIN
    drawn = model.generate(PROMPT, do_sample=True, seed=1, guidance_scale=None)
    plain = Toy(GenerationConfig(max_new_tokens=6, do_sample=True, temperature=0.7))
    assert drawn.tolist() == plain.generate(PROMPT, seed=1).tolist()


def test_a_file_that_is_passed_as_a_call_s_config_is_not_left_out_in_silence(tmp_path):
    own = Toy(GenerationConfig(max_new_tokens=6))
    with pytest.raises(ConfigError, match="guidance_scale: is asked for"):
        own.generate(PROMPT, read(tmp_path, {"guidance_scale": 1.5})[0])
    assert own.generate(PROMPT, read(tmp_path, {"top_p": 0.5})[0]).tolist() == PLAIN


def test_a_file_that_cannot_be_read_is_said_when_a_model_is_opened(tmp_path):
    folder = write_checkpoint(tmp_path / "model", revealing_config(), revealing_fill(0))
    path = folder / "generation_config.json"
    makes = [
        *(lambda text=text: path.write_text(text) for text in ("", "[]", "{", '{"top_k": 1, "top_k": 2}', "null")),
        lambda: path.write_bytes(b"\xff\xfe{}"),
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(folder / "nowhere"),
    ]
    for make in makes:
        make()
        with pytest.warns(CheckpointWarning, match=r"generation_config\.json: cannot be read, so the defaults"):
            assert prepare("causal_lm", folder).generation_config is None
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_folder_in_the_files_place_is_said_to_be_one(tmp_path):
    path = tmp_path / "generation_config.json"
    path.mkdir()
    for read_from in (path, tmp_path):
        with pytest.raises(FormatError, match=r"not a regular file .*found a folder") as refused:
            GenerationConfig.from_file(read_from)
        assert refused.value.file == str(path)
