"""Weights go in and out of each wing bit for bit, under the schema's names, whatever class reads them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from gptj_conversion.convert import convert
from wings import close

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.config.initial import initial_tensor
from gptj.config.schema import HEADS, schema, schema_by_name
from gptj.errors import FormatError, GPTJError, InputError, MissingFileError, ParityError, SchemaError, WriteError
from gptj.parity.revealing import revealing_config, revealing_fill, revealing_weights
from gptj.pretrained import FreshWeightsWarning
from gptj.pretrained.absent import Absent

CONFIG = revealing_config()
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)
IDS = np.arange(14).reshape(2, 7)


@EVERY_HEAD
def test_parameters_bear_the_schemas_names_and_shapes(wing, revealing, head):
    expected = {name: row.shape for name, row in schema_by_name(CONFIG, head).items()}
    assert {name: value.shape for name, value in wing.parameters(revealing(head)).items()} == expected


@EVERY_HEAD
def test_loaded_parameters_are_the_files_bits(wing, revealing, head):
    stored = revealing_weights(CONFIG, head=head)
    for name, value in wing.parameters(revealing(head)).items():
        assert value.dtype == np.float32 and (value == stored[name]).all(), name


@EVERY_HEAD
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.feature("from_pretrained, save_pretrained, bit for bit in four dtypes", "every")
def test_a_saved_model_is_read_back_bit_for_bit(wing, revealing, tmp_path, head, dtype):
    revealing(head, dtype=dtype).save_pretrained(tmp_path / "model")
    saved = open_checkpoint(tmp_path / "model")
    assert saved.head == head and {t.dtype for t in saved.tensors.values()} == {dtype}
    for row in schema(CONFIG, head):
        expected = revealing_fill(0)(row).astype(saved.read(row.name).dtype)
        assert (saved.read(row.name) == expected).all(), row.name
    again = wing.model(head).from_pretrained(tmp_path / "model")
    assert again.config == revealing(head).config.replace(extra=again.config.extra)


@pytest.mark.parametrize("rotary_dim", [None, 1000])
def test_a_saved_config_says_the_rotary_width_that_counts(wing, tmp_path, rotary_dim):
    config = CONFIG.replace(rotary_dim=rotary_dim, n_layer=1)
    wing.model("causal_lm")(config).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rotary_dim"] == CONFIG.head_dim


def test_a_saved_model_in_shards_is_read_back(wing, revealing, tmp_path):
    revealing().save_pretrained(tmp_path / "model", max_shard_bytes=100_000)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    again = wing.model("causal_lm").from_pretrained(tmp_path / "model")
    assert (wing.numpy(wing.call(again, IDS).logits) == wing.numpy(wing.call(revealing(), IDS).logits)).all()


def test_an_existing_folder_is_not_overwritten_unless_asked(wing, revealing, tmp_path):
    revealing().save_pretrained(tmp_path / "model")
    with pytest.raises(WriteError, match="overwrite"):
        revealing().save_pretrained(tmp_path / "model")
    revealing().save_pretrained(tmp_path / "model", overwrite=True)


def test_a_model_is_saved_beside_checkpoints_and_notes_which_stay(wing, revealing, tmp_path):
    inner = tmp_path / "out" / "checkpoint-2"
    revealing().save_pretrained(make(inner.parent) / inner.name)
    (inner.parent / "notes.txt").write_text("mine")
    kept = {path: (path.stat().st_ino, path.read_bytes()) for path in inner.parent.rglob("*") if path.is_file()}
    for overwrite in (False, True):
        revealing().save_pretrained(inner.parent, overwrite=overwrite)
        assert {path: (path.stat().st_ino, path.read_bytes()) for path in kept} == kept
        again = wing.model("causal_lm").from_pretrained(inner.parent)
        assert (wing.numpy(wing.call(again, IDS).logits) == wing.numpy(wing.call(revealing(), IDS).logits)).all()
    with pytest.raises(WriteError, match=r"is not empty: it holds 'config\.json'"):
        revealing().save_pretrained(inner.parent)
    (inner.parent / "pytorch_model.bin").write_bytes(b"another's")
    with pytest.raises(WriteError, match="would be taken for this model's"):
        revealing().save_pretrained(inner.parent, overwrite=True)


def make(folder):
    folder.mkdir()
    return folder


@EVERY_HEAD
@pytest.mark.feature("the same start values for a seed", "every")
def test_the_same_seed_makes_the_same_model_in_every_wing(wing, head):
    model = wing.model(head)(CONFIG, seed=3)
    expected = {row.name: initial_tensor(row, CONFIG, 3) for row in schema(CONFIG, head)}
    for name, value in wing.parameters(model).items():
        assert (value == expected[name]).all(), name


@pytest.mark.feature("a head folder as a base model", "base")
def test_a_causal_lm_folder_opens_as_a_base_model(wing, folder, oracle):
    model, info = wing.model("base").from_pretrained(folder("causal_lm"), output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["lm_head.bias", "lm_head.weight"] and not info["missing_keys"]
    got = wing.numpy(wing.call(model, IDS).last_hidden_state)
    assert close(got, oracle().forward(IDS).hidden_states[-1], "float32")


@pytest.mark.parametrize("head", ["causal_lm", "sequence_classification", "question_answering"])
@pytest.mark.feature("a base folder under a head", "causal_lm", "sequence_classification", "question_answering")
def test_a_base_folder_opens_under_a_head_whose_fresh_rows_are_announced(wing, folder, head):
    rows = [row.name for row in schema(CONFIG, head) if not row.name.startswith("transformer.")]
    with pytest.warns(FreshWeightsWarning, match=rows[0]) as caught:
        model, info = wing.model(head).from_pretrained(folder("base"), output_loading_info=True)
    assert [one.filename for one in caught] == [__file__]
    assert sorted(info["missing_keys"]) == sorted(rows)
    found = wing.parameters(model)
    for row in schema(CONFIG, head):
        name = row.name.removeprefix("transformer.")
        expected = initial_tensor(row, CONFIG) if row.name in rows else revealing_weights(CONFIG, head="base")[name]
        assert (found[row.name] == expected).all(), row.name


def test_a_row_of_another_shape_is_an_error_or_starts_afresh(wing, folder):
    source = folder("sequence_classification")
    with pytest.raises(SchemaError, match=r"score\.weight"):
        wing.model("sequence_classification").from_pretrained(source, num_labels=3)
    with pytest.warns(FreshWeightsWarning, match=r"score\.weight"):
        model, info = wing.model("sequence_classification").from_pretrained(
            source, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert len(info["mismatched_keys"]) == 1 and model.config.num_labels == 3


def test_missing_rows_of_the_base_are_an_error_that_lists_them(wing, tmp_path):
    fill, deep = revealing_fill(0), CONFIG.replace(n_layer=CONFIG.n_layer + 1)
    write_checkpoint(tmp_path / "model", CONFIG, fill)
    with pytest.raises(SchemaError, match=rf"transformer\.h\.{CONFIG.n_layer}\."):
        wing.model("causal_lm").from_pretrained(tmp_path / "model", config=deep)


def test_a_wrong_folder_is_named(wing, tmp_path):
    with pytest.raises((MissingFileError, GPTJError), match="nowhere"):
        wing.model("causal_lm").from_pretrained(tmp_path / "nowhere")


@pytest.mark.feature("a folder checked against its manifest and fingerprint", "causal_lm")
def test_a_verified_load_notices_what_no_shape_shows(wing, folder, tmp_path):
    path, load = convert(folder(), tmp_path / "model"), wing.model("causal_lm").from_pretrained
    load(path, verify=True)
    with pytest.raises(ParityError, match="forward pass"):
        load(path, verify=True, n_head=CONFIG.n_head // 2, rotary_dim=CONFIG.rotary_dim)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    load(path)
    with pytest.raises(FormatError, match=r"lm_head\.bias"):
        load(path, verify=True)
    with pytest.raises(MissingFileError, match="manifest"):
        load(folder(), verify=True)


def test_an_unknown_option_is_refused(wing, folder):
    with pytest.raises(GPTJError, match="n_lyaer"):
        wing.model("causal_lm").from_pretrained(folder(), n_lyaer=3)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtype_casts_every_parameter(wing, folder, dtype):
    model = wing.model("causal_lm").from_pretrained(folder(), param_dtype=dtype)
    for name, value in _raw(wing, model).items():
        assert str(value.dtype) == dtype, name


def _raw(wing, model):
    if wing.name == "pt":
        return {name: wing.module.to_numpy(p) for name, p in model.named_parameters()}
    if wing.name == "tf":
        return {v.path: wing.module.to_numpy(v) for v in model.trainable_variables}
    import jax

    return {str(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(model.params)}


@pytest.mark.parametrize("size", [CONFIG.vocab_size + 24, CONFIG.vocab_size - 16])
def test_resizing_keeps_the_rows_that_stay_and_is_saved(wing, folder, tmp_path, size):
    model = wing.model("causal_lm").from_pretrained(folder())
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "model")
    again = wing.model("causal_lm").from_pretrained(tmp_path / "model")
    kept = min(size, CONFIG.vocab_size)
    assert again.config.vocab_size == size
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        value = wing.parameters(again)[name]
        assert len(value) == size and (value[:kept] == revealing_weights(CONFIG)[name][:kept]).all()
    assert wing.numpy(wing.call(again, IDS).logits).shape[-1] == size


@EVERY_HEAD
def test_parameters_are_counted_from_the_schema(wing, revealing, head):
    assert revealing(head).num_parameters() == sum(row.size for row in schema(CONFIG, head))


def test_the_embedding_is_left_out_of_the_count_as_in_transformers(wing, folder):
    head = wing.model("causal_lm")
    for config in (CONFIG, CONFIG.replace(tie_word_embeddings=True)):
        model = head(config)
        whole, embedding = model.num_parameters(), CONFIG.vocab_size * CONFIG.n_embd
        assert model.num_parameters(exclude_embeddings=True) == whole - embedding
        assert model.num_parameters(True, True) == whole - embedding
    prepared = head.from_pretrained(folder(), inference=True)
    assert prepared.num_parameters(exclude_embeddings=True) == head(CONFIG).num_parameters() - embedding
    assert prepared.num_parameters(only_trainable=True, exclude_embeddings=True) == 0


def test_a_model_says_where_it_was_opened_and_its_files_do_not(wing, folder, tmp_path):
    folder = folder()
    model = wing.model("causal_lm").from_pretrained(pretrained_model_name_or_path=str(folder))
    assert vars(model)["name_or_path"] == model.config._name_or_path == str(folder)
    model.config.use_cache = False
    assert model.config.name_or_path == model.base_model.config.name_or_path == str(folder)
    model.save_pretrained(save_directory=tmp_path / "saved")
    assert str(folder) not in (tmp_path / "saved" / "config.json").read_text()
    assert wing.model("causal_lm")(CONFIG).name_or_path == CONFIG.name_or_path == ""
    with pytest.raises(InputError, match="save_directory: is given already"):
        model.save_pretrained(tmp_path / "a", save_directory=tmp_path / "b")
    given = GPTJConfig.from_pretrained(folder)
    other = wing.model("base").from_pretrained(folder, config=given.replace())
    assert other.name_or_path == given.name_or_path == str(folder) and other.config == given


@pytest.mark.parametrize("name", [name for name in vars(Absent) if not name.startswith("_")])
def test_a_method_that_is_not_there_says_what_to_write(wing, name):
    with pytest.raises(InputError, match=f"^{name}: is not there: .+[.] .+"):
        getattr(wing.model("causal_lm"), name)(CONFIG)


def test_a_model_that_was_read_and_not_mapped_outlives_its_file(wing, folder, tmp_path):
    copied = Path(shutil.copytree(folder(), tmp_path / "model"))
    mapped = wing.model("causal_lm").from_pretrained(folder())
    model = wing.model("causal_lm").from_pretrained(copied, mmap=False)
    os.truncate(copied / "model.safetensors", 0)
    ids = np.arange(6).reshape(1, 6)
    logits = [wing.numpy(wing.call(one, ids).logits) for one in (model, mapped)]
    assert np.array_equal(*logits)
