"""A training config is understood where its model is a GPT-J, forks and whole heads included, and else refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from gptj_conversion.convert import convert, describe, open_source, plan
from gptj_conversion.mesh.reader import open_mesh
from mesh_samples import MeshSample, same_bits, write_mesh_sample
from reference import MESH_FIXTURE, mesh_outputs

from gptj.checkpoint import open_checkpoint, verify_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import ConfigError
from gptj.parity.oracle import Oracle
from gptj.reading.manifest import Manifest

FLOAT32_ABSOLUTE = 2e-5
"""The original's own two routes differ by 3.8e-6."""


@pytest.fixture
def sample(tmp_path) -> MeshSample:
    return write_mesh_sample(tmp_path / "model")


def edited(sample: MeshSample, **changes: object) -> dict[str, object]:
    members = {key: value for key, value in {**sample.training_config, **changes}.items() if value is not ...}
    sample.config_file.write_text(json.dumps(members))
    return members


# ---- rotary


@pytest.mark.parametrize("dims", [..., 64, 4, 5], ids=["absent", "wider", "the head's", "wider and odd"])
@pytest.mark.parametrize("to", ["safetensors", "bin", "flax", "tf"])
def test_every_format_gets_the_effective_rotary_width(sample, tmp_path, dims, to):
    edited(sample, pe_rotary_dims=dims)
    convert(sample.path, tmp_path / "out", config=sample.config_file, to=to)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rotary_dim"] == 4
    convert(tmp_path / "out", tmp_path / "mesh", to="mesh", shards=2)
    assert json.loads((tmp_path / "mesh" / "training_config.json").read_text())["pe_rotary_dims"] == 4


@pytest.mark.parametrize("said", [None, 64, ...], ids=["null", "wider", "absent"])
def test_a_folder_of_ours_that_says_otherwise_still_verifies_and_is_written_with_the_effective_width(
    sample, tmp_path, said
):
    edited(sample, pe_rotary_dims=...)
    convert(sample.path, tmp_path / "old", config=sample.config_file)
    members = json.loads((tmp_path / "old" / "config.json").read_text())
    members["rotary_dim"] = said
    members = {key: value for key, value in members.items() if value is not ...}
    text = json.dumps(members)
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    (tmp_path / "old" / "config.json").write_text(text)
    record = manifest["files"]["config.json"]
    record |= {"nbytes": len(text), "hashed_bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    before = verify_checkpoint(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["rotary_dim"] == 4
    after = verify_checkpoint(tmp_path / "new")
    assert (before.config_sha256, before.sha256) == (after.config_sha256, after.sha256)
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize("dims", [..., 64], ids=["absent", "wider"])
def test_a_whole_heads_rotation_gives_the_originals_logits(tmp_path, dims):
    members = json.loads((MESH_FIXTURE / "config.json").read_text()) | {"pe_rotary_dims": dims}
    (tmp_path / "train.json").write_text(json.dumps({k: v for k, v in members.items() if v is not ...}))
    convert(MESH_FIXTURE / "full", tmp_path / "out", config=tmp_path / "train.json")
    opened = open_checkpoint(tmp_path / "out")
    outputs = mesh_outputs()
    logits = Oracle(opened.config, opened.read).forward(outputs["input_ids"]).logits
    assert np.abs(logits - outputs["logits_fp32"]).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        (None, "pe_rotary_dims: is null, with which the original computes no GPT-J.*rotated and its unrotated self"),
        (0, "pe_rotary_dims: is 0, which means no rotation"),
        (-2, "pe_rotary_dims: breaks its rule"),
        (True, "pe_rotary_dims: breaks its rule"),
        (False, "pe_rotary_dims: breaks its rule"),
        (2.0, "pe_rotary_dims: breaks its rule"),
        ("2", "pe_rotary_dims: breaks its rule"),
        (3, "pe_rotary_dims: breaks its rule"),
    ],
)
def test_what_is_no_rotary_width_is_refused_with_its_reason(sample, tmp_path, dims, words):
    edited(sample, pe_rotary_dims=dims)
    with pytest.raises(ConfigError, match=words):
        convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert not (tmp_path / "out").exists()


