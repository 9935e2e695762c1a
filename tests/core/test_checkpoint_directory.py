"""Which files of a directory are its checkpoint, and which names, links and mixtures are refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import CONFIG, arrays, safetensors_bytes, write_raw, write_sample

from gptj.checkpoint import open_checkpoint
from gptj.config import GPTJConfig
from gptj.errors import (
    CheckpointWarning,
    ConfigError,
    FormatError,
    LimitError,
    MissingFileError,
    SchemaError,
    UnsafeFileError,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "sharded", max_shard_bytes=3000)


def edit_index(directory: Path, change: Any) -> None:
    members = json.loads((directory / INDEX).read_text())
    change(members)
    (directory / INDEX).write_text(json.dumps(members))


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


# ---- what opening gives


def test_opening_gives_config_names_head_and_metadata(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert checkpoint.config.n_layer == CONFIG.n_layer
    assert list(checkpoint.tensors) == list(arrays())
    assert checkpoint.head == "causal_lm"
    assert checkpoint.metadata == {"format": "pt", "gptj.config_sha256": CONFIG.architecture_sha256}
    assert checkpoint.weight_files == (single / "model.safetensors",)


@pytest.mark.parametrize("head", ["base", "causal_lm", "sequence_classification", "question_answering"])
def test_the_head_is_inferred_from_the_names(tmp_path: Path, head: Any) -> None:
    assert open_checkpoint(write_sample(tmp_path / "x", head=head)).head == head


def test_a_sharded_directory_opens_as_one(single: Path, sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.weight_files) > 2
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {
        n: t.shape for n, t in open_checkpoint(single).tensors.items()
    }


# ---- nothing there, or too much


def test_a_directory_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_in_place_of_the_directory_is_refused_unless_it_holds_weights(single: Path) -> None:
    with pytest.raises(FormatError, match="not a directory"):
        open_checkpoint(single / "config.json")
    assert open_checkpoint(single / "model.safetensors").directory == single


def test_a_folder_in_place_of_a_weights_file_is_named(single: Path) -> None:
    (single / "inner").mkdir()
    for name in ("inner", str(single)):
        with pytest.raises(FormatError, match="weights: a folder"):
            open_checkpoint(single, weights=name)


def test_X6_a_directory_without_weights_says_what_was_looked_for(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors or model\.safetensors\.index\.json"):
        open_checkpoint(single)


def test_X6_a_directory_without_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json: no such file"):
        open_checkpoint(single)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"])
def test_W13_safetensors_win_over_other_formats_and_it_is_said(single: Path, other: str) -> None:
    (single / other).write_bytes(b"x")
    with pytest.warns(CheckpointWarning, match=rf"model\.safetensors is taken.*{other}"):
        assert len(open_checkpoint(single).tensors) == len(arrays())
    assert len(open_checkpoint(single, weights="model.safetensors").tensors) == len(arrays())


def test_W13_two_safetensors_sets_are_refused_unless_one_is_chosen(single: Path) -> None:
    (single / INDEX).write_bytes(b"x")
    with pytest.raises(FormatError, match=r"several weight sets .*Choose one, as weights='model\.safetensors'"):
        open_checkpoint(single)
    assert len(open_checkpoint(single, weights="model.safetensors").tensors) == len(arrays())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"])
def test_foreign_weights_alone_are_to_be_converted(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    with pytest.raises(FormatError, match="gptj convert"):
        open_checkpoint(single)


def test_another_safetensors_name_must_be_chosen(single: Path) -> None:
    (single / "model.safetensors").rename(single / "mine.safetensors")
    with pytest.raises(FormatError, match=r"--weights mine\.safetensors"):
        open_checkpoint(single)
    assert open_checkpoint(single, weights="mine.safetensors").head == "causal_lm"


def test_chosen_weights_must_be_a_plain_name(single: Path) -> None:
    with pytest.raises(UnsafeFileError, match="plain file name"):
        open_checkpoint(single, weights="../other/model.safetensors")
    assert open_checkpoint(single, weights=str(single / "model.safetensors")).head == "causal_lm"


# ---- the index


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/../../x.safetensors",
        "C:\\x.safetensors",
        "a\\b.safetensors",
        "",
        ".",
        "x\0.safetensors",
        "x\n.safetensors",
        "x" * 300 + ".safetensors",
        "x.bin",
        "config.json",
        7,
        None,
    ],
)
def test_X1_a_shard_name_that_could_lead_elsewhere_is_unsafe(sharded: Path, name: Any) -> None:
    edit_index(sharded, lambda members: members["weight_map"].update({"lm_head.bias": name}))
    with pytest.raises(UnsafeFileError, match=r"weight_map\['lm_head\.bias'\]"):
        open_checkpoint(sharded)


def test_X4_a_missing_shard_is_named(sharded: Path) -> None:
    first_shard(sharded).unlink()
    with pytest.raises(SchemaError, match=r"shard 'model-00001-of-\d+\.safetensors' is missing"):
        open_checkpoint(sharded)


def test_X4_a_cut_shard_is_named(sharded: Path) -> None:
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=shard.name):
        open_checkpoint(sharded)


def test_X4_a_tensor_listed_in_the_wrong_shard_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda members: members["weight_map"].update({"lm_head.bias": first_shard(sharded).name}))
    with pytest.raises(SchemaError, match=r"lm_head\.bias lies in model-\d+-of-\d+\.safetensors, not in model-00001"):
        open_checkpoint(sharded)


def test_X4_a_tensor_that_is_listed_and_absent_is_named(sharded: Path) -> None:
    edit_index(sharded, lambda members: members["weight_map"].update({"ghost": first_shard(sharded).name}))
    with pytest.raises(SchemaError, match="'ghost' is not in model-00001"):
        open_checkpoint(sharded)


def test_X4_a_tensor_that_is_there_and_not_listed_is_named(sharded: Path) -> None:
    def drop(members: Any) -> None:
        del members["weight_map"]["transformer.h.0.ln_1.bias"]

    edit_index(sharded, drop)
    with pytest.raises(SchemaError, match=r"transformer\.h\.0\.ln_1\.bias in model-\d+.* is not listed"):
        open_checkpoint(sharded)


def test_X4_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    (sharded / "more.safetensors").write_bytes(last.read_bytes())
    edit_index(sharded, lambda members: members["weight_map"].update({"x": "more.safetensors"}))
    with pytest.raises(SchemaError, match=r"lm_head\.bias lies in .* and in"):
        open_checkpoint(sharded)


def test_X4_a_shard_that_the_index_does_not_know_is_named(sharded: Path) -> None:
    (sharded / "model-00099-of-00099.safetensors").write_bytes(b"x")
    with pytest.raises(SchemaError, match=r"'model-00099-of-00099\.safetensors' is not listed"):
        open_checkpoint(sharded)


def test_X4_a_shard_of_another_model_is_noticed(tmp_path: Path, sharded: Path) -> None:
    other = write_sample(tmp_path / "other", CONFIG.replace(n_head=2), max_shard_bytes=3000)
    shutil.copy(first_shard(other), first_shard(sharded))
    with pytest.raises(SchemaError, match="belong to different models"):
        open_checkpoint(sharded)


def test_X4_all_contradictions_are_listed_at_once(sharded: Path) -> None:
    first_shard(sharded).unlink()
    edit_index(sharded, lambda members: members["weight_map"].update({"ghost": "model-00099-of-00099.safetensors"}))
    with pytest.raises(SchemaError, match=r"model-00001.* is missing, shard 'model-00099"):
        open_checkpoint(sharded)


def test_X5_a_wrong_total_size_is_said_and_a_missing_one_accepted(sharded: Path) -> None:
    edit_index(sharded, lambda members: members["metadata"].update({"total_size": 5}))
    with pytest.warns(CheckpointWarning, match=r"metadata\.total_size: not the bytes .* \(expected \d+, found 5\)"):
        open_checkpoint(sharded)
    edit_index(sharded, lambda members: members.pop("metadata"))
    assert open_checkpoint(sharded).head == "causal_lm"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
        '{"metadata": [], "weight_map": {"a": "x.safetensors"}}',
        '{"weight_map": {"a": "x.safetensors", "b": "X.safetensors"}}',
    ],
)
def test_X5_a_malformed_index_is_refused_by_name(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        open_checkpoint(sharded)


def test_X5_an_index_of_a_million_entries_is_refused(sharded: Path) -> None:
    entries = ",".join(f'"{n}":"x.safetensors"' for n in range(1_000_000))
    (sharded / INDEX).write_text(f'{{"weight_map":{{{entries}}}}}')
    with pytest.raises((FormatError, LimitError), match=r"index\.json"):
        open_checkpoint(sharded)


# ---- links


def test_X2_a_link_out_of_the_folder_is_refused_unless_it_is_allowed(tmp_path: Path, single: Path) -> None:
    (single / "model.safetensors").rename(tmp_path / "elsewhere")
    (single / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        open_checkpoint(single)
    assert open_checkpoint(single, follow_links=True).head == "causal_lm"


def test_X2_a_config_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, single: Path) -> None:
    (single / "config.json").rename(tmp_path / "elsewhere")
    (single / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match=r"config\.json: is a link out"):
        open_checkpoint(single)


def test_X3_a_link_inside_the_folder_is_followed(single: Path) -> None:
    (single / "model.safetensors").rename(single / "real.safetensors")
    (single / "model.safetensors").symlink_to("real.safetensors")
    checkpoint = open_checkpoint(single)
    np.testing.assert_array_equal(checkpoint.read("lm_head.bias"), arrays()["lm_head.bias"])


def test_X2_the_hub_cache_layout_is_followed(tmp_path: Path, single: Path) -> None:
    cache = tmp_path / "models--someone--gpt-j"
    snapshot, blobs = cache / "snapshots" / "0123abcd", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(single.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(snapshot)
    np.testing.assert_array_equal(checkpoint.map("lm_head.bias"), arrays()["lm_head.bias"])


@pytest.mark.parametrize("place", ["models--someone--gpt-j/elsewhere", "models--another--gpt-j/blobs"])
def test_X2_a_hub_snapshot_may_not_link_beyond_its_own_blobs(tmp_path: Path, single: Path, place: str) -> None:
    snapshot, outside = tmp_path / "models--someone--gpt-j" / "snapshots" / "0123abcd", tmp_path / place
    snapshot.parent.mkdir(parents=True)
    outside.mkdir(parents=True)
    single.rename(snapshot)
    (snapshot / "model.safetensors").rename(outside / "0")
    (snapshot / "model.safetensors").symlink_to(outside / "0")
    with pytest.raises(UnsafeFileError, match="link out of its folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("kind", ["loop", "dangling", "folder", "fifo"])
def test_X3_a_link_that_leads_nowhere_or_to_no_file_is_refused(single: Path, kind: str) -> None:
    path = single / "model.safetensors"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        (single / "inner").mkdir()
        path.symlink_to("inner")
    else:
        path.symlink_to("model.safetensors" if kind == "loop" else "nothing")
    with pytest.raises(FormatError, match=r"model\.safetensors: "):
        open_checkpoint(single)


def test_the_directory_itself_may_be_a_link(tmp_path: Path, single: Path) -> None:
    (tmp_path / "link").symlink_to(single)
    assert open_checkpoint(tmp_path / "link").head == "causal_lm"


# ---- the config


@pytest.mark.parametrize("field", [{"n_head": 2}, {"rotary_dim": 4}, {"layer_norm_epsilon": 1e-6}])
def test_C6_an_edited_config_is_noticed_although_every_shape_still_fits(single: Path, field: dict[str, Any]) -> None:
    (single / "config.json").write_text(CONFIG.replace(**field).to_json())
    with pytest.raises(ConfigError, match="n_head, rotary_dim") as caught:
        open_checkpoint(single)
    assert caught.value.file == str(single / "config.json")


def test_a_config_that_is_passed_is_believed(tmp_path: Path, single: Path) -> None:
    other = CONFIG.replace(n_head=2)
    assert open_checkpoint(single, config=other).config == other
    (tmp_path / "other.json").write_text(other.to_json())
    assert open_checkpoint(single, config=tmp_path / "other.json").config.n_head == 2


def test_a_directory_of_another_tool_without_hash_opens(tmp_path: Path) -> None:
    assert open_checkpoint(write_raw(tmp_path / "raw", arrays())).metadata == {}


def test_C7_another_kind_of_model_is_refused(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type"):
        open_checkpoint(single)


def test_metadata_do_not_reach_outside(tmp_path: Path) -> None:
    """A header may say anything in its metadata; only the config's hash is looked at."""
    directory = write_raw(tmp_path / "x", {})
    (directory / "model.safetensors").write_bytes(safetensors_bytes({"__metadata__": {"file": "../../etc/passwd"}}))
    assert open_checkpoint(directory, config=GPTJConfig()).tensors == {}
