"""Configs as users of transformers handle them: made, assigned, read, written; validated as a whole each time."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from gptj.config import BUILT_IN, GPTJConfig
from gptj.errors import ConfigError, MissingFileError, WriteError
from gptj.generation.config import GenerationConfig

SMALL = {"vocab_size": 11, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "rotary_dim": 2}


def test_arguments_have_transformers_order():
    config = GPTJConfig(11, 16, 12, 2, 3, 2, 48, "relu", 0.1, 0.2, 0.3, 1e-6, 0.5, False, 1, 2, True)
    assert (config.n_inner, config.activation_function) == (48, "relu")
    assert (config.resid_pdrop, config.embd_pdrop) == (0.1, 0.2)
    assert (config.attn_pdrop, config.layer_norm_epsilon, config.initializer_range) == (0.3, 1e-6, 0.5)
    assert (config.use_cache, config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (
        False,
        1,
        2,
        True,
    )


def test_aliases_are_arguments_attributes_and_fields_of_replace():
    config = GPTJConfig(vocab_size=11, hidden_size=12, num_attention_heads=3, num_hidden_layers=2, rotary_dim=2)
    assert (config.n_embd, config.n_head, config.n_layer) == (12, 3, 2)
    assert config.replace(num_hidden_layers=4).n_layer == config.replace(n_layer=4).num_hidden_layers == 4
    with pytest.raises(ConfigError, match="n_embd: contradicts its alias hidden_size"):
        GPTJConfig(n_embd=24, hidden_size=12)


def test_unknown_keys_are_kept_and_read_as_attributes():
    config = GPTJConfig(**SMALL, my_note="x", torch_dtype="float16")
    assert (config.my_note, config.torch_dtype, config.extra) == (
        "x",
        "float16",
        {"my_note": "x", "torch_dtype": "float16"},
    )
    config.other = [1]
    assert GPTJConfig.from_dict(json.loads(config.to_json())).other == [1]
    assert not hasattr(config, "quantization_config")
    del config.other
    assert not hasattr(config, "other")


@pytest.mark.parametrize("name", ["n_layers", "hidden_sise", "use_cach"])
def test_a_slip_of_the_finger_is_refused_wherever_it_is_made(name):
    with pytest.raises(ConfigError, match=f"{name}.*Did you mean"):
        GPTJConfig(**{name: 2})
    with pytest.raises(ConfigError, match=f"{name}.*Did you mean"):
        setattr(GPTJConfig(**SMALL), name, 2)


@pytest.mark.parametrize("field", BUILT_IN)
def test_a_field_that_models_are_built_by_keeps_its_value(field):
    config = GPTJConfig(**SMALL)
    value = getattr(config, field)
    setattr(config, field, value)  # which changes nothing
    with pytest.raises(ConfigError, match=rf"{field}: cannot be assigned.*{field}="):
        setattr(config, field, "relu" if field == "activation_function" else not value if value is False else 3.5)
    assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("pad_token_id", 5, "five"),
        ("eos_token_id", [1, 2], -1),
        ("use_cache", False, 1),
        ("problem_type", "regression", "other"),
        ("initializer_range", 0.1, -1),
        ("output_attentions", True, "yes"),
        ("id2label", {0: "no", 1: "yes"}, {0: "no"}),
        ("label2id", {"no": 0, "yes": 1}, {"no": 0, "maybe": 1, "yes": 2}),
    ],
)
def test_other_fields_are_validated_at_each_assignment(field, good, bad):
    config = GPTJConfig(**SMALL)
    setattr(config, field, good)
    assert getattr(config, field) == good
    with pytest.raises(ConfigError, match=field):
        setattr(config, field, bad)
    assert getattr(config, field) == good


def test_the_names_of_labels_follow_each_other():
    config = GPTJConfig(**SMALL)
    config.id2label = {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}


@pytest.mark.parametrize("config", [GPTJConfig(**SMALL), GenerationConfig()], ids=["model", "generation"])
def test_a_config_stays_the_key_of_a_dict(config):
    config = copy.deepcopy(config)
    kept = {config: 1}
    config.pad_token_id = 3
    assert kept[config] == 1 and kept.get(config.replace(pad_token_id=4)) is None
    assert pickle.loads(pickle.dumps(config)) == copy.copy(config) == config


def test_update_is_one_assignment_of_several():
    config = GenerationConfig()
    assert config.update(temperature=0.5, do_sample=True, max_new_tokens=3) == {}
    assert (config.temperature, config.do_sample, config.max_new_tokens) == (0.5, True, 3)
    with pytest.raises(ConfigError, match="top_p"):
        config.update(max_new_tokens=9, top_p=7)
    assert config.max_new_tokens == 3
    model = GPTJConfig(**SMALL)
    model.update({"pad_token_id": 3, "my_note": "x"})
    assert (model.pad_token_id, model.my_note) == (3, "x")


def test_an_assignment_of_generation_means_what_replace_means():
    config = GenerationConfig(do_sample=True, temperature=0.5, max_length=30)
    config.max_new_tokens = 5
    config.do_sample = False
    assert (config.max_length, config.max_new_tokens, config.temperature) == (None, 5, 1.0)


@pytest.mark.parametrize("config", [GPTJConfig(**SMALL, note=1), GenerationConfig(max_new_tokens=3)])
def test_a_config_is_written_and_read_by_transformers_methods(config, tmp_path):
    config.save_pretrained(tmp_path / "new")
    assert type(config).from_pretrained(tmp_path / "new") == config
    assert type(config).from_pretrained(tmp_path / "new", pad_token_id=2).pad_token_id == 2
    config.to_json_file(tmp_path / "one.json")
    assert (
        json.loads((tmp_path / "one.json").read_text()) == config.to_diff_dict() == json.loads(config.to_json_string())
    )
    assert json.loads(config.to_json_string(use_diff=False)) == json.loads(config.to_json())
    with pytest.raises(MissingFileError):
        type(config).from_pretrained(tmp_path / "absent")
    with pytest.raises(WriteError, match=r"one\.json"):
        config.save_pretrained(tmp_path / "one.json")


def test_a_difference_has_what_is_not_a_default():
    assert GPTJConfig(n_layer=2).to_diff_dict() == {"n_layer": 2, "model_type": "gptj"}
