"""A config that is wrong is refused by file, field, value and rule, before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, LimitError
from gptj.paths.json_file import SMALL_FILE_BYTES

SMALL = {"vocab_size": 11, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "rotary_dim": 2}


def read(folder: Path, data: bytes) -> GPTJConfig:
    (folder / "config.json").write_bytes(data)
    return GPTJConfig.from_file(folder)


@pytest.mark.parametrize("field", ["n_head", "n_embd", "n_layer", "n_positions", "vocab_size"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "2", True, None, 10**12])
def test_C1_a_size_that_breaks_its_rule_is_named_with_its_value(tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: breaks its rule .*found {json.dumps(value)}"):
        read(tmp_path, json.dumps(SMALL | {field: value}).encode())


def test_C1_a_number_of_heads_that_does_not_divide_the_width_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: n_(head|embd): .*found 5|n_(head|embd).*12"):
        read(tmp_path, json.dumps(SMALL | {"n_head": 5}).encode())


@pytest.mark.parametrize("value", [3, 0, -2])
def test_C2_an_odd_zero_or_negative_rotary_width_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match=rf"config\.json: rotary_dim: .*found {value}"):
        read(tmp_path, json.dumps(SMALL | {"rotary_dim": value}).encode())


@pytest.mark.parametrize(("said", "width"), [({}, 4), ({"rotary_dim": None}, 4), ({"rotary_dim": 6}, 4)])
def test_C2_a_rotary_width_beyond_the_head_null_or_missing_is_settled_as_transformers_means_it(tmp_path, said, width):
    members = {key: value for key, value in SMALL.items() if key != "rotary_dim"} | said
    config = read(tmp_path, json.dumps(members).encode())
    assert config.rotary_width == width
    assert config.rotary_dim == said.get("rotary_dim", 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_norm_epsilon", -1), ("layer_norm_epsilon", 0), ("layer_norm_epsilon", "1e-5"), ("attn_pdrop", 2),
     ("initializer_range", -1), ("activation_function", "tanhh"), ("tie_word_embeddings", 1)],
)  # fmt: skip
def test_C3_a_field_that_no_shape_shows_is_checked_all_the_same(tmp_path, field, value):
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: breaks its rule"):
        read(tmp_path, json.dumps(SMALL | {field: value}).encode())


@pytest.mark.parametrize("field", ["layer_norm_epsilon", "initializer_range"])
def test_C3_a_number_that_is_none_is_refused_where_no_file_is_read(field):
    with pytest.raises(ConfigError, match=rf"{field}: breaks its rule .*found NaN"):
        GPTJConfig.from_dict(SMALL | {field: float("nan")})


def test_C4_a_misspelt_key_is_refused_and_an_unknown_one_kept(tmp_path):
    members = {key: value for key, value in SMALL.items() if key != "n_layer"}
    with pytest.raises(ConfigError, match=r"config\.json: 'n_lyaer': unknown key\. Did you mean n_layer\?"):
        read(tmp_path, json.dumps(members | {"n_lyaer": 2}).encode())
    config = read(tmp_path, json.dumps(SMALL | {"mine": [1]}).encode())
    assert json.loads(config.to_json())["mine"] == [1]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "not JSON"), (b"[]", "not a JSON object"), (b'{"n_layer": 2,}', "not JSON"), (b'{"n_layer": NaN}', "NaN"),
     ("{}".encode("utf-16"), "not UTF-8"), (b'{"n_layer": 2, "n_layer": 2}', "stands twice"),
     (b'{"a":' + b"[" * 200_000, "nested too deeply")],
    ids=["empty", "a list", "a trailing comma", "NaN", "UTF-16", "a key twice", "200,000 levels"],
)  # fmt: skip
def test_C5_what_is_no_json_object_is_refused_by_name(tmp_path, data, words):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read(tmp_path, data)


def test_C5_a_byte_order_mark_is_accepted(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + json.dumps(SMALL).encode()).n_layer == 2


def test_C5_a_file_beyond_the_cap_is_refused_by_its_size_alone(tmp_path):
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(2**30)
    with pytest.raises(LimitError, match=rf"config\.json: too large .*{SMALL_FILE_BYTES}.*1073741824"):
        GPTJConfig.from_file(tmp_path)


@pytest.mark.parametrize(
    ("members", "words"),
    [({"model_type": "llama"}, "model_type"), ({"auto_map": {"AutoModel": "x.py"}}, "never runs such code"),
     ({"architectures": ["LlamaForCausalLM"]}, "architectures")],
)  # fmt: skip
def test_C7_another_model_and_remote_code_are_refused(tmp_path, members, words):
    with pytest.raises(ConfigError, match=rf"config\.json: .*{words}"):
        read(tmp_path, json.dumps(SMALL | members).encode())
