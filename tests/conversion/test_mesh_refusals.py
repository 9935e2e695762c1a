"""Every way in which a TPU checkpoint can be wrong gives one error that names the culprit, and no output."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gptj_conversion.convert import convert, describe
from gptj_conversion.mesh.reader import open_mesh
from mesh_samples import MeshSample, write_mesh_sample

from gptj.errors import (
    ConfigError,
    FormatError,
    GPTJError,
    LimitError,
    MissingFileError,
    SchemaError,
    UnsafeFileError,
    WriteError,
)
from gptj.reading.npz import open_npz

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def sample(tmp_path: Path) -> MeshSample:
    return write_mesh_sample(tmp_path / "model")


def refusal(sample: MeshSample, kind: type[GPTJError] = GPTJError) -> str:
    """The message of the refusal, after nothing has been left at the destination."""
    target = sample.path.parent / "out"
    with pytest.raises(kind) as caught:
        convert(sample.path, target, config=sample.config_file)
    assert not target.exists()
    assert list(sample.path.parent.glob("*gptj*")) == []
    return str(caught.value)


def edit_config(sample: MeshSample, **changes: object) -> None:
    members = {**sample.training_config, **changes}
    members = {key: value for key, value in members.items() if value is not ...}
    sample.config_file.write_text(json.dumps(members))


# ---- what is there


def test_the_v2_model_is_refused_by_name(tmp_path):
    for path in (DATA / "mesh_v2_refuse", DATA / "mesh_v2_refuse" / "step_0"):
        with pytest.raises(FormatError, match="v2 model, which is no GPT-J"):
            convert(path, tmp_path / "out", config=DATA / "mesh_mp2" / "config.json")
        with pytest.raises(FormatError, match="v2 model"):
            describe(path)
    assert not (tmp_path / "out").exists()


def test_W18_a_missing_shard_is_named(sample):
    shutil.rmtree(sample.step_directory / "shard_0")
    assert "shard 0 of at least 2 is missing" in refusal(sample, MissingFileError)


def test_W18_a_missing_last_shard_is_seen_from_the_shapes(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", shards=4)
    shutil.rmtree(sample.step_directory / "shard_3")
    message = refusal(sample, MissingFileError)
    assert "shard 3 of 4 is missing" in message and "shard_3" in message


def test_W18_too_many_shards_are_refused(sample):
    shutil.copytree(sample.step_directory / "shard_1", sample.step_directory / "shard_2")
    message = refusal(sample, SchemaError)
    assert "too many shards" in message and "expected 2 shards" in message


def test_W18_a_missing_npz_is_named(sample):
    (sample.step_directory / "shard_1" / "11.npz").unlink()
    message = refusal(sample, MissingFileError)
    assert "shard_1/11.npz" in message and "found 15 of 16" in message


def test_a_seventeenth_npz_is_refused(sample):
    shutil.copy(sample.step_directory / "shard_1" / "11.npz", sample.step_directory / "shard_1" / "16.npz")
    assert "shard_1/16.npz" in refusal(sample, FormatError)


def test_W18_shards_of_two_steps_are_refused(sample):
    file = sample.step_directory / "shard_1" / "15.npz"
    with np.load(file) as arrays:
        leaves = [arrays[name] for name in arrays.files]
    np.savez(file, *leaves[:-1], np.int32(8))
    message = refusal(sample, SchemaError)
    assert "different training steps" in message and "shard_1" in message and "found step 8" in message


def test_W18_a_shard_of_another_model_is_refused(sample, tmp_path):
    other = write_mesh_sample(tmp_path / "other", head_dim=6)
    shutil.rmtree(sample.step_directory / "shard_1")
    shutil.copytree(other.step_directory / "shard_1", sample.step_directory / "shard_1")
    message = refusal(sample, SchemaError)
    assert (
        "wrong shape for causal_transformer_shard/~/embedding_shard/~/linear/b" in message
        and "shard_1/0.npz" in message
    )


def test_W18_a_shard_of_a_deeper_model_is_refused(sample, tmp_path):
    other = write_mesh_sample(tmp_path / "other", layers=3)
    shutil.rmtree(sample.step_directory / "shard_1")
    shutil.copytree(other.step_directory / "shard_1", sample.step_directory / "shard_1")
    message = refusal(sample, SchemaError)
    assert "different numbers of leaves" in message and "expected 27" in message and "found 37" in message


def test_a_leaf_count_that_no_gptj_has_is_refused(sample):
    for shard in (0, 1):
        file = sample.step_directory / f"shard_{shard}" / "3.npz"
        with np.load(file) as arrays:
            leaves = [arrays[name] for name in arrays.files]
        np.savez(file, *leaves, leaves[-1])
    message = refusal(sample, SchemaError)
    assert "found 28" in message and "10 * layers + 7" in message


def test_leaves_in_the_wrong_files_are_refused(sample):
    for shard in (0, 1):
        one, other = (sample.step_directory / f"shard_{shard}" / name for name in ("0.npz", "15.npz"))
        moved = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(moved)
    message = refusal(sample, SchemaError)
    assert "wrong number of leaves" in message and "0.npz" in message


def test_parameters_of_two_dtypes_are_refused(sample):
    file = sample.step_directory / "shard_1" / "2.npz"
    with np.load(file) as arrays:
        leaves = [arrays[name].astype(np.float16) for name in arrays.files]
    np.savez(file, *leaves)
    message = refusal(sample, SchemaError)
    assert "shard_1/2.npz" in message and "expected float32" in message and "found float16" in message


def test_an_empty_directory_lists_what_was_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"model\.safetensors.*step_N or shard_0"):
        convert(tmp_path / "empty", tmp_path / "out")


def test_a_step_that_meta_json_names_and_that_is_not_there_is_an_error(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", meta=True)
    sample.step_directory.rename(sample.path / "step_6")
    message = refusal(sample, MissingFileError)
    assert "step_7" in message and "found step_6" in message


def test_a_meta_json_without_a_step_is_an_error(tmp_path):
    sample = write_mesh_sample(tmp_path / "model", meta=True)
    (sample.path / "meta.json").write_text('{"step": "7"}')
    assert "meta.json: step" in refusal(sample, FormatError)


def test_where_no_step_is_complete_the_newest_ones_error_is_given(sample):
    shutil.copytree(sample.step_directory, sample.path / "step_9")
    for step in (7, 9):
        (sample.path / f"step_{step}" / "shard_0" / "0.npz").unlink()
    assert "step_9/shard_0/0.npz" in refusal(sample, MissingFileError)


@pytest.mark.parametrize("place", ["step", "shard", "file"])
def test_X2_a_link_out_of_the_checkpoint_is_refused(sample, tmp_path, place):
    path = {
        "step": sample.step_directory,
        "shard": sample.step_directory / "shard_1",
        "file": sample.step_directory / "shard_1" / "4.npz",
    }[place]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "is a link out of its folder" in refusal(sample, UnsafeFileError)
    assert convert(sample.path, tmp_path / "out", config=sample.config_file, follow_links=True).exists()


# ---- the training config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_vocab": 11}, "n_vocab is 11, the files show 10"),
        ({"layers": 3}, "layers is 3, the files show 2"),
        ({"d_model": 32}, "d_model is 32, the files show 16"),
        ({"cores_per_replica": 8}, "cores_per_replica is 8, the files show 2"),
        ({"norm": "rmsnorm"}, 'norm: not a GPT-J (expected "layernorm"'),
        ({"norm": ...}, "norm: is missing"),
        ({"pe": "t5"}, 'pe: not a GPT-J (expected "rotary"'),
        ({"pe_rotary_dims": 3}, "pe_rotary_dims: breaks its rule"),
        ({"n_heads": 3}, "n_heads: breaks its rule"),
        ({"n_heads": 1}, "a multiple of the 2 shards"),
        ({"n_heads": "4"}, "n_heads: breaks its rule"),
        ({"seq": ...}, "seq: is missing"),
        ({"seq": True}, "seq: breaks its rule"),
        ({"seq": 10**12}, "seq: breaks its rule"),
        ({"layers": 0}, "layers: breaks its rule"),
    ],
)
def test_a_wrong_training_config_names_its_key(sample, changes, words):
    edit_config(sample, **changes)
    message = refusal(sample, ConfigError)
    assert words in message and str(sample.config_file) in message


def test_all_contradictions_of_a_training_config_are_listed_at_once(sample):
    edit_config(sample, n_vocab=11, layers=3)
    message = refusal(sample, ConfigError)
    assert "layers is 3" in message and "n_vocab is 11" in message


def test_a_training_config_that_is_no_json_is_named(sample):
    sample.config_file.write_text('{"layers": 2,}')
    assert "model.json: not JSON" in refusal(sample, ConfigError)


def test_without_a_training_config_the_hint_says_what_to_give(sample, tmp_path):
    with pytest.raises(ConfigError, match=r"--config TRAIN\.json"):
        convert(sample.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_optional_keys_of_a_training_config_may_be_absent(sample, tmp_path):
    edit_config(sample, pe_rotary_dims=..., cores_per_replica=..., lr="anything")
    convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert describe(tmp_path / "out").rotary_width == 4


def test_S5_an_existing_destination_stays_as_it_was(sample, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("1")
    with pytest.raises(WriteError, match="not empty"):
        convert(sample.path, target, config=sample.config_file)
    assert list(target.iterdir()) == [target / "precious"]


# ---- the files


def npy(descr: str = "'<f4'", shape: str = "(16,)", data: bytes = bytes(64), fortran: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def archive(*members: bytes | tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for n, member in enumerate(members):
            name, data = member if isinstance(member, tuple) else (f"arr_{n}.npy", member)
            file.writestr(name, data)
    return buffer.getvalue()


FAULTS: dict[str, tuple[Callable[[bytes], bytes], type[GPTJError], str]] = {
    "object_array": (lambda _: archive(npy("'|O'", "()", b"cos\nsystem\n")), UnsafeFileError, "Python objects"),
    "compound_dtype": (lambda _: archive(npy("[('a', '<f4')]")), FormatError, "compound dtype"),
    "string_dtype": (lambda _: archive(npy("'<U4'")), SchemaError, "unknown dtype"),
    "complex_dtype": (lambda _: archive(npy("'<c8'", "(8,)")), SchemaError, "unknown dtype"),
    "header_of_4_TB": (lambda _: archive(npy(shape="(1099511627776,)")), FormatError, "bytes do not fit"),
    "header_of_2_62": (lambda _: archive(npy(shape=f"({2**62}, 0)", data=b"")), LimitError, "absurd shape"),
    "negative_shape": (lambda _: archive(npy(shape="(-16,)")), FormatError, "whole numbers"),
    "shape_of_floats": (lambda _: archive(npy(shape="(16.0,)")), FormatError, "whole numbers"),
    "shape_of_booleans": (lambda _: archive(npy(shape="(True,)", data=bytes(4))), FormatError, "whole numbers"),
    "many_dimensions": (lambda _: archive(npy(shape="(" + "1," * 33 + ")", data=bytes(4))), LimitError, "absurd shape"),
    "code_in_the_header": (lambda _: archive(npy("__import__('os').system('true')")), FormatError, "not the literal"),
    "column_order": (lambda _: archive(npy(shape="(4, 4)", fortran="True")), FormatError, "column by column"),
    "short_data": (lambda _: archive(npy(data=bytes(60))), FormatError, "bytes do not fit"),
    "long_data": (lambda _: archive(npy(data=bytes(68))), FormatError, "bytes do not fit"),
    "no_npy": (lambda _: archive(b"hello"), FormatError, "not an .npy array"),
    "empty_member": (lambda _: archive(b""), FormatError, "not an .npy array"),
    "compressed": (lambda _: archive(npy(), compression=zipfile.ZIP_DEFLATED), FormatError, "compressed member"),
    "bomb": (
        lambda _: archive(npy(shape="(250000000,)", data=bytes(10**7)), compression=zipfile.ZIP_DEFLATED),
        FormatError,
        "compressed member",
    ),
    "path_escape": (lambda _: archive(("../../evil.npy", npy())), UnsafeFileError, "leads outside"),
    "absolute_path": (lambda _: archive(("/evil.npy", npy())), UnsafeFileError, "leads outside"),
    "other_names": (lambda _: archive(("weights.npy", npy())), FormatError, "not numbered"),
    "trailing_bytes": (lambda data: data + b"\0", FormatError, "bytes after its end"),
    "leading_bytes": (lambda data: b"\0" + data, FormatError, "not where it says"),
    "cut_by_one": (lambda data: data[:-1], FormatError, "cut short"),
    "cut_in_half": (lambda data: data[: len(data) // 2], FormatError, "cut short"),
    "empty_file": (lambda _: b"", FormatError, "an empty file"),
    "git_lfs": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        FormatError,
        "git-lfs pointer",
    ),
    "html": (lambda _: b"<!DOCTYPE html><html></html>", FormatError, "HTML page"),
    "gzip": (lambda _: b"\x1f\x8b\x08\x00" + bytes(40), FormatError, "a gzip file"),
    "single_npy": (lambda _: npy(), FormatError, "a single .npy array"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_W18_a_malformed_npz_is_refused_by_name(sample, fault):
    change, kind, words = FAULTS[fault]
    file = sample.step_directory / "shard_1" / "2.npz"
    file.write_bytes(change(file.read_bytes()))
    message = refusal(sample, kind)
    assert words in message and "shard_1/2.npz" in message


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile says so while we make the fault
def test_W18_a_duplicate_member_is_refused(sample):
    (sample.step_directory / "shard_0" / "0.npz").write_bytes(archive(npy(), ("arr_0.npy", npy())))
    assert "stands twice" in refusal(sample, FormatError)


def test_W12_a_flipped_bit_is_noticed_by_the_members_checksum(sample):
    file = sample.step_directory / "shard_1" / "2.npz"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    message = refusal(sample, FormatError)
    assert "another checksum" in message and "shard_1/2.npz: arr_0.npy" in message


@pytest.fixture
def small_npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "3.npz", np.arange(6, dtype=np.float32).reshape(2, 3), np.int32(7))
    return tmp_path / "3.npz"


def test_W18_every_truncation_of_a_file_is_refused(small_npz):
    whole = small_npz.read_bytes()
    for length in range(len(whole)):
        small_npz.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"3\.npz"):
            open_npz(small_npz)


def test_W18_every_changed_byte_is_refused_or_harmless(small_npz):
    """A byte may be wrong only where nothing depends on it: versions, dates, attributes."""
    whole = small_npz.read_bytes()
    harmless = 0
    for at in range(len(whole)):
        for flip in (0x01, 0xFF):
            small_npz.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                file = open_npz(small_npz)
                first, second = (file.read(array) for array in file.arrays)
            except GPTJError as error:
                assert "3.npz" in str(error)
            else:
                harmless += 1
                assert first.tolist() == [[0, 1, 2], [3, 4, 5]] and second == 7
    assert harmless < 2 * len(whole) / 6, "Python 3.11.2's zipfile looks at less than later ones"


def test_W18_big_endian_and_void_numbers_are_converted(sample, tmp_path):
    for shard in (0, 1):
        for n in range(16):
            file = sample.step_directory / f"shard_{shard}" / f"{n}.npz"
            with np.load(file) as arrays:
                leaves = [arrays[name].astype(arrays[name].dtype.newbyteorder(">")) for name in arrays.files]
            np.savez(file, *leaves)
    source = open_mesh(sample.path)
    for name, expected in sample.tensors.items():
        assert source.read(name).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_W14_what_is_no_regular_file_is_refused_before_it_is_opened(sample, kind):
    file = sample.step_directory / "shard_0" / "5.npz"
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises((FormatError, UnsafeFileError), match=r"5\.npz"):
        open_mesh(sample.path, follow_links=kind == "device")


def test_W15_a_file_that_changes_after_it_was_opened_is_noticed(sample):
    source = open_mesh(sample.path)
    file = sample.step_directory / "shard_0" / "0.npz"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(FormatError, match="changed while being read"):
        source.read("transformer.wte.weight")


def test_W11_values_that_are_not_finite_are_refused_unless_asked_for(sample, tmp_path):
    file = sample.step_directory / "shard_0" / "0.npz"
    with np.load(file) as arrays:
        leaves = [arrays[name] for name in arrays.files]
    leaves[1][0, 0] = np.nan
    np.savez(file, *leaves)
    assert "wte.weight: holds values that are not finite" in refusal(sample, SchemaError)
    convert(sample.path, tmp_path / "out", config=sample.config_file, allow_nonfinite=True)


def test_W11_a_value_too_large_for_float16_is_refused_unless_asked_for(sample, tmp_path):
    file = sample.step_directory / "shard_0" / "0.npz"
    with np.load(file) as arrays:
        leaves = [arrays[name] for name in arrays.files]
    leaves[1][0, 0] = 1e6
    np.savez(file, *leaves)
    with pytest.raises(SchemaError, match=r"wte\.weight: a value does not fit float16"):
        convert(sample.path, tmp_path / "out", config=sample.config_file, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_W21_a_million_members_are_refused_by_the_directory_alone(sample):
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 60_000, 60_000, 46 * 400_000, 0, 0)
    (sample.step_directory / "shard_0" / "0.npz").write_bytes(bytes(46 * 400_000) + end)
    assert "too many members" in refusal(sample, LimitError)


def test_W21_zip64_lies_are_refused(sample):
    file = sample.step_directory / "shard_0" / "0.npz"
    whole = file.read_bytes()
    count = struct.unpack_from("<H", whole, len(whole) - 12)[0]
    size, at = struct.unpack_from("<2L", whole, len(whole) - 10)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count + 1, count + 1, size, at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(whole) - 22, 1)
    file.write_bytes(whole[:-22] + wide + locator + whole[-22:])
    assert "disagree" in refusal(sample, FormatError)
    file.write_bytes(whole[:-22] + locator + whole[-22:])
    assert "64-bit end" in refusal(sample, FormatError)
