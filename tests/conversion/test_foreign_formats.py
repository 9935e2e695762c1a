"""transformers' and torch's own files are read exactly, and every format goes round through every other."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import h5py
import msgpack
import numpy as np
import pytest
from checkpoint_samples import CONFIG, write_sample
from gptj_conversion import convert as door
from gptj_conversion.common.dialects import spell
from gptj_conversion.convert import convert, describe, open_source, plan, source_formats, target_formats
from gptj_conversion.hf.flax_msgpack import MsgpackWriter, pack_array_heads, read_msgpack
from gptj_conversion.hf.torch_bin import read_bin
from gptj_conversion.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_samples import BFLOAT16, same_bits, write_mesh_sample

from gptj.checkpoint import open_checkpoint
from gptj.config import GPTJConfig
from gptj.config.schema import schema
from gptj.errors import CheckpointWarning, FormatError, InputError, MissingFileError, SchemaError, WriteError
from gptj.writing.containers import Entry
from gptj.writing.output_directory import OutputDirectory

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
TORCH = FOREIGN / "torch_save"
FOLDERS = sorted(path.name for path in FOREIGN.iterdir() if (path / "config.json").is_file())


def expected(folder: str) -> dict[str, np.ndarray]:
    own = FOREIGN / folder / "expected.npz"
    with np.load(own if own.exists() else FOREIGN / "expected.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def in_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    return values.astype(BFLOAT16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_that_transformers_wrote_is_read_to_the_bit(folder, tmp_path):
    convert(FOREIGN / folder, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    values = expected(folder)
    assert checkpoint.tensors.keys() == values.keys()
    for name, array in values.items():
        found = checkpoint.read(name)
        assert same_bits(found, in_dtype(array, found.dtype.name)), name


def test_every_format_of_transformers_is_among_the_fixtures():
    formats = {describe(FOREIGN / folder).format for folder in FOLDERS}
    assert formats == {
        "safetensors",
        "safetensors (flax)",
        "safetensors (tf)",
        "pytorch_model.bin",
        "flax_model.msgpack",
        "tf_model.h5",
    }


@pytest.mark.parametrize(
    "name",
    ["ordered_dict_with_metadata", "protocol_4", "parameters", "column_major", "old_buffers", "views_of_one_storage"],
)
def test_whatever_torch_save_makes_of_a_state_dict_is_read(name, tmp_path):
    config = GPTJConfig.from_file(FOREIGN / "pt_bin")
    source = open_source(TORCH / f"{name}.bin", config=config)
    for row in schema(config):
        assert same_bits(source.read(row), expected("pt_bin")[row.name]), row.name
    assert len(source.facts().problems) == (4 if name == "old_buffers" else 0)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_journey_through_every_format_is_bit_identical(tmp_path, dtype, max_shard_bytes):
    convert(FOREIGN / "pt", tmp_path / "start", dtype=dtype)
    steps = ["tf", "flax", "bin", "safetensors"] if dtype != "bfloat16" else ["flax", "bin", "safetensors"]
    here = tmp_path / "start"
    for number, step in enumerate(steps):
        convert(here, tmp_path / f"{number}-{step}", to=step, max_shard_bytes=max_shard_bytes)
        here = tmp_path / f"{number}-{step}"
        assert describe(here).shards > 1 or max_shard_bytes > 10**6
    start, end = open_checkpoint(tmp_path / "start"), open_checkpoint(here)
    assert start.tensors.keys() == end.tensors.keys()
    assert all(same_bits(start.read(name), end.read(name)) for name in start.tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_from_pt_by_tf_flax_and_mesh_back_to_pt_is_bit_identical(tmp_path, shards, dtype):
    """HDF5 has no bfloat16, so that leg is float32, which holds every bfloat16 number."""
    config = GPTJConfig(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=8, rotary_dim=2)
    write_sample(tmp_path / "pt", config, dtype=dtype)
    mesh = {"to": "mesh", "shards": shards, "layout": "full" if dtype == "float32" else "slim"}
    legs = [("pt", "tf", {"to": "tf", "dtype": "float32" if dtype == "bfloat16" else dtype}),
            ("tf", "flax", {"to": "flax", "dtype": dtype}), ("flax", "mesh", mesh), ("mesh", "end", {})]  # fmt: skip
    for source, target, options in legs:
        convert(tmp_path / source, tmp_path / target, fingerprint=False, **options)
    start, end = open_checkpoint(tmp_path / "pt"), open_checkpoint(tmp_path / "end")
    assert start.tensors.keys() == end.tensors.keys()
    assert all(same_bits(start.read(name), end.read(name)) for name in start.tensors)
    assert {tensor.dtype for tensor in end.tensors.values()} == {dtype}
    sums = [verify(tmp_path / name).sha256 for name in ("pt", "flax", "mesh", "end")]
    assert len({*sums}) == 1


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_a_mesh_of_any_shards_comes_back_once_its_embedding_bias_is_folded(tmp_path, shards, dtype):
    sample = write_mesh_sample(tmp_path / "mesh", heads=8, vocab_per_shard=8, shards=shards, dtype=dtype)
    convert(sample.path, tmp_path / "pt", config=sample.config_file, fingerprint=False)
    folded = verify(tmp_path / "pt")
    wte = folded.tensors["transformer.wte.weight"]
    assert "added to every row" in wte.origin.rule
    here = tmp_path / "pt"
    for step in ("flax", "bin", "mesh", "safetensors"):
        options = {"shards": 8 // shards} if step == "mesh" else {}
        here = convert(here, tmp_path / f"to-{step}", to=step, fingerprint=False, **options)
        assert verify(here).sha256 == folded.sha256


@pytest.mark.parametrize("folder", ["tf_base", "tf_classifier"])
@pytest.mark.parametrize("to", ["bin", "flax", "tf", "safetensors"])
def test_other_heads_go_round_too(tmp_path, folder, to):
    convert(FOREIGN / folder, tmp_path / "one", to=to)
    convert(tmp_path / "one", tmp_path / "two")
    checkpoint = open_checkpoint(tmp_path / "two")
    assert all(same_bits(checkpoint.read(name), array) for name, array in expected(folder).items())


def test_a_head_that_a_tpu_checkpoint_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="no place for this head"):
        convert(FOREIGN / "tf_classifier", tmp_path / "out", to="mesh", shards=1)
    assert list(tmp_path.iterdir()) == []


def test_our_archives_hold_what_torchs_do():
    theirs = {array.name: array for array in read_bin(FOREIGN / "pt_bin" / "pytorch_model.bin")}
    assert theirs.keys() == expected("pt_bin").keys()
    assert all(array.extents[0][0] % 64 == 0 for array in theirs.values())


def test_our_archives_are_aligned_as_torchs_are(tmp_path):
    convert(FOREIGN / "pt", tmp_path / "out", to="bin")
    ours = read_bin(tmp_path / "out" / "pytorch_model.bin")
    assert len(ours) == 25 and all(array.extents[0][0] % 64 == 0 for array in ours)


def test_our_msgpack_is_the_librarys_to_the_byte(tmp_path):
    """Flax's own file was packed by the msgpack library; the same tree packed by us is the same bytes."""
    theirs = (FOREIGN / "flax" / "flax_model.msgpack").read_bytes()
    arrays = read_msgpack(FOREIGN / "flax" / "flax_model.msgpack")
    rows = {spell(row.name, "flax").name: row for row in schema(GPTJConfig.from_file(FOREIGN / "flax"))}
    entries = [Entry(rows[a.name], a.dtype, a.name, spell(rows[a.name].name, "flax").transposed) for a in arrays]
    with OutputDirectory(tmp_path / "out") as output:
        writer = MsgpackWriter(output, "flax_model.msgpack", entries, "causal_lm")
        for entry, array in zip(entries, arrays, strict=True):
            writer.add(entry, [array.read(array.dtype).reshape(-1).view(np.uint8).data])
        writer.finish()
        output.commit()
    assert (tmp_path / "out" / "flax_model.msgpack").read_bytes() == theirs


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(0, 300), max_size=3).map(tuple),
    dtype=st.sampled_from([np.float32, np.float16, BFLOAT16, np.float64]),
)
def test_an_arrays_head_is_the_librarys_for_any_shape(shape, dtype):
    dtype = np.dtype(dtype)
    data = bytes(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    [(head, nbytes)] = pack_array_heads(shape, dtype)
    inner = msgpack.packb((shape, dtype.name, data), use_bin_type=True)
    assert nbytes == len(data) and head + data == msgpack.packb(msgpack.ExtType(1, inner))


def test_large_arrays_are_cut_as_flax_cuts_them_and_joined_again(tmp_path):
    config = CONFIG.replace(n_layer=1)
    write_sample(tmp_path / "pt", config)
    rows = schema(config)
    spellings = [spell(row.name, "flax") for row in rows]
    entries = [
        Entry(row, np.dtype(np.float32), spelling.name, spelling.transposed)
        for row, spelling in zip(rows, spellings, strict=True)
    ]
    place = {part: n for n, part in enumerate(dict.fromkeys(p for e in entries for p in e.name.split("/")))}
    entries.sort(key=lambda entry: [place[part] for part in entry.name.split("/")])
    checkpoint = open_checkpoint(tmp_path / "pt")

    def foreign(entry: Entry) -> np.ndarray:
        values = checkpoint.read(entry.row.name)
        return np.ascontiguousarray(values.T if entry.transposed else values)

    with OutputDirectory(tmp_path / "out") as output:
        writer = MsgpackWriter(output, "flax_model.msgpack", entries, "causal_lm", chunk_bytes=50)
        for entry in entries:
            data = foreign(entry).reshape(-1).view(np.uint8).data
            writer.add(entry, [data[at : at + 70] for at in range(0, len(data), 70)])
        writer.finish()
        output.write_file("config.json", config.to_json().encode())
        output.commit()
    tree = msgpack.unpackb((tmp_path / "out" / "flax_model.msgpack").read_bytes())
    chunked = tree["transformer"]["wte"]["embedding"]
    assert list(chunked) == ["__msgpack_chunked_array__", "shape", "chunks"] and chunked["shape"] == {"0": 11, "1": 12}
    convert(tmp_path / "out", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    assert all(same_bits(back.read(name), checkpoint.read(name)) for name in checkpoint.tensors)


def test_bfloat16_in_hdf5_is_refused_with_what_to_choose(tmp_path):
    with pytest.raises(SchemaError, match=r"has no bfloat16.*Choose float32"):
        convert(FOREIGN / "pt_bin_bfloat16", tmp_path / "out", to="tf")
    with pytest.raises(SchemaError, match=r"has no bfloat16.*Choose float32"):
        plan(FOREIGN / "pt_bin_bfloat16", tmp_path / "out", to="tf")
    assert list(tmp_path.iterdir()) == []


# ---- choosing


def test_W13_several_weight_sets_are_refused_until_one_is_chosen(tmp_path):
    for folder in ("pt", "pt_bin", "tf", "flax"):
        for path in (FOREIGN / folder).iterdir():
            if path.suffix != ".npz":
                (tmp_path / "src").mkdir(exist_ok=True)
                (tmp_path / "src" / path.name).write_bytes(path.read_bytes())
    with pytest.warns(CheckpointWarning, match=r"several weight sets.*model\.safetensors is taken"):
        convert(tmp_path / "src", tmp_path / "equal")
    with h5py.File(tmp_path / "src" / "tf_model.h5", "r+") as file:
        del file[next(iter(file))]
    with pytest.raises(FormatError, match=r"several weight sets that differ.*tf_model\.h5"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "src" / "tf_model.h5").write_bytes((FOREIGN / "tf" / "tf_model.h5").read_bytes())
    for number, name in enumerate(["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"]):
        convert(tmp_path / "src", tmp_path / f"by-name-{number}", weights=name)
        convert(tmp_path / "src" / name, tmp_path / f"by-path-{number}")
    convert(tmp_path / "src", tmp_path / "by-format", source_format="flax")


def test_W13_a_file_and_an_index_side_by_side_that_are_equal_are_read(tmp_path):
    for folder in ("pt_bin", "pt_bin_sharded"):
        for path in (FOREIGN / folder).iterdir():
            (tmp_path / "src").mkdir(exist_ok=True)
            (tmp_path / "src" / path.name).write_bytes(path.read_bytes())
    with pytest.warns(CheckpointWarning, match="several weight sets"):
        convert(tmp_path / "src", tmp_path / "first")
    convert(tmp_path / "src", tmp_path / "out", weights="pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "onnx"}, "one of safetensors, mesh"),
        ({"source_format": "onnx"}, "one of safetensors, mesh"),
        ({"to": "mesh"}, "shards"),
        ({"shards": 2}, "shards"),
        ({"dtype": "int8"}, "float16"),
        ({"to": "bin", "max_shard_bytes": 0}, "max_shard_bytes"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        convert(FOREIGN / "pt", tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_holds_another_formats_weights_is_not_replaced(tmp_path):
    convert(FOREIGN / "pt", tmp_path / "out", to="bin")
    with pytest.raises(WriteError, match="would be lost"):
        convert(FOREIGN / "pt", tmp_path / "out", to="flax", overwrite=True)
    convert(FOREIGN / "pt_bin_float16", tmp_path / "out", to="bin", overwrite=True, max_shard_bytes=3000)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists() and describe(tmp_path / "out").dtype == "float16"


def test_every_source_format_but_none_more_can_be_written():
    assert set(source_formats()) >= set(target_formats())
    assert door.target_formats() == ("safetensors", "mesh", "bin", "flax", "tf")


# ---- folders and indexes


def copy(folder: str, target: Path) -> Path:
    target.mkdir()
    for path in (FOREIGN / folder).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


SHARDED = {
    "pt_bin_sharded": "pytorch_model.bin.index.json",
    "flax_sharded": "flax_model.msgpack.index.json",
    "tf_sharded": "tf_model.h5.index.json",
}


@pytest.mark.parametrize("folder", SHARDED)
@pytest.mark.parametrize(
    "bad", ["../x{}", "/abs{}", "a/../../x{}", "C:x{}", "a\\b{}", "", ".", "x\0{}", "x\n{}", "n" * 300 + "{}"]
)
def test_X1_an_index_that_leads_outside_is_refused(tmp_path, folder, bad):
    source = copy(folder, tmp_path / "src")
    index = source / SHARDED[folder]
    members = json.loads(index.read_text())
    suffix = "." + SHARDED[folder].removesuffix(".index.json").split(".")[-1]
    members["weight_map"][next(iter(members["weight_map"]))] = bad.format(suffix)
    index.write_text(json.dumps(members))
    with pytest.raises((FormatError, SchemaError, ValueError), match="not a plain file name"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", SHARDED)
def test_X4_a_missing_shard_is_named(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    shard = next(path for path in sorted(source.iterdir()) if "-00002-of-" in path.name)
    shard.unlink()
    with pytest.raises(MissingFileError, match=shard.name):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("folder", SHARDED)
def test_X4_an_index_that_contradicts_its_shards_is_refused_with_all_contradictions(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    index = source / SHARDED[folder]
    members = json.loads(index.read_text())
    files = sorted(set(members["weight_map"].values()))
    first, second, third = sorted(members["weight_map"])[:3]
    other = {files[0]: files[1], files[1]: files[0]}
    members["weight_map"][first] = other[members["weight_map"][first]]
    members["weight_map"]["no.such"] = files[0]
    del members["weight_map"][second]
    index.write_text(json.dumps(members))
    with pytest.raises(SchemaError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    assert ", not in" in message and "no.such" in message and "is not listed" in message and third not in message


@pytest.mark.parametrize("folder", ["pt_bin", "flax", "tf"])
def test_X2_a_link_out_of_the_folder_is_refused_unless_allowed(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    weights = next(path for path in source.iterdir() if path.name != "config.json" and path.suffix != ".npz")
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", follow_links=True)


@pytest.mark.parametrize("folder", ["pt_bin", "flax", "tf"])
def test_W14_what_is_no_weights_file_is_said_to_be_what_it_is(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    weights = next(path for path in source.iterdir() if path.name != "config.json" and path.suffix != ".npz")
    for data in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html><html>",
        b"\x1f\x8b" + bytes(99),
    ):
        weights.write_bytes(data)
        with pytest.raises(FormatError, match=weights.name):
            convert(source, tmp_path / "out")


@pytest.mark.parametrize("folder", ["pt_bin", "flax", "tf"])
def test_W15_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    opened = open_source(source)
    weights = next(path for path in source.iterdir() if path.name != "config.json" and path.suffix != ".npz")
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(FormatError, match="changed while being read"):
        opened.read(schema(opened.config)[0])


# ---- tensors


@pytest.mark.parametrize("folder", ["pt_bin", "flax", "tf", "flax_safetensors", "tf_safetensors"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 3}, "missing: transformer"),
        ({"n_layer": 1}, "unexpected: "),
        ({"vocab_size": 41}, "expected"),
        ({"n_inner": 12}, "expected"),
    ],
)
def test_W10_C6_a_config_that_is_not_the_tensors_is_refused_with_all_mismatches(tmp_path, folder, changes, words):
    config = GPTJConfig.from_file(FOREIGN / folder).replace(**changes)
    with pytest.raises(SchemaError, match=words):
        convert(FOREIGN / folder, tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["pt_bin", "tf", "flax"])
def test_W8_a_transposed_matrix_is_said_to_look_transposed(tmp_path, folder):
    source = copy(folder, tmp_path / "src")
    weights = next(path for path in source.iterdir() if path.name != "config.json" and path.suffix != ".npz")
    data = weights.read_bytes()
    if folder == "flax":
        weights.write_bytes(data.replace(b"\x93\x92\x28\x0c", b"\x93\x92\x0c\x28"))
    elif folder == "pt_bin":
        shape, strides = b"K\x28K\x0c\x86q\x08K\x0cK\x01\x86", b"K\x0cK\x28\x86q\x08K\x28K\x01\x86"
        assert shape in data
        start = data.index(b"\x80\x02}")
        old = open_pickle(data, start)
        new = old.replace(shape, strides)
        data = data.replace(old, new).replace(struct.pack("<I", zlib.crc32(old)), struct.pack("<I", zlib.crc32(new)))
        weights.write_bytes(data)
    else:
        with h5py.File(weights, "r+") as file:
            place = file["transformer/tfgptj_for_causal_lm/transformer/wte"]
            values = place["weight:0"][...]
            del place["weight:0"]
            place.create_dataset("weight:0", data=values.T)
    with pytest.raises(SchemaError, match=r"shape \(12, 40\), expected \(40, 12\) \(looks transposed"):
        convert(source, tmp_path / "out")


def open_pickle(data: bytes, start: int) -> bytes:
    """The pickle that begins at `start`: up to its STOP, which is followed by the zip's next structure."""
    return data[start : data.index(b"u.PK\x07\x08", start) + 2]
