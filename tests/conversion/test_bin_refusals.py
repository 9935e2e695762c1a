"""A .bin is never unpickled: what its pickle would do is refused by name, and so is every lie of its archive."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import arrays
from gptj_conversion.convert import convert
from gptj_conversion.hf.torch_bin import pickle_state_dict, read_bin
from gptj_conversion.hf.torch_pickle import read_state_dict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lawful.weights import TRAINERS
from weight_changes import write_bin, write_legacy

from gptj.errors import CheckpointWarning, FormatError, GPTJError, LimitError, UnsafeFileError

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"


def archive(path: Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return path


def state(path: Path, data: bytes, **members: bytes) -> Path:
    """A .bin with this pickle, and a storage 0 of six floats."""
    return archive(path, {"data.pkl": data, "byteorder": b"little", "data/0": bytes(range(24)), **members})


def view(
    offset: int = 0, shape: tuple[int, ...] = (2, 3), strides: tuple[int, ...] = (3, 1), *, numel: int = 6
) -> bytes:
    """The pickle of one tensor, w, with whatever view of its storage."""

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def several(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(whole, values)) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + whole(numel) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + several(shape) + several(strides)
    return b"\x80\x02}(" + text("w") + rebuild + b"\x89ccollections\nOrderedDict\n)RtRu."


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


PAYLOADS = {
    "os.system": lambda touched: pickle.dumps({"w": Payload(f"touch {touched}")}, 2),
    "os.system, protocol 4": lambda touched: pickle.dumps({"w": Payload(f"touch {touched}")}, 4),
    "os.system, protocol 0": lambda touched: pickle.dumps({"w": Payload(f"touch {touched}")}, 0),
    "eval": lambda touched: b"\x80\x02cbuiltins\neval\n(X\x04\x00\x00\x001+11tR.",
    "resolve_name": lambda touched: b"\x80\x02cpkgutil\nresolve_name\n(X\x09\x00\x00\x00os.systemtR.",
    "instance": lambda touched: b"(S'touch'\nios\nsystem\n.",
    "newobj": lambda touched: b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "extension registry": lambda touched: b"\x80\x02\x82\x01.",
    "numpy scalar": lambda touched: pickle.dumps({"w": np.float32(1)}, 2),
    "torch load": lambda touched: b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR.",
    "dotted global": lambda touched: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "parameter class": lambda touched: b"\x80\x02ctorch.nn.parameter\nParameter\n.",
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_W16_a_pickle_that_would_call_something_is_refused_and_calls_nothing(tmp_path, payload):
    touched = tmp_path / "touched"
    path = state(tmp_path / "pytorch_model.bin", PAYLOADS[payload](touched))
    with pytest.raises((UnsafeFileError, FormatError)) as caught:
        read_bin(path)
    assert not touched.exists()
    message = str(caught.value)
    assert "pytorch_model.bin: archive/data.pkl" in message and "weights_only" not in message
    if isinstance(caught.value, UnsafeFileError) and "calls" in message:
        names = ["system", "eval", "resolve_name", "load", "scalar", "Parameter", "__globals__", "_reconstruct"]
        assert any(name in message for name in names)


def test_W16_a_payload_among_real_weights_leaves_no_output(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    (source / "config.json").write_bytes((FOREIGN / "pt_bin" / "config.json").read_bytes())
    state(source / "pytorch_model.bin", pickle.dumps({"w": Payload(f"touch {tmp_path / 'touched'}")}, 2))
    with pytest.raises(UnsafeFileError, match=r"the pickle calls (posix|nt)\.system"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_W16_torchs_other_formats_are_refused_by_name(tmp_path):
    folder = FOREIGN / "torch_save"
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        read_bin(folder / "torchscript.bin")
    with pytest.raises(UnsafeFileError, match=r"the pickle calls torch\.nn\.modules\.linear\.Linear"):
        read_bin(folder / "whole_module.bin")
    with tarfile.open(tmp_path / "tar.bin", "w") as file:
        file.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(FormatError, match="a tar archive"):
        read_bin(tmp_path / "tar.bin")


def test_what_torch_wrote_before_1_6_or_nested_is_read_and_said():
    folder = FOREIGN / "torch_save"
    with np.load(FOREIGN / "expected.npz") as values:
        expected = values["lm_head.bias"]
    for name, words in (("legacy", "before 1.6"), ("nested", "'state_dict'; left out: 'step'")):
        with pytest.warns(CheckpointWarning, match=words):
            [array] = read_bin(folder / f"{name}.bin")
        assert array.name == "lm_head.bias" and np.array_equal(array.read(array.dtype), expected)


@pytest.mark.filterwarnings("ignore:.*saved by PyTorch before 1.6")
@pytest.mark.parametrize("write", [write_bin, write_legacy], ids=["today", "before 1.6"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_training_checkpoint_gives_the_model_and_says_what_was_left(tmp_path, trainer, write):
    expected = arrays()
    write(tmp_path / "x.bin", TRAINERS[trainer](expected))
    with pytest.warns(CheckpointWarning, match="left out: .*optimizer"):
        found = {array.name: array.read(array.dtype) for array in read_bin(tmp_path / "x.bin")}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_storage_with_another_checksum_is_refused_when_it_is_read(tmp_path):
    path = state(tmp_path / "x.bin", view())
    path.write_bytes(path.read_bytes().replace(bytes(range(24)), bytes(range(1, 25))))
    [array] = read_bin(path)
    with pytest.raises(FormatError, match="w: its bytes have another checksum"):
        array.read(array.dtype)


def test_a_part_of_a_storage_is_checked_with_the_whole(tmp_path):
    path = state(tmp_path / "x.bin", view(offset=2, shape=(4,), strides=(1,)))
    path.write_bytes(path.read_bytes().replace(bytes(range(24)), b"x" + bytes(range(1, 24))))
    [array] = read_bin(path)
    with pytest.raises(FormatError, match="another checksum"):
        array.read(array.dtype)


def test_an_archive_without_checksums_is_read_and_said(tmp_path):
    """torch writes 0 for each after torch.serialization.set_crc32_options(False)."""
    path = state(tmp_path / "x.bin", view())
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            raw = raw.replace(struct.pack("<L", member.CRC), bytes(4))
    path.write_bytes(raw)
    with pytest.warns(CheckpointWarning, match="noted no checksums"):
        [array] = read_bin(path)
    assert array.read(array.dtype).tobytes() == bytes(range(24))


def test_the_views_that_the_next_tests_break_are_read_when_they_are_right(tmp_path):
    [array] = read_bin(state(tmp_path / "x.bin", view()))
    assert array.read(array.dtype).tobytes() == bytes(range(24))
    [turned] = read_bin(state(tmp_path / "y.bin", view(strides=(1, 2))))
    rows = np.frombuffer(bytes(range(24)), np.float32).reshape(3, 2).T
    assert np.array_equal(turned.read(turned.dtype).view(np.uint32), rows.view(np.uint32))
    [part] = read_bin(state(tmp_path / "z.bin", view(offset=2, shape=(4,), strides=(1,))))
    assert part.read(part.dtype).tobytes() == bytes(range(8, 24))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"strides": (0, 1)}, "skip or repeat"),
        ({"strides": (0, 0)}, "skip or repeat"),
        ({"strides": (2, 1)}, "skip or repeat"),
        ({"strides": (3, -1)}, "breaks its rule"),
        ({"offset": -1}, "breaks its rule"),
        ({"offset": 1}, "beyond its storage"),
        ({"shape": (3, 3)}, "beyond its storage"),
        ({"shape": (2**30, 2**30, 2**30), "strides": (2**30, 1, 1)}, "beyond its storage"),
        ({"shape": (-2, 3)}, "breaks its rule"),
        ({"shape": (6,)}, "breaks its rule"),
        ({"numel": 5}, "another size"),
        ({"numel": 2**30}, "another size"),
    ],
)
def test_W17_a_view_that_does_not_fit_its_storage_is_refused(tmp_path, arguments, words):
    with pytest.raises(FormatError, match=words):
        read_bin(state(tmp_path / "x.bin", view(**arguments)))


def test_W17_compressed_members_are_refused(tmp_path):
    path = archive(tmp_path / "x.bin", {"data.pkl": view(), "data/0": bytes(24)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="compressed member"):
        read_bin(path)


def test_W17_a_pickle_with_a_wrong_checksum_is_refused(tmp_path):
    path = state(tmp_path / "x.bin", view())
    path.write_bytes(path.read_bytes().replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))
    with pytest.raises(FormatError, match="another checksum"):
        read_bin(path)


def test_W17_a_missing_storage_is_refused(tmp_path):
    path = archive(tmp_path / "x.bin", {"data.pkl": view()})
    with pytest.raises(FormatError, match="its storage is missing"):
        read_bin(path)


def test_W17_two_tensors_that_share_some_bytes_are_refused(tmp_path):
    both = view()[:-2] + view(offset=2, shape=(4,), strides=(1,))[4:].replace(
        b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v", 1
    )
    with pytest.raises(FormatError, match="shares bytes with another tensor"):
        read_bin(state(tmp_path / "x.bin", both))


def test_W17_a_name_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(FormatError, match="a name stands twice"):
        read_bin(state(tmp_path / "x.bin", view()[:-2] + view()[4:]))


def test_a_huge_pickle_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(LimitError, match="too large"):
        read_bin(state(tmp_path / "x.bin", b"\x80\x02" + b"N" * (17 * 2**20)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"}q\x00" + b"h\x00\x85q\x00" * 100_000 + b".",  # a tuple in a tuple in a tuple ...
        b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 80 + b"h\x00\x93.",  # 2**80 leaves, were it printed
        b"\x80\x02}q\x00h\x00h\x00s.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        b"\x80\x02((((((((.",
        b"\x80\x02" + b"(" * 20_000 + b".",
        b"\x80\x02h\x05.",
        b"\x80\x02R.",
        b"\x80\x02QQQ.",
        b"\x80\x09.",
        b"\x80\x02}.}",
        b"\x80\x02}}.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"",
        b".",
    ],
)
def test_a_senseless_pickle_gives_one_error_quickly(data):
    with pytest.raises((FormatError, UnsafeFileError, LimitError)) as caught:
        read_state_dict(data, file=Path("x.bin"), where="data.pkl")
    assert len(str(caught.value)) < 1000


REAL = zipfile.ZipFile(FOREIGN / "pt_bin" / "pytorch_model.bin").read("pytorch_model/data.pkl")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(at=st.integers(0, len(REAL) - 1), replacement=st.binary(max_size=6), removed=st.integers(0, 6))
@example(at=2, replacement=b"", removed=1)
def test_a_mutated_pickle_gives_tensors_or_one_of_our_errors(at, replacement, removed):
    data = REAL[:at] + replacement + REAL[at + removed :]
    try:
        tensors = read_state_dict(data, file=Path("x.bin"), where="data.pkl")
    except GPTJError as error:
        assert "x.bin" in str(error)
    else:
        assert isinstance(tensors, dict)


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 1200), flip=st.integers(1, 255))
def test_a_mutated_archive_gives_the_same_tensors_or_one_of_our_errors(tmp_path_factory, at, flip):
    path = state(tmp_path_factory.mktemp("bin") / "x.bin", view())
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        [array] = read_bin(path)
        array.read(array.dtype)
    except GPTJError as error:
        assert "x.bin" in str(error)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_our_pickle_is_read_back_by_our_interpreter_and_by_pythons_grammar(dtype):
    import pickletools

    shape = (3, 70_000)
    data = pickle_state_dict([("a", dtype, shape), ("b", dtype, ()), ("c", dtype, (2**33, 1))])
    assert [opcode.name for opcode, _, _ in pickletools.genops(data)][-1] == "STOP"
    tensors = read_state_dict(data, file=Path("x.bin"), where="data.pkl")
    assert {name: (t.storage.dtype, t.shape, t.strides) for name, t in tensors.items()} == {
        "a": (dtype, shape, (70_000, 1)),
        "b": (dtype, (), ()),
        "c": (dtype, (2**33, 1), (1, 1)),
    }


def test_W21_a_directory_of_a_million_members_is_refused(tmp_path):
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65534, 65534, 46 * 400_000, 0, 0)
    (tmp_path / "x.bin").write_bytes(bytes(46 * 400_000) + end)
    with pytest.raises(LimitError, match="too many members"):
        read_bin(tmp_path / "x.bin")


def test_W21_an_archive_inside_a_member_is_only_data(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("archive/data.pkl", b"evil")
    path = state(tmp_path / "x.bin", view(), extra=inner.getvalue())
    assert [array.name for array in read_bin(path)] == ["w"]


def test_big_endian_storages_are_turned(tmp_path):
    values = np.arange(6, dtype=">f4")
    path = archive(tmp_path / "x.bin", {"data.pkl": view(), "byteorder": b"big", "data/0": values.tobytes()})
    [array] = read_bin(path)
    assert array.read(array.dtype).tolist() == [[0, 1, 2], [3, 4, 5]]