def test_the_config_in_memory_stays_what_was_said_and_its_file_says_what_counts():
    config = GPTJConfig(n_embd=32, n_head=4, rotary_dim=None)
    assert config.rotary_dim is None and config.to_dict()["rotary_dim"] == 8
    again = GPTJConfig.from_dict(config.to_dict())
    assert again.architecture_sha256 == config.architecture_sha256 and again.to_json() == config.to_json()


# ---- the keys of KoboldAI's fork


FORK = {"compat": "j", "combined_qkv": False, "do_layer_norm_before": True, "attention_layers": ["global", "global"],
        "d_embed": 16, "pe_shift": 0, "tokenizer": "gpt2", "tokenizer_class": "GPT2Tokenizer"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compat": "neo"}, 'compat: not a GPT-J (expected "j", found .*neo'),
        ({"compat": "opt"}, "compat: not a GPT-J"),
        ({"compat": None}, "compat: not a GPT-J"),
        ({"combined_qkv": True}, "combined_qkv: not a GPT-J"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before: not a GPT-J"),
        ({"attention_layers": ["global", "local"]}, "attention_layers: not a GPT-J"),
        ({"d_embed": 8}, "d_embed: not a GPT-J (expected d_model = 16"),
        ({"activation": "quick_gelu"}, "activation: an activation that GPT-J has no name for"),
        ({"activation": None}, "activation: an activation"),
        ({"pe": "fixed"}, "pe: not a GPT-J .*trained table"),
        ({"pe": "t5"}, "pe: not a GPT-J .*trained bias"),
        ({"pe": "neox_rotary"}, "pe: not a GPT-J .*turns the halves"),
        ({"pe": "alibi"}, "pe: not a GPT-J .*bias of the attention"),
        ({"norm": "layernorm-nobias"}, "norm: not a GPT-J .*drops the offset"),
        ({"norm": "layernorm-desync"}, "norm: not a GPT-J .*Each shard"),
        ({"norm": "rmsnorm-bias"}, "norm: not a GPT-J .*subtracts no mean"),
        ({"n_vocab_padding": -1}, "n_vocab_padding: breaks its rule"),
        ({"n_vocab_padding": 3}, "n_vocab + n_vocab_padding is 13, the files show 10"),
        ({"pe_rotary_pct": 1.0}, "pe_rotary_pct: contradicts pe_rotary_dims"),
        ({"pe_rotary_pct": 2}, "pe_rotary_pct: breaks its rule"),
        ({"pe_rotary_pct": 0, "pe_rotary_dims": ...}, "pe_rotary_pct: breaks its rule"),
    ],
)
def test_a_forks_key_that_makes_another_model_is_refused_by_name(sample, changes, words):
    edited(sample, **{**FORK, **changes})
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace("+", r"\+")):
        open_mesh(sample.path, config=sample.config_file)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, {"activation_function": "gelu_new", "rotary_width": 2}),
        ({"activation": "gelu_python"}, {"activation_function": "gelu_new"}),
        ({"activation": "relu"}, {"activation_function": "relu"}),
        ({"pe_rotary_pct": 0.5}, {"rotary_width": 2}),
        ({"pe_rotary_pct": 1, "pe_rotary_dims": ...}, {"rotary_width": 4}),
        ({"n_vocab_padding": 0}, {"vocab_size": 10}),
    ],
)
def test_a_forks_key_that_leaves_it_a_gptj_is_understood(sample, changes, fields):
    edited(sample, **{**FORK, **changes})
    config = open_mesh(sample.path, config=sample.config_file).config
    assert {name: getattr(config, name) for name in fields} == fields


