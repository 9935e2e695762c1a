"""config.json as other people write it: what changes nothing is read and said, another model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import CheckpointWarning, ConfigError
from gptj.generation import GenerationConfig
from gptj.parity.revealing import revealing_config, revealing_fill

SMALL = {"vocab_size": 11, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "rotary_dim": 2}
PLAIN = {**SMALL, "model_type": "gptj", "eos_token_id": 3, "bos_token_id": 3}


def read(folder: Path, members: dict[str, Any]) -> GPTJConfig:
    (folder / "config.json").write_text(json.dumps(members))
    return GPTJConfig.from_file(folder)


SAID: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"mask_token_id": 5}, "mask_token_id", {}),
    ({"cls_token_id": None}, "cls_token_id", {}),
    ({"eos_token": "<|endoftext|>"}, "eos_token", {}),
    ({"n_layers": 2}, "n_layers", {"n_layer": 2}),
    ({"layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-6}, "layer_norm_eps", {"layer_norm_epsilon": 1e-6}),
    ({"pad_token_id": -1}, "pad_token_id", {"pad_token_id": None}),
    ({"eos_token_id": "<|endoftext|>"}, "eos_token_id", {"eos_token_id": None}),
    ({"eos_token_id": [3, -1]}, "eos_token_id", {"eos_token_id": [3]}),
    ({"eos_token_id": 3.0}, "eos_token_id", {"eos_token_id": 3}),
    ({"use_cache": 1}, "use_cache", {"use_cache": True}),
    ({"auto_map": {"AutoModelForCausalLM": "modeling_gptj.GPTJForCausalLM"}}, "auto_map", {}),
    ({"architectures": ["AutoModelForCausalLMWithValueHead"]}, "architectures", {}),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures", {}),
    ({"architectures": "GPTJForCausalLM"}, "architectures", {}),
    ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "num_labels", {"num_labels": 2}),
    ({"id2label": {}}, "id2label", {"num_labels": 2}),
]


@pytest.mark.parametrize(("members", "named", "expected"), SAID, ids=[str(members) for members, _, _ in SAID])
def test_what_changes_nothing_is_read_and_said(tmp_path, members, named, expected):
    with pytest.warns(CheckpointWarning, match=rf"config\.json: .*{named}"):
        config = read(tmp_path, PLAIN | members)
    for field, value in expected.items():
        assert getattr(config, field) == value
    assert (config.n_layer, config.n_embd, config.rotary_width) == (2, 12, 2)


QUIET: list[dict[str, Any]] = [
    {"auto_map": None},
    {"use_cache": None, "tie_word_embeddings": None, "output_attentions": None, "return_dict": None},
    {"_wandb": {}, "wandb_version": "1", "_flax_dtype": "x", "trl": None},
    {"architectures": ["GPTJForCausalLMWithValueHead"]},
    {"architectures": None},
    {"rope_scaling": None, "rope_parameters": None, "layer_types": None, "dtype": "float16"},
    {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 16},
    {"sep_token_id": 7, "decoder_start_token_id": None, "forced_eos_token_id": None, "rotary": True},
]


@pytest.mark.parametrize("members", QUIET, ids=str)
def test_what_transformers_itself_writes_is_read_without_a_word(tmp_path, members):
    config = read(tmp_path, PLAIN | members)
    plain = read(tmp_path, PLAIN)
    assert config.replace(extra={}) == plain.replace(extra={})


def test_a_config_without_a_model_type_is_a_gptj_by_its_classes(tmp_path):
    members = {key: value for key, value in PLAIN.items() if key != "model_type"}
    assert read(tmp_path, members | {"architectures": ["GPTJForCausalLM"]}).n_layer == 2
    with pytest.raises(ConfigError, match="architectures: another architecture"):
        read(tmp_path, members | {"architectures": ["LlamaForCausalLM"]})


SHAPING = {
    "n_layer": "n_layers",
    "n_embd": "n_embed",
    "n_head": "n_heads",
    "n_positions": "n_position",
    "vocab_size": "vocabsize",
    "rotary_dim": "rotary_dims",
    "n_inner": "n_iner",
    "activation_function": "activation_fuction",
    "layer_norm_epsilon": "layer_norm_eps",
}


@pytest.mark.parametrize("field", SHAPING)
def test_the_misspelling_of_a_missing_field_that_shapes_the_model_is_refused(tmp_path, field):
    members = {key: value for key, value in PLAIN.items() if key != field}
    with pytest.raises(ConfigError, match=rf"'{SHAPING[field]}': unknown key\. Did you mean {field}\?"):
        read(tmp_path, members | {SHAPING[field]: 2})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_positions", 2**24),
        ("n_positions", 2**31),
        ("layer_norm_epsilon", 1e-300),
        ("layer_norm_epsilon", 1e-45),
        ("layer_norm_epsilon", 1e30),
        ("initializer_range", 1e300),
        ("vocab_size", 10**400),
        ("attn_pdrop", 10**400),
        ("pad_token_id", 10**5000),
    ],
    ids=range(9),
)
def test_a_number_beyond_reason_is_refused_by_its_field(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}: breaks its rule"):
        GPTJConfig(**{**SMALL, "rotary_dim": None, field: value})


def test_an_integer_of_five_thousand_digits_is_refused_by_its_file(tmp_path):
    text = json.dumps(PLAIN)[:-1] + ', "pad_token_id": ' + "9" * 5000 + "}"
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: a number too large: an integer of 5,000 digits"):
        GPTJConfig.from_file(tmp_path)


def test_numbers_of_numpy_are_taken_as_pythons_own():
    config = GPTJConfig(**{**SMALL, "n_layer": np.int64(2), "layer_norm_epsilon": np.float64(1e-6)})
    assert type(config.n_layer) is int and type(config.layer_norm_epsilon) is float
    assert json.loads(config.to_json())["n_layer"] == 2


def test_question_answering_is_written_with_the_two_labels_that_transformers_gives_its_rows(tmp_path):
    config = revealing_config(num_labels=3)
    write_checkpoint(tmp_path / "qa", config, revealing_fill(0), head="question_answering")
    members = json.loads((tmp_path / "qa" / "config.json").read_text())
    assert "id2label" not in members and "num_labels" not in members  # the default is two
    assert open_checkpoint(tmp_path / "qa").tensors["qa_outputs.weight"].shape[0] == 2
    write_checkpoint(tmp_path / "cls", config, revealing_fill(0), head="sequence_classification")
    assert len(json.loads((tmp_path / "cls" / "config.json").read_text())["id2label"]) == 3


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_a_weights_file_is_no_config(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xf8" * size)
    for kind in (GPTJConfig, GenerationConfig):
        with pytest.raises(ConfigError, match=rf"model\.safetensors: a weights file, not a {kind.FILE}"):
            kind.from_pretrained(path)


def test_another_file_of_the_folder_is_no_config(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "truncation": null, "model": {}}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no config of a model: .*'version', 'truncation'"):
        GPTJConfig.from_file(path)
