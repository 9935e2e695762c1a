"""A msgpack file's lies are refused before anything of their size is read, each with file and array."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from gptj_conversion.convert import convert
from gptj_conversion.hf.flax_msgpack import read_msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj.errors import FormatError, GPTJError, LimitError, SchemaError

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
REAL = (FOREIGN / "flax" / "flax_model.msgpack").read_bytes()


def array(shape: Any = (2, 3), dtype: Any = "float32", data: bytes = bytes(24), *, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data), use_bin_type=True))


def chunked(shape: Any = (2, 3), chunks: Any = None, **changes: Any) -> dict[str, Any]:
    chunks = [array((4,), data=bytes(16)), array((2,), data=bytes(8))] if chunks is None else chunks
    tree = {
        "__msgpack_chunked_array__": True,
        "shape": {str(n): size for n, size in enumerate(shape)},
        "chunks": {str(n): chunk for n, chunk in enumerate(chunks)},
    }
    return {**tree, **changes}


def written(path: Path, value: Any) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else msgpack.packb(value))
    return path


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\x80"


FAULTS: dict[str, tuple[Any, type[GPTJError], str]] = {
    "cut": (REAL[:-1], FormatError, "cut short"),
    "cut in half": (REAL[: len(REAL) // 2], FormatError, "cut short"),
    "trailing bytes": (REAL + b"\0", FormatError, "bytes after the tree's end"),
    "empty": (b"", FormatError, "an empty file"),
    "extension 77": ({"a": array(code=77)}, FormatError, "found type 77"),
    "complex number": ({"a": array(code=2)}, FormatError, "found type 2"),
    "dtype O": ({"a": array(dtype="O")}, SchemaError, "unknown dtype"),
    "dtype V8": ({"a": array(dtype="V8")}, SchemaError, "unknown dtype"),
    "dtype zzz": ({"a": array(dtype="zzz")}, SchemaError, "unknown dtype"),
    "dtype number": ({"a": array(dtype=4)}, FormatError, "expected a name"),
    "shape -1": ({"a": array((-1, 6))}, FormatError, "whole number"),
    "shape of floats": ({"a": array((2.0, 3))}, FormatError, "whole number"),
    "shape of nine axes": ({"a": array((1,) * 9, data=bytes(4))}, FormatError, "at most 8 axes"),
    "shape of 4 TB": ({"a": array((2**20, 2**20))}, FormatError, "bytes do not fit"),
    "shape beyond counting": ({"a": array((2**40, 2**40, 0), data=b"")}, LimitError, "absurd shape"),
    "buffer too short": ({"a": array(data=bytes(20))}, FormatError, "bytes do not fit"),
    "buffer too long": ({"a": array(data=bytes(28))}, FormatError, "bytes do not fit"),
    "extension longer than its array": (
        {"a": msgpack.ExtType(1, msgpack.packb(((1,), "float32", bytes(4))) + b"x")},
        FormatError,
        "does not end where it says",
    ),
    "extension that is no array": ({"a": msgpack.ExtType(1, b"\xa1x")}, FormatError, "breaks its rule"),
    "a number for an array": ({"a": 3}, FormatError, "expected a map"),
    "a list at the top": ([1, 2], FormatError, "expected a map"),
    "a key that is no name": ({3: array()}, FormatError, "expected a name"),
    "an empty key": ({"": array()}, FormatError, "not a name"),
    "a key with a slash": ({"a/b": array()}, FormatError, "not a name"),
    "a duplicate key": (b"\x82\xa1a\x80\xa1a\x80", FormatError, "a key stands twice"),
    "a key of 1 MB": ({"k" * 2**20: array()}, LimitError, "a name too long"),
    "100k levels": (nested(100_000), LimitError, "nested too deeply"),
    "2**32 entries": (b"\xdf\xff\xff\xff\xff", FormatError, "cut short"),
    "a pickle, renamed": (pickle.dumps({"a": 1}), FormatError, ""),
    "chunks of too few": ({"a": chunked((2, 4))}, FormatError, "do not make its shape"),
    "chunks of two dtypes": (
        {"a": chunked(chunks=[array((4,), data=bytes(16)), array((2,), "float64", bytes(16))])},
        FormatError,
        "do not make its shape",
    ),
    "chunks that are not flat": ({"a": chunked(chunks=[array()])}, FormatError, "do not make its shape"),
    "chunks out of order": (
        {"a": {**chunked(), "chunks": {"1": array((4,), data=bytes(16)), "0": array((2,), data=bytes(8))}}},
        FormatError,
        "the key 0",
    ),
    "a chunk that is no array": ({"a": {**chunked(), "chunks": {"0": 3}}}, FormatError, "expected an array"),
    "chunks that are no map": ({"a": {**chunked(), "chunks": 3}}, FormatError, "expected a map"),
    "chunked but false": ({"a": chunked(**{"__msgpack_chunked_array__": False})}, FormatError, "expected true"),
    "chunked and more": ({"a": chunked(more=1)}, FormatError, "breaks its rule"),
    "no chunks": ({"a": chunked(chunks=[])}, FormatError, "do not make its shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_W20_a_malformed_msgpack_is_refused_by_name(tmp_path, fault):
    value, kind, words = FAULTS[fault]
    path = written(tmp_path / "flax_model.msgpack", value)
    with pytest.raises(kind) as caught:
        read_msgpack(path)
    assert words in str(caught.value) and "flax_model.msgpack" in str(caught.value)


def test_W20_a_malformed_file_leaves_no_output(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "config.json").write_bytes((FOREIGN / "flax" / "config.json").read_bytes())
    written(tmp_path / "src" / "flax_model.msgpack", REAL[:-1])
    with pytest.raises(FormatError, match="cut short"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_arrays_that_the_faults_break_are_read_when_they_are_right(tmp_path):
    values = np.arange(6, dtype=np.float32)
    tree = {
        "a": {"plain": array(data=values.tobytes())},
        "b": chunked(chunks=[array((4,), data=values[:4].tobytes()), array((2,), data=values[4:].tobytes())]),
        "c": array((), data=values[3:4].tobytes()),
    }
    plain, joined, scalar = read_msgpack(written(tmp_path / "x.msgpack", tree))
    assert [plain.name, joined.name, scalar.name] == ["a/plain", "b", "c"]
    assert plain.read(plain.dtype).tolist() == joined.read(joined.dtype).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert joined.read(joined.dtype, transposed=True).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert scalar.read(scalar.dtype) == 3


def test_W20_every_truncation_is_refused(tmp_path):
    whole = msgpack.packb({"a": {"x": array()}, "b": chunked()})
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            read_msgpack(written(tmp_path / "x.msgpack", whole[:length]))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_W20_a_mutated_tree_gives_arrays_or_one_of_our_errors(tmp_path_factory, data):
    whole = msgpack.packb({"a": {"x": array()}, "b": chunked(), "c": array((), data=bytes(4))})
    at = data.draw(st.integers(0, len(whole) - 1))
    mutant = whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 4)) :]
    path = written(tmp_path_factory.getbasetemp() / "mutant.msgpack", mutant)
    try:
        for found in read_msgpack(path):
            found.read(found.dtype)
    except GPTJError as error:
        assert "mutant.msgpack" in str(error)
