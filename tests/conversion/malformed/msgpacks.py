"""msgpack trees that lie about lengths, hold other things than arrays, or are made of nothing a million times."""

from __future__ import annotations

import datetime
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
from gptj_conversion.hf.flax_msgpack import read_msgpack

from malformed import Malformed

TITLE = "msgpack trees"


def read(folder: Path) -> object:
    return read_msgpack(folder / "flax_model.msgpack")


def written(make_bytes: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(make_bytes())


def array(shape: Any = (2,), dtype: Any = "float32", data: Any = bytes(8), code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


def pack(tree: Any) -> bytes:
    return msgpack.packb(tree, datetime=True)


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + pack(array())


def many_maps(count: int) -> bytes:
    keys = b"".join(b"\xa7%07d\x80" % number for number in range(count))
    return b"\xdf" + struct.pack(">I", count) + keys


def cases() -> Iterator[Malformed]:
    """Every kind of value where an array or a map must be, and every length that lies."""
    makers: dict[str, Callable[[], bytes]] = {
        "a million empty maps": lambda: many_maps(1_000_000),
        "a million chunked heads": lambda: b"\xdf" + struct.pack(">I", 10**6) + b"\xa1a\x81" * 10**6,
        "a map of 2^32 - 1 pairs over nothing": lambda: b"\xdf\xff\xff\xff\xff",
        "a map of 65535 pairs over nothing": lambda: b"\xde\xff\xff",
        "a name of 2^32 - 1 bytes": lambda: b"\x81\xdb\xff\xff\xff\xff",
        "an extension of 2^32 - 1 bytes": lambda: b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        "nothing": lambda: b"",
        "bytes after the end": lambda: pack({"a": array()}) + b"\0",
        "a chunked array of nothing": lambda: pack({"a": {"__msgpack_chunked_array__": True}}),
        "chunks whose shape has a million axes": lambda: pack(
            {"a": {"__msgpack_chunked_array__": True, "shape": {str(n): 1 for n in range(1000)}, "chunks": {}}}
        ),
        "a shape of 2^64 - 1 twice": lambda: pack({"a": array((2**64 - 1, 2**64 - 1))}),
        "a shape of eight times 2^64 - 1": lambda: pack({"a": array((2**64 - 1,) * 8)}),
        "a key twice": lambda: b"\x82\xa1a\x80\xa1a\x80",
        "an empty key": lambda: pack({"": array()}),
        "a key that is a number": lambda: pack({1: array()}),
        "a key that is a list": lambda: b"\x81\x91\x01\x80",
        "a key that is a map": lambda: b"\x81\x80\x80",
        "a key that is no UTF-8": lambda: b"\x81\xa2\xff\xfe\x80",
        "a key with a slash": lambda: pack({"a/b": array()}),
        "a key with a NUL": lambda: pack({"a\0": array()}),
    }
    for depth in (18, 100, 10_000, 300_000):
        makers[f"maps {depth} deep"] = lambda depth=depth: nested(depth)
    values: dict[str, Any] = {
        "nil": None, "true": True, "an integer": 7, "a negative integer": -7, "2^63": 2**63, "a float": 1.5,
        "text": "x", "bytes": b"x", "a list": [1, 2], "an empty list": [],
        "a timestamp": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    }  # fmt: skip
    for what, value in values.items():
        makers[f"{what} in place of an array"] = lambda value=value: pack({"a": value})
        makers[f"{what} in place of the tree"] = lambda value=value: pack(value)
        if what != "a list":  # which is a shape
            makers[f"{what} as an array's shape"] = lambda value=value: pack({"a": _raw(value, "float32", bytes(8))})
        makers[f"{what} as an array's size"] = lambda value=value: pack({"a": _raw([value], "float32", bytes(8))})
        makers[f"{what} as an array's dtype"] = lambda value=value: pack({"a": _raw([2], value, bytes(8))})
        makers[f"{what} as an array's bytes"] = lambda value=value: pack({"a": _raw([2], "float32", value)})
    for code in (0, 2, 3, 127):
        makers[f"an extension of type {code}"] = lambda code=code: pack({"a": array(code=code)})
    for code in (b"\xff", b"\x80"):
        makers[f"an extension of type {code[0] - 256}"] = lambda code=code: b"\x81\xa1a\xc7\x01" + code + b"\0"
    whole = pack({"a": {"kernel": array(), "bias": array()}})
    for length in range(0, len(whole), 5):
        makers[f"cut after {length} bytes"] = lambda length=length: whole[:length]
    for what, make_bytes in makers.items():
        yield Malformed(what, written(make_bytes), read, "flax_model.msgpack")


def _raw(*parts: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(parts, datetime=True))


CASES = list(cases())
