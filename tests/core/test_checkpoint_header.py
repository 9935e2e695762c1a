"""The header of a safetensors file is believed only after everything in it has been checked."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from checkpoint_samples import entry, safetensors_bytes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptj.errors import FormatError, GPTJError, LimitError, MissingFileError, SchemaError
from gptj.reading.safetensors_file import pack_header, parse_header, read_safetensors

GOOD = safetensors_bytes(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", (2, 3), 0, 24), "b": entry("BF16", (4,), 24, 32)}, bytes(32)
)


def parse(data: bytes) -> Any:
    return parse_header(data, file="x.safetensors", file_bytes=len(data))


def refusal(data: bytes) -> GPTJError:
    with pytest.raises(GPTJError) as caught:
        parse(data)
    assert caught.value.file == "x.safetensors"
    return caught.value


def one(name: str = "t", data: bytes = bytes(8), **facts: Any) -> bytes:
    return safetensors_bytes({name: {**entry(), **facts}}, data)


def test_a_good_header_gives_names_dtypes_shapes_and_places() -> None:
    tensors, metadata = parse(GOOD)
    start = len(GOOD) - 32
    assert metadata == {"format": "pt"}
    assert [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in tensors.values()] == [
        ("a", "float32", (2, 3), start, 24),
        ("b", "bfloat16", (4,), start + 24, 8),
    ]


def test_what_pack_header_makes_parses_to_the_same() -> None:
    rows = [("x", "bfloat16", (3, 2)), ("y", "float64", ()), ("z", "float16", (0, 4))]
    head = pack_header(rows, {"format": "pt"}, length=512)
    tensors, metadata = parse_header(head, file="x", file_bytes=512 + 12 + 8)
    assert len(head) == 512
    assert [(t.name, t.dtype, t.shape) for t in tensors.values()] == rows
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize("size", range(len(GOOD)))
def test_W1_a_file_cut_anywhere_is_refused(size: int) -> None:
    assert isinstance(refusal(GOOD[:size]), FormatError)


def test_W1_a_cut_header_says_how_much_there_is_and_how_much_is_needed() -> None:
    needed = len(GOOD) - 32
    assert f"the file has 20 bytes, its header needs {needed}" in str(refusal(GOOD[:20]))


@pytest.mark.parametrize("length", [2**63, 2**40, 99_000_000, 8 * 2**20 + 1])
def test_W2_an_absurd_header_length_is_refused_before_anything_is_allocated(length: int) -> None:
    assert isinstance(refusal(safetensors_bytes({}, length=length)), LimitError)


def test_W2_an_empty_header_is_refused() -> None:
    assert "does not begin with {" in str(refusal(struct.pack("<Q", 0) + bytes(8)))


@pytest.mark.parametrize(
    ("header", "data", "tensor", "words"),
    [
        ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "b", "overlaps"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, 20, "b", "hole"),
        ({"a": entry(begin=4, end=12)}, 12, "a", "hole"),
        ({"a": entry(begin=8, end=0)}, 8, "a", "outside"),
        ({"a": entry(begin=-8, end=0)}, 8, "a", "outside"),
        ({"a": entry(begin=0, end=2**64)}, 8, "a", "outside"),
        ({"a": entry(begin=0.0, end=8)}, 8, "a", "whole numbers"),
        ({"a": entry(begin=False, end=8)}, 8, "a", "whole numbers"),
        ({"a": entry(shape=(3,))}, 8, "a", "do not fit its shape"),
        ({"a": entry(shape=(1,))}, 8, "a", "do not fit its shape"),
        ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, 8, "a", "two whole numbers"),
        ({"a": entry(shape=(-2,))}, 8, "a", "0 or above"),
        ({"a": entry(shape=(2.0,))}, 8, "a", "0 or above"),
        ({"a": entry(shape=(True, 2))}, 8, "a", "0 or above"),
        ({"a": {**entry(), "shape": 2}}, 8, "a", "shape"),
        ({"a": {**entry(), "more": 1}}, 8, "a", "dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32"}}, 8, "a", "dtype, shape and data_offsets"),
        ({"a": [1, 2]}, 8, "a", "dtype, shape and data_offsets"),
    ],
)
def test_W3_a_lie_about_a_tensor_is_refused_with_its_name(header: Any, data: int, tensor: str, words: str) -> None:
    error = refusal(safetensors_bytes(header, bytes(data)))
    assert isinstance(error, FormatError)
    assert tensor in (error.where or "")
    assert words in str(error)


def test_W3_bytes_after_the_last_tensor_are_refused() -> None:
    assert "after the last tensor" in str(refusal(GOOD + b"x"))


@pytest.mark.parametrize("again", [entry(), entry("F16", (4,))])
def test_W4_a_name_that_stands_twice_is_refused(again: dict[str, Any]) -> None:
    text = f'{{"a": {json.dumps(entry())}, "\\u0061": {json.dumps(again)}}}'.encode()
    assert "stands twice" in str(refusal(safetensors_bytes(text, bytes(8))))


@pytest.mark.parametrize(
    "name", ["", "a\0b", "a\nb", "../a", "/a", "a\\b", ".", "..", "a" * 600, "a" * 1_000_000, "\u202eabc", "\ud800"]
)
def test_W5_a_hostile_name_is_refused_and_printed_escaped(name: str) -> None:
    error = refusal(one(name))
    assert isinstance(error, FormatError)
    assert str(error).isprintable()
    assert len(str(error)) < 500


def test_W5_a_tensor_that_is_called_metadata_is_refused() -> None:
    assert "__metadata__" in str(refusal(one("__metadata__")))


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}])
def test_metadata_that_are_not_strings_are_refused(metadata: Any) -> None:
    assert "an object of strings" in str(refusal(safetensors_bytes({"__metadata__": metadata})))


def test_W6_more_tensors_than_the_cap_are_refused() -> None:
    text = b"{" + b",".join(b'"%x":0' % n for n in range(100_001)) + b"}"
    assert isinstance(refusal(safetensors_bytes(text)), LimitError)


@pytest.mark.parametrize("shape", [[1] * 9, [1] * 10_000, [2**62, 0], [2**31, 2**31, 0]])
def test_W6_absurd_shapes_are_refused(shape: list[int]) -> None:
    assert isinstance(refusal(one(shape=shape, data_offsets=[0, 0])), LimitError)


def test_W6_deep_nesting_is_refused() -> None:
    error = refusal(safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
    assert "nested too deeply" in str(error)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "Q4", "float32", "", 7, None])
def test_W7_an_unknown_or_sub_byte_dtype_is_refused_with_name_found_and_wanted(dtype: Any) -> None:
    error = refusal(one("h.0.x", dtype=dtype))
    assert isinstance(error, SchemaError)
    assert "h.0.x" in str(error)
    assert "F32" in str(error.expected)


@pytest.mark.parametrize("text", [b"{nope}", b'{"a": NaN}', b"{}x", b"\xff\xfe{}"])
def test_a_header_that_is_not_json_is_refused(text: bytes) -> None:
    assert isinstance(refusal(safetensors_bytes(text)), FormatError)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"\n <HTML><head></head></HTML>", "HTML page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "XML page"),
        (gzip.compress(bytes(1000), mtime=0), "gzip"),
        (pickle.dumps({"a": list(range(1000))}, protocol=2), "pickle"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
    ],
)
def test_W14_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=kind) as caught:
        read_safetensors(path)
    assert caught.value.file == str(path)


def test_W14_a_file_that_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "fifo", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(FormatError, match="not a regular file"):
            read_safetensors(path)
    with pytest.raises(MissingFileError, match="no such file"):
        read_safetensors(tmp_path / "nothing")


# ---- fuzz: nothing but our own errors, and what we accept the format's own library accepts too


def accepted_by_safetensors(data: bytes) -> dict[str, Any]:
    return {name: (fact["shape"], len(fact["data"])) for name, fact in safetensors.deserialize(data)}


def check_any_bytes(data: bytes) -> None:
    try:
        tensors, _ = parse(data)
    except GPTJError as error:
        assert str(error).isprintable()
    else:
        if b"-0" in data:  # a whole number to Python, a fraction to the other library; 0 either way
            return
        assert accepted_by_safetensors(data) == {t.name: (list(t.shape), t.nbytes) for t in tensors.values()}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_one_of_our_errors(data: bytes) -> None:
    check_any_bytes(data)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.booleans()), min_size=1, max_size=6))
def test_a_damaged_file_ends_in_one_of_our_errors_or_is_read_as_safetensors_reads_it(edits: Any) -> None:
    data = bytearray(GOOD)
    for place, value, insert in edits:
        data[place : place + (not insert)] = bytes([value])
    check_any_bytes(bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4"]) | JSON,
        "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRY | JSON, max_size=3), st.integers(0, 24))
@example({"a": entry("F32", (2,), 0, 8), "b": entry("F32", (), 8, 12)}, 12)
def test_any_json_header_ends_in_one_of_our_errors_or_is_read_as_safetensors_reads_it(header: Any, size: int) -> None:
    check_any_bytes(safetensors_bytes(header, bytes(size)))


def test_the_fuzz_oracle_can_fail() -> None:
    """The comparison with the format's own library would notice a shape that we read otherwise."""
    assert accepted_by_safetensors(GOOD) == {"a": ([2, 3], 24), "b": ([4], 8)}
    assert np.prod(accepted_by_safetensors(GOOD)["a"][0]) == 6
