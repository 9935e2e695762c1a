"""flax_model.msgpack: transformers' FlaxGPTJ tree, read and written without flax or jax.

The file is a tree of maps whose leaves are msgpack extensions of type 1, each a packed (shape, dtype, bytes). A
msgpack library hands over whole values, so the largest array, or with flax's own reader the whole file, would be
in memory. The tree's outline is a few kilobytes: it is walked here, past the arrays' bytes, and the arrays are
read when they are asked for. Arrays above 1 GiB are maps of pieces (`__msgpack_chunked_array__`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from gptj.config.schema import Head
from gptj.errors import FormatError, GPTJError, LimitError, SchemaError, shown
from gptj.reading.files import FileIdentity, file_identity, open_regular_file, read_into
from gptj.reading.manifest import FileRecord
from gptj.writing.containers import Entry, HashedFile
from gptj.writing.output_directory import OutputDirectory
from gptj_conversion.common.stored_array import DTYPES, StoredArray

__all__ = ["FLAX_FILE", "FLAX_INDEX", "MsgpackWriter", "pack_array_heads", "read_msgpack"]

FLAX_FILE = "flax_model.msgpack"
FLAX_INDEX = "flax_model.msgpack.index.json"
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30
"""flax.serialization.MAX_CHUNK_SIZE: a msgpack value may be 2**32 - 1 bytes long at most."""

ARRAY_EXTENSION = 1
MOST_ARRAYS = 100_000
DEEPEST = 16
LONGEST_NAME = 512


def read_msgpack(path: Path) -> list[StoredArray]:
    """Every array of one file, its name the keys of the tree joined with slashes.

    Raises:
        FormatError: it is no such tree, is cut short, has bytes after its end, or an array contradicts itself.
        LimitError: it has more arrays or levels than any checkpoint.
    """
    with open_regular_file(path) as stream:
        walk = _Walk(stream, path)
        walk.map(walk.byte(), (), 0)
        if walk.at != walk.size:
            walk.refuse("bytes after the tree's end", expected=f"{walk.at} bytes", found=f"{walk.size} bytes")
    return walk.arrays


class _Walk:
    """Reads the outline of a tree; `at` is the next byte."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.identity: FileIdentity = file_identity(stream)
        self.size = self.identity[2]
        self.at = 0
        self.where: str | None = None
        self.arrays: list[StoredArray] = []
        self.maps = 0
        if self.size == 0:
            self.refuse("an empty file")

    def refuse(self, problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        raise error(problem, file=self.path, where=self.where, **facts)

    # ---- tokens

    def take(self, count: int) -> bytes:
        self.require(count)
        data = bytearray(count)
        read_into(self.stream, memoryview(data), self.at, file=self.path, where=self.where or "tree")
        self.at += count
        return bytes(data)

    def require(self, count: int) -> None:
        if self.at + count > self.size:
            self.refuse(f"cut short: the file has {self.size} bytes, its tree needs {self.at + count} or more")

    def byte(self) -> int:
        return self.take(1)[0]

    def count(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "big")

    def whole(self) -> int:
        kind = self.byte()
        if kind < 0x80:
            return kind
        if 0xCC <= kind <= 0xCF:
            return self.count(1 << (kind - 0xCC))
        self.refuse("breaks its rule", expected="a whole number, 0 or above", found=f"byte 0x{kind:02x}")

    def text(self) -> str:
        kind = self.byte()
        if kind & 0xE0 == 0xA0:
            length = kind & 0x1F
        elif 0xD9 <= kind <= 0xDB:
            length = self.count(1 << (kind - 0xD9))
        else:
            self.refuse("breaks its rule", expected="a name", found=f"byte 0x{kind:02x} at {self.at - 1}")
        if length > LONGEST_NAME:
            self.refuse("a name too long", LimitError, expected=f"at most {LONGEST_NAME} bytes", found=length)
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("a name that is not UTF-8", found=shown(data))

    def map_length(self, kind: int) -> int | None:
        if kind & 0xF0 == 0x80:
            length = kind & 0x0F
        elif kind in (0xDE, 0xDF):
            length = self.count(2 << (kind - 0xDE))
        else:
            return None
        self.maps += 1
        if self.maps > MOST_ARRAYS:
            self.refuse("too many maps", LimitError, expected=f"at most {MOST_ARRAYS}")
        self.require(2 * length)  # a key and a value take a byte each at the very least
        return length

    def keys(self, length: int, path: tuple[str, ...]) -> Iterator[str]:
        """The keys of a map, none twice; the caller reads the values."""
        seen: set[str] = set()
        for _ in range(length):
            self.where = "/".join(path) or None
            key = self.text()
            if key in seen:
                self.refuse("a key stands twice", found=shown(key))
            if not key or not key.isprintable() or "/" in key:
                self.refuse("not a name", found=shown(key))
            seen.add(key)
            self.where = "/".join((*path, key))
            yield key

    # ---- the tree

    def map(self, kind: int, path: tuple[str, ...], depth: int) -> None:
        """A map of maps and arrays."""
        length = self.map_length(kind)
        if length is None:
            self.refuse("not a tree of named arrays", expected="a map", found=f"byte 0x{kind:02x} at {self.at - 1}")
        if depth > DEEPEST:
            self.refuse("nested too deeply", LimitError, expected=f"at most {DEEPEST} levels")
        for number, key in enumerate(self.keys(length, path)):
            if key == CHUNKED:
                if number or length != 3:
                    self.refuse("a chunked array that breaks its rule", expected="the keys shape and chunks beside")
                self.read_chunked(path)
                return
            self.node((*path, key), depth)

    def node(self, path: tuple[str, ...], depth: int) -> None:
        kind = self.byte()
        if _is_extension(kind):
            dtype, shape, extent = self.array(kind)
            self.store(path, dtype, shape, (extent,))
        else:
            self.map(kind, path, depth + 1)

    def store(
        self, path: tuple[str, ...], dtype: np.dtype[Any], shape: tuple[int, ...], extents: tuple[tuple[int, int], ...]
    ) -> None:
        if len(self.arrays) >= MOST_ARRAYS:
            self.refuse("too many arrays", LimitError, expected=f"at most {MOST_ARRAYS}")
        self.arrays.append(StoredArray("/".join(path), dtype, shape, self.path, self.identity, extents))

    def array(self, kind: int) -> tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]:
        """An extension: its dtype, shape, and where its bytes lie; they are passed over."""
        if not _is_extension(kind):
            self.refuse("breaks its rule", expected="an array", found=f"byte 0x{kind:02x} at {self.at - 1}")
        length = self.count(1 << (kind - 0xC7)) if kind <= 0xC9 else 1 << (kind - 0xD4)
        code = self.byte()
        end = self.at + length
        self.require(length)
        if code != ARRAY_EXTENSION:
            self.refuse("an extension that is no array", expected=f"type {ARRAY_EXTENSION}", found=f"type {code}")
        if self.byte() != 0x93:
            self.refuse("an array that breaks its rule", expected="shape, dtype and bytes")
        shape = self.shape()
        name = self.text()
        if name not in DTYPES:
            self.refuse("unknown dtype", SchemaError, expected="one of " + ", ".join(DTYPES), found=shown(name))
        nbytes = self.binary_length()
        dtype = DTYPES[name]
        if nbytes != math.prod(shape) * dtype.itemsize:
            self.refuse(
                "its bytes do not fit its shape and dtype",
                expected=f"{math.prod(shape) * dtype.itemsize} bytes for {name} {shape}",
                found=f"{nbytes} bytes",
            )
        if self.at + nbytes != end:
            self.refuse("an array that does not end where it says", expected=f"byte {end}", found=self.at + nbytes)
        extent = (self.at, nbytes)
        self.at = end
        return dtype, shape, extent

    def shape(self) -> tuple[int, ...]:
        kind = self.byte()
        length = kind & 0x0F
        if kind & 0xF0 != 0x90 or length > 8:
            self.refuse("breaks its rule", expected="a shape of at most 8 axes", found=f"byte 0x{kind:02x}")
        shape = tuple(self.whole() for _ in range(length))
        if math.prod(n or 1 for n in shape) > 2**60:
            self.refuse("an absurd shape", LimitError, found=shown(shape))
        return shape

    def binary_length(self) -> int:
        kind = self.byte()
        if not 0xC4 <= kind <= 0xC6:
            self.refuse("breaks its rule", expected="an array's bytes", found=f"byte 0x{kind:02x}")
        return self.count(1 << (kind - 0xC4))

    def read_chunked(self, path: tuple[str, ...]) -> None:
        """The rest of a map that stands for one large array: true, then shape and chunks, numbered from "0"."""
        if self.byte() != 0xC3:
            self.refuse("a chunked array that breaks its rule", expected="true")
        self.expect_key("shape")
        shape = tuple(self.whole() for _ in self.numbered_keys(path, 8))
        self.expect_key("chunks")
        pieces = []
        for _ in self.numbered_keys(path, 1000):
            pieces.append(self.array(self.byte()))
        dtypes = {dtype for dtype, _, _ in pieces}
        total = sum(math.prod(piece) for _, piece, _ in pieces)
        flat = all(len(piece) == 1 for _, piece, _ in pieces)
        if len(dtypes) != 1 or total != math.prod(shape) or not flat:
            self.refuse(
                "its chunks do not make its shape",
                expected=f"{math.prod(shape)} elements of one dtype for {shape}",
                found=f"{total} of {len(dtypes)}",
            )
        self.store(path, dtypes.pop(), shape, tuple(extent for _, _, extent in pieces))

    def expect_key(self, wanted: str) -> None:
        if (key := self.text()) != wanted:
            self.refuse("a chunked array that breaks its rule", expected=f"the key {wanted}", found=shown(key))

    def numbered_keys(self, path: tuple[str, ...], most: int) -> Iterator[str]:
        """The keys "0", "1", ... of a tuple that flax writes as a map; the caller reads the values."""
        length = self.map_length(kind := self.byte())
        if length is None or length > most:
            self.refuse("a chunked array that breaks its rule", expected=f"a map of at most {most}", found=hex(kind))
        for number, key in enumerate(self.keys(length, path)):
            if key != str(number):
                self.refuse("a chunked array that breaks its rule", expected=f"the key {number}", found=shown(key))
            yield key