def test_rows_that_pad_the_vocabulary_are_left_out_and_said(sample, tmp_path):
    edited(sample, n_vocab=7, n_vocab_padding=3)
    notes = plan(sample.path, tmp_path / "out", config=sample.config_file).notes
    assert any("(n_vocab_padding: 3) are left out" in note for note in notes)
    convert(sample.path, tmp_path / "out", config=sample.config_file, verify=True)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.config.vocab_size == 7 and describe(tmp_path / "out").vocab == 7
    for name, whole in sample.tensors.items():
        cut = whole[:7] if name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias") else whole
        assert same_bits(opened.read(name), np.ascontiguousarray(cut)), name
    record = Manifest.from_file(tmp_path / "out" / "manifest.json").tensors["lm_head.weight"]
    assert record.shape == (7, 16) and "pad the vocabulary (3) left out" in record.origin.rule


# ---- the other config, and what is none


def test_a_config_json_may_take_the_training_configs_place(sample, tmp_path):
    convert(sample.path, tmp_path / "one", config=sample.config_file)
    for given in (tmp_path / "one" / "config.json", tmp_path / "one"):
        assert open_mesh(sample.path, config=None).config is None
        assert open_source(sample.path, config=given).config.rotary_width == 2
    assert open_mesh(sample.path, config=tmp_path / "one" / "config.json").config.n_head == 4
    (tmp_path / "one" / "config.json").rename(sample.path / "training_config.json")
    assert open_mesh(sample.path).config.n_head == 4


def test_a_config_json_without_its_model_type_is_known_by_its_fields(sample, tmp_path):
    convert(sample.path, tmp_path / "one", config=sample.config_file)
    members = json.loads((tmp_path / "one" / "config.json").read_text())
    del members["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(members))
    assert open_source(sample.path, config=tmp_path / "config.json").config.n_head == 4


@pytest.mark.parametrize(
    "change", [{"activation_function": "relu"}, {"layer_norm_epsilon": 1e-6}, {"tie_word_embeddings": True}]
)
def test_a_config_json_that_the_original_could_not_compute_is_refused(sample, tmp_path, change):
    convert(sample.path, tmp_path / "one", config=sample.config_file)
    config = GPTJConfig.from_file(tmp_path / "one").replace(**change)
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: not what a TPU checkpoint computes"):
        open_source(sample.path, config=config)


def test_a_training_config_may_take_a_config_jsons_place(sample, tmp_path):
    convert(sample.path, tmp_path / "one", config=sample.config_file)
    assert open_source(tmp_path / "one", config=sample.config_file).config.rotary_width == 2


def test_a_folder_is_understood_as_the_config_in_it(sample, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    sample.config_file.rename(folder / "training_config.json")
    assert open_source(sample.path, config=folder).config.n_head == 4


def test_a_folder_without_one_config_names_the_files_to_give(sample, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"configs: a folder, not a file .*no JSON file"):
        open_source(sample.path, config=folder)
    sample.config_file.rename(folder / "6B.json")
    with pytest.raises(ConfigError, match=r"configs: a folder, not a file .*Give the file: .*6B\.json"):
        open_source(sample.path, config=folder)
    for name in ("config.json", "training_config.json"):
        (folder / name).write_text("{}")
    with pytest.raises(ConfigError, match="a folder with two configs"):
        open_source(sample.path, config=folder)


def test_a_json_file_of_something_else_is_named_as_neither(sample, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 3}')
    with pytest.raises(ConfigError, match=r"neither a training config nor a config\.json"):
        open_source(sample.path, config=tmp_path / "generation_config.json")


def test_a_training_config_in_a_config_jsons_place_is_named_and_may_be_said(sample, tmp_path):
    convert(sample.path, tmp_path / "one", config=sample.config_file)
    (tmp_path / "one" / "manifest.json").unlink()
    (tmp_path / "one" / "config.json").write_text(sample.config_file.read_text())
    with pytest.raises(ConfigError, match=r"config\.json: the training config of a TPU checkpoint, not a config\.json"):
        convert(tmp_path / "one", tmp_path / "two")
    convert(tmp_path / "one", tmp_path / "two", config=tmp_path / "one" / "config.json")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["n_head"] == 4