def _is_extension(kind: int) -> bool:
    return 0xC7 <= kind <= 0xC9 or 0xD4 <= kind <= 0xD8


# ---- writing


class MsgpackWriter:
    """Writes one file of a Flax checkpoint; see `gptj.writing.containers.NamedContainer`.

    Entries come in an order in which the arrays of each map stand together; the maps' lengths are known before.
    """

    def __init__(
        self,
        output: OutputDirectory,
        name: str,
        entries: Sequence[Entry],
        head: Head,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._file = HashedFile(output, name)
        self._chunk_bytes = chunk_bytes
        self._open: tuple[str, ...] = ()
        children: dict[tuple[str, ...], set[str]] = {}
        for entry in entries:
            keys = tuple(entry.name.split("/"))
            for depth in range(len(keys)):
                children.setdefault(keys[:depth], set()).add(keys[depth])
        self._lengths = {path: len(keys) for path, keys in children.items()}
        self._file.write(pack_map_head(self._lengths.get((), 0)))

    def add(self, entry: Entry, blocks: Iterable[memoryview]) -> None:
        """Write the next array, and the beginnings of the maps that open before it."""
        *maps, last = entry.name.split("/")
        shared = 0
        while shared < min(len(maps), len(self._open)) and maps[shared] == self._open[shared]:
            shared += 1
        for depth in range(shared, len(maps)):
            self._file.write(pack_text(maps[depth]) + pack_map_head(self._lengths[tuple(maps[: depth + 1])]))
        self._open = tuple(maps)
        self._file.write(pack_text(last))
        heads = iter(pack_array_heads(entry.shape, entry.dtype, chunk_bytes=self._chunk_bytes))
        before, room = next(heads)
        self._file.write(before)
        for block in blocks:
            while len(block) > room:
                self._file.write(block[:room])
                block = block[room:]
                before, room = next(heads)
                self._file.write(before)
            self._file.write(block)
            room -= len(block)

    def finish(self) -> FileRecord:
        """Close the file and compare what the disk gives back."""
        return self._file.finish()


def pack_text(text: str) -> bytes:
    """A msgpack string."""
    data = text.encode("utf-8")
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    head = b"\xd9" + bytes([len(data)]) if len(data) < 256 else b"\xda" + struct.pack(">H", len(data))
    return head + data


def pack_map_head(count: int) -> bytes:
    """The beginning of a map of `count` pairs."""
    return bytes([0x80 | count]) if count < 16 else b"\xde" + struct.pack(">H", count)


def _pack_whole(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    for kind, layout in ((0xCC, ">B"), (0xCD, ">H"), (0xCE, ">I"), (0xCF, ">Q")):
        if value < 1 << 8 * struct.calcsize(layout):
            return bytes([kind]) + struct.pack(layout, value)
    raise AssertionError(value)


def _pack_length(kinds: tuple[int, int, int], length: int) -> bytes:
    for kind, layout in zip(kinds, (">B", ">H", ">I"), strict=True):
        if length < 1 << 8 * struct.calcsize(layout):
            return bytes([kind]) + struct.pack(layout, length)
    raise AssertionError(length)


def _pack_array_head(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The header of an array, which comes before its bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    inner = b"\x93" + bytes([0x90 | len(shape)]) + b"".join(_pack_whole(n) for n in shape) + pack_text(dtype.name)
    inner += _pack_length((0xC4, 0xC5, 0xC6), nbytes)
    length = len(inner) + nbytes
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(length)
    outer = _pack_length((0xC7, 0xC8, 0xC9), length) if fixed is None else bytes([fixed])
    return outer + bytes([ARRAY_EXTENSION]) + inner


def pack_array_heads(
    shape: tuple[int, ...], dtype: np.dtype[Any], *, chunk_bytes: int = CHUNK_BYTES
) -> list[tuple[bytes, int]]:
    """The headers of an array: for each run of its bytes, what comes before it, and how many bytes it has.

    >>> pack_array_heads((2,), np.dtype("float32"))
    [(b'\\xc7\\x14\\x01\\x93\\x91\\x02\\xa7float32\\xc4\\x08', 8)]
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= chunk_bytes:
        return [(_pack_array_head(shape, dtype), nbytes)]
    step = max(1, chunk_bytes // dtype.itemsize)
    sizes = [min(step, math.prod(shape) - start) for start in range(0, math.prod(shape), step)]
    head = pack_map_head(3) + pack_text(CHUNKED) + b"\xc3" + pack_text("shape") + pack_map_head(len(shape))
    head += b"".join(pack_text(str(axis)) + _pack_whole(n) for axis, n in enumerate(shape))
    head += pack_text("chunks") + pack_map_head(len(sizes))
    runs = []
    for number, size in enumerate(sizes):
        before = pack_text(str(number)) + _pack_array_head((size,), dtype)
        runs.append(((head if number == 0 else b"") + before, size * dtype.itemsize))
    return runs
